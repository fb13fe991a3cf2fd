"""A Hugging Face checkpoint directory: its config, its weight files, its tensors."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llmconvert.checkpoint.config import read_config
from llmconvert.checkpoint.files import check_inside, shown
from llmconvert.checkpoint.files import read_json as read_json
from llmconvert.checkpoint.files import stays_inside as stays_inside
from llmconvert.checkpoint.safetensors import read_header
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.checkpoint.torch_pickle import read_pickle
from llmconvert.errors import BadInput, InputOutput, Refused, Usage

WEIGHT_FILES = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Index and single-file names, in the order they are looked for (transformers' own order)."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory of weights, opened by its headers alone.

    Attributes:
        path: the directory.
        config: config.json as it is.
        tensors: every tensor by name.
        index: the index file's name, or None for a single weight file.
        notes: what was odd but harmless.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    index: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in name order."""
        return tuple(sorted({tensor.path for tensor in self.tensors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _shard_path(directory: Path, name: str, index: str) -> Path:
    where = str(directory / index)
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise BadInput(f"the index names `{name}`, a path outside the checkpoint", where=where)
    path = directory / name
    if not os.path.exists(path):
        raise BadInput(f"the index names `{name}`, which is not there", where=where, hint="download the missing shard")
    check_inside(directory, path)
    return path


def _read_file(path: Path) -> dict[str, StoredTensor]:
    return read_header(path) if path.suffix == ".safetensors" else read_pickle(path)


def _open_sharded(directory: Path, index: str) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    where = str(directory / index)
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput("the index has no `weight_map`", where=where)
    for name in weight_map.values():
        if not isinstance(name, str) or not name:
            raise BadInput(f"the index names the file {shown(name)}, which is not a file name", where=where)
    paths = {name: _shard_path(directory, name, index) for name in sorted(set(weight_map.values()))}
    tensors: dict[str, StoredTensor] = {}
    owners: dict[str, list[str]] = defaultdict(list)
    for file, path in paths.items():
        for name, tensor in _read_file(path).items():
            owners[name].append(file)
            tensors[name] = tensor
    twice = sorted(name for name, files in owners.items() if len(files) > 1)
    if twice:
        raise BadInput(
            f"{len(twice)} tensors are in two shards, {listing(twice)}: which is right cannot be told", where=where
        )
    absent = sorted(name for name, file in weight_map.items() if file not in owners.get(name, ()))
    if absent:
        raise BadInput(
            f"the index names {len(absent)} tensors their shard does not hold: {listing(absent)}", where=where
        )
    unlisted = sorted(set(tensors) - set(weight_map))
    notes = (
        (f"{len(unlisted)} tensors are in the shards but not in the index: {listing(unlisted)}",) if unlisted else ()
    )
    return tensors, notes


def listing(names: list[str], limit: int = 4) -> str:
    """The first few of `names`, in backticks, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint directory by reading its config and its weight files' headers.

    Args:
        source: a local directory, or a hub id such as `Qwen/Qwen2.5-7B` or `Qwen/Qwen2.5-7B@main`.

    Raises:
        Usage: there is no such directory and the name is not a hub id.
        BadInput: a file is missing or corrupt.
        Refused: the directory holds adapters only, or a pickle that would run code.
    """
    directory = Path(source)
    if not directory.exists():
        from llmconvert.checkpoint.hub import download

        directory = download(str(source))
    if not directory.is_dir():
        raise Usage(
            "a checkpoint is a directory, this is a file", where=str(source), hint="name the directory around it"
        )
    try:
        names = set(os.listdir(directory))
    except OSError as error:
        raise InputOutput(f"cannot read the directory: {error.strerror}", where=str(directory)) from None
    for index, single in WEIGHT_FILES:
        if index in names:
            config = read_config(directory)
            tensors, notes = _open_sharded(directory, index)
            return Checkpoint(directory, config, tensors, index, notes)
        if single in names:
            config = read_config(directory)
            path = _shard_path(directory, single, single)
            return Checkpoint(directory, config, _read_file(path))
    raise _no_weights(directory, names)


def _no_weights(directory: Path, names: set[str]) -> Exception:
    where = str(directory)
    if "adapter_config.json" in names:
        return Refused(
            "this is a LoRA adapter without its base model",
            where=where,
            hint="merge it into its base first (peft: model.merge_and_unload()), save, and convert that",
        )
    if "latest_checkpointed_iteration.txt" in names or any(name.startswith("mp_rank_") for name in names):
        return Usage(
            "this is a Megatron checkpoint",
            where=where,
            hint="`llmconvert merge` makes a Hugging Face checkpoint of it, `llmconvert reshard` cuts it anew",
        )
    if any(name.endswith(".gguf") for name in names):
        return Refused("GGUF files are not read", where=where, hint="convert the original safetensors checkpoint")
    shards = sorted(name for name in names if name.endswith((".safetensors", ".bin")))
    if shards:
        return BadInput(
            f"there are weight files ({listing(shards)}) but no index that says what is in them",
            where=where,
            hint="download `model.safetensors.index.json` (or `pytorch_model.bin.index.json`) too",
        )
    expected = ", ".join(f"`{name}`" for pair in WEIGHT_FILES for name in pair)
    return BadInput(f"the directory holds no weights (none of {expected})", where=where)
