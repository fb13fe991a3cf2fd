"""Evaluate expressions by row blocks, and recognise the parts that only move bytes.

A block travels as a numpy array of unsigned integers that carry the elements bit for bit, shape [rows, ...].
Arithmetic goes through torch, imported when the first block needs it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmconvert.checkpoint.dtypes import ITEMSIZE, TO_NAME, carrier
from llmconvert.checkpoint.files import open_descriptor
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.errors import BadInput, InputOutput, Refused
from llmconvert.tensors.expressions import (
    LARGEST_E4M3,
    Beside,
    BlockScales,
    Cast,
    Columns,
    Concat,
    Dequantize,
    Expression,
    Fill,
    Gather,
    Interleave,
    Mean,
    NormalizeRows,
    Quantize,
    Rows,
    Scale,
    Shift,
    Stored,
    sources,
)

if TYPE_CHECKING:
    import torch

Block = npt.NDArray[Any]

MOVE_BYTES = 256 * 1024
"""The buffer for byte moves: it stays in the cache, where larger ones measured up to twice slower."""

BLOCK_BYTES = 1024 * 1024
"""Aim of one evaluated block; enough for one attention head of a large model."""

_SHORTEST_MOVE = 64 * 1024


class Reader:
    """Open files for positioned reads, shared by threads. Close it, or use it as a context manager."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        """The file descriptor for `path`, opened once.

        Raises:
            InputOutput: it cannot be opened.
        """
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = open_descriptor(path)
            return self._descriptors[path]

    def read_into(self, tensor: StoredTensor, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` bytes into the tensor.

        Raises:
            BadInput: the file ends before the tensor does.
            InputOutput: it cannot be read.
        """
        descriptor, position, done = self.descriptor(tensor.path), tensor.offset + offset, 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], position + done)
            except OSError as error:
                raise _unreadable(tensor.path, error) from None
            if count == 0:
                raise BadInput(
                    f"the file ended inside tensor `{tensor.name}`: it changed while being read", where=str(tensor.path)
                )
            done += count

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unreadable(path: Path, error: OSError) -> InputOutput:
    return InputOutput(f"cannot read the file: {error.strerror or error}", where=str(path))


def as_bytes(block: Block) -> memoryview:
    """The block's bytes, row-major."""
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


def to_torch(block: Block, dtype: str) -> torch.Tensor:
    """View a carrier block as a torch tensor of `dtype` (a float type)."""
    import torch

    signed = {2: np.int16, 4: np.int32, 8: np.int64}[ITEMSIZE[dtype]]
    return torch.from_numpy(block.view(signed)).view(getattr(torch, TO_NAME[dtype]))


def as_floats(block: Block, dtype: str) -> npt.NDArray[np.float64]:
    """The numbers a carrier block of a float type stands for, without torch."""
    if dtype == "BF16":
        return (block.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return block.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float64)


def _from_torch(tensor: torch.Tensor, dtype: str) -> Block:
    import torch

    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ITEMSIZE[dtype]]
    array: Block = tensor.contiguous().view(signed).numpy()
    return array.view(carrier(dtype))


def _origin(expression: Expression) -> str:
    return ", ".join(f"`{tensor.name}`" for tensor in sources(expression)) or "a constant"


def _arithmetic(expression: Expression, operand: Expression, block: Block) -> Block:
    import torch

    value = to_torch(np.ascontiguousarray(block), operand.dtype)
    match expression:
        case Scale(factor=factor):
            result = value.float() * factor
        case Shift(offset=offset):
            result = value.float() + offset
        case NormalizeRows():
            result = torch.nn.functional.normalize(value, dim=-1)
        case _:
            result = value.to(getattr(torch, TO_NAME[expression.dtype]))
            infinite = result.isinf() if ITEMSIZE[expression.dtype] == 2 else None
            if infinite is not None and bool(infinite.any()) and bool((infinite & ~value.isinf()).any()):
                raise _overflow(operand, expression.dtype)
    return _from_torch(result, expression.dtype)


def _mean(blocks: list[Block], dtype: str) -> Block:
    import torch

    total = torch.stack([to_torch(np.ascontiguousarray(block), dtype).double() for block in blocks]).mean(0)
    return _from_torch(total.to(getattr(torch, TO_NAME[dtype])), dtype)


def _e4m3(block: Block) -> torch.Tensor:
    """E4M3 numbers as float32, 2^8 times too small.

    Shifted by 7 the bits are a float16, whose exponent counts from 15 and not from 7; that widens fast.
    """
    import torch

    contiguous = np.ascontiguousarray(block)
    wide = torch.from_numpy(contiguous.view(np.int8)).to(torch.int16)
    # The sign came along when the byte was widened: it is in every bit from 7 on, and two of them stay.
    value = wide.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16).float()
    magnitude = contiguous & 0x7F
    if magnitude.size and magnitude.max() == 0x7F:
        value.masked_fill_(torch.from_numpy(magnitude == 0x7F), math.nan)
    return value


