"""From where two halves of a layer part to the tensors that make them part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmconvert.verify.probes import Probe
from llmconvert.verify.routing import alike, differing_experts
from llmconvert.verify.runnable import Call, Runnable, Seen

Explanation = tuple[str, list[str], list[str]]
"""What the numbers say, the first model's tensors concerned, the second's."""

SAME = 1e-9
"""Stages this close, relative to their largest number, are the same in float64; faults worth naming are larger."""


class _Stages:
    """A half of a layer at work: what its norm gives, what its first matrices make of it, what its last one gets."""

    def __init__(self, model: Runnable, index: int, child: str, seen: Sequence[Seen], probes: Sequence[Probe]) -> None:
        self.model, self.index, self.child = model, index, child
        calls = [[call for call in s.calls if call.name.split(".")[0] == child] for s in seen]
        names = [call.name for call in calls[0]]
        # The same few matrices once each, or it is a build (experts, say) whose stages are not known here.
        self.known = 2 <= len(names) <= 6 and len(set(names)) == len(names)
        plain = (call.given.ndim == 3 and isinstance(call.gave, Tensor) for each in calls for call in each)
        self.known = self.known and all(plain) and not any(s.routed is not None and child == self._mlp() for s in seen)
        self.known = self.known and all([call.name for call in each] == names for each in calls)
        if not self.known:
            return
        self.kept = [probe.kept.to(calls[0][0].given.device) for probe in probes]
        self.early = [call.name for call in calls[0] if call.given is calls[0][0].given]
        self.last = names[-1]
        self.known = self.last not in self.early
        self.normed = self._column(calls, 0, "given")
        self.inner = self._column(calls, len(names) - 1, "given")
        self.projected = {name: self._flat(calls, k) for k, name in enumerate(names) if name in self.early}

    def _mlp(self) -> str:
        halves = self.model.halves(self.index)
        return halves.mlp if halves else ""

    def _column(self, calls: list[list[Call]], k: int, what: str) -> list[Tensor]:
        return [getattr(each[k], what).double().cpu() for each in calls]

    def _flat(self, calls: list[list[Call]], k: int) -> Tensor:
        """[kept tokens of all probes, columns]."""
        return torch.cat([each[k].gave[kept].double() for each, kept in zip(calls, self.kept, strict=True)]).cpu()

    def tensors(self, *calls: str) -> list[str]:
        """Stored tensors behind calls."""
        return [name for call in calls for name in self.model.part_tensors(self.index, call)]


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    difference = float((a - b).abs().max()) if a.numel() else 0.0
    return difference / (float(a.abs().max()) or 1.0) if a.numel() else 0.0


def _worst(a: Sequence[Tensor], b: Sequence[Tensor], kept: Sequence[Tensor]) -> float:
    return max(_apart(x[k.cpu()], y[k.cpu()]) for x, y, k in zip(a, b, kept, strict=True))


def _unmatched(mine: Tensor, theirs: Tensor, same: float) -> int:
    """Columns of `theirs` that equal no column of `mine`, in whatever order; both [tokens, columns]."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(mine.shape[0], generator=generator, dtype=torch.float64)
    known, asked = (weights @ mine).sort().values, weights @ theirs
    near = torch.searchsorted(known, asked)
    gaps = torch.stack([(known[(near + k).clamp(0, len(known) - 1)] - asked).abs() for k in (-1, 0)]).amin(0)
    return int((gaps > same * float(known.abs().max())).sum())


def _norm_fault(a: Sequence[Tensor], b: Sequence[Tensor], kept: Sequence[Tensor]) -> str:
    """Whether a norm departs by its weight (the same factor for every token) or its epsilon (for every column)."""
    mine, theirs = (torch.cat([x[k.cpu()] for x, k in zip(xs, kept, strict=True)]) for xs in (a, b))
    ratio = theirs / mine
    usable = ratio.isfinite() & (mine.abs() > 1e-6 * mine.abs().max())
    ratio = torch.where(usable, ratio, torch.nan)
    across_tokens = float((ratio - ratio.nanmean(0, keepdim=True)).abs().nanmean())
    across_columns = float((ratio - ratio.nanmean(1, keepdim=True)).abs().nanmean())
    return "epsilon" if across_columns < across_tokens else "weight"


