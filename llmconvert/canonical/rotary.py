"""Rewrites of rotary layouts: interleaved or halves, partial or padded, half of a wider head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel
from llmconvert.canonical.step import EXACT, ROUNDED, Step, edit, rounded
from llmconvert.tensors.expressions import Expression, gather, interleave, scale

# Rotary layouts. A head's rows are permuted alike in q and k, so every q·k product is a sum of the same terms.

_QK = (canonical.Q, canonical.K, canonical.Q_NORM, canonical.K_NORM)


def _inverse(pattern: list[int]) -> list[int]:
    return sorted(range(len(pattern)), key=pattern.__getitem__)


def deinterleaved(head_dim: int, rotary_dim: int) -> list[int]:
    """Row order that turns neighbouring rotary pairs (2j, 2j+1) into halves (j, j + rotary_dim/2)."""
    return [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, head_dim)]


def padded(head_dim: int, rotary_dim: int) -> list[int]:
    """Row order that spreads a half-split partial rotation over the whole head.

    Llama pairs row j with row j + head_dim/2. Rotated pairs go to j < rotary_dim/2; the unrotated rows fill the
    rest, where the frequency is zero and the rotation the identity.
    """
    half, turned = head_dim // 2, rotary_dim // 2
    rest = list(range(rotary_dim, head_dim))
    cut = half - turned
    return [*range(turned), *rest[:cut], *range(turned, rotary_dim), *rest[cut:]]


def _permute(model: CanonicalModel, pattern: list[int], **changes: bool) -> CanonicalModel:
    tensors = edit(model, _QK, lambda expression: gather(expression, pattern, len(pattern)))
    return replace(model, config=replace(model.config, **changes), tensors=tensors)  # type: ignore[arg-type]


def _order(model: CanonicalModel, layout: Callable[[int, int], list[int]]) -> list[int]:
    return layout(model.config.head_dim, model.config.rotary_dim)


DEINTERLEAVE = Step(
    "reorder rotary pairs from neighbours to halves",
    EXACT,
    "rows of q and k move together, so every attention score keeps its terms",
    lambda m: _permute(m, _order(m, deinterleaved), rotary_interleaved=False),
    lambda m, before: _permute(m, _inverse(_order(m, deinterleaved)), rotary_interleaved=True),
)

INTERLEAVE = Step(
    "reorder rotary pairs from halves to neighbours",
    EXACT,
    DEINTERLEAVE.why,
    lambda m: _permute(m, _inverse(_order(m, deinterleaved)), rotary_interleaved=True),
    lambda m, before: _permute(m, _order(m, deinterleaved), rotary_interleaved=False),
)

PAD = Step(
    "express partial rotary as zero frequencies",
    EXACT,
    "a pair with frequency zero is not rotated; base theta^(head_dim/rotary_dim) keeps the other frequencies",
    lambda m: _permute(m, _order(m, padded), rotary_padded=True),
    lambda m, before: _permute(m, _inverse(_order(m, padded)), rotary_padded=False),
)

UNPAD = Step(
    "express zero frequencies as partial rotary",
    EXACT,
    PAD.why,
    lambda m: _permute(m, _inverse(_order(m, padded)), rotary_padded=False),
    lambda m, before: _permute(m, _order(m, padded), rotary_padded=True),
)


# LongRoPE multiplies cosines and sines by a factor, and so the rotated dimensions of q and k. Padded, the others have a
# cosine too, of one times the factor.


def scales_rotation(config: CanonicalConfig) -> bool:
    """Whether rotated dimensions are scaled as they are rotated (LongRoPE's and YaRN's attention factor)."""
    return (config.rope_scaling or {}).get("attention_factor", 1.0) not in (None, 1.0)


def _scale_unrotated(model: CanonicalModel, power: int) -> CanonicalModel:
    c = model.config
    factor = float((c.rope_scaling or {})["attention_factor"]) ** power
    sizes = (c.rotary_dim, c.head_dim - c.rotary_dim)

    def rewrite(expression: Expression) -> Expression:
        turned = gather(expression, range(c.rotary_dim), c.head_dim)
        rest = gather(expression, range(c.rotary_dim, c.head_dim), c.head_dim)
        return interleave([turned, rounded(lambda e: scale(e, factor))(rest)], sizes)

    modules = (canonical.Q_NORM, canonical.K_NORM) if c.qk_norm else (canonical.Q, canonical.K)
    return replace(model, tensors=edit(model, modules, rewrite))


UNROTATED_DOWN = Step(
    "divide the unrotated dimensions of q and k by the attention factor",
    ROUNDED,
    "a pair with frequency zero is multiplied by the factor as rotated ones are, in q and in k",
    lambda m: _scale_unrotated(m, -1),
    lambda m, before: _scale_unrotated(m, 1),
)
UNROTATED_UP = Step(
    "multiply the unrotated dimensions of q and k by the attention factor",
    ROUNDED,
    "the target leaves them as they are",
    lambda m: _scale_unrotated(m, 1),
    lambda m, before: _scale_unrotated(m, -1),
)


def _widen(model: CanonicalModel) -> CanonicalModel:
    """Double head_dim with zero rows: scores are unchanged if q grows by sqrt(2), since the scale is 1/sqrt(2d)."""
    d = model.config.head_dim
    pattern = [*range(d), *([-1] * d)]
    tensors = edit(model, (canonical.Q,), rounded(lambda e: scale(e, math.sqrt(2.0))))
    wider = replace(model, tensors=tensors)
    wider = replace(
        wider, tensors=edit(wider, (canonical.Q, canonical.K, canonical.V), lambda e: gather(e, pattern, d))
    )
    tensors = edit(wider, (canonical.O,), lambda e: gather(e, pattern, d, axis=1), ("weight",))
    return replace(model, config=replace(model.config, head_dim=2 * d), tensors=tensors)


def _narrow(model: CanonicalModel, before: CanonicalConfig) -> CanonicalModel:
    d = before.head_dim
    pattern = list(range(d))
    tensors = edit(model, (canonical.Q, canonical.K, canonical.V), lambda e: gather(e, pattern, 2 * d))
    slim = replace(model, tensors=tensors)
    slim = replace(slim, tensors=edit(slim, (canonical.O,), lambda e: gather(e, pattern, 2 * d, axis=1), ("weight",)))
    tensors = edit(slim, (canonical.Q,), rounded(lambda e: scale(e, math.sqrt(0.5))))
    return replace(model, config=before, tensors=tensors)


WIDEN = Step(
    "double head_dim with zeros, so that half of it is rotated",
    ROUNDED,
    "zero rows add nothing to a score; q times sqrt(2) makes up for the softmax scale",
    _widen,
    _narrow,
)
