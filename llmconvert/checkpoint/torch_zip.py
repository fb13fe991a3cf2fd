"""Lay out a file as `torch.save` writes it, without torch and before its tensors' bytes are known.

The format (torch's `caffe2/serialize/inline_container.h`): a zip of uncompressed records, `archive/data.pkl` with the
pickled object, `archive/data/0`, `archive/data/1`, … with one storage each at a multiple of 64 bytes, and a version. A
record's CRC-32 stands in its local header and in the directory at the end; those of tensors are filled in afterwards.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from dataclasses import dataclass
from math import prod
from typing import Any

from llmconvert.checkpoint.dtypes import ITEMSIZE

_STORAGES = {
    "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F64": "DoubleStorage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}  # fmt: skip
_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
_FLAGS, _VERSION, _VERSION64 = 0x0800, 20, 45
_DATE = 0x21  # 1980-01-01: the same object gives the same bytes


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes in an object to be saved.

    Attributes:
        dtype: safetensors dtype code.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Laid:
    """A laid-out file.

    Attributes:
        size: of the file, in bytes.
        pieces: all bytes that are not tensors', as (offset, bytes), in order.
        offsets: of each slot's data, in the order the slots come in the object.
        crc_places: of each slot, where its CRC-32 goes (4 bytes, little-endian), twice.
    """

    size: int
    pieces: tuple[tuple[int, bytes], ...]
    offsets: tuple[int, ...]
    crc_places: tuple[tuple[int, int], ...]


class Global:
    """A name to be pickled as it is, of a module that need not be there."""

    def __init__(self, module: str, name: str) -> None:
        """The name `name` of `module`."""
        self.module, self.name = module, name


@dataclass(frozen=True, eq=False)
class Called:
    """To be pickled as the result of a call."""

    function: Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Instance:
    """To be pickled as an object of a class, with its state: a dictionary, or what its `__setstate__` takes."""

    kind: Global
    state: Any


class _Storage:
    def __init__(self, key: int, slot: Slot) -> None:
        self.key, self.slot = key, slot


_REBUILD, _ORDERED = Global("torch._utils", "_rebuild_tensor_v2"), Global("collections", "OrderedDict")


# The pickler written in Python, which alone can be taught a name of a module that is not there.
_Python: Any = pickle._Pickler


class _Pickler(_Python):  # type: ignore[misc]
    """Writes slots as tensors whose storages are numbered in order."""

    dispatch = _Python.dispatch.copy()

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.slots: list[Slot] = []
        self._types = {dtype: Global("torch", name) for dtype, name in _STORAGES.items()}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        slot = value.slot
        return "storage", self._types[slot.dtype], str(value.key), "cpu", prod(slot.shape)

    def _save_called(self, value: Called) -> None:
        self.save(value.function)
        self.save(value.arguments)
        self.write(pickle.REDUCE)
        self.memoize(value)

    def _save_instance(self, value: Instance) -> None:
        self.save(value.kind)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.memoize(value)
        if value.state is not None:
            self.save(value.state)
            self.write(pickle.BUILD)

    def _save_global(self, value: Global) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memoize(value)

    def _save_slot(self, value: Slot) -> None:
        stride, strides = 1, list[int]()
        for size in reversed(value.shape):
            strides.insert(0, stride)
            stride *= max(1, size)
        self.slots.append(value)
        storage = _Storage(len(self.slots) - 1, value)
        self.save(_REBUILD)
        self.write(pickle.MARK)
        for part in (storage, 0, value.shape, tuple(strides), False):
            self.save(part)
        self.save(_ORDERED)
        self.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)

    dispatch[Global] = _save_global
    dispatch[Called] = _save_called
    dispatch[Instance] = _save_instance
    dispatch[Slot] = _save_slot


class _Archive:
    """A zip file under construction."""

    def __init__(self, base: int) -> None:
        self.base = self.position = base
        self.pieces: list[tuple[int, bytes]] = []
        self.entries: list[tuple[bytes, int, int, int]] = []

    def _put(self, data: bytes) -> int:
        at = self.position
        self.pieces.append((at, data))
        self.position += len(data)
        return at

    def header(self, name: str, size: int, crc: int, alignment: int = 1) -> int:
        """Write a local header such that the data begins at a multiple of `alignment`; where its CRC stands."""
        encoded, offset = name.encode(), self.position - self.base
        large = size >= _LIMIT
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        start = self.position + 30 + len(encoded) + len(extra) + 4
        gap = -start % alignment
        extra += struct.pack("<HH", 0x4246, gap) + b"Z" * gap  # torch's own padding field, "FB"
        shown = _LIMIT if large else size
        head = struct.pack(
            "<4sHHHHHIIIHH", b"PK\3\4", _VERSION64 if large else _VERSION, _FLAGS, 0, 0, _DATE, crc, shown, shown,
            len(encoded), len(extra),
        )  # fmt: skip
        self.entries.append((encoded, size, crc, offset))
        return self._put(head + encoded + extra) + 14

    def record(self, name: str, data: bytes) -> None:
        """Write a whole record."""
        self.header(name, len(data), zlib.crc32(data))
        self._put(data)

    def close(self) -> list[int]:
        """Write the directory; where each entry's CRC stands in it."""
        start, places = self.position, []
        for name, size, crc, offset in self.entries:
            values = [value for value in (size, size, offset) if value >= _LIMIT]
            extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
            shown = min(size, _LIMIT)
            head = struct.pack(
                "<4sHHHHHHIIIHHHHHII", b"PK\1\2", _VERSION64, _VERSION64 if values else _VERSION, _FLAGS, 0, 0, _DATE,
                crc, shown, shown, len(name), len(extra), 0, 0, 0, 0, min(offset, _LIMIT),
            )  # fmt: skip
            places.append(self._put(head + name + extra) + 16)
        count, size, offset = len(self.entries), self.position - start, start - self.base
        if count >= 0xFFFF or size >= _LIMIT or offset >= _LIMIT:
            end = self.position - self.base
            self._put(
                struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, _VERSION64, _VERSION64, 0, 0, count, count, size, offset)
                + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
            )
        shown = min(count, 0xFFFF)
        self._put(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, shown, shown, min(size, _LIMIT), min(offset, _LIMIT), 0))
        return places


