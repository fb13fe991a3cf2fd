"""The round trip: read the output back through the inverse rewrites and compare it with the source, block by block."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import xxhash

from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.errors import ProofFailed
from llmconvert.tensors.evaluate import MOVE_BYTES, Block, Reader, as_bytes, evaluate, pieces, to_torch
from llmconvert.tensors.expressions import Check, Expression, Stored, computes

BITWISE, ROUNDED, ONE_WAY, QUANTISED = "bitwise", "to rounding", "recomputed", "to FP8"


@dataclass(frozen=True)
class Pair:
    """A source tensor and the same tensor read back out of the output.

    Attributes:
        name: the source tensor's name (or the output's, for ONE_WAY).
        source: what it was.
        returned: what comes back.
        promise: BITWISE; ROUNDED (equal but for one rounding each way); ONE_WAY (does not come back: the output is
            compared with the rewrite applied to the source once more); QUANTISED (equal but for rounding to E4M3).
        floor: least magnitude the rounding is measured against: a number added before rounding costs bits of its own.
    """

    name: str
    source: Expression
    returned: Expression
    promise: str
    floor: float = 0.0


@dataclass
class RoundTrip:
    """What a round trip found.

    Attributes:
        bitwise, rounded, one_way, quantised: tensors compared, by promise.
        largest_error: of the rounded and quantised ones, the largest |a - b| / max|a| of a block.
        source_digests: digest of each source file's tensors, in offset order.
    """

    bitwise: int = 0
    rounded: int = 0
    one_way: int = 0
    quantised: int = 0
    largest_error: float = 0.0
    source_digests: dict[str, str] = field(default_factory=dict)


_TOLERANCE = {"F16": 2.0**-9, "BF16": 2.0**-6, "F32": 2.0**-21, "F64": 2.0**-21}
"""Twice one rounding each way, relative to the block's largest value: 4 units in the last place."""

_QUANTISED_TOLERANCE = 2.0**-4
"""Half a unit in the last place of three bits, of a block's largest value, and what bfloat16 adds."""


class _Comparison:
    def __init__(self, progress: Callable[[int], None]) -> None:
        self.reader, self.progress = Reader(), progress
        self.result = RoundTrip()
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._digests: dict[str, dict[int, bytes]] = defaultdict(dict)

    def compare(self, pair: Pair) -> None:
        source, returned = pair.source, pair.returned
        if source.shape != returned.shape or source.dtype != returned.dtype:
            raise ProofFailed(
                f"`{pair.name}` comes back as {returned.dtype} {list(returned.shape)}, it was {source.dtype} {list(source.shape)}"
            )
        hasher = xxhash.xxh3_128() if isinstance(source, Stored) else None
        worst = 0.0
        step = max(1, MOVE_BYTES // max(1, source.row_bytes))
        if not isinstance(returned, Stored):
            step = max(step, (4 * MOVE_BYTES) // max(1, source.row_bytes))
        for low in range(0, source.rows, step):
            if self.stop.is_set():
                return
            high = min(low + step, source.rows)
            left = evaluate(source, low, high, self.reader)
            right = self._read(returned, low, high)
            if hasher is not None:
                hasher.update(as_bytes(left))
            if not np.array_equal(left, right):
                worst = max(worst, self._difference(pair, left, right, low))
            self.progress(left.nbytes)
        with self._lock:
            counted = {BITWISE: "bitwise", ROUNDED: "rounded", ONE_WAY: "one_way", QUANTISED: "quantised"}[pair.promise]
            setattr(self.result, counted, getattr(self.result, counted) + 1)
            self.result.largest_error = max(self.result.largest_error, worst)
            if hasher is not None and isinstance(source, Stored):
                self._digests[source.tensor.path.name][source.tensor.offset] = hasher.digest()

    def _read(self, returned: Expression, low: int, high: int) -> Block:
        parts = [evaluate(e, start, stop, self.reader) for e, start, stop in pieces(returned, low, high)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _difference(self, pair: Pair, left: Block, right: Block, low: int) -> float:
        flat = left.reshape(left.shape[0], -1) != right.reshape(right.shape[0], -1)
        row = low + int(np.flatnonzero(flat.any(axis=1))[0])
        if pair.promise not in (ROUNDED, QUANTISED):
            raise ProofFailed(
                f"the round trip fails at `{pair.name}`, row {row}: what comes back differs from the source",
                hint="the output was not published; please report this with the command",
            )
        a, b = (to_torch(np.ascontiguousarray(x), pair.source.dtype).double() for x in (left, right))
        scale = max(float(a.abs().max()), pair.floor) or 1.0
        error = float((a - b).abs().max()) / scale
        allowed = _QUANTISED_TOLERANCE if pair.promise == QUANTISED else _TOLERANCE[pair.source.dtype]
        if not error <= allowed:
            raise ProofFailed(f"the round trip fails at `{pair.name}`, near row {row}: off by {error:.2g} of its scale")
        return error

    def digests(self) -> dict[str, str]:
        """One digest a file, over its tensors' digests in offset order."""
        return {
            name: xxhash.xxh3_128(b"".join(parts[offset] for offset in sorted(parts))).hexdigest()
            for name, parts in sorted(self._digests.items())
        }


def compare(pairs: Sequence[Pair], workers: int, progress: Callable[[int], None] = lambda n: None) -> RoundTrip:
    """Compare all pairs.

    Raises:
        ProofFailed: a tensor does not come back as promised.
    """
    if any(computes(e) for pair in pairs for e in (pair.source, pair.returned)):
        import torch

        torch.set_num_threads(1)
    comparison = _Comparison(progress)
    with comparison.reader, ThreadPoolExecutor(workers) as pool:
        try:
            for _ in pool.map(comparison.compare, pairs):
                pass
        except BaseException:
            comparison.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        comparison.result.source_digests = comparison.digests()
    return comparison.result


def failing(checks: Sequence[Check]) -> list[str]:
    """Test a plan's checks against the data.

    Returns:
        One line for each that does not hold: the tensor and what rested on it.
    """
    with Reader() as reader, ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        held = pool.map(lambda check: _holds(check, reader), checks)
        return [f"`{check.name}`: {check.why}" for check, holds in zip(checks, held, strict=True) if not holds]


def _holds(check: Check, reader: Reader) -> bool:
    step = max(1, MOVE_BYTES // max(1, check.left.row_bytes))
    for low in range(0, check.left.rows, step):
        high = min(low + step, check.left.rows)
        left, right = (evaluate(e, low, high, reader) for e in (check.left, check.right))
        if not np.array_equal(left, right) and not _both_zero(left, right, check.left.dtype):
            return False
    return True


def _both_zero(left: Block, right: Block, dtype: str) -> bool:
    sign = left.dtype.type(1 << (8 * ITEMSIZE[dtype] - 1))
    return not (left & ~sign).any() and not (right & ~sign).any()
