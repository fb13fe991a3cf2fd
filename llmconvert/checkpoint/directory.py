"""A Hugging Face checkpoint directory: its config, its weight files, its tensors."""

from __future__ import annotations

import fnmatch
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llmconvert.checkpoint.config import read_config
from llmconvert.checkpoint.files import check_inside, opened, shown
from llmconvert.checkpoint.files import read_json as read_json
from llmconvert.checkpoint.files import stays_inside as stays_inside
from llmconvert.checkpoint.hub import download, what_is_there
from llmconvert.checkpoint.safetensors import read_header
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.checkpoint.torch_pickle import read_pickle
from llmconvert.errors import BadInput, InputOutput, LlmconvertError, Refused, Usage

WEIGHT_FILES = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Index and single-file names: safetensors first, as in transformers. Of a pair there is to be one."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""Git LFS's own bound on a pointer's size (git-lfs/git-lfs, docs/spec.md)."""

_READ_OR_CARRIED = (".json", ".model", ".tiktoken", ".txt", ".jinja", ".py", ".vocab", ".spm")
"""What the files beside the weights end in that matter to a model."""


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


def refuse_two_sets(directory: Path, index: str, single: str) -> None:
    """Refuse a directory with an index and, beside the files it names, the single file that stands for all of them.

    transformers loads the single file, vLLM and others what the index names.

    Raises:
        BadInput: it is one.
    """
    weight_map = read_json(directory / index).get("weight_map")
    others = isinstance(weight_map, dict) and any(name != single for name in weight_map.values())
    if others and os.path.lexists(directory / single):
        raise BadInput(
            f"there are two sets of weights: `{single}`, and what `{index}` names; which is meant cannot be told",
            where=str(directory),
            hint="move one of the two elsewhere",
        )


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
    refuse_pointers(directory, paths)
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


def is_pointer(directory: Path, name: str) -> bool:
    """Whether a file is a Git LFS pointer: a note of where the file is, left by a clone without `git lfs`.

    Raises:
        InputOutput: the system does not let it be read.
    """
    path = directory / name
    if not path.is_file() or not stays_inside(directory, path):
        return False  # whoever needs it says so
    with opened(path, inside=directory) as file:
        return os.fstat(file.fileno()).st_size <= _POINTER_BYTES and file.read(len(_POINTER)) == _POINTER


