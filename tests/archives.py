"""Build what `torch.save` would never write: pickles out of opcodes, and zip archives with anything wrong in them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def long(value: int) -> bytes:
    """LONG1, LONG4."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return (b"\x8a" + bytes([len(raw)]) if len(raw) < 256 else b"\x8b" + struct.pack("<I", len(raw))) + raw


def integers(values: object) -> bytes:
    """A tuple of whole numbers, or opcodes as they are."""
    if isinstance(values, bytes):
        return values
    return b"(" + b"".join(long(value) for value in values) + b"t"  # type: ignore[attr-defined]


def storage(kind: bytes = name("torch", "FloatStorage"), key: object = "0", numel: object = 4) -> bytes:
    """The reference to a storage."""
    key = text(key) if isinstance(key, str) else key
    numel = long(numel) if isinstance(numel, int) else numel
    return b"(" + text("storage") + kind + key + text("cpu") + numel + b"tQ"  # type: ignore[operator]


def tensor(
    where: bytes | None = None, offset: object = 0, shape: object = (4,), stride: object = (1,), rest: bytes = b""
) -> bytes:
    """A tensor, with anything in place of its parts."""
    parts = (storage() if where is None else where) + (long(offset) if isinstance(offset, int) else offset)  # type: ignore[operator]
    parts += integers(shape) + integers(stride) + b"\x89" + name("collections", "OrderedDict") + b")R" + rest
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"tR"


def state(*values: bytes, **named: bytes) -> bytes:
    """A pickled dictionary of what opcodes make, under the names `a`, `b`, … or the names given."""
    entries = {chr(ord("a") + k): value for k, value in enumerate(values)} | named
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u."


def archive(pickled: bytes, storages: Mapping[str, bytes] | None = None, compress: bool = False) -> bytes:
    """A file as torch.save makes it, of one pickle and its storages (by default one of 16 bytes, called 0)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/byteorder", b"little")
        for key, data in ({"0": bytes(16)} if storages is None else storages).items():
            made.writestr(f"archive/data/{key}", data)
        made.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def write(path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """`archive` as a file."""
    path.write_bytes(archive(pickled, storages))
    return path


def records(*entries: tuple[str, bytes], flags: int = 0, method: int = 0) -> bytes:
    """A zip archive of these records, whatever their names."""
    out, directory = b"", b""
    for called, data in entries:
        raw, crc = called.encode(), zlib.crc32(data)
        fields = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, crc, len(data), len(data), len(raw), 0)
        directory += b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(out)) + raw
        out += b"PK\3\4" + fields + raw + data
    return out + directory + end(len(entries), len(directory), len(out))


def end(count: int, size: int, offset: int) -> bytes:
    """The end of a zip archive."""
    return b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size, offset, 0)
