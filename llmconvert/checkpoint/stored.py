"""A tensor as it lies in a file: where its bytes are and what they mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from llmconvert.checkpoint.dtypes import ITEMSIZE

_MAX_NAME = 1000


def is_name(name: Any) -> bool:
    """Whether something can be a tensor's name: text, and no longer than the numbers in it can be read."""
    return isinstance(name, str) and len(name) <= _MAX_NAME


class StoredTensor(NamedTuple):
    """One contiguous, row-major tensor in a file.

    Attributes:
        name: its name in the checkpoint.
        path: the file that holds it.
        offset: byte offset of its first element in the file.
        dtype: safetensors dtype code.
        shape: its shape; () for a scalar.
    """

    name: str
    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]
