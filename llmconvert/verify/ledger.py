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
from llmconvert.tensors.expressions import Concat, Expression, Fill, Gather, Interleave, Rows, Stored

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


def _usage(expression: Expression, index: _Rows, counts: dict[str, _Rows]) -> None:
    """Count the source rows behind rows `index` of an expression."""
    match expression:
        case Stored(tensor=tensor):
            count = counts.setdefault(tensor.name, np.zeros(expression.rows, dtype=np.int64))
            np.add.at(count, index, 1)
        case Fill():
            return
        case Rows(operand=operand, start=start):
            _usage(operand, index + start, counts)
        case Gather(operand=operand, axis=0, pattern=pattern, period=period):
            entry = np.asarray(pattern, dtype=np.int64)[index % len(pattern)]
            source = index // len(pattern) * period + entry
            _usage(operand, source[entry >= 0], counts)
        case Gather(operand=operand, pattern=pattern, period=period):
            # Columns: rows are only all there if no column is left behind.
            if set(range(period)) <= set(pattern):
                _usage(operand, index, counts)
        case Concat(parts=parts):
            base = 0
            for part in parts:
                inside = (index >= base) & (index < base + part.rows)
                _usage(part, index[inside] - base, counts)
                base += part.rows
        case Interleave(parts=parts, chunks=chunks):
            total = sum(chunks)
            turn, place = np.divmod(index, total)
            base = 0
            for part, chunk in zip(parts, chunks, strict=True):
                inside = (place >= base) & (place < base + chunk)
                _usage(part, turn[inside] * chunk + place[inside] - base, counts)
                base += chunk
        case _:
            for operand in expression.operands:
                _usage(operand, index, counts)


def account(plan: Plan, source: Mapping[str, StoredTensor], dropped: Mapping[str, str]) -> Ledger:
    """Account for a plan against the source's tensors.

    Args:
        plan: the plan.
        source: every tensor of the source.
        dropped: those left out by a named rule.

    Raises:
        ProofFailed: a row of the source goes nowhere, or an output byte is written never or twice.
    """
    counts: dict[str, _Rows] = {}
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
        if name in counts and tensor.shape:
            least, most = least + int(counts[name].min(initial=0)), most + int(counts[name].max(initial=0))
            if counts[name].size:
                least = whole[name] + int(counts[name].min())
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
    position = {file.name: len(file.prefix) for file in plan.files}
    for region in sorted(plan.regions(), key=lambda r: (r.tensor.file, r.offset)):
        if region.offset != position[region.tensor.file]:
            raise ProofFailed(f"byte {region.offset} of {region.tensor.file} is written never or twice ({region.key})")
        position[region.tensor.file] += region.nbytes
    for file in plan.files:
        if position[file.name] != file.size:
            raise ProofFailed(f"{file.name} is {file.size} bytes, {position[file.name]} are written")
