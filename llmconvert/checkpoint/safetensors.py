"""The safetensors container: read and validate headers, lay out new files.

Format: https://github.com/huggingface/safetensors — eight bytes of little-endian header length, a JSON header,
then the tensors' bytes without gaps. Only headers pass through here; reading one needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.checkpoint.files import opened, shown, whole_number
from llmconvert.checkpoint.stored import StoredTensor, is_name
from llmconvert.errors import BadInput

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit; a longer header is refused by every reader."""

_ALIGNMENT = 8
_LIMIT = 1 << 64
"""Sizes and offsets are 64-bit numbers in the library."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and validate one file's header.

    Returns:
        The file's tensors by name, in the order of the header.

    Raises:
        BadInput: the file is no regular one or truncated, its header is not valid, or offsets overlap, leave gaps or
            leave the file.
        InputOutput: it cannot be read.
    """
    where = str(path)
    redo = "download or write this file again"
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadInput(f"the file is {size} bytes long: too short for safetensors", where=where, hint=redo)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise BadInput(
                f"the header claims {length:,} bytes but the file holds {size:,}: truncated, or not safetensors",
                where=where,
                hint=redo,
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the header is not valid JSON: {error}", where=where, hint=redo) from None
    if not isinstance(header, dict):
        raise BadInput("the header is not a JSON object", where=where, hint=redo)
    described = header.pop("__metadata__", None)
    if not _is_description(described):
        raise BadInput("the header's `__metadata__` is not a mapping of text to text", where=where, hint=redo)
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    base = 8 + length
    for name, info in header.items():
        entry = _entry(name, info)
        if entry is None:
            raise BadInput(f"the header entry of tensor {shown(name)} is malformed", where=where, hint=redo)
        dtype, shape, begin, end = entry
        if dtype not in ITEMSIZE:
            raise BadInput(f"tensor `{name}` has the unknown dtype {shown(dtype)}", where=where)
        if math.prod(shape) * ITEMSIZE[dtype] != end - begin:
            raise BadInput(
                f"tensor `{name}` of shape {shown(list(shape))} and dtype {dtype} cannot take {end - begin:,} bytes",
                where=where,
                hint=redo,
            )
        tensors[name] = StoredTensor(name, path, base + begin, dtype, shape)
        spans.append((begin, end, name))
    spans.sort()
    position = 0
    for begin, end, name in spans:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise BadInput(f"tensor `{name}` {fault} (offset {begin:,}, expected {position:,})", where=where, hint=redo)
        position = end
    if base + position != size:
        fault = "is truncated" if base + position > size else "has bytes no tensor owns"
        raise BadInput(f"the file {fault}: {size:,} bytes, {base + position:,} expected", where=where, hint=redo)
    return tensors


def _is_description(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(text, str) for text in value.values()))


def _entry(name: str, info: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    """A tensor's dtype code, shape and place in the data; None where the header does not say them."""
    if not is_name(name) or not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if type(dtype) is not str or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        return None
    try:
        name.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    begin, end = offsets
    if not all(type(n) is int and 0 <= n < _LIMIT for n in (*shape, begin, end)) or begin > end:
        return None
    return dtype, tuple(shape), begin, end


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Lay out a new file holding `tensors` (name → dtype code and shape) in the given order.

    Returns:
        The file's first bytes (length prefix and header, padded to 8 bytes) and each tensor's byte offset in the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    begins: dict[str, int] = {}
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        begins[name] = position
        position = end
    body = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % _ALIGNMENT)
    prefix = len(body).to_bytes(8, "little") + body
    return prefix, {name: len(prefix) + begin for name, begin in begins.items()}
