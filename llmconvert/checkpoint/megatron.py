"""Megatron checkpoints in the `torch` format: which rank files there are, their arguments, their tensors by place.

Layout (Megatron-LM, `megatron/training/checkpointing.py`): `latest_checkpointed_iteration.txt` names `iter_NNNNNNN/` or
`release/`; in it `mp_rank_TT[_PPP]/model_optim_rng.pt` holds `args`, `checkpoint_version`, `iteration` and `model`, or
`model0`, `model1`, … with virtual pipeline stages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.directory import listing
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.checkpoint.torch_pickle import Inert, read_object
from llmconvert.errors import BadInput, Refused

LATEST = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")


@dataclass(frozen=True, order=True)
class Place:
    """One chunk of layers on one rank.

    Attributes:
        pp_rank: pipeline rank.
        vpp_chunk: virtual chunk of that rank, 0 where there is one.
        tp_rank: tensor rank.
    """

    pp_rank: int
    vpp_chunk: int
    tp_rank: int


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A Megatron checkpoint opened by its pickles' contents; tensors are not read.

    Attributes:
        path: the directory given.
        release: the directory that holds the ranks.
        args: the arguments it was trained or written with, as a mapping of plain values.
        iteration: of the training run, or what is written in place of one.
        tp, pp, vpp: numbers of tensor ranks, pipeline ranks and virtual chunks a rank.
        tensors: for each place its tensors by name; a tensor's own name is its place and name, and is unique.
        left_out: bytes of optimizer and random state that are there and are not the model's.
    """

    path: Path
    release: Path
    args: dict[str, Any]
    iteration: int | str
    tp: int
    pp: int
    vpp: int
    tensors: dict[Place, dict[str, StoredTensor]]
    left_out: int

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor by its unique name."""
        return {tensor.name: tensor for chunk in self.tensors.values() for tensor in chunk.values()}


def is_megatron(directory: Path) -> bool:
    """Whether a directory looks like a Megatron checkpoint, in either format."""
    if (directory / LATEST).is_file() or (directory / "metadata.json").is_file():
        return True
    return directory.is_dir() and any(_RANK.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())


def release_folder(directory: Path, iteration: int | None = None) -> Path:
    """The folder of one iteration: the one asked for, else the latest.

    Raises:
        BadInput: there is no such folder, or the tracker file cannot be understood.
    """
    if iteration is not None:
        folder = directory / f"iter_{iteration:07d}"
    elif (directory / LATEST).is_file():
        text = (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not text.isdigit():
            raise BadInput(f"`{LATEST}` says {text!r}, which is neither a number nor `release`", where=str(directory))
        folder = directory / ("release" if text == "release" else f"iter_{int(text):07d}")
    else:
        folder = directory
    if not folder.is_dir():
        there = sorted(p.name for p in directory.glob("iter_*") if p.is_dir())
        hint = f"`--iteration` takes one of {', '.join(name[5:].lstrip('0') for name in there[:6])}" if there else None
        raise BadInput(f"there is no `{folder.name}`", where=str(directory), hint=hint)
    return folder


def open_megatron(directory: Path, *, iteration: int | None = None, trust_pickle: bool = False) -> MegatronCheckpoint:
    """Open a checkpoint in the `torch` format.

    Args:
        directory: that of the tracker file, or of the ranks.
        iteration: which; the latest if None.
        trust_pickle: read past names in the pickle that are not known to be harmless. They become inert stand-ins
            all the same; nothing is run.

    Raises:
        BadInput: a rank is missing or cut short, or ranks contradict each other.
        Refused: an old version, expert parallelism, or a pickle that names what is not known.
    """
    release = release_folder(directory, iteration)
    ranks: dict[tuple[int, int], Path] = {}
    for entry in sorted(release.iterdir()):
        match = _RANK.fullmatch(entry.name)
        if match is None:
            continue
        if match[3] is not None:
            raise Refused("expert-parallel ranks are not read", where=str(entry))
        ranks[int(match[1]), int(match[2] or 0)] = entry / RANK_FILE
    if not ranks:
        if (release / ".metadata").is_file():
            raise Refused("this is a `torch_dist` checkpoint, which is not read yet", where=str(release))
        raise BadInput("there are no `mp_rank_…` folders", where=str(release))
    tp, pp = max(rank for rank, _ in ranks) + 1, max(rank for _, rank in ranks) + 1
    absent = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") for p in range(pp) for t in range(tp)
              if (t, p) not in ranks or not ranks[t, p].is_file()]  # fmt: skip
    if absent:
        raise BadInput(f"{len(absent)} of {tp * pp} ranks are missing: {listing(absent)}", where=str(release))
    tensors: dict[Place, dict[str, StoredTensor]] = {}
    args: dict[str, Any] = {}
    first: Any = None
    left_out, vpp = 0, 1
    for (t, p), path in sorted(ranks.items()):
        hint = "add `--trust-pickle` to read past it; it becomes an inert stand-in and is not run"
        value = read_object(path, inert="anything" if trust_pickle else "harmless", hint=hint)
        if not isinstance(value, dict):
            raise BadInput("the rank file does not hold a dictionary", where=str(path))
        _check_version(value, path)
        models = sorted(
            (key for key in value if re.fullmatch(r"model\d*", str(key))), key=lambda key: int(key[5:] or 0)
        )
        if not models:
            raise BadInput("the rank file has no `model`", where=str(path))
        own = _plain(value.get("args"), path)
        if first is None:
            args, first, vpp = own, value, len(models)
        elif len(models) != vpp or value.get("iteration") != first.get("iteration"):
            raise BadInput("ranks differ in iteration or in virtual stages: not one checkpoint", where=str(path))
        for chunk, key in enumerate(models):
            place = Place(p, chunk, t)
            tensors[place] = _named(value[key], place, path)
        left_out += sum(_bytes(entry) for key, entry in value.items() if key not in (*models, "args"))
    for key, found in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
        if args.get(key) not in (None, found):
            raise BadInput(f"args say {key} {args[key]}, there are {found}", where=str(release))
    return MegatronCheckpoint(
        directory, release, args, first.get("iteration", "release"), tp, pp, vpp, tensors, left_out
    )


def _check_version(value: Mapping[str, Any], path: Path) -> None:
    version = value.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2.0:
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
    return {key: value for key, value in state.items() if isinstance(value, bool | int | float | str | list | None)}


def _named(model: Any, place: Place, path: Path) -> dict[str, StoredTensor]:
    if not isinstance(model, dict):
        raise BadInput("`model` is not a state dict", where=str(path))
    if "language_model" in model:
        raise Refused(
            "this is the layout of Megatron-LM before megatron-core, or of Megatron-DeepSpeed", where=str(path)
        )
    found = {}
    for name, value in model.items():
        if isinstance(value, StoredTensor) and not name.endswith("_extra_state"):
            unique = f"{path.parent.name}/{place.vpp_chunk}/{name}"
            found[name] = value._replace(name=unique)
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
