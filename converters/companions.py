"""The files beside the weights: which come along unchanged, which stay behind, and why."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.directory import Checkpoint, read_json, stays_inside
from llmconvert.engine.journal import PRIVATE
from llmconvert.engine.manifest import MANIFEST, REPORT

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
        if name in found or not (directory / name).is_file():
            continue
        found.add(name)
        try:
            tree = ast.parse((directory / name).read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        wanted += [
            f"{node.module}.py"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        ]
    return found


def companions(checkpoint: Checkpoint) -> Companions:
    """Sort a checkpoint directory's other files."""
    directory = checkpoint.path
    needed = _tokenizer_modules(directory, checkpoint.config)
    copies: dict[str, Path] = {}
    left: dict[str, str] = {}
    weights = set(checkpoint.files)
    for path in sorted(directory.iterdir()):
        name = path.name
        if path.is_dir():
            if name in _TOKENIZER_FOLDERS:
                copies |= {f"{name}/{p.name}": p for p in sorted(path.iterdir()) if p.is_file()}
            elif not name.startswith("."):
                left[name + "/"] = "a folder: not part of the checkpoint"
            continue
        if name in PRIVATE or name in ("config.json", MANIFEST, REPORT) or name.startswith("."):
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
        if not stays_inside(directory, path):
            left[name] = "a symlink that leaves the checkpoint"
        elif path.is_file():
            copies[name] = path
    texts, notes = _tokenizer_map(checkpoint, needed)
    return Companions(copies, left, texts, notes)


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
