"""What makes two runs the same run: the model, the data, how tokens are chosen. It guards `--resume`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

from llmconvert.errors import InputOutput

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_TEMPLATES = "additional_chat_templates"
_BLOCK, _SAMPLES = 1 << 16, 64
_CHUNK = 1 << 22


def file_hash(path: Path) -> str:
    """Hash of all of a file."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _sampled_hash(path: Path) -> str:
    """Hash of a file's size and of blocks evenly spread over it, the first and the last among them."""
    length = os.path.getsize(path)
    found = xxhash.xxh3_128(str(length).encode())
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(0, length - _BLOCK) * number // (_SAMPLES - 1))
            found.update(file.read(_BLOCK))
            if length <= _BLOCK:
                break
    return found.hexdigest()


def model_hash(directory: Path) -> str:
    """Hash of a checkpoint: configs, tokenizer and templates in full; weights by samples, 4 MiB of a file.

    Raises:
        InputOutput: a file cannot be read.
    """
    found = xxhash.xxh3_128()
    try:
        for path in [*sorted(directory.iterdir()), *sorted((directory / _TEMPLATES).glob("*"))]:
            if not path.is_file() or path.name.startswith(".") or path.suffix in (".md", ".html", ".png"):
                continue
            found.update(os.fsencode(path.name) + b"\0")
            found.update((_sampled_hash if path.suffix in _WEIGHTS else file_hash)(path).encode())
    except OSError as error:
        raise InputOutput(f"the model cannot be read: {error.strerror}", where=str(error.filename)) from None
    return found.hexdigest()


def data_hash(files: Iterable[Path]) -> str:
    """Hash of the data's files, in full.

    Raises:
        InputOutput: a file cannot be read.
    """
    try:
        return xxhash.xxh3_128("".join(file_hash(path) for path in files).encode()).hexdigest()
    except OSError as error:
        raise InputOutput(f"the data cannot be read: {error.strerror}", where=str(error.filename)) from None


class Unchanged:
    """Files that must not change while they are worked on."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Note their state.

        Raises:
            InputOutput: one cannot be looked at.
        """
        self._files = list(files)
        self._states = self._look()

    def _look(self) -> list[tuple[int, ...]]:
        try:
            found = [os.stat(path) for path in self._files]
        except OSError as error:
            raise InputOutput(f"the data cannot be read: {error.strerror}", where=str(error.filename)) from None
        return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found]

    def still(self) -> bool:
        """Whether they are as they were, by their sizes and times."""
        return self._look() == self._states
