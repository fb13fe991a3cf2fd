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


_Counts = dict[str, dict[tuple[int, int], _Rows]]
"""For each source tensor, how often each row is used, apart for each range of columns it is used in."""


def _usage(expression: Expression, index: _Rows, counts: _Counts, cut: tuple[int, int] | None = None) -> None:
    """Count the source rows behind rows `index` of an expression, or behind columns `cut` of them."""
    match expression:
        case Stored(tensor=tensor):
            whole = (0, expression.shape[1] if len(expression.shape) > 1 else 1)
            ranges = counts.setdefault(tensor.name, {})
            count = ranges.setdefault(cut or whole, np.zeros(expression.rows, dtype=np.int64))
            np.add.at(count, index, 1)
        case Columns(operand=operand, start=start):
            low, high = cut or (0, expression.shape[1])
            _usage(operand, index, counts, (start + low, start + high))
        case Beside(parts=parts):
            low, high = cut or (0, expression.shape[1])
            base = 0
            for part in parts:
                left, right = max(low - base, 0), min(high - base, part.shape[1])
                if left < right:
                    _usage(part, index, counts, (left, right))
                base += part.shape[1]
        case Fill():
            return
        case Rows(operand=operand, start=start):
            _usage(operand, index + start, counts, cut)
        case Gather(operand=operand, axis=0, pattern=pattern, period=period):
            entry = np.asarray(pattern, dtype=np.int64)[index % len(pattern)]
            source = index // len(pattern) * period + entry
            _usage(operand, source[entry >= 0], counts, cut)
        case Gather(operand=operand, pattern=pattern, period=period):
            # Columns: rows are only all there if no column is left behind.
            if set(range(period)) <= set(pattern):
                _usage(operand, index, counts)
        case (
            Dequantize(operand=operand, scale=scale, block=(height, _))
            | Quantize(operand=operand, scale=scale, block=(height, _))
        ):
            _usage(operand, index, counts, cut)
            # A scale serves a whole block: it counts as used, however many cuts share the block.
            for tensor in sources(scale):
                ranges = counts.setdefault(tensor.name, {})
                count = ranges.setdefault((0, tensor.shape[1]), np.zeros(tensor.shape[0], dtype=np.int64))
                count[np.unique(index // height)] = 1
        case BlockScales():
            return  # computed from rows that are written themselves
        case Concat(parts=parts):
            base = 0
            for part in parts:
                inside = (index >= base) & (index < base + part.rows)
                _usage(part, index[inside] - base, counts, cut)
                base += part.rows
        case Interleave(parts=parts, chunks=chunks):
            total = sum(chunks)
            turn, place = np.divmod(index, total)
            base = 0
            for part, chunk in zip(parts, chunks, strict=True):
                inside = (place >= base) & (place < base + chunk)
                _usage(part, turn[inside] * chunk + place[inside] - base, counts, cut)
                base += chunk
        case _:
            for operand in expression.operands:
                _usage(operand, index, counts, cut)


def _covered(ranges: Mapping[tuple[int, int], _Rows], width: int) -> tuple[_Rows, _Rows]:
    """For each row, how often its least used and its most used column is used."""
    edges = sorted({edge for pair in ranges for edge in pair} | {0, width})
    used = []
    for left, right in zip(edges, edges[1:], strict=False):
        inside = [rows for (low, high), rows in ranges.items() if low <= left and right <= high]
        used.append(np.sum(inside, axis=0) if inside else np.zeros_like(next(iter(ranges.values()))))
    return np.minimum.reduce(used), np.maximum.reduce(used)


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
    counts: _Counts = {}
    whole: dict[str, int] = defaultdict(int)
    filled = 0
    for output in plan.tensors:
        if isinstance(output.expression, Stored):
            whole[output.expression.tensor.name] += 1
        else:
            _usage(output.expression, np.arange(output.expression.rows), counts)
        filled += isinstance(output.expression, Fill)
    repeated: dict[str, int] = {}
    for name, tensor in source.items():
        least, most = whole[name], whole[name]
        if name in counts and tensor.shape and 0 not in tensor.shape:
            fewest, often = _covered(counts[name], tensor.shape[1] if len(tensor.shape) > 1 else 1)
            kept = fewest[: used[name]] if name in used else fewest
            least, most = least + int(kept.min(initial=most + 1)), most + int(often.max())
        if tensor.shape and 0 in tensor.shape:
            continue
        if name in dropped:
            if most:
                raise ProofFailed(f"`{name}` is dropped ({dropped[name]}) and used as well")
        elif least == 0:
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
