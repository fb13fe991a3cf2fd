"""The files beside the weights: which come along unchanged, which stay behind, and why."""

from __future__ import annotations

import ast
import errno
import json
import os
import stat
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.directory import Checkpoint, read_json, stays_inside
from llmconvert.engine.manifest import MANIFEST, REPORT
from llmconvert.errors import InputOutput

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
    ".ot",
    ".distcp",
    ".ckpt",
    ".npz",
)
_TOKENIZER_FOLDERS = ("additional_chat_templates",)
_LONGEST_MODULE = 1024 * 1024
_FOLDER = "a folder: not part of the checkpoint"
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Companions:
    """What goes with the weights.

    Attributes:
        copies: files copied unchanged, by name.
        texts: files rewritten, by name.
        left: files left behind, and why.
        notes: remarks for the report.
    """

    copies: dict[str, Path]
    left: dict[str, str]
    texts: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def beside(self, written: Collection[str]) -> Companions:
        """These companions of a result that has files of its own, which none of them replaces."""
        taken = [name for name in self.copies if name in written]
        why = "the result has a file of this name of its own"
        kept = {name: path for name, path in self.copies.items() if name not in taken}
        return replace(self, copies=kept, left={**self.left, **dict.fromkeys(taken, why)})


def _tokenizer_modules(directory: Path, root: Path, config: dict[str, Any]) -> set[str]:
    """Python files the tokenizer's `auto_map` needs, with those they import from beside them."""
    wanted: list[str] = []
    for auto_map in (config.get("auto_map"), _tokenizer_settings(directory, root).get("auto_map")):
        entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        for reference in entry if isinstance(entry, list) else [entry]:
            if isinstance(reference, str) and "--" not in reference:
                wanted.append(reference.rpartition(".")[0] + ".py")
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in found or "/" in name or "\0" in name or _look(root, directory / name)[1]:
            continue
        found.add(name)
        with (directory / name).open("rb") as file:
            code = file.read(_LONGEST_MODULE)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its style, which is not the user's
                tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # what it imports, nobody can tell
            continue
        wanted += [
            f"{node.module}.py"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        ]
    return found


def companions(checkpoint: Checkpoint, *, within: Path | None = None) -> Companions:
    """Sort a checkpoint directory's other files.

    Args:
        checkpoint: the directory, opened.
        within: what links must not leave; the directory itself if None.

    Raises:
        BadInput: a tokenizer's settings cannot be understood.
        InputOutput: the system refuses.
    """
    try:
        return _companions(checkpoint, within or checkpoint.path)
    except OSError as error:
        raise InputOutput(
            f"cannot read the checkpoint's files: {error.strerror}", where=str(error.filename or checkpoint.path)
        ) from None


def _companions(checkpoint: Checkpoint, root: Path) -> Companions:
    directory = checkpoint.path
    needed = _tokenizer_modules(directory, root, checkpoint.config)
    copies: dict[str, Path] = {}
    left: dict[str, str] = {}
    weights = set(checkpoint.files)
    for name in sorted(os.listdir(directory)):
        path = directory / name
        if name in ("config.json", MANIFEST, REPORT) or name.startswith(".") or name.endswith(".index.json"):
            continue
        kind, why = _look(root, path)
        if kind == stat.S_IFDIR:
            if name in _TOKENIZER_FOLDERS and why is None:
                found = _flat_folder(path, root)
                copies |= {f"{name}/{inner}": file for inner, file in found.copies.items()}
                left |= {f"{name}/{inner}": reason for inner, reason in found.left.items()}
            else:
                left[f"{_told(name)}/"] = _FOLDER if why is None else why
        elif name.endswith(_WEIGHTS):
            if path not in weights:
                left[_told(name)] = "weights or training state that the checkpoint's index does not name"
        elif why is not None:
            left[_told(name)] = why
        elif name.endswith(".py") and name not in needed:
            left[name] = "model code of the source architecture"
        else:
            copies[name] = path
    texts, notes = _tokenizer_map(checkpoint, root, needed)
    return Companions({name: path for name, path in copies.items() if name not in texts}, left, texts, notes)


def _flat_folder(directory: Path, root: Path) -> Companions:
    """The files of a folder; nobody looks into its folders."""
    copies: dict[str, Path] = {}
    left: dict[str, str] = {}
    for name in sorted(os.listdir(directory)):
        kind, why = _look(root, directory / name)
        if kind == stat.S_IFDIR:
            left[f"{_told(name)}/"] = _FOLDER if why is None else why
        elif why is not None:
            left[_told(name)] = why
        else:
            copies[name] = directory / name
    return Companions(copies, left)


def _look(root: Path, path: Path) -> tuple[int, str | None]:
    """What a file of the source is, its links followed (0 where they lead nowhere), and why it is not to be used, if so.

    Raises:
        OSError: the system refuses; a disk that fails for a moment is no reason to leave a file behind.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        if error.errno in _ABSENT:
            return 0, "a symlink that leads nowhere" if path.is_symlink() else "not there"
        if error.errno == errno.EACCES and not stays_inside(root, path):
            return 0, "a symlink that leaves the checkpoint"
        raise
    if not stays_inside(root, real):
        return kind, "a symlink that leaves the checkpoint"
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        return kind, "no regular file"
    if _told(path.name) != path.name:
        return kind, "its name is not UTF-8, so that `llmconvert.json` cannot hold it"
    return kind, None


def _told(name: str) -> str:
    """A file's name as reports show it, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _tokenizer_settings(directory: Path, root: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    kind, why = _look(root, path)
    return read_json(path) if kind == stat.S_IFREG and why is None else {}


def _tokenizer_map(checkpoint: Checkpoint, root: Path, needed: set[str]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Move a tokenizer's `auto_map` entry from config.json, which is rewritten, to tokenizer_config.json."""
    auto_map = checkpoint.config.get("auto_map")
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else None
    settings = _tokenizer_settings(checkpoint.path, root)
    if not entry or not needed or "auto_map" in settings:
        return {}, ()
    settings["auto_map"] = {"AutoTokenizer": entry if isinstance(entry, list) else [entry, None]}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    note = "the tokenizer's `auto_map` entry moved from config.json to tokenizer_config.json"
    return {"tokenizer_config.json": text.encode()}, (note,)
