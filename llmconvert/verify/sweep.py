"""Run two models side by side, layer by layer, and find where they part.

Each half of each layer of the second model is run on what the first model's half was given, so that a difference is
charged to the half that makes it and not to those that inherit it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmconvert.verify.diagnose import SAME, explain_head, explain_layer
from llmconvert.verify.probes import Probe
from llmconvert.verify.routing import LayerRouting, compare_routing
from llmconvert.verify.runnable import Runnable, Seen

_WORTH_EXPLAINING = 2.0**-40
"""Relative differences below it are float64's rounding."""


@dataclass(frozen=True)
class Departure:
    """A place where the second model computes something else than the first.

    Attributes:
        layer: its number from 0, or None outside the layers.
        part: embedding, attention, mlp, layer (where halves run in parallel), norm or lm_head.
        difference: largest, relative to the largest number the part adds to the residual stream (or puts out).
        why: what the numbers say of the cause.
        first, second: the tensors concerned, in each checkpoint.
    """

    layer: int | None
    part: str
    difference: float
    why: str
    first: tuple[str, ...]
    second: tuple[str, ...]

    @property
    def place(self) -> str:
        """In words."""
        return self.part if self.layer is None else f"layer {self.layer}, {self.part}"


@dataclass(frozen=True)
class LayerDifference:
    """Differences at one layer, each relative.

    Attributes:
        index: of the layer, from 0.
        hidden: of the residual stream after it, each model on its own stream.
        attention, mlp: of what the half adds, both models on the first one's stream; None where there are no halves.
    """

    index: int
    hidden: float
    attention: float | None
    mlp: float | None


@dataclass
class Sweep:
    """Two models' run side by side.

    Attributes:
        first, second: logits of each probe, on the CPU, [batch, tokens, vocabulary].
        layers: differences a layer; empty where the two are not built alike.
        departures: every place with a difference beyond float64's rounding, in order.
        note: why layers could not be compared, if so.
        routing: the routers' decisions, a layer that has experts.
        norms: [place, {tensor: Frobenius norm} of the first, the same of the second] in order.
    """

    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    departures: list[Departure] = field(default_factory=list)
    note: str = ""
    routing: list[LayerRouting] = field(default_factory=list)
    norms: list[tuple[str, dict[str, float], dict[str, float]]] = field(default_factory=list)


def apart(a: Tensor, b: Tensor, base: Tensor | None = None) -> float:
    """max|a - b| / max|a - base|; infinity where a number is not finite.

    Args:
        a: any shape.
        b: the same.
        base: subtracted from `a` before its size is taken; or None.
    """
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0 if bool(a.isfinite().all()) else math.inf
    scale = float((a if base is None else a - base).abs().max())
    difference = float((a - b).abs().max())
    return difference / (scale or 1.0) if math.isfinite(difference) and math.isfinite(scale) else math.inf


def _farthest(
    probes: Sequence[Probe], a: Sequence[Tensor], b: Sequence[Tensor], base: Sequence[Tensor] | None = None
) -> float:
    worst = 0.0
    for k, probe in enumerate(probes):
        kept = probe.kept.to(a[k].device)
        worst = max(worst, apart(a[k][kept], b[k].to(a[k].device)[kept], None if base is None else base[k][kept]))
    return worst


