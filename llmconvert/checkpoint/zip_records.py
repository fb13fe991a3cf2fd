"""Where the records of a file written by `torch.save` lie: its zip directory, read as torch reads it, or not at all.

Python's zipfile forgives what torch's reader (miniz, `caffe2/serialize/inline_container.cc`) does not, or understands
otherwise: bytes before the archive, several records of one name, names that differ in case alone. What can be read in
two ways is refused here. Format: PKWARE's APPNOTE 6.3.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

from llmconvert.checkpoint.files import read_at

_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY_BYTES = 1 << 28
"""Enough for two million records."""

_SMALL, _LARGE = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_FOLDER = 0x10
"""Among a record's attributes, those of DOS."""
_PATCH, _METHODS = 0x0020, (0, 8)
"""What torch's reader (miniz) knows of: no patches, and bytes as they are or deflated."""


class NotAnArchive(ValueError):
    """There is no zip archive that ends where the file ends."""


class Record(NamedTuple):
    """A record's bytes.

    Attributes:
        offset: where they begin in the file.
        size: how many there are.
        stored: whether they are as they were, not compressed.
        crc: their CRC-32; 0 where it was not computed.
    """

    offset: int
    size: int
    stored: bool
    crc: int


def read_records(file: BinaryIO, start: int, length: int) -> dict[str, Record]:
    """The records of an archive, by their names within its one folder.

    Args:
        file: a file.
        start: where in it the archive begins.
        length: how long the archive is.

    Raises:
        NotAnArchive: the archive does not end there, or is cut short.
        ValueError: it contradicts itself, or may be read in two ways.
    """
    descriptor = file.fileno()
    begin, size, count = _directory_place(descriptor, start, length)
    directory = read_at(descriptor, size, start + begin)
    records: dict[str, Record] = {}
    seen: set[str] = set()
    root: str | None = None
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > size:
            raise NotAnArchive("its directory is cut short")
        (mark, _, _, flags, method, _, _, crc, packed, plain, name_size, extra_size, comment_size, disk, _, kind, header) = (
            _ENTRY.unpack_from(directory, at)
        )
        if mark != b"PK\1\2":
            raise NotAnArchive("its directory is damaged")
        at += _ENTRY.size
        raw = directory[at : at + name_size]
        if _LARGE in (packed, plain, header):
            packed, plain, header = _wide(
                directory[at + name_size : at + name_size + extra_size], packed, plain, header
            )
        at += name_size + extra_size + comment_size
        name = raw.decode("utf-8")
        if flags & _ENCRYPTED:
            raise ValueError(f"the record `{name}` is encrypted")
        if flags & _PATCH or method not in _METHODS:
            raise ValueError(f"the record `{name}` is packed in a way that torch does not read")
        if disk:
            raise ValueError("the archive is in several parts")
        if kind & _FOLDER:
            raise ValueError(f"the record `{name}` says that it is a folder")  # of which miniz reads no byte
        if method == 0 and packed != plain:
            raise ValueError(f"the record `{name}` has two sizes")
        folder, slash, own = name.partition("/")
        if root is None:
            if not slash:
                raise ValueError("its records lie in no folder")
            root = folder
        # Torch's reader looks for names without regard to case.
        if name.lower() in seen:
            raise ValueError(f"two records are called `{name}`")
        seen.add(name.lower())
        data = _data_place(descriptor, start, header, raw, begin)
        if data + packed > begin:
            raise NotAnArchive(f"the record `{name}` is cut short")
        if folder == root:
            records[own] = Record(start + data, packed, method == 0, crc)
    if at != size:
        raise NotAnArchive("its directory is damaged")
    return records


def _directory_place(descriptor: int, start: int, length: int) -> tuple[int, int, int]:
    """Where the directory begins in the archive, its size, and the number of its entries."""
    place = length - _END.size
    tail = read_at(descriptor, _END.size, start + place) if place >= 0 else b""
    if len(tail) < _END.size or not tail.startswith(b"PK\5\6") or tail[-2:] != b"\0\0":
        raise NotAnArchive("its end is not that of an archive")
    _, disk, first_disk, here, count, size, begin, _ = _END.unpack(tail)
    if disk not in (0, _SMALL) or first_disk not in (0, _SMALL) or here != count:
        raise ValueError("the archive is in several parts")
    end = place
    locator = read_at(descriptor, _LOCATOR.size, start + place - _LOCATOR.size) if place >= _LOCATOR.size else b""
    if locator.startswith(b"PK\6\7"):
        _, disk, end, disks = _LOCATOR.unpack(locator)
        if disk or disks != 1 or end + _END64.size != place - _LOCATOR.size:
            raise NotAnArchive("its end is damaged")
        wide = read_at(descriptor, _END64.size, start + end)
        if len(wide) < _END64.size or not wide.startswith(b"PK\6\6"):
            raise NotAnArchive("its end is damaged")
        _, own, _, _, disk, first_disk, here, count64, size64, begin64 = _END64.unpack(wide)
        if own != _END64.size - 12:
            raise NotAnArchive("its end is damaged")
        if disk or first_disk or here != count64:
            raise ValueError("the archive is in several parts")
        for narrow, full, mask in ((count, count64, _SMALL), (size, size64, _LARGE), (begin, begin64, _LARGE)):
            if narrow not in (full, mask):
                raise ValueError("its directory is described in two ways")
        count, size, begin = count64, size64, begin64
    if begin + size != end:
        raise NotAnArchive("its directory is not where it should be")
    if size > _MAX_DIRECTORY_BYTES:
        raise ValueError(f"its directory is {size:,} bytes long")
    return begin, size, count


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
    """Sizes and place, those of them that do not fit 32 bits taken from the field kept for them."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wanted = sum(value == _LARGE for value in values)
            if size < 8 * wanted or at + 4 + size > len(extra):
                break
            found = iter(struct.unpack_from(f"<{wanted}Q", extra, at + 4))
            # In the directory's order, which is: size, packed size, place.
            packed, plain, header = values
            plain = next(found) if plain == _LARGE else plain
            packed = next(found) if packed == _LARGE else packed
            return packed, plain, next(found) if header == _LARGE else header
        at += 4 + size
    return values  # exactly 2^32 - 1, as miniz has it


def _data_place(descriptor: int, start: int, header: int, name: bytes, end: int) -> int:
    """Where a record's data begin in the archive: behind its own header, which pads as it likes."""
    if header + _LOCAL.size > end:
        raise NotAnArchive("a record is cut short")
    local = read_at(descriptor, _LOCAL.size + len(name), start + header)
    if len(local) < _LOCAL.size + len(name) or not local.startswith(b"PK\3\4"):
        raise NotAnArchive("a record is damaged")
    name_size, extra_size = struct.unpack_from("<HH", local, 26)
    if local[_LOCAL.size :] != name or name_size != len(name):
        raise ValueError(f"the record `{name.decode('utf-8')}` has two names")
    return header + _LOCAL.size + int(name_size) + int(extra_size)