def explain_layer(
    part: str, index: int, left: Runnable, right: Runnable, mine: Sequence[Seen], theirs: Sequence[Seen],
    probes: Sequence[Probe], same: float = SAME,
) -> Explanation:  # fmt: skip
    """Name the tensors behind a half's difference.

    Args:
        part: attention, mlp or layer.
        index: of the layer.
        left: the first model.
        right: the second.
        mine: what the first model's layer did.
        theirs: what the second's did, given the same.
        probes: the probes; the last one has all its tokens at position 0.
        same: relative difference of stages taken for equal; more than `SAME` where weights were rounded.
    """
    everything = left.part_tensors(index, ""), right.part_tensors(index, "")
    halves = left.halves(index), right.halves(index)
    if part == "layer" or halves[0] is None or halves[1] is None:
        return "somewhere in the layer", *everything
    a = _Stages(left, index, getattr(halves[0], part), mine, probes)
    b = _Stages(right, index, getattr(halves[1], part), theirs, probes)
    if not (a.known and b.known):
        experts = _explain_experts(a, b, probes, mine, theirs, same) if part == "mlp" else None
        return experts or (f"somewhere in the {part} half", a.tensors(a.child), b.tensors(b.child))
    if _worst(a.normed, b.normed, a.kept) > same:
        fault = _norm_fault(a.normed, b.normed, a.kept)
        return f"the norm before it: its {fault}", _norms(left, index, part), _norms(right, index, part)
    if _worst(a.inner, b.inner, a.kept) <= same:
        return "its last matrix: all that comes before agrees", a.tensors(a.last), b.tensors(b.last)
    known = torch.cat(list(a.projected.values()), 1)
    strange = {name: _unmatched(known, columns, same) for name, columns in b.projected.items()}
    strange = {name: count for name, count in strange.items() if count}
    if strange:
        held = torch.cat(list(b.projected.values()), 1)
        lost = [name for name, columns in a.projected.items() if _unmatched(held, columns, same)]
        counts = ", ".join(f"{n} of {b.projected[name].shape[1]} of {name}" for name, n in strange.items())
        return f"outputs with no counterpart: {counts}", a.tensors(*(lost or a.early)), b.tensors(*strange)
    if part == "mlp":
        return (
            "its first matrices put out the same numbers: in another order, one for the other, or under another activation",
            a.tensors(*a.early),
            b.tensors(*b.early),
        )
    return _explain_order(a, b, same)


def _explain_experts(
    a: _Stages, b: _Stages, probes: Sequence[Probe], mine: Sequence[Seen], theirs: Sequence[Seen], same: float
) -> Explanation | None:
    """A mixture of experts: its router, single experts, or what stands beside them; None where it shows nothing."""
    if not any(seen.experts for seen in mine) or not any(seen.experts for seen in theirs):
        return None
    if not alike(probes, mine, theirs):
        return "its router sends tokens to other experts", _beside(a), _beside(b)
    strange = differing_experts(probes, mine, theirs, same)
    if strange:
        numbers = ", ".join(name.rpartition("/")[2] for name in strange[:6]) + (
            " and others" if len(strange) > 6 else ""
        )
        return f"what experts make of the same tokens: {numbers}", a.tensors(*strange), b.tensors(*strange)
    why = "its experts agree, and so does who goes where: the weights they are given, or the shared experts"
    return why, _beside(a), _beside(b)


def _beside(stages: _Stages) -> list[str]:
    """The tensors of a mixture of experts that are not the experts'."""
    return [name for name in stages.tensors(stages.child) if ".experts." not in name]


def _explain_order(a: _Stages, b: _Stages, same: float) -> Explanation:
    """Attention whose projections agree as a set: their order, or what positions do to them."""
    first_tokens = max(
        _apart(x[row, k], y[row, k])
        for x, y, kept in zip(a.inner, b.inner, a.kept, strict=True)
        for row, k in enumerate(kept.int().argmax(1).tolist())
    )
    if first_tokens > same:
        # The first token sees itself alone: whatever q and k are, it gets v.
        return "the order of v_proj's rows, or of what is packed with it", a.tensors(*a.early), _some(b, "v")
    if _apart(a.inner[-1], b.inner[-1]) <= same:
        why = "right where all tokens stand at one position: rotary angles (theta, scaling), or interleaved for halves"
        return why, a.tensors(*a.early), _some(b, "q", "k")
    why = "its projections agree, its scores do not: the order of q_proj's or k_proj's rows, one for the other, scale or mask"
    return why, a.tensors(*a.early), _some(b, "q", "k")


def _some(stages: _Stages, *letters: str) -> list[str]:
    """The tensors of q, k or v where they are apart, else of all projections."""
    names = [n for n in stages.early if any(n.rpartition(".")[2].startswith(f"{letter}_") for letter in letters)]
    return stages.tensors(*(names or stages.early))


def _norms(model: Runnable, index: int, part: str) -> list[str]:
    """The norms of a layer: the one before the MLP half, or the others."""
    layer, halves = model.layers[index], model.halves(index)
    assert halves is not None  # or the stages would not be known
    children = [name for name, child in layer.named_children() if all(p.ndim < 2 for p in child.parameters())]
    chosen = [name for name in children if (name == halves.middle) == (part == "mlp")]
    return [name for child in chosen or children for name in model.part_tensors(index, child)]


def explain_head(a: Sequence[Tensor], b: Sequence[Tensor], probes: Sequence[Probe]) -> str:
    """Why two heads given the same depart: rows scaled, rows in another order, or other rows."""
    mine = torch.cat([x[p.kept.to(x.device)].double().cpu() for x, p in zip(a, probes, strict=True)])
    theirs = torch.cat([x[p.kept.to(x.device)].double().cpu() for x, p in zip(b, probes, strict=True)])
    ratio = (theirs * mine).sum(0) / mine.square().sum(0)
    if _apart(theirs, mine * ratio) <= SAME and bool(((ratio - 1).abs() > SAME).all()):
        return "each row of the head is scaled, as by a NormHead forgotten or applied twice"
    strange = _unmatched(mine, theirs, SAME)
    return (
        f"{strange} of {theirs.shape[1]} rows of the head have no counterpart"
        if strange
        else "the head's rows are in another order"
    )
