"""Router decisions of two models, apart from what experts make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llmconvert.verify.probes import Probe
from llmconvert.verify.runnable import Seen

_SHOWN = 8


@dataclass(frozen=True)
class LayerRouting:
    """Where two mixtures of experts, given the same, send their tokens.

    Attributes:
        index: of the layer, from 0.
        choices: (token, slot) pairs compared.
        different: choices of the first model that the second does not make for that token.
        examples: the first few, as (probe, row, token, the first model's experts, the second's), what they share left out.
        experts: how many there are.
        chosen: how many of them either model sends a token to: of the others the logits say nothing.
    """

    index: int
    choices: int
    different: int
    examples: tuple[tuple[str, int, int, tuple[int, ...], tuple[int, ...]], ...]
    experts: int
    chosen: int


def compare_routing(
    index: int, probes: Sequence[Probe], mine: Sequence[Seen], theirs: Sequence[Seen]
) -> LayerRouting | None:
    """Compare the decisions of one layer; None where a model shows none."""
    choices = different = 0
    examples: list[tuple[str, int, int, tuple[int, ...], tuple[int, ...]]] = []
    chosen: set[int] = set()
    for probe, a, b in zip(probes, mine, theirs, strict=True):
        if a.routed is None or b.routed is None or a.routed.shape != b.routed.shape:
            return None
        kept = probe.kept.flatten().nonzero()[:, 0]
        first, second = a.routed.cpu()[kept].sort(-1).values, b.routed.cpu()[kept].sort(-1).values
        choices += first.numel()
        chosen |= set(first.flatten().tolist()) | set(second.flatten().tolist())
        for k in (first != second).any(-1).nonzero()[:, 0].tolist():
            here, there = set(first[k].tolist()), set(second[k].tolist())
            different += len(here - there)
            row, token = divmod(int(kept[k]), probe.input_ids.shape[1])
            if len(examples) < _SHOWN:
                examples.append((probe.name, row, token, tuple(sorted(here - there)), tuple(sorted(there - here))))
    experts = max(seen.num_experts for seen in (*mine, *theirs))
    return LayerRouting(index, choices, different, tuple(examples), experts, len(chosen))


def differing_experts(probes: Sequence[Probe], mine: Sequence[Seen], theirs: Sequence[Seen], same: float) -> list[str]:
    """Experts that give their tokens something else, by name in the layer; the tokens must be the same.

    Args:
        probes: what was run; padding is left out.
        mine: what the first model's layer did.
        theirs: what the second's did, given the same.
        same: largest relative difference taken for equal.
    """
    found: dict[str, None] = {}
    for probe, a, b in zip(probes, mine, theirs, strict=True):
        kept = probe.kept.flatten()
        for name in sorted(a.experts.keys() & b.experts.keys()):
            left, right = (_by_token(*seen.experts[name], kept) for seen in (a, b))
            comparable = left.shape == right.shape and len(left) > 0
            if comparable and float((left - right).abs().max()) > same * float(left.abs().max()):
                found[name] = None
    return list(found)


def _by_token(tokens: Tensor, output: Tensor, kept: Tensor) -> Tensor:
    """Outputs in the order of their tokens (models rank the chosen experts otherwise), without padding."""
    order = tokens.cpu().argsort()
    return output.cpu().double()[order][kept[tokens.cpu()[order]]]


def alike(probes: Sequence[Probe], mine: Sequence[Seen], theirs: Sequence[Seen]) -> bool:
    """Whether both models sent every token to the same experts, in the same slots or not."""
    found = compare_routing(0, probes, mine, theirs)
    return found is not None and not found.different
