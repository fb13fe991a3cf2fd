"""Which source reaches which target, how exactly, and why not: worked out from the specs, not written down."""

from __future__ import annotations

from dataclasses import dataclass

from llmconvert.canonical.lowerings import ADD, NEEDS_OWN_HEAD, REMOVE
from llmconvert.canonical.model import TRAITS
from llmconvert.canonical.step import EXACT, ONE_WAY, ROUNDED
from llmconvert.spec.language import Field, Fixed, SoftmaxScale, Spec, SquareRoot
from llmconvert.spec.registry import Registry
from llmconvert.spec.rope import Rope


@dataclass(frozen=True)
class Reach:
    """How far one architecture converts to another.

    Attributes:
        source, target: spec names.
        verdict: `exact`, `rounded`, `one-way`, or `no`.
        steps: the rewrites every conversion takes.
        unless: what an individual checkpoint may have that stops it.
        why: the reason of a `no`.
    """

    source: str
    target: str
    verdict: str
    steps: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    why: str = ""


_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
"""Where there is a key for them, published checkpoints use them."""


_SIZES = {"num_experts": "moe", "kv_lora_rank": "mla"}
"""Where there is a key for the size, every checkpoint has the trait."""


def certain_traits(spec: Spec) -> frozenset[str]:
    """Traits every checkpoint of an architecture has, because its code fixes them."""
    if spec.family == "canonical":
        return frozenset()
    names = {
        "qkv_bias": "qkv_bias", "o_bias": "o_bias", "mlp_bias": "mlp_bias", "rotary_interleaved": "interleaved_rotary",
        "qk_norm": "qk_norm", "unit_offset_norm": "unit_offset_norm", "alibi": "alibi", "router_bias": "router_bias",
        "branch_output_norm": "branch_output_norm", "norm_head": "norm_head", "shared_expert_gate": "shared_expert_gate",
    }  # fmt: skip
    certain = set()
    for field in spec.fields:
        if isinstance(field, Fixed) and field.value is True:
            certain |= {names[a] for a in field.attributes if a in names}
        elif isinstance(field, Fixed) and field.attribute == "scoring_func" and field.value == "sigmoid":
            certain.add("sigmoid_router")
        elif isinstance(field, Field) and field.attribute in _SIZES:
            certain.add(_SIZES[field.attribute])
        elif isinstance(field, SquareRoot):
            certain.add("rounded_" + field.attribute)
        elif isinstance(field, SoftmaxScale):
            certain |= set(field.attributes)
        elif isinstance(field, Field) and field.attribute in _MULTIPLIERS:
            certain.add(field.attribute)
        elif isinstance(field, Rope) and field.partial != 1.0:
            certain.add("partial_rotary")
        elif isinstance(field, Field) and field.attribute == "tie_word_embeddings" and field.default is True:
            certain.add("tied_embeddings")
        elif isinstance(field, Field) and field.attribute == "hidden_act" and field.default != "silu":
            certain.add("activation")
    if "mla" in certain:
        certain.discard("interleaved_rotary")
    return frozenset(certain)


def possible_traits(spec: Spec) -> frozenset[str]:
    """Traits a checkpoint of an architecture may have."""
    possible = set(spec.holds | spec.always | certain_traits(spec))
    for field in spec.fields:
        if not isinstance(field, Fixed):  # what it fixes, `certain_traits` knows
            possible |= {"sliding_window", "alibi"} & set(field.attributes)
    return frozenset(possible & set(TRAITS))


def _blocked(traits: frozenset[str], target: Spec) -> list[str]:
    held = target.holds | target.always
    pairs = {"partial_rotary": "padded_rotary", "padded_rotary": "partial_rotary"}
    return sorted(t for t in traits - held if t not in REMOVE or (t in pairs and pairs[t] not in held))


def reach(source: Spec, target: Spec) -> Reach:
    """The verdict for a pair of specs."""
    if not target.target:
        return Reach(source.name, target.name, "no", why=target.not_target)
    if source.name == target.name:
        return Reach(source.name, target.name, "exact")
    certain, possible = certain_traits(source), possible_traits(source)
    blocked = _blocked(certain, target)
    if blocked:
        trait = TRAITS[blocked[0]]
        return Reach(
            source.name, target.name, "no", why=f"{trait.name}: {trait.obstacle or f'{target.name} has no form of it'}"
        )
    lacking = sorted(t for t in target.always - possible_traits(source) if t not in ADD)
    if lacking:
        why = f"{lacking[0]}: {target.name} always has it ({TRAITS[lacking[0]].meaning}), and no rewrite adds it"
        return Reach(source.name, target.name, "no", why=why)
    surplus = certain - target.holds - target.always
    if "tied_embeddings" in certain and surplus & set(NEEDS_OWN_HEAD):
        surplus |= {"tied_embeddings"}
    steps = [REMOVE[t] for t in REMOVE if t in surplus]
    kept = (certain & target.holds) | {"partial_rotary"} & certain
    steps += [ADD[t] for t in ADD if t in target.always and t not in kept | certain]
    worst = max((s.exactness for s in steps), key=[EXACT, ROUNDED, ONE_WAY].index, default=EXACT)
    verdict = {EXACT: "exact", ROUNDED: "rounded", ONE_WAY: "one-way"}[worst]
    return Reach(
        source.name, target.name, verdict, tuple(s.name for s in steps), tuple(_blocked(possible - certain, target))
    )


def matrix(known: Registry) -> list[Reach]:
    """The verdict for every source and target."""
    sources = [spec for spec in known.specs.values() if spec.source]
    return [reach(source, target) for source in sources for target in known.specs.values()]
