"""The files beside the weights: which come along unchanged, which stay behind, and why."""

from __future__ import annotations

import ast
import json
import os
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


def _tokenizer_modules(directory: Path, config: dict[str, Any]) -> set[str]:
    """Python files the tokenizer's `auto_map` needs, with those they import from beside them."""
    wanted: list[str] = []
    settings = [config.get("auto_map")]
    if (directory / "tokenizer_config.json").is_file():
        settings.append(read_json(directory / "tokenizer_config.json").get("auto_map"))
    for auto_map in settings:
        entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        for reference in entry if isinstance(entry, list) else [entry]:
            if isinstance(reference, str) and "--" not in reference:
                wanted.append(reference.rpartition(".")[0] + ".py")
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in found or "/" in name or _why_not(directory, directory / name):
            continue
        found.add(name)
        try:
            with (directory / name).open("rb") as file:
                tree = ast.parse(file.read(_LONGEST_MODULE))
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):  # what it imports, nobody can tell
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
    needed = _tokenizer_modules(directory, checkpoint.config)
    copies: dict[str, Path] = {}
    left: dict[str, str] = {}
    weights = set(checkpoint.files)
    for path in sorted(directory.iterdir()):
        name = path.name
        if path.is_dir():
            if name in _TOKENIZER_FOLDERS:
                found = whole_folder(path, root)
                copies |= {f"{name}/{inner}": file for inner, file in found.copies.items()}
                left |= {f"{name}/{inner}": why for inner, why in found.left.items()}
            elif not name.startswith("."):
                left[name + "/"] = "a folder: not part of the checkpoint"
            continue
        if name in ("config.json", MANIFEST, REPORT) or name.startswith("."):
            continue
        if name.endswith(".index.json"):
            continue
        if name.endswith(_WEIGHTS):
            if path not in weights:
                left[name] = "weights or training state that the checkpoint's index does not name"
            continue
        if name.endswith(".py") and name not in needed:
            left[name] = "model code of the source architecture"
            continue
        why = _why_not(root, path)
        if why is None:
            copies[name] = path
        else:
            left[name] = why
    texts, notes = _tokenizer_map(checkpoint, needed)
    return Companions({name: path for name, path in copies.items() if name not in texts}, left, texts, notes)


def whole_folder(directory: Path, root: Path) -> Companions:
    """Every file of a folder and its folders, by nested name; links stay behind where they leave `root`."""
    copies: dict[str, Path] = {}
    left: dict[str, str] = {}
    if directory.is_symlink() and _why_not(root, directory, folders=True):
        return Companions({}, {"": "a symlink that leaves the checkpoint"})
    for place, folders, files in os.walk(directory):
        folders.sort()
        inner = Path(place)
        left |= {
            f"{(inner / name).relative_to(directory)}/": "a symlink to a folder"
            for name in folders if (inner / name).is_symlink()
        }  # fmt: skip
        for path in sorted(inner / name for name in files):
            why = _why_not(root, path)
            if why is None:
                copies[str(path.relative_to(directory))] = path
            else:
                left[str(path.relative_to(directory))] = why
    return Companions(copies, left)


def _why_not(root: Path, path: Path, *, folders: bool = False) -> str | None:
    """Why a file of the source is not copied; None if it is."""
    try:
        if not path.exists():
            return "a symlink to nothing" if path.is_symlink() else "not there"
        if not stays_inside(root, path):
            return "a symlink that leaves the checkpoint"
        return None if path.is_file() or (folders and path.is_dir()) else "no regular file"
    except (OSError, RuntimeError):  # a loop of links; RuntimeError before Python 3.13
        return "a symlink that leads nowhere"


def _tokenizer_map(checkpoint: Checkpoint, needed: set[str]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Move a tokenizer's `auto_map` entry from config.json, which is rewritten, to tokenizer_config.json."""
    auto_map = checkpoint.config.get("auto_map")
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else None
    path = checkpoint.path / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if not entry or not needed or "auto_map" in settings:
        return {}, ()
    settings["auto_map"] = {"AutoTokenizer": entry if isinstance(entry, list) else [entry, None]}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    note = "the tokenizer's `auto_map` entry moved from config.json to tokenizer_config.json"
    return {"tokenizer_config.json": text.encode()}, (note,)
