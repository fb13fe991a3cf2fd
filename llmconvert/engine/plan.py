"""A plan: the files to write, and for every region of them the expression that fills it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.safetensors import layout
from llmconvert.engine.tree import open_regular
from llmconvert.errors import BadInput, InputOutput, Usage
from llmconvert.tensors.expressions import Check, Expression

REGION_BYTES = 64 * 1024 * 1024
"""Tensors are written, journalled and checksummed in runs of whole rows of about this size."""

_COPY_BYTES = 256 * 1024

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output: where it goes and what fills it."""

    name: str
    file: str
    offset: int
    expression: Expression

    @property
    def region_rows(self) -> int:
        """Rows in one region of this tensor."""
        return max(1, REGION_BYTES // max(1, self.expression.row_bytes))


@dataclass(frozen=True)
class Region:
    """Rows `start` to `stop` of one output tensor; the unit of work."""

    tensor: OutputTensor
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.tensor.name}:{self.start}"

    @property
    def offset(self) -> int:
        """Byte offset in the output file."""
        return self.tensor.offset + self.start * self.tensor.expression.row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the region."""
        return (self.stop - self.start) * self.tensor.expression.row_bytes


@dataclass(frozen=True)
class WeightFile:
    """A weight file of the output.

    Attributes:
        name: its path within the output.
        size: in bytes.
        pieces: its bytes that are not tensors', as (offset, bytes).
        crc_places: for tensors whose CRC-32 the format wants, where it goes (4 bytes, little-endian), by tensor name.
    """

    name: str
    size: int
    pieces: tuple[tuple[int, bytes], ...]
    crc_places: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of `pieces`."""
        hasher = hashlib.sha256()
        for offset, data in self.pieces:
            hasher.update(f"{offset}:{len(data)}:".encode() + data)
        return hasher.hexdigest()


    def outside(self, crcs: Mapping[int, bytes]) -> Iterator[bytes]:
        """Its bytes that are not tensors', in order.

        Args:
            crcs: what is written over `pieces` at which offset.
        """
        places = deque(sorted(crcs.items()))
        for offset, data in sorted(self.pieces):
            patched = bytearray(data)
            while places and places[0][0] < offset + len(data):
                place, crc = places.popleft()
                patched[place - offset : place - offset + len(crc)] = crc
            yield bytes(patched)


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do, known before it does it.

    Attributes:
        source: the source directory.
        tensors: the output tensors, in file and offset order.
        files: the weight files.
        texts: small files to write, by name.
        copies: files to copy unchanged, by name; where a text has the name, the text is written.
        checks: facts about the data to test before writing.
        identity: what of the source, the options and the layout makes two runs the same run; see `run_identity`.
        summary: what reports and the manifest say about the conversion.
    """

    source: Path
    tensors: tuple[OutputTensor, ...]
    files: tuple[WeightFile, ...]
    texts: Mapping[str, bytes]
    copies: Mapping[str, Path]
    checks: tuple[Check, ...]
    identity: str
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes the output takes."""
        small = sum(map(len, self.texts.values())) + sum(size for size, _ in self.copied().values())
        return sum(file.size for file in self.files) + small

    def copied(self) -> dict[str, tuple[int, int]]:
        """Size and time of change (nanoseconds) of every file to copy, by its name in the output.

        Raises:
            InputOutput: one is gone, or the system refuses.
        """
        found = {}
        for name, path in self.copies.items():
            if name in self.texts:
                continue
            try:
                stat = path.stat()
            except OSError as error:
                raise InputOutput(f"cannot read the file: {error.strerror}", where=str(path)) from None
            found[name] = stat.st_size, stat.st_mtime_ns
        return found

    def reading(self, name: str) -> Iterator[bytes]:
        """The bytes of a file to copy, which holds still while it is read.

        Args:
            name: its name in the output.

        Raises:
            InputOutput: it cannot be read.
            BadInput: it changed, or is no regular file.
        """
        path, size = self.copies[name], 0
        try:
            descriptor = open_regular(os.path.realpath(path), os.O_RDONLY)
        except OSError as error:
            raise InputOutput(f"cannot read the file: {error.strerror}", where=str(path)) from None
        try:
            before = os.fstat(descriptor)
            while True:
                try:
                    data = os.read(descriptor, _COPY_BYTES)
                except OSError as error:
                    raise InputOutput(f"cannot read the file: {error.strerror}", where=str(path)) from None
                if not data:
                    break
                size += len(data)
                yield data
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if size != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
            raise BadInput("the file changed while it was copied", where=str(path))

    def run_identity(self) -> str:
        """What makes two runs the same run, for resuming: `identity`, and every small file as it is now.

        Raises:
            InputOutput: a file to copy is gone, or the system refuses.
        """
        texts = {name: hashlib.sha256(text).hexdigest() for name, text in sorted(self.texts.items())}
        return json.dumps([self.identity, texts, sorted(self.copied().items())]) + "\n"

    def regions(self) -> Iterator[Region]:
        """The work, in file and offset order."""
        for tensor in self.tensors:
            for start in range(0, tensor.expression.rows, tensor.region_rows):
                yield Region(tensor, start, min(start + tensor.region_rows, tensor.expression.rows))


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """Bytes in `5GB`, `500MB`, `2GiB` or a plain number (powers of ten unless written with an i).

    Raises:
        Usage: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise Usage(f"`{text}` is not a size", hint="write it like `5GB`, `500MB` or `2GiB`")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def lay_out(
    tensors: Mapping[str, Expression], max_shard_size: int
) -> tuple[tuple[OutputTensor, ...], tuple[WeightFile, ...]]:
    """Distribute tensors over safetensors files, in order, each at most `max_shard_size` bytes of data.

    A tensor larger than that gets a file of its own.
    """
    shards: list[dict[str, Expression]] = [{}]
    filled = 0
    for name, expression in tensors.items():
        if filled and filled + expression.nbytes > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = expression
        filled += expression.nbytes
    outputs: list[OutputTensor] = []
    files: list[WeightFile] = []
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        prefix, offsets = layout({key: (e.dtype, e.shape) for key, e in shard.items()})
        outputs += [OutputTensor(key, name, offsets[key], e) for key, e in shard.items()]
        files.append(WeightFile(name, len(prefix) + sum(e.nbytes for e in shard.values()), ((0, prefix),)))
    return tuple(outputs), tuple(files)


def index_texts(outputs: Sequence[OutputTensor], files: Sequence[WeightFile]) -> dict[str, bytes]:
    """The index that says which file holds which tensor, by its name; empty for a single file."""
    if len(files) < 2:
        return {}
    total = sum(output.expression.nbytes for output in outputs)
    index = {"metadata": {"total_size": total}, "weight_map": {output.name: output.file for output in outputs}}
    return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}
