"""Megatron checkpoints: which rank files there are, their arguments, their tensors by place.

Layout (Megatron-LM, `megatron/training/checkpointing.py`): `latest_checkpointed_iteration.txt` names `iter_NNNNNNN/` or
`release/`. In the `torch` format `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` in it (tensor, pipeline, expert rank; the
latter two where there are several) holds `args`, `checkpoint_version`, `iteration` and `model`, or `model0`, `model1`, …
with virtual pipeline stages. The `torch_dist` format knows no ranks; it
is opened as the one rank that would hold everything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from llmconvert.checkpoint.config import ARGUMENTS, ITERATION, check
from llmconvert.checkpoint.directory import listing, require_directory
from llmconvert.checkpoint.files import check_inside, read_bytes, shown
from llmconvert.checkpoint.stored import StoredTensor, is_name
from llmconvert.checkpoint.torch_dist import METADATA, open_torch_dist
from llmconvert.checkpoint.torch_pickle import Inert, read_object
from llmconvert.errors import BadInput, Refused

LATEST = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_MAX_TRACKER_BYTES = 1000
_MAX_RANKS = 1 << 20
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")


@dataclass(frozen=True, order=True)
class Place:
    """One chunk of layers on one rank.

    Attributes:
        pp_rank: pipeline rank.
        vpp_chunk: virtual chunk of that rank, 0 where there is one.
        tp_rank: tensor rank.
        ep_rank: expert rank.
    """

    pp_rank: int
    vpp_chunk: int
    tp_rank: int
    ep_rank: int = 0


def ranks(tp: int, ep: int, etp: int) -> list[tuple[int, int]]:
    """The (tensor rank, expert rank) of each rank file of a pipeline stage, in the order of ranks.

    Of ep · etp ranks, rank r is tensor rank r mod tp, expert rank r div etp, and tensor rank r mod etp of its experts
    (megatron-core, `parallel_state`, order tp-cp-ep-dp-pp).
    """
    return [(r % tp, r // etp) for r in range(ep * etp)]


class Tile(NamedTuple):
    """A stored piece of a vector or matrix.

    Attributes:
        row: where it begins in the whole.
        column: likewise; 0 for a vector.
        stored: its bytes. Its name is unique in the checkpoint.
    """

    row: int
    column: int
    stored: StoredTensor


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A Megatron checkpoint opened by its pickles' contents; tensors are not read.

    Attributes:
        path: the directory given.
        release: the directory that holds the ranks.
        args: the arguments it was trained or written with, as a mapping of plain values.
        iteration: of the training run, or what is written in place of one.
        format: torch or torch_dist.
        tp, pp, vpp: numbers of tensor ranks, pipeline ranks and virtual chunks a rank; 1 each for torch_dist.
        ep, etp: numbers of expert ranks, and of tensor ranks of an expert; 1 each for torch_dist.
        tensors: for each place its tensors by name, in the tiles they are stored in (one, in the `torch` format).
        items: what was written as one tensor, by name; stacked layers and experts are one, with their axes folded into
            the rows.
        left_out: bytes of optimizer and random state that are there and are not the model's.
    """

    path: Path
    release: Path
    args: dict[str, Any]
    iteration: int | str
    format: str
    tp: int
    pp: int
    vpp: int
    tensors: dict[Place, dict[str, tuple[Tile, ...]]]
    items: dict[str, StoredTensor]
    left_out: int
    ep: int = 1
    etp: int = 1

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """Every tile by its unique name."""
        everything = (tiles for chunk in self.tensors.values() for tiles in chunk.values())
        return {tile.stored.name: tile.stored for tiles in everything for tile in tiles}


def is_megatron(directory: Path) -> bool:
    """Whether a directory looks like a Megatron checkpoint, in either format."""
    if (directory / LATEST).is_file() or (directory / "metadata.json").is_file():
        return True
    return directory.is_dir() and any(_RANK.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())