def pickled(value: Any) -> bytes:
    """An object's pickle: plain values, `Global`, `Called`, `Instance`."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def torch_saved(value: Any) -> bytes:
    """An object without tensors as `torch.save` would save it."""
    laid = lay_out_torch(value)
    return b"".join(data for _, data in laid.pieces)


def lay_out_torch(value: Any, base: int = 0) -> Laid:
    """Lay out an object as `torch.save` would save it.

    Args:
        value: plain containers, plain values, `argparse.Namespace`, and a `Slot` for each tensor.
        base: where in its file the archive begins; all offsets are the file's.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    archive = _Archive(base)
    archive.record("archive/data.pkl", buffer.getvalue())
    archive.record("archive/byteorder", b"little")
    offsets, places = [], []
    for key, slot in enumerate(pickler.slots):
        places.append(archive.header(f"archive/data/{key}", slot.nbytes, 0, _ALIGNMENT))
        offsets.append(archive.position)
        archive.position += slot.nbytes
    archive.record("archive/version", b"3\n")
    directory = archive.close()[2 : 2 + len(offsets)]
    return Laid(
        archive.position - base, tuple(archive.pieces), tuple(offsets), tuple(zip(places, directory, strict=True))
    )


def combine_crc(first: int, second: int, length: int) -> int:
    """The CRC-32 of two runs of bytes from those of each.

    Appending n bytes multiplies a CRC, as a polynomial over GF(2), by x^(8n) modulo the generator (Adler, zlib's
    `crc32_combine`); the power is taken by squaring.

    Args:
        first: of the first run.
        second: of the second.
        length: bytes in the second.
    """
    power, square, bits = 1 << 31, 1 << 30, 8 * length
    while bits:
        if bits & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        bits >>= 1
    return _multiply(power, first) ^ second


_GENERATOR = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo CRC-32's generator; bit 31 is the constant term."""
    product, probe = 0, 1 << 31
    while a:
        if a & probe:
            product ^= b
            a ^= probe
        probe >>= 1
        b = (b >> 1) ^ _GENERATOR if b & 1 else b >> 1
    return product
