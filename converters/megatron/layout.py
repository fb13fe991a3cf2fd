"""Shards laid out as Megatron-LM saves them: the files of the `torch` and the `torch_dist` format."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from llmconvert.checkpoint.megatron import RANK_FILE, Place
from llmconvert.checkpoint.torch_dist import lay_out_torch_dist
from llmconvert.checkpoint.torch_zip import Slot, lay_out_torch
from llmconvert.converters.megatron.grid import Chunk, Grid
from llmconvert.converters.megatron.shards import EXTRA_STATES, NORMS, TRANSFORMER_ENGINE, Cut, Shards
from llmconvert.engine.plan import OutputTensor, WeightFile
from llmconvert.errors import Usage
from llmconvert.tensors.expressions import Expression, concat

TORCH, TORCH_DIST = "torch", "torch_dist"


def tracked(iteration: int | None) -> tuple[str, str]:
    """The folder to write to, and what the tracker file says of it.

    Without an iteration it is `release`: weights no training run has made, from which Megatron-LM starts at 0.

    Raises:
        Usage: the iteration is not at least 1, which Megatron-LM does not take.
    """
    if iteration is None:
        return "release", "release"
    if iteration < 1:
        raise Usage("`--iteration` must be at least 1: Megatron-LM does not take 0")
    return f"iter_{iteration:07d}", str(iteration)


LaidOut = tuple[tuple[OutputTensor, ...], tuple[WeightFile, ...], dict[str, bytes]]
"""Output tensors, files, and small files by name."""


def written_cut(layers: int, cut: Cut, fmt: str) -> Cut:
    """What is written for a cut: the ranks themselves, or, in `torch_dist`, the one rank that holds everything."""
    if fmt not in (TORCH, TORCH_DIST):
        raise Usage(f"`{fmt}` is not a checkpoint format", hint=f"choose {TORCH} or {TORCH_DIST}")
    if fmt == TORCH:
        return cut
    return Cut([Chunk(0, 0, tuple(range(layers)), True, True)], 1, cut.padded_vocab_size, NORMS[TRANSFORMER_ENGINE])


def lay_out(shards: Shards, args: Mapping[str, Any], grid: Grid, fmt: str, folder: str) -> LaidOut:
    """Lay out shards, cut by `written_cut`, in a format and a folder."""
    return _lay_out_ranks(shards, args, grid, folder) if fmt == TORCH else _lay_out_dist(shards, args, folder)


def rank_folder(place: Place, pp: int) -> str:
    """A rank's folder."""
    return f"mp_rank_{place.tp_rank:02d}" + (f"_{place.pp_rank:03d}" if pp > 1 else "")


def _lay_out_ranks(shards: Shards, args: Mapping[str, Any], grid: Grid, release: str) -> LaidOut:
    """A rank file for every rank, as Megatron-LM saves it."""
    outputs: list[OutputTensor] = []
    files: list[WeightFile] = []
    for p in range(grid.pp):
        for t in range(grid.tp):
            folder = rank_folder(Place(p, 0, t), grid.pp)
            file = f"{release}/{folder}/{RANK_FILE}"
            value: dict[str, Any] = {
                "args": Namespace(**args),
                "checkpoint_version": 3.0,
                "iteration": args["iteration"],
            }
            named: list[tuple[str, Expression]] = []
            for v in range(grid.vpp):
                shard = shards[Place(p, v, t)]
                state: dict[str, Any] = {}
                for name, expression in shard.items():
                    state[name] = Slot(expression.dtype, expression.shape)
                    named.append((f"{folder}/{v}/{name}", expression))
                    module = name.rpartition(".")[0]
                    if f"{module.partition('layers.')[2].partition('.')[2]}._extra_state" in EXTRA_STATES:
                        state[f"{module}._extra_state"] = None
                value["model" if grid.vpp == 1 else f"model{v}"] = state
            laid = lay_out_torch(value)
            outputs += [OutputTensor(n, file, at, e) for (n, e), at in zip(named, laid.offsets, strict=True)]
            crcs = {n: places for (n, _), places in zip(named, laid.crc_places, strict=True)}
            files.append(WeightFile(file, laid.size, laid.pieces, crcs))
    return tuple(outputs), tuple(files), {}


_MAX_FILE_SIZE = 4 * 1024**3


def _lay_out_dist(shards: Shards, args: Mapping[str, Any], release: str) -> LaidOut:
    """Global tensors, layers stacked on a first axis, as Megatron-LM saves homogeneous layers."""
    (named,) = shards.values()
    whole: dict[str, Expression] = {}
    layers: dict[str, list[Expression]] = {}
    for name, expression in named.items():
        if name.startswith("decoder.layers."):
            _, _, _, rest = name.split(".", 3)
            layers.setdefault(f"decoder.layers.{rest}", []).append(expression)
        else:
            whole[name] = expression
    shapes = {name: (e.dtype, e.shape) for name, e in whole.items()}
    for name, each in layers.items():
        whole[name] = concat(each)
        shapes[name] = (each[0].dtype, (len(each), *each[0].shape))
    count = max(map(len, layers.values()))
    common = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": args["iteration"],
              "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False}}  # fmt: skip
    objects: dict[str, Any] = {
        f"decoder.layers.{state}/shard_{layer}_{count}": [None] for state in EXTRA_STATES for layer in range(count)
    }
    objects["common_state/shard_0_1"] = [common]  # where megatron-core looks for it from 0.19 on
    files, texts = lay_out_torch_dist(shapes, objects, common, _MAX_FILE_SIZE)
    outputs = tuple(
        OutputTensor(name, f"{release}/{file.name}", offset, whole[name])
        for file in files
        for name, offset in file.offsets.items()
    )
    written = tuple(
        WeightFile(f"{release}/{file.name}", file.size, tuple(file.pieces), file.crc_places) for file in files
    )
    return outputs, written, {f"{release}/{name}": text for name, text in texts.items()}
