"""Shards laid out as Megatron-LM saves them: the files of the `torch` and the `torch_dist` format."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.megatron import RANK_FILE, Place, rank_folder, ranks
from llmconvert.checkpoint.torch_dist import lay_out_torch_dist
from llmconvert.checkpoint.torch_zip import Slot, lay_out_torch
from llmconvert.converters.megatron.grid import Chunk, Grid, chunks
from llmconvert.converters.megatron.parts import TRANSFORMER_ENGINE, Cut, states_beside
from llmconvert.converters.megatron.shards import Shards
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


def cut_for(
    config: CanonicalConfig, grid: Grid, fmt: str, padded_vocab_size: int, implementation: str, grouped: bool = False
) -> Cut:
    """How a model is cut to be written: over the ranks of a grid, or, in `torch_dist`, not at all.

    Raises:
        Usage: no such format, or the layers cannot be dealt so.
    """
    if fmt not in (TORCH, TORCH_DIST):
        raise Usage(f"`{fmt}` is not a checkpoint format", hint=f"choose {TORCH} or {TORCH_DIST}")
    dealt = chunks(config.num_hidden_layers, grid, config.num_nextn_predict_layers)
    if fmt == TORCH:
        return Cut(dealt, grid.tp, grid.ep, grid.expert_tp if config.num_experts else grid.tp, padded_vocab_size,
                   implementation, grouped)  # fmt: skip
    return dist_cut(config, padded_vocab_size, implementation)


def dist_cut(config: CanonicalConfig, padded_vocab_size: int, implementation: str) -> Cut:
    """The cut of `torch_dist`: one place that holds everything."""
    whole = [Chunk(0, 0, tuple(range(config.num_hidden_layers)), True, True)]
    return Cut(whole, 1, 1, 1, padded_vocab_size, implementation, dist=True)


def lay_out(shards: Shards, args: Mapping[str, Any], grid: Grid, cut: Cut, folder: str) -> LaidOut:
    """Lay out shards, cut by `cut_for`, in a folder."""
    return _lay_out_dist(shards, args, folder) if cut.dist else _lay_out_ranks(shards, args, grid, cut, folder)


def _lay_out_ranks(shards: Shards, args: Mapping[str, Any], grid: Grid, cut: Cut, release: str) -> LaidOut:
    """A rank file for every rank, as Megatron-LM saves it."""
    outputs: list[OutputTensor] = []
    files: list[WeightFile] = []
    before: tuple[Any, Any] = None, None
    for p in range(grid.pp):
        for t, e in ranks(cut.tp, cut.ep, cut.etp):
            chunks_here = [shards[Place(p, v, t, e)] for v in range(grid.vpp)]
            folder = rank_folder(Place(p, 0, t, e), grid.pp, cut.ep)
            file = f"{release}/{folder}/{RANK_FILE}"
            value: dict[str, Any] = {
                "args": Namespace(**args),
                "checkpoint_version": 3.0,
                "iteration": args["iteration"],
            }
            named: list[tuple[str, Expression]] = []
            for v, shard in enumerate(chunks_here):
                state: dict[str, Any] = {}
                for name, expression in shard.items():
                    state[name] = Slot(expression.dtype, expression.shape)
                    named.append((f"{folder}/{v}/{name}", expression))
                    state |= dict.fromkeys(states_beside(name, cut.implementation == TRANSFORMER_ENGINE))
                value["model" if grid.vpp == 1 else f"model{v}"] = state
            # The ranks of a stage mostly hold tensors of the same names and shapes, and are laid out alike.
            kind = [[(name, e.dtype, e.shape) for name, e in shard.items()] for shard in chunks_here]
            laid = before[1] if kind == before[0] else lay_out_torch(value)
            before = kind, laid
            outputs += [OutputTensor(n, file, at, e) for (n, e), at in zip(named, laid.offsets, strict=True)]
            crcs = {n: places for (n, _), places in zip(named, laid.crc_places, strict=True)}
            files.append(WeightFile(file, laid.size, laid.pieces, crcs))
    return tuple(outputs), tuple(files), {}


_MAX_FILE_SIZE = 4 * 1024**3

_DECODER = "decoder.layers."
_LOCAL, _GLOBAL = ".mlp.experts.local_experts.", ".mlp.experts.experts."


def _stacked(name: str, homogeneous: bool) -> tuple[str, int | None, int | None]:
    """A tensor's global name, and its layer and expert where those are axes of the global tensor."""
    layer = expert = None
    if homogeneous and name.startswith(_DECODER):
        number, _, rest = name.removeprefix(_DECODER).partition(".")
        layer, name = int(number), _DECODER + rest
    before, found, rest = f".{name}".partition(_LOCAL)
    if found:
        number, _, rest = rest.partition(".")
        expert, name = int(number), f"{before}{_GLOBAL}{rest}"[1:]
    return name, layer, expert


def _lay_out_dist(shards: Shards, args: Mapping[str, Any], release: str) -> LaidOut:
    """Global tensors: experts on an axis of their own, and layers too where they are all alike, as Megatron-LM saves."""
    (named,) = shards.values()
    homogeneous = not isinstance(args.get("moe_layer_freq"), list)
    parts: dict[str, list[Expression]] = {}
    axes: dict[str, list[int]] = {}
    states: dict[str, None] = {}
    counts = [1 + max((number for number in numbers if number is not None), default=-1) for numbers in zip(
        *(_stacked(name, homogeneous)[1:] for name in named), strict=True)]  # fmt: skip
    for name, expression in named.items():
        whole, *places = _stacked(name, homogeneous)
        parts.setdefault(whole, []).append(expression)
        held = [(place, count) for place, count in zip(places, counts, strict=True) if place is not None]
        axes[whole] = [count for _, count in held]
        # All states any implementation asks for: what is not there cannot be loaded, what is not asked for is passed over.
        for extra in states_beside(whole, engine=True):
            at, of = (".".join(str(pair[k]) for pair in held) or ("0", "1")[k] for k in (0, 1))
            states[f"{extra}/shard_{at}_{of}"] = None
    shapes = {name: (each[0].dtype, (*axes[name], *each[0].shape)) for name, each in parts.items()}
    common = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": args["iteration"],
              "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": not homogeneous}}  # fmt: skip
    objects: dict[str, Any] = {state: [None] for state in states}
    objects["common_state/shard_0_1"] = [common]  # where megatron-core looks for it from 0.19 on
    files, texts = lay_out_torch_dist(shapes, objects, common, _MAX_FILE_SIZE)
    outputs = tuple(
        OutputTensor(name, f"{release}/{file.name}", offset, concat(parts[name]))
        for file in files
        for name, offset in file.offsets.items()
    )
    written = tuple(
        WeightFile(f"{release}/{file.name}", file.size, tuple(file.pieces), file.crc_places) for file in files
    )
    return outputs, written, {f"{release}/{name}": text for name, text in texts.items()}