def release_folder(directory: Path, iteration: int | None = None) -> Path:
    """The folder of one iteration: the one asked for, else the latest.

    Raises:
        Usage: there is no such directory.
        BadInput: there is no such folder, or the tracker file cannot be understood.
    """
    require_directory(directory)
    if iteration is not None:
        folder = directory / f"iter_{iteration:07d}"
    elif (directory / LATEST).is_file():
        text = read_bytes(directory / LATEST, _MAX_TRACKER_BYTES, inside=directory).decode(errors="replace").strip()
        if text != "release" and re.fullmatch(r"[0-9]{1,18}", text) is None:
            raise BadInput(
                f"`{LATEST}` says {shown(text)}, which is neither a number nor `release`", where=str(directory)
            )
        folder = directory / ("release" if text == "release" else f"iter_{int(text):07d}")
    else:
        folder = directory
    if not folder.is_dir():
        there = sorted(p.name for p in directory.glob("iter_*") if p.is_dir())
        hint = f"`--iteration` takes one of {', '.join(name[5:].lstrip('0') for name in there[:6])}" if there else None
        raise BadInput(f"there is no `{folder.name}`", where=str(directory), hint=hint)
    check_inside(directory, folder, hint=f"give `{os.path.realpath(folder)}` itself")
    return folder


def open_megatron(directory: Path, *, iteration: int | None = None, trust_pickle: bool = False) -> MegatronCheckpoint:
    """Open a checkpoint, in either format.

    Args:
        directory: that of the tracker file, or of the ranks.
        iteration: which; the latest if None.
        trust_pickle: read past names in the pickle that are not known to be harmless. They become inert stand-ins
            all the same; nothing is run.

    Raises:
        BadInput: a rank is missing or cut short, or ranks contradict each other.
        Refused: an old version, or a pickle that names what is not known.
    """
    release = release_folder(directory, iteration)
    folders = {entry.name: entry for entry in sorted(release.iterdir()) if _RANK.fullmatch(entry.name)}
    if (release / METADATA).is_file():
        return _open_dist(directory, release, trust_pickle)
    if not folders:
        other = (release / "config.json").is_file()
        hint = "this is a Hugging Face checkpoint: `llmconvert split` makes a Megatron one of it" if other else None
        raise BadInput("there are no `mp_rank_…` folders", where=str(release), hint=hint)
    args = _plain(_rank_file(release, next(iter(folders.values())) / RANK_FILE, trust_pickle).get("args"), release)
    files, tp, pp, ep, etp = _files(release, folders, args)
    tensors: dict[Place, dict[str, tuple[Tile, ...]]] = {}
    first: Any = None
    left_out, vpp = 0, 1
    for (p, t, e), path in sorted(files.items()):
        value = _rank_file(release, path, trust_pickle)
        models = sorted(
            (key for key in value if re.fullmatch(r"model\d{0,4}", str(key))), key=lambda key: int(key[5:] or 0)
        )
        if not models:
            raise BadInput("the rank file has no `model`", where=str(path))
        if first is None:
            first, vpp = value, len(models)
        elif len(models) != vpp or value.get("iteration") != first.get("iteration"):
            raise BadInput("ranks differ in iteration or in virtual stages: not one checkpoint", where=str(path))
        for chunk, key in enumerate(models):
            place = Place(p, chunk, t, e)
            tensors[place] = _named(value[key], place, path)
        left_out += sum(_bytes(entry) for key, entry in value.items() if key not in (*models, "args"))
    items = {tile.stored.name: tile.stored for named in tensors.values() for (tile,) in named.values()}
    iteration_found = first.get("iteration", "release")
    return MegatronCheckpoint(
        directory, release, args, iteration_found, "torch", tp, pp, vpp, tensors, items, left_out, ep, etp
    )


def _rank_file(release: Path, path: Path, trust_pickle: bool) -> dict[str, Any]:
    hint = "add `--trust-pickle` to read past it; it becomes an inert stand-in and is not run"
    if not path.is_file():
        raise BadInput("the file is missing", where=str(path), hint="copy the whole checkpoint again")
    check_inside(release, path)
    value = read_object(path, inert="anything" if trust_pickle else "harmless", hint=hint)
    if not isinstance(value, dict):
        raise BadInput("the rank file does not hold a dictionary", where=str(path))
    check(value, ITERATION, str(path))
    _check_version(value, path)
    return value