def sweep(
    left: Runnable, right: Runnable, probes: Sequence[Probe], *, explain: bool, rounded: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sweep:  # fmt: skip
    """Run both models on all probes.

    Args:
        left: the first model; its device holds the comparison.
        right: the second.
        probes: what to run.
        explain: look for the cause of each difference.
        rounded: weights were rounded on purpose, so that small differences are everywhere.
        progress: called with the layers done and their number.
    """
    found = Sweep()
    own, other = left.begin(probes), right.begin(probes)
    if len(left.layers) != len(right.layers):
        found.note = f"the models have {len(left.layers)} and {len(right.layers)} layers"
    elif own[0].shape != other[0].shape:
        found.note = f"the models' hidden sizes are {own[0].shape[-1]} and {other[0].shape[-1]}"
    if found.note:
        found.first = [logits.cpu() for logits in left.forward(probes)]
        found.second = [logits.cpu() for logits in right.forward(probes)]
        return found
    _Lockstep(left, right, list(probes), explain, rounded, found, progress).run(own, other)
    return found


class _Lockstep:
    def __init__(
        self, left: Runnable, right: Runnable, probes: list[Probe], explain: bool, rounded: bool,
        found: Sweep, progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.left, self.right, self.probes, self.explain = left, right, probes, explain
        self.rounded, self.found, self.progress = rounded, found, progress

    def run(self, own: list[Tensor], other: list[Tensor]) -> None:
        difference = _farthest(self.probes, own, other)
        self._depart(None, "embedding", difference, "the embedding, or what it is multiplied by",
                     self.left.early_tensors(), self.right.early_tensors())  # fmt: skip
        self._note_norms("embedding", self.left.early_tensors(), self.right.early_tensors())
        total = len(self.left.layers)
        for index in range(total):
            own, other = self._layer(index, own, other)
            self.progress(index + 1, total)
        self._end(own, other)

    def _layer(self, index: int, own: list[Tensor], other: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        left, right, probes = self.left, self.right, self.probes
        with left.block(index):
            mine = left.layer(index, own)
        middles = [seen.middle for seen in mine]
        split = left.halves(index) is not None and None not in middles
        device = right.device
        with right.block(index):
            theirs = right.layer(index, other)
            split = split and all(seen.middle is not None for seen in theirs)
            alone = theirs
            if not self._same(own, other, mine, theirs, split):
                given = [None if m is None or not split else m.to(device) for m in middles]
                alone = right.layer(index, [stream.to(device) for stream in own], given)
        routing = compare_routing(index, probes, mine, alone)
        if routing is not None:
            self.found.routing.append(routing)
        out, others = [seen.out for seen in mine], [seen.out for seen in theirs]
        isolated = [seen.out for seen in alone]
        attention = mlp = None
        if split:
            mids = [m for m in middles if m is not None]
            attention = _farthest(probes, mids, [s.middle for s in alone if s.middle is not None], own)
            mlp = _farthest(probes, out, isolated, mids)
            parts = {"attention": attention, "mlp": mlp}
        else:
            parts = {"layer": _farthest(probes, out, isolated, own)}
        for part, difference in parts.items():
            if self.explain and difference > _WORTH_EXPLAINING:
                same = max(SAME, difference / 4) if self.rounded else SAME
                why, first, second = explain_layer(part, index, left, right, mine, alone, probes, same)
                self._depart(index, part, difference, why, first, second)
        self._note_norms(f"layer {index}", left.part_tensors(index, ""), right.part_tensors(index, ""))
        self.found.layers.append(LayerDifference(index, _farthest(probes, out, others), attention, mlp))
        return out, others

    @staticmethod
    def _same(own: list[Tensor], other: list[Tensor], mine: list[Seen], theirs: list[Seen], split: bool) -> bool:
        """Whether a layer was given, and made, the same bits: nothing is left to tell apart then."""
        pairs = [*zip(own, other, strict=True), *((a.out, b.out) for a, b in zip(mine, theirs, strict=True))]
        if split:
            pairs += [(a.middle, b.middle) for a, b in zip(mine, theirs, strict=True)]  # type: ignore[misc]
        return all(torch.equal(a, b.to(a.device)) for a, b in pairs)

    def _end(self, own: list[Tensor], other: list[Tensor]) -> None:
        left, right, probes = self.left, self.right, self.probes
        ends = list(left.end(own))
        self.found.first = [logits.cpu() for _, logits in ends]
        self.found.second = [logits.cpu() for _, logits in right.end(other)]
        normed = [given for given, _ in ends]
        norms, heads = left.late_tensors(), right.late_tensors()
        self._note_norms("norm and lm_head", norms[0] + norms[1], heads[0] + heads[1])
        if not self.explain:
            return
        device = right.device
        isolated = list(right.end([stream.to(device) for stream in own], [given.to(device) for given in normed]))
        difference = _farthest(probes, normed, [given for given, _ in isolated])
        self._depart(None, "norm", difference, "the last norm: its weight, or its epsilon", norms[0], heads[0])
        logits = [logits for _, logits in isolated]
        difference = _farthest(probes, [logits for _, logits in ends], logits)
        why = explain_head([logits for _, logits in ends], logits, probes) if difference > _WORTH_EXPLAINING else ""
        self._depart(None, "lm_head", difference, why, norms[1], heads[1])

    def _depart(
        self, layer: int | None, part: str, difference: float, why: str, first: Sequence[str], second: Sequence[str]
    ) -> None:
        if self.explain and difference > _WORTH_EXPLAINING:
            self.found.departures.append(Departure(layer, part, difference, why, tuple(first), tuple(second)))

    def _note_norms(self, place: str, first: Sequence[str], second: Sequence[str]) -> None:
        mine = {name: self.left.norms[name] for name in first if name in self.left.norms}
        theirs = {name: self.right.norms[name] for name in second if name in self.right.norms}
        self.found.norms.append((place, mine, theirs))
