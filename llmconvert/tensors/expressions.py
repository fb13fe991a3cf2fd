"""The algebra: what a written tensor is in terms of stored ones, with shape and dtype known before any byte is read.

Nodes are immutable. The lower-case functions are the constructors to use: they check shapes and simplify
(a permutation of a permutation is one permutation, a cast to the same type is nothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.checkpoint.stored import StoredTensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Expression:
    """Base of all nodes.

    Attributes:
        shape: the tensor's shape; () for a scalar.
        dtype: safetensors dtype code.
    """

    shape: Shape
    dtype: str

    @property
    def rows(self) -> int:
        """Length of the first axis (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.rows * self.row_bytes

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The expressions this one is made of."""
        return ()


@dataclass(frozen=True)
class Stored(Expression):
    """A tensor in a file."""

    tensor: StoredTensor


@dataclass(frozen=True)
class Fill(Expression):
    """A constant tensor."""

    value: float


@dataclass(frozen=True)
class _Unary(Expression):
    operand: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The parts."""
        return (self.operand,)


@dataclass(frozen=True)
class Rows(_Unary):
    """Rows `start` to `start + shape[0]` of the operand."""

    start: int


@dataclass(frozen=True)
class Columns(_Unary):
    """Columns `start` to `start + shape[1]` of the operand."""

    start: int


@dataclass(frozen=True)
class Gather(_Unary):
    """Rows (axis 0) or columns (axis 1) picked by a pattern that repeats.

    The operand's axis is cut into groups of `period`; from each group, `pattern` picks entries in order.
    An entry of -1 is a zero. Head-wise permutations, grouped QKV and repeated heads are all of this form.
    """

    pattern: tuple[int, ...]
    period: int
    axis: int

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """The pattern as (position in the pattern, first source entry or -1, length) of consecutive entries."""
        runs: list[tuple[int, int, int]] = []
        for position, entry in enumerate(self.pattern):
            if runs:
                at, first, length = runs[-1]
                if (first == -1 and entry == -1) or (first >= 0 and entry == first + length):
                    runs[-1] = (at, first, length + 1)
                    continue
            runs.append((position, entry, 1))
        return tuple(runs)


@dataclass(frozen=True)
class Scale(_Unary):
    """The operand in float32, times `factor`."""

    factor: float


@dataclass(frozen=True)
class Shift(_Unary):
    """The operand in float32, plus `offset`."""

    offset: float


@dataclass(frozen=True)
class NormalizeRows(_Unary):
    """Each row divided by its Euclidean norm (at least 1e-12), in the operand's own dtype."""


@dataclass(frozen=True)
class Cast(_Unary):
    """The operand rounded to another float type (to nearest, ties to even)."""


@dataclass(frozen=True)
class Dequantize(Expression):
    """Block-wise quantised numbers times their blocks' scales, in float32.

    Element [m, n] is operand[m, n] · scale[m // block[0], (column + n) // block[1]]; blocks at the edges are cropped
    (deepseek-ai/DeepSeek-V3, README_WEIGHTS.md). A scale in E8M0 or U8 is 2^(b - 127).
    """

    operand: Expression
    scale: Expression
    block: tuple[int, int]
    column: int

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The numbers and the scales."""
        return (self.operand, self.scale)


@dataclass(frozen=True)
class BlockScales(_Unary):
    """The scale of each block of a matrix, in float32: its largest magnitude over `LARGEST_E4M3`, 1 for a block of zeros."""

    block: tuple[int, int]


@dataclass(frozen=True)
class Quantize(Expression):
    """A matrix over its blocks' scales, rounded to E4M3 (to nearest, ties to even, saturating): see `Dequantize`."""

    operand: Expression
    scale: Expression
    block: tuple[int, int]

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The numbers and the scales."""
        return (self.operand, self.scale)


@dataclass(frozen=True)
class Concat(Expression):
    """Operands stacked along axis 0."""

    parts: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The parts."""
        return self.parts


@dataclass(frozen=True)
class Mean(Expression):
    """The mean of tensors of one shape, summed in float64."""

    parts: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The parts."""
        return self.parts


@dataclass(frozen=True)
class Beside(Expression):
    """Operands side by side along axis 1."""

    parts: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The parts."""
        return self.parts


@dataclass(frozen=True)
class Interleave(Expression):
    """Rows dealt from each part in turn: `chunks[0]` from the first, `chunks[1]` from the second, and round again."""

    parts: tuple[Expression, ...]
    chunks: tuple[int, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The parts."""
        return self.parts


def stored(tensor: StoredTensor) -> Expression:
    """The expression for a tensor in a file."""
    return Stored(tensor.shape, tensor.dtype, tensor)


def fill(shape: Shape, dtype: str, value: float = 0.0) -> Expression:
    """A constant tensor."""
    return Fill(shape, dtype, value)


def rows(operand: Expression, start: int, stop: int) -> Expression:
    """Rows `start` to `stop`.

    Raises:
        ValueError: the range is not inside the operand.
    """
    if not 0 <= start <= stop <= operand.rows:
        raise ValueError(f"rows {start}:{stop} of a tensor with {operand.rows}")
    if (start, stop) == (0, operand.rows):
        return operand
    if isinstance(operand, Rows):
        return rows(operand.operand, operand.start + start, operand.start + stop)
    return Rows((stop - start, *operand.shape[1:]), operand.dtype, operand, start)


def columns(operand: Expression, start: int, stop: int) -> Expression:
    """Columns `start` to `stop` of a matrix.

    Raises:
        ValueError: the range is not inside the operand.
    """
    if len(operand.shape) != 2 or not 0 <= start <= stop <= operand.shape[1]:
        raise ValueError(f"columns {start}:{stop} of shape {operand.shape}")
    if (start, stop) == (0, operand.shape[1]):
        return operand
    match operand:
        case Columns(operand=inner, start=first):
            return columns(inner, first + start, first + stop)
        case Cast(operand=inner, dtype=dtype):
            return cast(columns(inner, start, stop), dtype)
        case Dequantize(operand=inner, scale=scales, block=block, column=first):
            return Dequantize(
                (operand.shape[0], stop - start), "F32", columns(inner, start, stop), scales, block, first + start
            )
    return Columns((operand.shape[0], stop - start), operand.dtype, operand, start)


def gather(operand: Expression, pattern: Sequence[int], period: int, axis: int = 0) -> Expression:
    """Pick `pattern` from each group of `period` rows (axis 0) or columns (axis 1).

    Raises:
        ValueError: the axis is not a multiple of `period`, or the pattern leaves it.
    """
    if len(operand.shape) <= axis or operand.shape[axis] % period:
        raise ValueError(f"axis {axis} of shape {operand.shape} is not a multiple of {period}")
    if any(not -1 <= entry < period for entry in pattern):
        raise ValueError(f"the pattern leaves its period of {period}")
    picked = tuple(pattern)
    if picked == tuple(range(period)):
        return operand
    if isinstance(operand, Gather) and operand.axis == axis and len(operand.pattern) == period:
        inner = tuple(-1 if entry < 0 else operand.pattern[entry] for entry in picked)
        return gather(operand.operand, inner, operand.period, axis)
    shape = list(operand.shape)
    shape[axis] = shape[axis] // period * len(picked)
    return Gather(tuple(shape), operand.dtype, operand, picked, period, axis)


def concat(parts: Sequence[Expression]) -> Expression:
    """Stack along axis 0.

    Raises:
        ValueError: the parts differ in dtype or in any later axis.
    """
    first = parts[0]
    if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype or not part.shape for part in parts):
        raise ValueError(f"cannot concatenate {[(part.dtype, part.shape) for part in parts]}")
    if len(parts) == 1:
        return first
    return Concat((sum(part.rows for part in parts), *first.shape[1:]), first.dtype, tuple(parts))


def mean(parts: Sequence[Expression]) -> Expression:
    """The mean of tensors, in their dtype.

    Raises:
        ValueError: they differ in dtype or shape.
    """
    first = parts[0]
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        raise ValueError(f"there is no mean of {[(part.dtype, part.shape) for part in parts]}")
    return first if len(parts) == 1 else Mean(first.shape, first.dtype, tuple(parts))


def beside(parts: Sequence[Expression]) -> Expression:
    """Put matrices side by side along axis 1.

    Raises:
        ValueError: the parts differ in dtype or in rows.
    """
    first = parts[0]
    if any(len(part.shape) != 2 or part.shape[0] != first.shape[0] or part.dtype != first.dtype for part in parts):
        raise ValueError(f"cannot put side by side {[(part.dtype, part.shape) for part in parts]}")
    if len(parts) == 1:
        return first
    return Beside((first.shape[0], sum(part.shape[1] for part in parts)), first.dtype, tuple(parts))


def interleave(parts: Sequence[Expression], chunks: Sequence[int]) -> Expression:
    """Deal rows from each part in turn, `chunks[k]` at a time from part k.

    Raises:
        ValueError: the parts disagree in dtype, later axes or the number of rounds.
    """
    first = parts[0]
    rounds = {part.rows / chunk for part, chunk in zip(parts, chunks, strict=True)}
    if (
        len(rounds) != 1
        or rounds.pop() % 1
        or any(p.shape[1:] != first.shape[1:] or p.dtype != first.dtype for p in parts)
    ):
        raise ValueError(f"cannot interleave {[(part.dtype, part.shape) for part in parts]} by {chunks}")
    return Interleave((sum(part.rows for part in parts), *first.shape[1:]), first.dtype, tuple(parts), tuple(chunks))


def scale(operand: Expression, factor: float) -> Expression:
    """`factor` times the operand, in float32."""
    return operand if factor == 1.0 else Scale(operand.shape, "F32", operand, factor)


def shift(operand: Expression, offset: float) -> Expression:
    """The operand plus `offset`, in float32."""
    return operand if offset == 0.0 else Shift(operand.shape, "F32", operand, offset)


def normalize_rows(operand: Expression) -> Expression:
    """Rows scaled to unit Euclidean norm, in the operand's dtype (as `torch.nn.functional.normalize`)."""
    return NormalizeRows(operand.shape, operand.dtype, operand)


WIDENS = frozenset({("BF16", "F32"), ("BF16", "F64"), ("F16", "F32"), ("F16", "F64"), ("F32", "F64")})
"""Casts that round nothing."""


def cast(operand: Expression, dtype: str) -> Expression:
    """The operand in another float type."""
    if operand.dtype == dtype:
        return operand
    if isinstance(operand, Fill):
        return Fill(operand.shape, dtype, operand.value)
    if isinstance(operand, Cast) and (operand.operand.dtype, operand.dtype) in WIDENS:
        return cast(operand.operand, dtype)
    return Cast(operand.shape, dtype, operand)


LARGEST_E4M3 = 448.0


def block_grid(shape: Shape, block: tuple[int, int]) -> Shape:
    """Rows and columns of the scales of a matrix."""
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def dequantize(operand: Expression, scale: Expression, block: tuple[int, int]) -> Expression:
    """A quantised matrix as float32.

    Raises:
        ValueError: it is no matrix, or the scales are not one a block.
    """
    if len(operand.shape) != 2 or scale.shape != block_grid(operand.shape, block):
        raise ValueError(f"scales of shape {scale.shape} for {operand.shape} in blocks of {block}")
    return Dequantize(operand.shape, "F32", operand, scale, block, 0)


def block_scales(operand: Expression, block: tuple[int, int]) -> Expression:
    """The scales to quantise a matrix with."""
    return BlockScales(block_grid(operand.shape, block), "F32", operand, block)


def quantize(operand: Expression, scale: Expression, block: tuple[int, int]) -> Expression:
    """A matrix in E4M3.

    Raises:
        ValueError: it is no matrix, or the scales are not one a block.
    """
    if len(operand.shape) != 2 or scale.shape != block_grid(operand.shape, block):
        raise ValueError(f"scales of shape {scale.shape} for {operand.shape} in blocks of {block}")
    return Quantize(operand.shape, "F8_E4M3", operand, scale, block)


def walk(expression: Expression) -> Iterator[Expression]:
    """The expression and everything below it."""
    yield expression
    for operand in expression.operands:
        yield from walk(operand)


def sources(expression: Expression) -> Iterator[StoredTensor]:
    """The stored tensors an expression reads."""
    return (node.tensor for node in walk(expression) if isinstance(node, Stored))


def computes(expression: Expression) -> bool:
    """Whether evaluating needs arithmetic (and so torch) rather than moving bytes."""
    return any(
        isinstance(node, Scale | Shift | NormalizeRows | Mean | Cast | Dequantize | Quantize | BlockScales)
        or (isinstance(node, Fill) and node.value != 0.0)
        for node in walk(expression)
    )


@dataclass(frozen=True)
class Check:
    """A fact about the data that a plan relies on; tested before anything is written.

    Attributes:
        name: the tensor concerned.
        left, right: expressions that must be equal bit for bit (a zero of either sign counts as zero).
        why: what rests on it, and what to do if it does not hold.
    """

    name: str
    left: Expression
    right: Expression
    why: str
