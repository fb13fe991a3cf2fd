"""Checks of a spec as data: a clash, a gap or an unknown name is reported with its file and row."""

from __future__ import annotations

import dataclasses

from llmconvert.canonical.lowerings import ADD
from llmconvert.canonical.model import DOWN, GATE, HEAD, MODULES, TRAITS, UP, CanonicalConfig, K, O, Q, V
from llmconvert.errors import BadInput
from llmconvert.spec.expand import all_rows
from llmconvert.spec.language import Fixed, Refusal, Row, Spec

_ATTRIBUTES = {attribute.name for attribute in dataclasses.fields(CanonicalConfig)}
_PACKS = ("concat", "grouped")
_BIASED = {"qkv_bias": {Q, K, V}, "o_bias": {O}, "mlp_bias": {GATE, UP, DOWN}}


def validate(spec: Spec, where: str) -> None:
    """Check one spec.

    Args:
        spec: the spec.
        where: its file, for the message.

    Raises:
        BadInput: the first fault, naming the row or field.
    """

    def fault(what: str) -> BadInput:
        return BadInput(f"spec `{spec.name}`: {what}", where=where, hint="see docs/adding-an-architecture.md")

    if not spec.name or not spec.name.replace("_", "").isalnum():
        raise fault("`name` must be letters, digits and underscores")
    if not spec.model_types or not spec.architectures:
        raise fault("`model_types` and `architectures` must each name at least one value")
    for trait in (*spec.holds, *spec.always, *(t for group in spec.coupled for t in group)):
        if trait not in TRAITS:
            raise fault(f"`{trait}` is not a trait (they are: {', '.join(sorted(TRAITS))})")
    for group in spec.coupled:
        if not set(group) & set(ADD):
            raise fault(f"no lowering adds any of {', '.join(f'`{t}`' for t in group)}, so they cannot be coupled")
    owner: dict[str, object] = {}
    for field in spec.config:
        for attribute in field.attributes:
            if attribute not in _ATTRIBUTES:
                raise fault(f"`{attribute}` in {field!r} is not a canonical attribute")
            if attribute in owner:
                raise fault(f"`{attribute}` is set by two fields: {owner[attribute]!r} and {field!r}")
            owner[attribute] = field
    for field in spec.fields:
        for attribute in set(field.attributes) & _BIASED.keys():
            if not isinstance(field, Fixed) or field.value:
                for row in spec.weights:
                    if _BIASED[attribute] & set(row.modules) and "{p}" not in row.stored:
                        raise fault(
                            f"row `{row.stored}` has no place (`{{p}}`) for the bias that `{attribute}` may say is there"
                        )
    _validate_rows(spec, fault)


def _validate_rows(spec: Spec, fault: object) -> None:
    assert callable(fault)
    owners: dict[str, Row] = {}
    for row in spec.weights:
        if not row.modules:
            raise fault(f"row `{row.stored}` holds no module")
        for module in row.modules:
            if module not in MODULES:
                raise fault(f"row `{row.stored}` names `{module}`, which is not a canonical module")
            if module in owners:
                raise fault(f"`{module}` is in two rows: `{owners[module].stored}` and `{row.stored}`")
            owners[module] = row
            for each, what in (("{i}", "layer"), ("{j}", "expert")):
                if (each in module) != (each in row.stored):
                    raise fault(
                        f"row `{row.stored}` and module `{module}` must both be per {what} (`{each}`) or neither"
                    )
        packs = {row.pack, *(row.otherwise[1:] if row.otherwise else ())}
        for pack in sorted(packs - set(_PACKS)):
            raise fault(f"row `{row.stored}` has the unknown pack {pack!r} (known: {', '.join(_PACKS)})")
        if "grouped" in packs and row.modules != (Q, K, V):
            raise fault(f"row `{row.stored}` is grouped, which is defined for (Q, K, V) only")
        if "{p}" not in row.stored and not row.stored.endswith((".weight", "weight")):
            raise fault(f"row `{row.stored}` ends in neither `{{p}}` nor `weight`")
    stored = [row.stored for row in all_rows(spec)] + [drop.stored for drop in spec.drops]
    twice = {name for name in stored if stored.count(name) > 1}
    if twice:
        raise fault(f"`{min(twice)}` is stored by two rows")
    if "tied_embeddings" in spec.always and any(HEAD in row.modules for row in spec.weights):
        raise fault("a spec that always ties its head cannot have a row for it")


def validate_all(specs: dict[str, tuple[Spec, str]], refusals: tuple[Refusal, ...]) -> None:
    """Check that no family has two default targets and that refusals give their reason.

    Raises:
        BadInput: one has, or a refusal gives none.
    """
    for refusal in refusals:
        if not refusal.why:
            raise BadInput(f"refusal `{refusal.name}` gives no reason")
    families = {spec.family for spec, _ in specs.values()}
    for family in families:
        defaults = [s.name for s, _ in specs.values() if s.family == family and s.target and s.default_target]
        if len(defaults) > 1:
            raise BadInput(f"family `{family}` has several default targets: {', '.join(sorted(defaults))}")
