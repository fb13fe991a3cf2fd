"""Exact rewrites that remove a trait a target cannot hold, or add one it always has.

Each `Step` is a pair: `apply` rewrites a model, `undo` gives the model back. Proofs stand with the steps.
`lower` chooses and composes the steps between a model and a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from llmconvert.canonical import model as canonical
from llmconvert.canonical.experts import GIVE_COPIES, GIVE_SHARED_GATE, TAKE_COPIES, TAKE_SHARED_GATE
from llmconvert.canonical.model import TRAITS, CanonicalConfig, CanonicalModel, traits
from llmconvert.canonical.rotary import (
    DEINTERLEAVE,
    INTERLEAVE,
    PAD,
    UNPAD,
    UNROTATED_DOWN,
    UNROTATED_UP,
    WIDEN,
    scales_rotation,
)
from llmconvert.canonical.step import EXACT, ONE_WAY, ROUNDED, Step, edit, rounded
from llmconvert.checkpoint.dtypes import in_dtype
from llmconvert.errors import Refused
from llmconvert.tensors.expressions import Check, Expression, fill, gather, normalize_rows, scale, shift

# Heads, embeddings, norms.


def _repeat_heads(model: CanonicalModel) -> CanonicalModel:
    c = model.config
    pattern = list(range(c.head_dim)) * (c.num_attention_heads // c.num_key_value_heads)
    tensors = edit(model, (canonical.K, canonical.V), lambda e: gather(e, pattern, c.head_dim))
    return replace(model, config=replace(c, num_key_value_heads=c.num_attention_heads), tensors=tensors)


def _merge_heads(model: CanonicalModel, before: CanonicalConfig) -> CanonicalModel:
    group = before.num_attention_heads // before.num_key_value_heads
    d = before.head_dim
    tensors = edit(model, (canonical.K, canonical.V), lambda e: gather(e, list(range(d)), group * d))
    return replace(model, config=before, tensors=tensors)


_REPEAT_HEADS = Step(
    "repeat key/value heads to one per query head",
    EXACT,
    "grouped-query attention is multi-head attention whose groups share keys and values",
    _repeat_heads,
    _merge_heads,
)


def _untie(model: CanonicalModel) -> CanonicalModel:
    tensors = {**model.tensors, f"{canonical.HEAD}.weight": model.tensors[f"{canonical.EMBED}.weight"]}
    return replace(model, config=replace(model.config, tie_word_embeddings=False), tensors=tensors)


def _tie(model: CanonicalModel, before: CanonicalConfig) -> CanonicalModel:
    tensors = {name: e for name, e in model.tensors.items() if not name.startswith(canonical.HEAD)}
    return replace(model, config=before, tensors=tensors)


_UNTIE = Step("write the tied head as a matrix of its own", EXACT, "the head is a copy of the embedding", _untie, _tie)

_FOLD_NORM_HEAD = Step(
    "fold NormHead into lm_head",
    ONE_WAY,
    "the published code replaces the head by its normalised rows, in the checkpoint's dtype, at the first forward",
    lambda m: replace(
        m, config=replace(m.config, norm_head=False), tensors=edit(m, (canonical.HEAD,), normalize_rows, ("weight",))
    ),
    None,
    lossy=(canonical.HEAD,),
)

_NORMS = (
    canonical.INPUT_NORM, canonical.POST_NORM, canonical.POST_ATTENTION_NORM, canonical.POST_MLP_NORM,
    canonical.Q_NORM, canonical.K_NORM, canonical.NORM,
)  # fmt: skip

_FOLD_UNIT_OFFSET = Step(
    "add one to norm weights",
    ROUNDED,
    "RMSNorm(x)·(1 + w) with 1 + w stored; bfloat16 keeps 8 bits of the sum: `--dtype float32` keeps all",
    lambda m: replace(
        m,
        config=replace(m.config, unit_offset_norm=False),
        tensors=edit(m, _NORMS, rounded(lambda e: shift(e, 1.0)), ("weight",)),
    ),
    lambda m, before: replace(
        m, config=before, tensors=edit(m, _NORMS, rounded(lambda e: shift(e, -1.0)), ("weight",))
    ),
)


def _scaling(
    name: str,
    why: str,
    modules: Callable[[CanonicalConfig], tuple[str, ...]],
    factor: Callable[[CanonicalConfig], float],
    neutral: dict[str, float | None],
) -> Step:
    def by(model: CanonicalModel, value: float) -> dict[str, Expression]:
        return edit(model, modules(model.config), rounded(lambda e: scale(e, value)))

    return Step(
        name,
        ROUNDED,
        why,
        lambda m: replace(m, config=replace(m.config, **neutral), tensors=by(m, factor(m.config))),  # type: ignore[arg-type]
        lambda m, before: replace(m, config=before, tensors=by(m, 1.0 / factor(before))),
    )


def _branch_ends(c: CanonicalConfig) -> tuple[str, ...]:
    if c.branch_output_norm:
        return canonical.POST_ATTENTION_NORM, canonical.POST_MLP_NORM
    return canonical.O, canonical.DOWN, canonical.EXPERT_DOWN, canonical.SHARED_DOWN


def _query_ends(c: CanonicalConfig) -> tuple[str, ...]:
    return (canonical.Q_NORM,) if c.qk_norm else (canonical.Q, canonical.Q_B)


_FOLD_EMBEDDING = _scaling(
    "multiply embeddings by their constant", "the first thing done to an embedding is that product",
    lambda c: (canonical.EMBED,), lambda c: c.embedding_multiplier, {"embedding_multiplier": 1.0},
)  # fmt: skip


def _fold_rounded(model: CanonicalModel, multiplier: float, power: int) -> dict[str, Expression]:
    constant = rounded(lambda e: scale(e, in_dtype(multiplier, model.dtype or e.dtype) ** power))
    return edit(model, (canonical.EMBED,), constant)


_FOLD_ROUNDED_EMBEDDING = Step(
    "multiply embeddings by their constant, rounded to the dtype written",
    ROUNDED,
    "the code rounds the constant to the embeddings' dtype before the product; so does inference in that dtype",
    lambda m: replace(
        m,
        config=replace(m.config, embedding_multiplier=1.0, embedding_multiplier_rounded=False),
        tensors=_fold_rounded(m, m.config.embedding_multiplier, 1),
    ),
    lambda m, before: replace(m, config=before, tensors=_fold_rounded(m, before.embedding_multiplier, -1)),
)
_FOLD_LOGITS = _scaling(
    "divide lm_head by logits_scaling", "(W/s)·x = (W·x)/s",
    lambda c: (canonical.HEAD,), lambda c: 1.0 / c.logits_scaling, {"logits_scaling": 1.0},
)  # fmt: skip
_FOLD_RESIDUAL = _scaling(
    "multiply what ends each branch by residual_multiplier", "o_proj and down_proj are linear; so is a norm in its weight",
    _branch_ends, lambda c: c.residual_multiplier, {"residual_multiplier": 1.0},
)  # fmt: skip
_FOLD_ATTENTION = _scaling(
    "multiply queries by attention_multiplier·sqrt(head_dim)", "scores are linear in q; rotary keeps scalars",
    _query_ends, lambda c: (c.attention_multiplier or 1.0) * math.sqrt(c.head_dim), {"attention_multiplier": None},
)  # fmt: skip


# Biases: a zero bias is no bias.

_BIASED = {
    "qkv_bias": (canonical.Q, canonical.K, canonical.V),
    "o_bias": (canonical.O,),
    "mlp_bias": (canonical.GATE, canonical.UP, canonical.DOWN),
}


def _give_bias(model: CanonicalModel, trait: str) -> CanonicalModel:
    config = replace(model.config, **{trait: True})  # type: ignore[arg-type]
    tensors: dict[str, Expression] = {}
    for name, shape in canonical.shapes(config).items():
        if name in model.tensors:
            tensors[name] = model.tensors[name]
        else:
            tensors[name] = fill(shape, model.tensors[name.removesuffix("bias") + "weight"].dtype)
    return replace(model, config=config, tensors=tensors)


def _take_bias(model: CanonicalModel, trait: str) -> CanonicalModel:
    config = replace(model.config, **{trait: False})  # type: ignore[arg-type]
    kept = canonical.shapes(config)
    dropped = {name: e for name, e in model.tensors.items() if name not in kept}
    checks = tuple(
        Check(
            name,
            e,
            fill(e.shape, e.dtype),
            f"the target cannot hold `{trait}` ({TRAITS[trait].meaning}), and it is not zero",
        )
        for name, e in dropped.items()
    )
    tensors = {name: e for name, e in model.tensors.items() if name in kept}
    return replace(model, config=config, tensors=tensors, checks=model.checks + checks)


def _bias_step(trait: str, give: bool) -> Step:
    modules = ", ".join(module.rpartition(".")[2] for module in _BIASED[trait])
    if give:
        return Step(
            f"give {modules} a zero bias", EXACT, "adding zero changes nothing",
            lambda m: _give_bias(m, trait), lambda m, before: _take_bias(m, trait),
        )  # fmt: skip
    return Step(
        f"leave out the zero biases of {modules}", EXACT, "they are checked to be zero",
        lambda m: _take_bias(m, trait), lambda m, before: _give_bias(m, trait),
    )  # fmt: skip


# Query/key norms that do nothing.

_NORM_EXPONENT = 32


def _norm_weights(product: float, dtype: str) -> tuple[float, float]:
    """Two weights whose product is `product`; in bfloat16, the best pair its 8-bit mantissas allow (2^-15 off)."""
    root = math.sqrt(product)
    if dtype != "BF16":
        return root, root
    exponent = math.frexp(root)[1] - 8
    unit = 2.0**exponent
    pairs = ((first, round(product / unit / unit / first)) for first in range(128, 256))
    first, second = min((p for p in pairs if p[1] <= 256), key=lambda p: abs(p[0] * p[1] * unit * unit - product))
    return first * unit, second * unit


def _add_norms(model: CanonicalModel) -> CanonicalModel:
    """Make RMSNorm nearly the identity: see `_ADD_QK_NORM`.

    Raises:
        Refused: the weights are float16, where the shrunken q and k would underflow.
    """
    down = 2.0**-_NORM_EXPONENT
    dtype = model.dtype or model.tensors[canonical.Q.replace("{i}", "0") + ".weight"].dtype
    if dtype == "F16":
        raise Refused(
            "q and k shrunk by 2^-32 underflow in float16", hint="add `--dtype bfloat16` or `--dtype float32`"
        )
    tensors = edit(model, (canonical.Q, canonical.K), rounded(lambda e: scale(e, down)))
    config = replace(model.config, qk_norm=True)
    weights = _norm_weights(config.rms_norm_eps * 4.0**_NORM_EXPONENT, dtype)
    result: dict[str, Expression] = {}
    for name, shape in canonical.shapes(config).items():
        result[name] = tensors[name] if name in tensors else fill(shape, dtype, weights["k_norm" in name])
    return replace(model, config=config, tensors=result)


def _drop_norms(model: CanonicalModel, before: CanonicalConfig) -> CanonicalModel:
    kept = canonical.shapes(before)
    slim = replace(model, tensors={name: e for name, e in model.tensors.items() if name in kept})
    up = 2.0**_NORM_EXPONENT
    return replace(slim, config=before, tensors=edit(slim, (canonical.Q, canonical.K), rounded(lambda e: scale(e, up))))


_ADD_QK_NORM = Step(
    "add q/k norms that do nothing: shrink q and k until eps outweighs them",
    ROUNDED,
    "with |q|² ≪ eps, RMSNorm(q·2^-k) = q·2^-k/sqrt(eps), which a weight of sqrt(eps)·2^k undoes; in "
    "bfloat16 the two weights' product is within 2^-15 of eps·4^k",
    _add_norms,
    _drop_norms,
)

REMOVE: dict[str, Step] = {
    "mtp_copies": TAKE_COPIES,
    "shared_expert_gate": TAKE_SHARED_GATE,
    "unit_offset_norm": _FOLD_UNIT_OFFSET,
    "norm_head": _FOLD_NORM_HEAD,
    "tied_embeddings": _UNTIE,
    "embedding_multiplier": _FOLD_EMBEDDING,
    "rounded_embedding_multiplier": _FOLD_ROUNDED_EMBEDDING,
    "logits_scaling": _FOLD_LOGITS,
    "residual_multiplier": _FOLD_RESIDUAL,
    "attention_multiplier": _FOLD_ATTENTION,
    "interleaved_rotary": DEINTERLEAVE,
    "partial_rotary": PAD,
    "padded_rotary": UNPAD,
    "grouped_query": _REPEAT_HEADS,
    **{trait: _bias_step(trait, give=False) for trait in _BIASED},
}
"""The step that removes each removable trait, in the order they are applied."""

ADD: dict[str, Step] = {
    "partial_rotary": WIDEN,
    "interleaved_rotary": INTERLEAVE,
    "qk_norm": _ADD_QK_NORM,
    "shared_expert_gate": GIVE_SHARED_GATE,
    "mtp_copies": GIVE_COPIES,
    **{trait: _bias_step(trait, give=True) for trait in _BIASED},
}
"""The step that adds each trait some target always has."""

_NEEDS = {"partial_rotary": "padded_rotary", "padded_rotary": "partial_rotary"}
NEEDS_OWN_HEAD = ("norm_head", "embedding_multiplier", "rounded_embedding_multiplier", "logits_scaling")
"""Traits whose removal changes the embedding or the head alone, so that a tied pair must part first."""


def lower(
    model: CanonicalModel,
    target: str,
    holds: frozenset[str],
    always: frozenset[str],
    coupled: tuple[tuple[str, ...], ...] = (),
    holders: Callable[[str], list[str]] = lambda trait: [],
) -> tuple[CanonicalModel, list[tuple[Step, CanonicalConfig]]]:
    """Rewrite a model until `target` can hold it.

    Args:
        model: the model.
        target: the target's name, for messages.
        holds: traits the target can have.
        always: traits it always has; those no step adds the model must have.
        coupled: groups of traits the target has together or not at all.
        holders: names the targets that can hold a trait, for messages.

    Returns:
        The rewritten model, and the steps taken, each with the config before it.

    Raises:
        Refused: a trait that the target cannot hold and no step removes, or always has and no step adds.
    """
    steps: list[tuple[Step, CanonicalConfig]] = []

    def take(step: Step) -> None:
        nonlocal model
        steps.append((step, model.config))
        model = step.apply(model)

    surplus = traits(model.config) - holds - always
    check_representable(model.config, target, holds | always, holders)
    lacking = [trait for trait in sorted(always - traits(model.config)) if trait not in ADD]
    if lacking:
        named = ", ".join(f"`{trait}` ({TRAITS[trait].meaning})" for trait in lacking)
        raise Refused(f"{target} always has {named}, which this model lacks and no rewrite adds")
    if model.config.tie_word_embeddings and surplus & set(NEEDS_OWN_HEAD):
        take(_UNTIE)
    for trait, step in REMOVE.items():
        if trait in surplus and trait in traits(model.config):
            if trait == "partial_rotary" and scales_rotation(model.config):
                take(UNROTATED_DOWN)
            take(step)
            if trait == "padded_rotary" and scales_rotation(model.config):
                take(UNROTATED_UP)
    for trait, step in ADD.items():
        if trait in always and trait not in traits(model.config):
            take(step)
    for group in coupled:
        present = traits(model.config)
        if present & set(group):
            for trait in group:
                if trait not in present:
                    take(ADD[trait])
    window = model.config.sliding_window
    if window is not None and "sliding_window" not in holds:
        model = replace(model, config=replace(model.config, sliding_window=None, layer_types=None))
    return model, steps


def check_representable(
    config: CanonicalConfig, target: str, holds: frozenset[str], holders: Callable[[str], list[str]] = lambda trait: []
) -> None:
    """Check that every trait is one the target holds or a step removes.

    Raises:
        Refused: naming each that is not, why, and who could hold it.
    """
    refusals = [
        trait
        for trait in sorted(traits(config) - holds)
        if trait not in REMOVE or (trait in _NEEDS and _NEEDS[trait] not in holds)
    ]
    if refusals:
        raise _refusal(refusals, target, holders)


def _refusal(names: list[str], target: str, holders: Callable[[str], list[str]]) -> Refused:
    lines, hints = [], []
    for name in names:
        trait = TRAITS[name]
        if trait.part_of in names:
            continue
        lines.append(f"`{name}` ({trait.meaning}): {trait.obstacle or f'{target} has no form of it'}")
        others = [other for other in holders(name) if other != target]
        if trait.instead:
            hints.append(trait.instead)
        if others:
            hints.append(f"targets that hold `{name}`: {', '.join(others)}")
    return Refused(f"{target} cannot hold " + "; ".join(lines), hint="; ".join(dict.fromkeys(hints)) or None)