def _files(
    release: Path, folders: Mapping[str, Path], args: Mapping[str, Any]
) -> tuple[dict[tuple[int, int, int], Path], int, int, int, int]:
    """The rank files by (pipeline rank, tensor rank, expert rank), and the numbers of ranks: tp, pp, ep, etp.

    With two numbers in its name a folder is a pipeline's or an expert's: the args tell.

    Raises:
        BadInput: ranks are missing or too many.
    """
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
             "expert_tensor_parallel_size")  # fmt: skip
    for key in sizes:
        if not isinstance(args.get(key), int | None) or not 1 <= (args.get(key) or 1) <= _MAX_RANKS:
            raise BadInput(f"args say {key} {str(args[key])[:40]!r}", where=str(release))
    numbers = {name: [int(text) for text in name.split("_")[2:]] for name in folders}
    ep = args.get("expert_model_parallel_size") or 1
    pipelined = (args.get("pipeline_model_parallel_size") or (2 if ep == 1 else 1)) > 1
    found: dict[tuple[int, int, int], Path] = {}
    for name, (t, *rest) in numbers.items():
        p = rest.pop(0) if rest and pipelined else 0
        found[p, t, rest.pop(0) if rest else 0] = folders[name] / RANK_FILE
    tp, pp = (max(place[k] for place in found) + 1 for k in (1, 0))
    for key, there in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
        if args.get(key) not in (None, there):
            raise BadInput(f"args say {key} {args[key]}, there are {there}", where=str(release))
    etp = (args.get("expert_tensor_parallel_size") or tp) if ep > 1 or args.get("num_experts") else tp
    if pp * ep * etp > _MAX_RANKS:
        raise BadInput(f"the args say {pp * ep * etp:,} ranks, there are {len(found)}", where=str(release))
    expected = {(p, t, e) for p in range(pp) for t, e in ranks(tp, ep, etp)}
    absent = [rank_folder(Place(p, 0, t, e), pp, ep) for p, t, e in sorted(expected)
              if (p, t, e) not in found or not found[p, t, e].is_file()]  # fmt: skip
    if absent:
        raise BadInput(f"{len(absent)} of {len(expected)} ranks are missing: {listing(absent)}", where=str(release))
    surplus = [rank_folder(Place(p, 0, t, e), pp, ep) for p, t, e in sorted(found.keys() - expected)]
    if surplus:
        grid = f"TP {tp}, PP {pp}, EP {ep}, ETP {etp}"
        raise BadInput(f"the args say {grid}, which has no {listing(surplus)}", where=str(release))
    return found, tp, pp, ep, etp


def rank_folder(place: Place, pp: int, ep: int) -> str:
    """A rank's folder in the `torch` format (Megatron-LM, `get_checkpoint_name`)."""
    pipeline = f"_{place.pp_rank:03d}" if pp > 1 else ""
    return f"mp_rank_{place.tp_rank:02d}{pipeline}" + (f"_{place.ep_rank:03d}" if ep > 1 else "")


_STACKED = "decoder.layers."


def _open_dist(directory: Path, release: Path, trust_pickle: bool) -> MegatronCheckpoint:
    """A `torch_dist` checkpoint as one rank: layers that are stacked on the first axis are taken apart."""
    opened = open_torch_dist(release, passed_over=is_training_state, trust_pickle=trust_pickle)
    check(opened.common, ITERATION, str(release))
    _check_version(opened.common, release)
    named: dict[str, list[Tile]] = {}
    items: dict[str, StoredTensor] = {}
    for name, tensor in opened.tensors.items():
        for chunk in tensor.chunks:
            items[chunk.stored.name] = _folded(name, chunk.stored)
            for own, offsets, stored in _taken_apart(name, chunk.offsets, chunk.stored):
                named.setdefault(own, []).append(_tile(offsets, stored))
    tensors = {name: tuple(tiles) for name, tiles in _joined_halves(named).items()}
    iteration = opened.common.get("iteration", "release")
    args = _plain(opened.common.get("args"), release)
    return MegatronCheckpoint(
        directory, release, args, iteration, "torch_dist", 1, 1, 1, {Place(0, 0, 0): tensors}, items, opened.left_out
    )


def is_training_state(name: str) -> bool:
    """Whether a global name is of the optimizer or of random state, and not of the model.

    The optimizer's all have `optimizer` as one of their parts, which is part of no parameter's name: `optimizer.state.…`,
    `optimizer.distributed.…`, behind `chained_0.` and so on where experts have an optimizer of their own
    (megatron-core, `optimizer/`). What else there is has names of its own (Megatron-LM, `generate_state_dict`).
    """
    parts = name.split(".")
    return "optimizer" in parts or parts[0].startswith(("rng_state", "rerun_state"))


_GLOBAL_EXPERTS = ".mlp.experts.experts."
_LOCAL_EXPERTS = ".mlp.experts.local_experts."


def _axes(name: str) -> tuple[bool, bool]:
    """Whether a global tensor's leading axes are layers, and experts."""
    rest = name.removeprefix(_STACKED)
    layers = rest != name and not rest.split(".")[0].isdigit()
    _, found, rest = name.partition(_GLOBAL_EXPERTS)
    return layers, bool(found) and not rest.split(".")[0].isdigit()