def _scales(block: Block, dtype: str) -> torch.Tensor:
    """Scales as float32."""
    import torch

    if dtype in ("U8", "F8_E8M0"):
        powers = np.ldexp(np.float32(1), block.astype(np.int32) - 127)
        return torch.from_numpy(np.where(block == 255, np.float32(math.nan), powers))
    return to_torch(np.ascontiguousarray(block), dtype).float()


def _bands(
    expression: Dequantize | Quantize, start: int, stop: int, reader: Reader
) -> Iterator[tuple[slice, torch.Tensor]]:
    """For rows `start` to `stop`, slices of them that share scales, and the scale of every column."""
    height, width = expression.block
    first = start // height
    scales = _scales(evaluate(expression.scale, first, -(-stop // height), reader), expression.scale.dtype)
    column = expression.column if isinstance(expression, Dequantize) else 0
    columns = scales.repeat_interleave(width, dim=1)[:, column : column + expression.shape[1]]
    for k, row in enumerate(columns):
        low, high = max((first + k) * height, start), min((first + k + 1) * height, stop)
        yield slice(low - start, high - start), row


def _dequantized(expression: Dequantize, dtype: str, start: int, stop: int, reader: Reader) -> Block:
    """Rows of a dequantised matrix, rounded once to `dtype`.

    Raises:
        Refused: they overflow to infinity.
    """
    import torch

    value, largest = _e4m3(evaluate(expression.operand, start, stop, reader)), 0.0
    for band, scales in _bands(expression, start, stop, reader):
        value[band] *= scales * 256.0  # exact: a power of two
        largest = max(largest, float(scales.abs().max()))
    kind = getattr(torch, TO_NAME[dtype])
    result = value.to(kind)
    if largest * LARGEST_E4M3 > torch.finfo(kind).max and bool((result.isinf() & ~value.isinf()).any()):
        raise _overflow(expression, dtype)
    return _from_torch(result, dtype)


def _overflow(expression: Expression, dtype: str) -> Refused:
    return Refused(
        f"values of {_origin(expression)} overflow to infinity in {TO_NAME[dtype]}",
        hint="use `--dtype bfloat16` or `--dtype float32`",
    )


def _quantized(expression: Quantize, start: int, stop: int, reader: Reader) -> Block:
    import torch

    value = to_torch(evaluate(expression.operand, start, stop, reader), expression.operand.dtype).float()
    for band, scales in _bands(expression, start, stop, reader):
        value[band] /= torch.where(scales == 0, 1.0, scales)
    quantised = value.clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    array: Block = quantised.view(torch.uint8).numpy()
    return array


def _block_scales(expression: BlockScales, start: int, stop: int, reader: Reader) -> Block:
    import torch

    (height, width), operand = expression.block, expression.operand
    found = []
    for k in range(start, stop):
        block = evaluate(operand, k * height, min((k + 1) * height, operand.rows), reader)
        largest = to_torch(np.ascontiguousarray(block), operand.dtype).float().abs().amax(0)
        padded = torch.nn.functional.pad(largest, (0, expression.shape[1] * width - len(largest)))
        found.append(padded.view(-1, width).amax(1) / LARGEST_E4M3)
    scales = torch.stack(found)
    return _from_torch(torch.where(scales == 0, 1.0, scales), "F32")


def _group_indices(expression: Gather, start: int, stop: int) -> npt.NDArray[np.int64]:
    position = np.arange(start, stop)
    pattern = np.asarray(expression.pattern, dtype=np.int64)
    entry = pattern[position % len(pattern)]
    return np.where(entry < 0, -1, position // len(pattern) * expression.period + entry)


def _gather_rows(expression: Gather, start: int, stop: int, reader: Reader) -> Block:
    index = _group_indices(expression, start, stop)
    wanted = index[index >= 0]
    if not wanted.size:
        return np.zeros((stop - start, *expression.shape[1:]), dtype=carrier(expression.dtype))
    low, high = int(wanted.min()), int(wanted.max()) + 1
    if high - low <= 4 * len(index) + expression.period:
        block = evaluate(expression.operand, low, high, reader)[np.maximum(index - low, 0)]
        if wanted.size < index.size:
            block[index < 0] = 0
        return block
    out: Block = np.zeros((stop - start, *expression.shape[1:]), dtype=carrier(expression.dtype))
    for position in np.flatnonzero(index >= 0):
        out[position] = evaluate(expression.operand, int(index[position]), int(index[position]) + 1, reader)[0]
    return out


def _gather_columns(expression: Gather, block: Block) -> Block:
    index = _group_indices(expression, 0, expression.shape[1])
    out: Block = block[:, np.maximum(index, 0)]
    out[:, index < 0] = 0
    return out


def segments(expression: Concat | Interleave, start: int, stop: int) -> Iterator[tuple[Expression, int, int]]:
    """Split rows `start` to `stop` into (part, first row, end row) of the parts they come from, in order."""
    if isinstance(expression, Concat):
        base = 0
        for part in expression.parts:
            low, high = max(start - base, 0), min(stop - base, part.rows)
            if low < high:
                yield part, low, high
            base += part.rows
        return
    total = sum(expression.chunks)
    for turn in range(start // total, -(-stop // total)):
        base = turn * total
        for part, chunk in zip(expression.parts, expression.chunks, strict=True):
            low, high = max(start - base, 0), min(stop - base, chunk)
            if low < high:
                yield part, turn * chunk + low, turn * chunk + high
            base += chunk


def evaluate(expression: Expression, start: int, stop: int, reader: Reader) -> Block:
    """Rows `start` to `stop` of an expression, as a carrier array of shape [stop - start, ...].

    Raises:
        Refused: a cast overflows to infinity.
        BadInput: a source file ended early.
    """
    match expression:
        case Stored(tensor=tensor):
            out: Block = np.empty((stop - start, *expression.shape[1:]), dtype=carrier(expression.dtype))
            reader.read_into(tensor, as_bytes(out), start * expression.row_bytes)
            return out
        case Rows(operand=operand, start=first):
            return evaluate(operand, first + start, first + stop, reader)
        case Columns(operand=operand, start=first):
            return evaluate(operand, start, stop, reader)[:, first : first + expression.shape[1]]
        case Mean(parts=parts):
            return _mean([evaluate(part, start, stop, reader) for part in parts], expression.dtype)
        case Beside(parts=parts):
            return np.concatenate([evaluate(part, start, stop, reader) for part in parts], axis=1)
        case Concat() | Interleave():
            blocks = [evaluate(part, low, high, reader) for part, low, high in segments(expression, start, stop)]
            return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        case Gather(axis=0):
            return _gather_rows(expression, start, stop, reader)
        case Gather(operand=operand):
            return _gather_columns(expression, evaluate(operand, start, stop, reader))
        case Fill(value=value):
            shape = (stop - start, *expression.shape[1:])
            if value == 0.0:
                return np.zeros(shape, dtype=carrier(expression.dtype))
            import torch

            return _from_torch(
                torch.full(shape, value, dtype=getattr(torch, TO_NAME[expression.dtype])), expression.dtype
            )
        case Dequantize():
            return _dequantized(expression, "F32", start, stop, reader)
        case Cast(operand=Dequantize() as quantised, dtype=dtype):
            return _dequantized(quantised, dtype, start, stop, reader)
        case Quantize():
            return _quantized(expression, start, stop, reader)
        case BlockScales():
            return _block_scales(expression, start, stop, reader)
        case Scale(operand=operand) | Shift(operand=operand) | NormalizeRows(operand=operand) | Cast(operand=operand):
            return _arithmetic(expression, operand, evaluate(operand, start, stop, reader))
    raise TypeError(f"not an expression: {expression!r}")


def block_rows(expression: Expression) -> int:
    """How many rows to evaluate at a time, in whole groups of a gather where that fits.

    Memory per worker is a few times `BLOCK_BYTES`, or a few rows where one row is longer than that.
    """
    widest = max(expression.row_bytes, 1, *(node.row_bytes for node in expression.operands or (expression,)))
    return max(1, BLOCK_BYTES // widest)


def blocks(expression: Expression, start: int, stop: int, reader: Reader) -> Iterator[Block]:
    """Rows `start` to `stop` in consecutive blocks of bounded size."""
    step = block_rows(expression)
    for low in range(start, stop, step):
        yield evaluate(expression, low, min(low + step, stop), reader)


def pieces(expression: Expression, start: int, stop: int) -> Iterator[tuple[Expression, int, int]]:
    """Split rows into ranges of `Stored` tensors (plain byte moves) and of whatever must be evaluated.

    Consecutive ranges come in output order; the caller copies the former and evaluates the latter.
    """
    match expression:
        case Rows(operand=operand, start=first):
            yield from pieces(operand, first + start, first + stop)
        case Concat() | Interleave() if _mean_segment(expression) >= _SHORTEST_MOVE:
            for part, low, high in segments(expression, start, stop):
                yield from pieces(part, low, high)
        case Gather(axis=0) if expression.nbytes // _run_count(expression) >= _SHORTEST_MOVE:
            yield from _gather_pieces(expression, start, stop)
        case _:
            yield expression, start, stop


def _mean_segment(expression: Concat | Interleave) -> int:
    if isinstance(expression, Concat):
        return max(part.nbytes for part in expression.parts)
    return sum(expression.chunks) * expression.row_bytes // len(expression.chunks)


def _run_count(expression: Gather) -> int:
    return max(1, expression.rows // len(expression.pattern) * len(expression.runs))


def _gather_pieces(expression: Gather, start: int, stop: int) -> Iterator[tuple[Expression, int, int]]:
    width = len(expression.pattern)
    for group in range(start // width, -(-stop // width)):
        for position, first, length in expression.runs:
            low = max(group * width + position, start)
            high = min(group * width + position + length, stop)
            if low >= high:
                continue
            if first < 0:
                yield Fill((high - low, *expression.shape[1:]), expression.dtype, 0.0), 0, high - low
                continue
            source = group * expression.period + first + (low - group * width - position)
            yield from pieces(expression.operand, source, source + high - low)
