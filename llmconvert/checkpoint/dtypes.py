"""Element types by their safetensors codes, and the names other formats give them."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

ITEMSIZE: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element of each safetensors dtype code."""

FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
"""The types weights can be cast between."""

FROM_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
"""torch's names (config.json, command line) to codes."""

TO_NAME = {code: name for name, code in FROM_NAME.items()}

_CARRIER: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def carrier(dtype: str) -> npt.DTypeLike:
    """The unsigned numpy type that holds elements of `dtype` bit for bit (numpy has no bfloat16)."""
    return _CARRIER[ITEMSIZE[dtype]]


def in_dtype(value: float, dtype: str) -> float:
    """A Python number rounded to a float type, to nearest, ties to even."""
    if dtype == "F64":
        return value
    if dtype == "F16":
        return float(np.float16(value))
    single = float(np.float32(value))
    if dtype == "F32":
        return single
    bits = int(struct.unpack("<I", struct.pack("<f", single))[0])
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
