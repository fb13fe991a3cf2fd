"""The ledger: every row of every source tensor accounted for, every byte of every output file written once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.engine.plan import Plan
from llmconvert.errors import ProofFailed
from llmconvert.tensors.expressions import (
    Beside,
    BlockScales,
    Columns,
    Concat,
    Dequantize,
    Expression,
    Fill,
    Gather,
    Interleave,
    Quantize,
    Rows,
    Stored,
    sources,
)

_Rows = npt.NDArray[np.int64]
_Index = range | _Rows
"""Rows asked for: consecutive ones as a range, others as an array."""


@dataclass(frozen=True)
class Ledger:
    """The account of a plan.

    Attributes:
        consumed: source tensors every row of which goes into the output.
        repeated: those some rows of which are written more than once, each with how often at most.
        dropped: source tensors left out, and why.
        filled: output tensors that hold constants only.
        source_bytes, output_bytes: of weights.
    """

    consumed: int
    repeated: dict[str, int]
    dropped: dict[str, str]
    filled: int
    source_bytes: int
    output_bytes: int


class _Usage:
    """How often each row of a source tensor is used, apart for the columns it is used in.

    Attributes:
        boxes: (first row, end row, first column, end column), one a use of consecutive rows.
        arrays: uses of other rows: for a range of columns, how often each row is used.
    """

    def __init__(self, tensor: StoredTensor) -> None:
        self.height = tensor.shape[0] if tensor.shape else 1
        self.width = tensor.shape[1] if len(tensor.shape) > 1 else 1
        self.boxes: list[tuple[int, int, int, int]] = []
        self.arrays: dict[tuple[int, int], _Rows] = {}

    def add(self, index: _Index, cut: tuple[int, int] | None) -> None:
        """Count a use of some rows, or of their columns in `cut`."""
        left, right = cut or (0, self.width)
        if isinstance(index, range):
            self.boxes.append((index.start, index.stop, left, right))
        else:
            np.add.at(self.arrays.setdefault((left, right), np.zeros(self.height, dtype=np.int64)), index, 1)

    def extremes(self, rows: int | None = None) -> tuple[int, int]:
        """How often the least used entry of the first `rows` rows is used, and the most used one of all."""
        kept = self.height if rows is None else rows
        if not self.arrays:
            return self._of_boxes(kept)
        edges = sorted(
            {e for box in self.boxes for e in box[2:]} | {e for cut in self.arrays for e in cut} | {0, self.width}
        )
        least, most = 1 << 60, 0
        for left, right in zip(edges, edges[1:], strict=False):
            count = np.zeros(self.height, dtype=np.int64)
            for (low, high), array in self.arrays.items():
                if low <= left and right <= high:
                    count += array
            for start, stop, low, high in self.boxes:
                if low <= left and right <= high:
                    count[start:stop] += 1
            least, most = min(least, int(count[:kept].min(initial=least))), max(most, int(count.max(initial=0)))
        return least, most

    def _of_boxes(self, kept: int) -> tuple[int, int]:
        down = sorted({e for box in self.boxes for e in box[:2]} | {0, self.height, kept})
        across = sorted({e for box in self.boxes for e in box[2:]} | {0, self.width})
        count = np.zeros((len(down) - 1, len(across) - 1), dtype=np.int64)
        rows, columns = ({edge: k for k, edge in enumerate(edges)} for edges in (down, across))
        for start, stop, left, right in self.boxes:
            count[rows[start] : rows[stop], columns[left] : columns[right]] += 1
        return int(count[: rows[kept]].min(initial=1 << 60)), int(count.max(initial=0))


class _Account:
    """Uses of source tensors, by name; `scales` holds those of block scales, which serve all rows of a block."""

    def __init__(self) -> None:
        self.used: dict[str, _Usage] = {}
        self.scales: dict[str, _Usage] = {}

    def use(self, expression: Expression, index: _Index, cut: tuple[int, int] | None = None) -> None:
        """Count the source rows behind rows `index` of an expression, or behind columns `cut` of them."""
        match expression:
            case Stored(tensor=tensor):
                self.used.setdefault(tensor.name, _Usage(tensor)).add(index, cut)
            case Columns(operand=operand, start=start):
                low, high = cut or (0, expression.shape[1])
                self.use(operand, index, (start + low, start + high))
            case Beside(parts=parts):
                low, high = cut or (0, expression.shape[1])
                base = 0
                for part in parts:
                    left, right = max(low - base, 0), min(high - base, part.shape[1])
                    if left < right:
                        self.use(part, index, (left, right))
                    base += part.shape[1]
            case Fill():
                return
            case Rows(operand=operand, start=start):
                self.use(operand, _shifted(index, start), cut)
            case Gather(operand=operand, axis=0, pattern=pattern, period=period):
                rows = _array(index)
                entry = np.asarray(pattern, dtype=np.int64)[rows % len(pattern)]
                source = rows // len(pattern) * period + entry
                self.use(operand, source[entry >= 0], cut)
            case Gather(operand=operand, pattern=pattern, period=period):
                # Columns: rows are only all there if no column is left behind.
                if set(range(period)) <= set(pattern):
                    self.use(operand, index)
            case (
                Dequantize(operand=operand, scale=scale, block=(height, _))
                | Quantize(operand=operand, scale=scale, block=(height, _))
            ):
                self.use(operand, index, cut)
                for tensor in sources(scale):
                    self.scales.setdefault(tensor.name, _Usage(tensor)).add(_blocks(index, height), None)
            case BlockScales():
                return  # computed from rows that are written themselves
            case Concat(parts=parts):
                base = 0
                for part in parts:
                    inside = _inside(index, base, base + part.rows)
                    if len(inside):
                        self.use(part, _shifted(inside, -base), cut)
                    base += part.rows
            case Interleave(parts=parts, chunks=chunks):
                total = sum(chunks)
                turn, place = np.divmod(_array(index), total)
                base = 0
                for part, chunk in zip(parts, chunks, strict=True):
                    here = (place >= base) & (place < base + chunk)
                    self.use(part, turn[here] * chunk + place[here] - base, cut)
                    base += chunk
            case _:
                for operand in expression.operands:
                    self.use(operand, index, cut)


def _array(index: _Index) -> _Rows:
    return np.arange(index.start, index.stop) if isinstance(index, range) else index


def _shifted(index: _Index, by: int) -> _Index:
    return range(index.start + by, index.stop + by) if isinstance(index, range) else index + by


def _inside(index: _Index, low: int, high: int) -> _Index:
    if isinstance(index, range):
        return range(max(index.start, low), max(min(index.stop, high), max(index.start, low)))
    return index[(index >= low) & (index < high)]


def _blocks(index: _Index, height: int) -> _Index:
    if isinstance(index, range):
        return range(index.start // height, -(-index.stop // height))
    return np.unique(index // height)


def account(
    plan: Plan, source: Mapping[str, StoredTensor], dropped: Mapping[str, str], used: Mapping[str, int] | None = None
) -> Ledger:
    """Account for a plan against the source's tensors.

    Args:
        plan: the plan.
        source: every tensor of the source.
        dropped: those left out by a named rule.
        used: tensors of which only so many first rows are meant to be used (the rest is padding).

    Raises:
        ProofFailed: a row of the source goes nowhere, or an output byte is written never or twice.
    """
    used = used or {}
    account = _Account()
    filled = 0
    for output in plan.tensors:
        account.use(output.expression, range(output.expression.rows))
        filled += isinstance(output.expression, Fill)
    repeated: dict[str, int] = {}
    for name, tensor in source.items():
        if 0 in tensor.shape:
            continue
        least = most = 0
        if name in account.used:
            least, most = account.used[name].extremes(used.get(name))
        if name in account.scales:  # used, however many cuts share a block
            least, most = max(least, min(1, account.scales[name].extremes()[0])), max(most, 1)
        if name in dropped:
            if most:
                raise ProofFailed(f"`{name}` is dropped ({dropped[name]}) and used as well")
        elif least == 0 and used.get(name) != 0:
            raise ProofFailed(f"rows of `{name}` go nowhere and no rule drops them")
        elif most > 1:
            repeated[name] = most
    _account_files(plan)
    return Ledger(
        consumed=len(source) - len(dropped),
        repeated=repeated,
        dropped=dict(dropped),
        filled=filled,
        source_bytes=sum(tensor.nbytes for tensor in source.values()),
        output_bytes=sum(output.expression.nbytes for output in plan.tensors),
    )


def _account_files(plan: Plan) -> None:
    """Check that regions and the formats' own bytes tile every file."""
    written: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for region in plan.regions():
        written[region.tensor.file].append((region.offset, region.nbytes, region.key))
    for file in plan.files:
        written[file.name] += [(offset, len(data), "the format's own bytes") for offset, data in file.pieces]
        position = 0
        for offset, count, key in sorted(written[file.name]):
            if offset != position:
                raise ProofFailed(f"byte {min(offset, position)} of {file.name} is written never or twice ({key})")
            position += count
        if position != file.size:
            raise ProofFailed(f"{file.name} is {file.size} bytes, {position} are written")
