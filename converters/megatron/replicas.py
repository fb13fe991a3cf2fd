"""Copies of a tensor on several ranks that are not equal: how far apart they are, and what stands for them.

Ranks that hold copies of a tensor train them alike, but sums taken in another order make them drift apart in long runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from llmconvert.converters.megatron.shards import Joined, Replica, where
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.tensors.evaluate import MOVE_BYTES, Reader, evaluate, to_torch
from llmconvert.verify.roundtrip import failing

FIRST, MEAN = "first", "mean"
POLICIES = (FIRST, MEAN)
_TAKEN = {FIRST: "the first rank's is taken", MEAN: "the mean of all is taken"}


@dataclass(frozen=True)
class Difference:
    """How far a copy is from what it is a copy of.

    Attributes:
        replica: the copy.
        size: the largest |a - b| of its entries; infinite where one of them is no number.
        scale: the largest magnitude of what it is a copy of.
    """

    replica: Replica
    size: float
    scale: float

    def __str__(self) -> str:
        (place, name), (first, _) = self.replica.shards[0], self.replica.first[0]
        apart = f"{self.size:.2g} between {where(first)} and {where(place)}"
        return f"`{name}`, {apart}, where the largest entry is {self.scale:.2g}"


def check_policy(policy: str | None) -> None:
    """Check that a policy is one of `POLICIES`, or None.

    Raises:
        Usage: it is not.
    """
    if policy is not None and policy not in POLICIES:
        raise Usage(
            f"`{policy}` does not say what stands for copies that differ", hint=f"choose {' or '.join(POLICIES)}"
        )


def settle(
    joined: Joined, policy: str | None, again: Callable[[frozenset[str]], Joined]
) -> tuple[Joined, tuple[str, ...]]:
    """A model whose replicas are equal, or whose differing ones are settled by a policy; and remarks for the report.

    Args:
        joined: with the first of all copies in place.
        policy: one of `POLICIES`; None to refuse copies that differ.
        again: joins once more, with the mean of all copies in place for some groups.

    Raises:
        BadInput: copies differ, and there is no policy.
    """
    faults = failing(joined.checks)
    if not faults:
        return joined, ()
    apart = [_measured(replica) for replica in joined.replicas if failing([replica.check])]
    most = max(apart, key=lambda difference: difference.size / (difference.scale or 1.0))
    count = "1 copy differs" if len(apart) == 1 else f"{len(apart)} copies differ"
    if policy is None:
        raise BadInput(
            f"{'; '.join(faults[:3])}; {count}, most of all {most}",
            hint="if that is no more than ranks drift apart in training, `--replica first` takes the first rank's, "
            "`--replica mean` the mean",
        )
    differing = frozenset(shard for each in apart for shard in each.replica.shards)
    if policy == MEAN:
        groups = frozenset(each.replica.group for each in apart)
        joined = again(groups)
        members = (replica for replica in joined.replicas if replica.group in groups)
        differing = frozenset(shard for replica in members for shard in (*replica.shards, *replica.first))
    note = f"{count} from the first rank's, and {_TAKEN[policy]}; most of all {most}"
    return replace(joined, differing=differing), (note,)


def refuse_differing(joined: Joined) -> None:
    """Refuse where logits are to be compared, and ranks whose copies differ compute no one function.

    Raises:
        Refused: saying so.
    """
    if joined.differing:
        raise Refused(
            "the ranks' copies differ, so there is no one model whose logits the result's could be compared with",
            hint="add `--verify weights`",
        )


def _measured(replica: Replica) -> Difference:
    """How far apart a copy and its original are."""
    left, right, size, scale = replica.check.left, replica.check.right, 0.0, 0.0
    step = max(1, MOVE_BYTES // max(1, left.row_bytes))
    with Reader() as reader:
        for low in range(0, left.rows, step):
            a, b = (
                to_torch(np.ascontiguousarray(evaluate(e, low, min(low + step, left.rows), reader)), e.dtype).double()
                for e in (left, right)
            )
            size = max(size, float((a - b).abs().nan_to_num(math.inf, math.inf).max()))
            scale = max(scale, float(b.abs().nan_to_num(math.inf, math.inf).max()))
    return Difference(replica, size, scale)