def _folded(name: str, stored: StoredTensor) -> StoredTensor:
    """A tensor with the axes of layers and experts folded into its rows."""
    leading = sum(_axes(name))
    return stored._replace(shape=(prod(stored.shape[: leading + 1]), *stored.shape[leading + 1 :]))


def _taken_apart(
    name: str, offsets: tuple[int, ...], stored: StoredTensor
) -> Iterator[tuple[str, tuple[int, ...], StoredTensor]]:
    """A chunk of a global tensor as the chunks of each layer's and each expert's own, under their names on one rank."""
    layers, experts = _axes(name)
    if not (layers or experts) or not stored.nbytes:
        yield _renamed(name), offsets, stored
        return
    inner, each = stored.shape[1:], stored.nbytes // max(1, stored.shape[0])
    for k in range(stored.shape[0]):
        number = offsets[0] + k
        if layers:
            own = f"{_STACKED}{number}.{name.removeprefix(_STACKED)}"
        else:
            own = name.replace(_GLOBAL_EXPERTS, f"{_GLOBAL_EXPERTS}{number}.")
        part = stored._replace(name=f"{stored.name}/{k}", offset=stored.offset + k * each, shape=inner)
        yield from _taken_apart(own, offsets[1:], part)


def _renamed(name: str) -> str:
    """As on one rank; `mtp_model_layer` is what some versions of megatron-core call `transformer_layer`."""
    return name.replace(_GLOBAL_EXPERTS, _LOCAL_EXPERTS).replace(".mtp_model_layer.", ".transformer_layer.")


def _tile(offsets: tuple[int, ...], stored: StoredTensor) -> Tile:
    return Tile(offsets[0], offsets[1] if len(offsets) > 1 else 0, stored)


def _joined_halves(named: dict[str, list[Tile]]) -> dict[str, list[Tile]]:
    """Gate and up stored apart (`weight_w`, `weight_v`, with singleton_local_shards) as the one tensor they are."""
    result = {}
    for name, tiles in named.items():
        stem, _, half = name.rpartition("_")
        if half == "w" and f"{stem}_v" in named:
            height = max(tile.row + tile.stored.shape[0] for tile in tiles)
            result[stem] = tiles + [tile._replace(row=tile.row + height) for tile in named[f"{stem}_v"]]
        elif not (half == "v" and f"{stem}_w" in named):
            result[name] = tiles
    return result


def _check_version(value: Mapping[str, Any], path: Path) -> None:
    version = value.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or not version >= 2.0:
        raise Refused(
            f"checkpoint_version is {version!r}: before 2.0 the rows of query, key and value were ordered otherwise",
            where=str(path),
            hint="load and save it once with Megatron-LM, which brings it to 3.0",
        )


def _plain(args: Any, path: Path) -> dict[str, Any]:
    if args is None:
        return {}
    state = args.state if isinstance(args, Inert) else args
    if not isinstance(state, dict):
        raise BadInput("`args` is not a Namespace", where=str(path))
    plain = {key: value for key, value in state.items() if isinstance(key, str) and _is_plain(value)}
    check(plain, ARGUMENTS, f"{path}, `args`")
    return plain


def _is_plain(value: Any) -> bool:
    """Whether a value can be written as JSON and read again."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, float | str) or (isinstance(value, int) and value.bit_length() <= 200)


def _named(model: Any, place: Place, path: Path) -> dict[str, tuple[Tile, ...]]:
    if not isinstance(model, dict):
        raise BadInput("`model` is not a state dict", where=str(path))
    if "language_model" in model:
        raise Refused(
            "this is the layout of Megatron-LM before megatron-core, or of Megatron-DeepSpeed", where=str(path)
        )
    found: dict[str, tuple[Tile, ...]] = {}
    for name, value in model.items():
        if not is_name(name):
            raise BadInput("`model` is not a state dict", where=str(path))
        if isinstance(value, StoredTensor) and not name.endswith("_extra_state"):
            unique = f"{path.parent.name}/{place.vpp_chunk}/{name}"
            found[_renamed(name)] = (Tile(0, 0, value._replace(name=unique)),)
        elif not name.endswith("_extra_state"):
            raise BadInput(f"`{name}` is not a tensor", where=str(path))
    return found


def _bytes(value: Any) -> int:
    if isinstance(value, StoredTensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return _bytes(value.state) + _bytes(value.arguments) if isinstance(value, Inert) else 0