def refuse_pointers(directory: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint of whose files `names` some were not fetched.

    Raises:
        BadInput: naming them.
    """
    found = sorted(name for name in names if is_pointer(directory, name))
    if found:
        several = f"{listing(found)} are Git LFS pointers, not the files themselves"
        raise BadInput(
            several if len(found) > 1 else f"`{found[0]}` is a Git LFS pointer, not the file itself",
            where=str(directory),
            hint="`git lfs pull` in that directory fetches what is missing",
        )


_VOCABULARIES = ("tokenizer.json", "tekken*.json", "*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.vocab", "*.bpe")
"""Files a vocabulary may be in, whatever the tokenizer."""


def holds_vocabulary(directory: Path, tokenizer: Any) -> bool:
    """Whether a directory holds what a tokenizer was made of.

    Of a directory without, transformers 5 makes an empty tokenizer for some architectures (Gemma, Qwen2): every text is
    one unknown token, or none.

    Args:
        directory: the checkpoint.
        tokenizer: made of it by transformers; one that names no files (bytes are its vocabulary) needs none.
    """
    named = getattr(tokenizer, "vocab_files_names", None)
    patterns = [*named.values(), *_VOCABULARIES] if isinstance(named, dict) and named else ["*"]
    return any(fnmatch.filter(_entries(directory), str(pattern)) for pattern in patterns)


def listing(names: list[str], limit: int = 4) -> str:
    """The first few of `names`, in backticks, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def require_directory(path: Path) -> Path:
    """A path that must be a directory here.

    Raises:
        Usage: it is not there, or a file.
    """
    if not path.exists():
        raise Usage("no such directory", where=str(path), hint=what_is_there(str(path), "give a checkpoint directory"))
    if not path.is_dir():
        raise Usage(
            "a checkpoint is a directory, this is a file", where=str(path), hint="name the directory around it"
        )
    return path


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
    directory = require_directory(directory if directory.exists() else download(str(source)))
    try:
        names = set(os.listdir(directory))
    except OSError as error:
        raise InputOutput(f"cannot read the directory: {error.strerror}", where=str(directory)) from None
    refuse_pointers(directory, (name for name in names if name.endswith(_READ_OR_CARRIED)))
    for index, single in WEIGHT_FILES:
        if index in names:
            config = read_config(directory)
            refuse_two_sets(directory, index, single)
            tensors, notes = _open_sharded(directory, index)
            return Checkpoint(directory, config, tensors, index, notes)
        if single in names:
            config = read_config(directory)
            path = _shard_path(directory, single, single)
            refuse_pointers(directory, [single])
            return Checkpoint(directory, config, _read_file(path))
    raise no_weights(directory, names)


_FOREIGN: tuple[tuple[str, str, str], ...] = (
    ("adapter_config.json", "this is a LoRA adapter without its base model",
     "merge it into its base first (peft: model.merge_and_unload()), save, and convert that"),
    ("consolidated*.safetensors", "the weights are in Mistral's own form, whose names are not those of Hugging Face",
     "fetch the repository's `model*.safetensors`, its index and config.json, which hold the same weights"),
    ("consolidated*.pth", "the weights are in Meta's own form, whose names are not those of Hugging Face",
     "fetch the repository in Hugging Face's form (`model*.safetensors`, config.json)"),
    ("*.gguf", "GGUF files are not read", "convert the original safetensors checkpoint"),
    ("*.distcp", "this is a torch.distributed checkpoint, not one of Hugging Face's",
     "load it in the trainer that wrote it and save the model with `save_pretrained`"),
    ("zero_to_fp32.py", "this is a DeepSpeed checkpoint, whose weights are spread over its ranks",
     "`python zero_to_fp32.py . OUT` in that directory puts them together"),
    ("tf_model.h5", "TensorFlow weights are not read", "save the model with `save_pretrained` from PyTorch"),
    ("flax_model.msgpack", "Flax weights are not read", "save the model with `save_pretrained` from PyTorch"),
)  # fmt: skip
"""What marks a directory of another kind (a pattern of names), what it is, and what to do."""


def no_weights(directory: Path, names: set[str]) -> LlmconvertError:
    """Why a directory with these entries holds no weights that are read: it is of another kind, or around one, or not whole."""
    where = str(directory)
    if "latest_checkpointed_iteration.txt" in names or any(name.startswith("mp_rank_") for name in names):
        return Usage(
            "this is a Megatron checkpoint",
            where=where,
            hint="`llmconvert merge` makes a Hugging Face checkpoint of it, `llmconvert reshard` cuts it anew",
        )
    for pattern, what, hint in _FOREIGN:
        if fnmatch.filter(names, pattern):
            return Refused(what, where=where, hint=hint)
    shards = sorted(name for name in names if name.endswith((".safetensors", ".bin")))
    if shards:
        return BadInput(
            f"there are weight files ({listing(shards)}) but no index that says what is in them",
            where=where,
            hint="download `model.safetensors.index.json` (or `pytorch_model.bin.index.json`) too",
        )
    return _around(directory, names) or BadInput(
        f"the directory holds no weights (none of {', '.join(f'`{name}`' for pair in WEIGHT_FILES for name in pair)})",
        where=where,
    )


def _around(directory: Path, names: set[str]) -> Usage | None:
    """The error for a directory that holds checkpoints further down: the hub's cache, a parent."""
    cached = sorted(name for name in names if name.startswith("models--"))
    if not cached and "hub" in names:
        cached = sorted(name for name in _entries(directory / "hub") if name.startswith("models--"))
    if cached:
        ids = [name.removeprefix("models--").replace("--", "/") for name in cached]
        return Usage(
            f"this is the hub's cache, with {listing(ids)} in it", where=str(directory), hint="give such an id"
        )
    below = [f"snapshots/{name}" for name in _entries(directory / "snapshots")] if "snapshots" in names else sorted(names)
    weights = {name for pair in WEIGHT_FILES for name in pair}
    found = [name for name in below if weights & _entries(directory / name)]
    if not found:
        return None
    return Usage(
        f"the directory holds no weights itself; there {'is a checkpoint' if len(found) == 1 else 'are checkpoints'} "
        f"in {listing(found)}",
        where=str(directory),
        hint=f"give `{directory / found[-1]}`",
    )


def _entries(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except OSError:
        return set()
