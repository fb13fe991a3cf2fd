"""What a spec file is written in: frozen records that say how one architecture names, packs and configures a model.

Every record works both ways. A field reads a config key into a canonical attribute and writes it back; a row takes a
stored tensor apart into canonical ones and puts it together again. What is as in Llama is not repeated: a canonical
attribute without a field and a module without a row keep Llama's key and name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmconvert.canonical.model import CanonicalConfig
from llmconvert.spec.fields import (
    LLAMA_FIELDS,
    AllLayers,
    AnyField,
    Field,
    Fixed,
    HeadDim,
    LeadingDense,
    NormalisedScores,
    SharedExperts,
    SoftmaxScale,
    SparseStep,
    SquareRoot,
    Window,
    key_value_heads,
)
from llmconvert.spec.keys import same
from llmconvert.spec.rope import Rope

_ORDER = [attribute.name for attribute in dataclasses.fields(CanonicalConfig)]


@dataclass(frozen=True)
class Row:
    """One stored tensor (per layer) and the canonical modules it holds.

    Attributes:
        stored: its name; `{i}` is the layer, `{j}` the expert, `{p}` is `weight` and, where the modules have
            one, `bias` or `e_score_correction_bias`.
        modules: the canonical modules in it, in order.
        pack: `concat` (one after the other along the output axis) or `grouped` (per key/value head: its query
            heads, its key, its value).
        otherwise: a boolean config key, and the pack where it is false or absent.
    """

    stored: str
    modules: tuple[str, ...]
    pack: str = "concat"
    otherwise: tuple[str, str] | None = None

    def pack_in(self, config: Mapping[str, Any]) -> str:
        """The pack in a checkpoint of this config.json."""
        return self.otherwise[1] if self.otherwise and not config.get(self.otherwise[0]) else self.pack


def row(stored: str, *modules: str, pack: str = "concat", otherwise: tuple[str, str] | None = None) -> Row:
    """Short for `Row`, with the modules as arguments."""
    return Row(stored, modules, pack, otherwise)


@dataclass(frozen=True)
class Drop:
    """A stored tensor (per layer where it has `{i}`, per expert where it has `{j}`) that holds nothing to convert, and why."""

    stored: str
    why: str


@dataclass(frozen=True)
class Note:
    """A sentence for the report where a config key has a value that means something.

    Attributes:
        key: the config key.
        text: the sentence.
        neutral: values that need no remark; a boolean is never a number.
        default: the value where the key is absent.
        written: whether it is said of checkpoints written too, and not only of those read.
    """

    key: str
    text: str
    neutral: tuple[Any, ...] = (None, False)
    default: Any = None
    written: bool = False

    def concerns(self, config: Mapping[str, Any]) -> bool:
        """Whether it is to be said of a checkpoint of this config.json."""
        value = config.get(self.key, self.default)
        return not any(same(value, neutral) for neutral in self.neutral)


@dataclass(frozen=True)
class Sign:
    """What tells a spec's checkpoints from those of another with the same class name; all that is given must hold.

    Attributes:
        present, absent: config keys that are set, and that are not (null is not set).
        values: config keys and their values.
        unlike: groups of keys and values, none of which holds whole.
        stored: names of tensors that are there.
        code, no_code: texts that are, and are not, in the modelling file beside the weights. Where that is there it
            has the last word.
    """

    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    unlike: tuple[Mapping[str, Any], ...] = ()
    stored: tuple[str, ...] = ()
    code: str = ""
    no_code: str = ""


@dataclass(frozen=True)
class Refusal:
    """Checkpoints that are recognised, and that no spec reads.

    Attributes:
        name: what they are called.
        model_types, architectures: values of config.json that mark them.
        why: what they have that the canonical layout cannot say, true whatever the target.
        instead: what to do.
        key: a config key that must be present as well.
    """

    name: str
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    why: str = ""
    instead: str = ""
    key: str | None = None


@dataclass(frozen=True)
class Spec:
    """One architecture.

    Attributes:
        name: its name on the command line.
        title: the models it stands for.
        family: the family whose commands cover it.
        model_types, architectures: values of config.json that claim a checkpoint; the first of each is written.
        config: fields that differ from Llama's.
        weights: rows that differ from Llama's.
        drops: stored tensors left out.
        holds: traits it can have as a target.
        always: traits it has as a target whatever the model; one that no rewrite adds the model must have.
        coupled: groups of traits it has together or not at all.
        requires: keys that change the maths, with the only value the spec describes: another one is refused, an absent
            one means it; it is written too.
        constants: keys written with a fixed value.
        code: modelling files of `llmconvert.models` put beside the weights, for those who have not installed it.
        ignores: keys its own code reads that change nothing a conversion must keep.
        notes: remarks for the report.
        source, target: whether it is read, and written.
        not_target: why it is not written.
        default_target: whether `llama-to-FAMILY` means this one.
        signs: for each question that tells it from specs of the same class name, signs of which one must hold.
        published_code: its checkpoints come with modelling code of their own, beside the class transformers has.
        told: config keys that answer those questions: written, and believed before any sign.
        aka: other specs whose checkpoints the family's commands accept (Yi's new form is Llama).
    """

    name: str
    title: str
    family: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: tuple[AnyField, ...] = ()
    weights: tuple[Row, ...] = ()
    drops: tuple[Drop, ...] = ()
    holds: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()
    coupled: tuple[tuple[str, ...], ...] = ()
    requires: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    source: bool = True
    target: bool = True
    not_target: str = ""
    default_target: bool = True
    signs: tuple[tuple[Sign, ...], ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
    published_code: bool = False
    aka: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[AnyField, ...]:
        """All fields, Llama's where the spec has none of its own, in an order that reads sizes before what needs them."""
        own = {attribute for f in self.config for attribute in f.attributes}
        inherited = tuple(f for f in LLAMA_FIELDS if not own & set(f.attributes))
        return tuple(sorted(inherited + self.config, key=lambda f: min(map(_ORDER.index, f.attributes))))


__all__ = [
    "AllLayers",
    "AnyField",
    "Drop",
    "Field",
    "Fixed",
    "HeadDim",
    "LeadingDense",
    "NormalisedScores",
    "Note",
    "Refusal",
    "Rope",
    "Row",
    "SharedExperts",
    "Sign",
    "SoftmaxScale",
    "SparseStep",
    "Spec",
    "SquareRoot",
    "Window",
    "key_value_heads",
    "row",
]
