"""Config fields: each reads config keys into canonical attributes and writes them back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmconvert.canonical.model import CanonicalConfig
from llmconvert.errors import BadInput, Refused
from llmconvert.spec.rope import Rope, RopeParameters

REQUIRED = "REQUIRED"
"""The default of a field whose key must be present: sizes are never guessed."""

UNSET = "UNSET"
"""No value of its own."""


@dataclass(frozen=True)
class Field:
    """One canonical attribute (or several of equal value) under a key of its own.

    Attributes:
        attribute: the canonical attribute, or several separated by spaces that share the key.
        key: the config key written, and read first.
        aliases: other keys it is read from.
        default: value where no key is present; REQUIRED to insist, or `=other` for another attribute's value.
        null: value where a key is present and null, likewise; if UNSET `default`, but False for True, as code that asks
            `if config.key` reads it.
        times: canonical value = stored value × times.
        only_if: a boolean key that must be true for `key` to count; otherwise the value is `otherwise`.
        otherwise: see `only_if`.
        values: stored values with another canonical spelling.
        also: further keys the value is written under, and read from.
    """

    attribute: str
    key: str
    aliases: tuple[str, ...] = ()
    default: Any = REQUIRED
    null: Any = UNSET
    times: float = 1.0
    only_if: str | None = None
    otherwise: Any = None
    values: tuple[tuple[str, str], ...] = ()
    also: tuple[str, ...] = ()

    @property
    def attributes(self) -> tuple[str, ...]:
        """The canonical attributes it sets."""
        return tuple(self.attribute.split())

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys it understands."""
        return (self.key, *self.also, *self.aliases, *((self.only_if,) if self.only_if else ()))

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """Attribute values from a config; `done` holds those read before.

        Raises:
            BadInput: a required key is missing or not a number where one is needed.
        """
        names = (self.key, *self.also, *self.aliases)
        value: Any = next((config[name] for name in names if config.get(name) is not None), None)
        if self.only_if is not None and not config.get(self.only_if):
            value = _resolved(self.otherwise, done)
        elif value is None:
            stated = any(name in config for name in names)
            null = self.null if self.null is not UNSET else False if self.default is True else self.default
            value = null if stated else self.default
            if value is REQUIRED:
                raise BadInput(f"the key `{self.key}` is missing", where="config.json")
            value = _resolved(value, done)
        else:
            value = self._canonical(value)
        return dict.fromkeys(self.attributes, value)

    def _canonical(self, value: Any) -> Any:
        if isinstance(value, str):
            return dict(self.values).get(value, value)
        if isinstance(value, list):
            return tuple(value)
        if self.times != 1.0:
            value = float(value) * self.times
            return int(value) if value.is_integer() else value
        return value

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The key and its value."""
        value = getattr(config, self.attributes[0])
        if self.times != 1.0:
            value = value / self.times
            value = int(value) if float(value).is_integer() else value
        return {**dict.fromkeys((self.key, *self.also), value), **({self.only_if: True} if self.only_if else {})}


def _resolved(value: Any, done: Mapping[str, Any]) -> Any:
    """A default: itself, or another attribute's value."""
    return done[value[1:]] if isinstance(value, str) and value.startswith("=") else value


def key_value_heads(default: int) -> Field:
    """`num_key_value_heads` as most classes read it: a default of their own if absent, one a query head if null."""
    return Field("num_key_value_heads", "num_key_value_heads", default=default, null="=num_attention_heads")


@dataclass(frozen=True)
class Fixed:
    """An attribute the architecture's code fixes; there is no key for it.

    Attributes:
        attribute: the canonical attribute, or several separated by spaces.
        value: theirs; `=other` for another attribute's.
        keys: config keys that the code does not read, and that say nothing therefore.
    """

    attribute: str
    value: Any
    keys: tuple[str, ...] = ()

    @property
    def attributes(self) -> tuple[str, ...]:
        """The canonical attributes it sets."""
        return tuple(self.attribute.split())

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """The fixed value."""
        return dict.fromkeys(self.attributes, _resolved(self.value, done))

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """Nothing to write.

        Raises:
            Refused: the model has another value.
        """
        for attribute in self.attributes:
            value, fixed = getattr(config, attribute), _resolved(self.value, vars(config))
            if value != fixed:
                raise Refused(f"{target} fixes `{attribute}` to {fixed!r}; the checkpoint has {value!r}")
        return {}


@dataclass(frozen=True)
class HeadDim:
    """head_dim: a key, or hidden_size / num_attention_heads where it is absent or null.

    Attributes:
        key: the key, or None where the code always divides.
        default: the value where the key is absent, of classes that have one.
    """

    key: str | None = "head_dim"
    default: int | None = None
    attributes = ("head_dim",)

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys it understands."""
        return (self.key,) if self.key else ()

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """head_dim.

        Raises:
            BadInput: hidden_size is not a multiple of num_attention_heads and there is no key.
        """
        value = config.get(self.key, self.default) if self.key else None
        if value is None:
            value, rest = divmod(done["hidden_size"], done["num_attention_heads"])
            if rest:
                raise BadInput(
                    f"hidden_size {done['hidden_size']} is not a multiple of num_attention_heads "
                    f"{done['num_attention_heads']} and there is no `head_dim`",
                    where="config.json",
                )
        return {"head_dim": value}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The key, where there is one."""
        return {self.key: config.head_dim} if self.key else {}


@dataclass(frozen=True)
class SquareRoot:
    """An attribute the code sets to the square root of another (Gemma's embedding scale)."""

    attribute: str
    of: str
    keys: tuple[str, ...] = ()

    @property
    def attributes(self) -> tuple[str, ...]:
        """The canonical attribute it sets."""
        return (self.attribute,)

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """The square root."""
        return {self.attribute: math.sqrt(done[self.of])}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """Nothing to write.

        Raises:
            Refused: the model has another value.
        """
        if getattr(config, self.attribute) != math.sqrt(getattr(config, self.of)):
            raise Refused(f"{target} fixes `{self.attribute}` to sqrt({self.of})")
        return {}


@dataclass(frozen=True)
class SoftmaxScale:
    """The factor on attention scores, under a key of its own; head_dim ** -0.5 is no departure from Llama.

    Attributes:
        key: the key.
        power: factor = value ** power.
        default: the value where the key is absent (1: transformers' GraniteConfig).
    """

    key: str
    power: float = 1.0
    default: float = 1.0
    attributes = ("attention_multiplier",)

    @property
    def keys(self) -> tuple[str, ...]:
        """The config key it understands."""
        return (self.key,)

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """The factor, or None where it is the usual one."""
        value = float(config.get(self.key, self.default)) ** self.power
        return {"attention_multiplier": None if math.isclose(value, done["head_dim"] ** -0.5, rel_tol=1e-9) else value}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The key, always."""
        usual = float(config.head_dim**-0.5)
        value = (usual if config.attention_multiplier is None else config.attention_multiplier) ** (1 / self.power)
        whole = self.power != 1.0 and math.isclose(value, round(value), rel_tol=1e-12)
        return {self.key: round(value) if whole else value}


SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Window:
    """The sliding attention window, and which layers have it.

    Attributes:
        key: the window's key.
        default: the window where the key is absent altogether (a key set to null means no window).
        switch: a boolean key without which the window is off.
        from_layer: a key naming the first layer the window applies to, `first` where the key is absent.
        alternates: it applies to every other layer, the first among them, where `layer_types` is absent (Gemma 2).
    """

    key: str = "sliding_window"
    default: int | None = None
    switch: str | None = None
    from_layer: str | None = None
    first: int = 0
    alternates: bool = False
    attributes = ("sliding_window", "layer_types")

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys it understands."""
        return tuple(key for key in (self.key, self.switch, self.from_layer, "layer_types") if key)

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """The window, or None where no layer has one; and the layers' types where they differ.

        Raises:
            BadInput: `layer_types` does not name a known type for each layer.
        """
        window = config.get(self.key, self.default)
        if self.switch and not config.get(self.switch):
            window = None
        layers = range(done["num_hidden_layers"])
        types = config.get("layer_types")
        if types is None:
            first = config.get(self.from_layer, self.first) if self.from_layer else 0
            types = [SLIDING if i >= first and not (self.alternates and i % 2) else FULL for i in layers]
        elif set(types) - {SLIDING, FULL} or (window is not None and len(types) != len(layers)):
            raise BadInput(
                f"`layer_types` does not say of each of {len(layers)} layers that it is `{FULL}` or `{SLIDING}`",
                where="config.json",
            )
        if window is None or SLIDING not in types:
            return {"sliding_window": None, "layer_types": None}
        return {"sliding_window": window, "layer_types": None if FULL not in types else tuple(types)}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The window's keys."""
        window, types = config.sliding_window, config.layer_types
        if types is None and (self.alternates or (self.from_layer and window is not None)):
            types = (SLIDING if window is not None else FULL,) * config.num_hidden_layers
        written: dict[str, Any] = {self.key: window}
        if self.switch:
            written[self.switch] = window is not None
        if types:
            written["layer_types"] = list(types)
        if self.from_layer and types and FULL not in types[types.index(SLIDING) :]:
            written[self.from_layer] = types.index(SLIDING)  # what releases of transformers before `layer_types` read
        return written


@dataclass(frozen=True)
class LeadingDense:
    """Which layers have experts: all but the first few, `default` where the key is absent (DeepSeek)."""

    default: int = 0
    key: str = "first_k_dense_replace"
    attributes = ("moe_layers",)

    @property
    def keys(self) -> tuple[str, ...]:
        """The config key it understands."""
        return (self.key,)

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """A flag a layer."""
        first = config.get(self.key, self.default) or 0
        return {"moe_layers": tuple(i >= first for i in range(done["num_hidden_layers"]))}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The number of dense layers.

        Raises:
            Refused: there are dense layers after the first with experts.
        """
        dense = config.moe_layers.count(False)
        if any(config.moe_layers[:dense]):
            raise Refused(f"{target} has its dense layers first; the checkpoint has them elsewhere too")
        return {self.key: dense}


@dataclass(frozen=True)
class SparseStep:
    """Which layers have experts: every so many, but for a list of dense ones (Qwen2-MoE)."""

    step: str = "decoder_sparse_step"
    dense: str = "mlp_only_layers"
    attributes = ("moe_layers",)

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys it understands."""
        return (self.step, self.dense)

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """A flag a layer."""
        step, dense = config.get(self.step) or 1, set(config.get(self.dense) or ())
        layers = range(done["num_hidden_layers"])
        return {"moe_layers": tuple(i not in dense and (i + 1) % step == 0 for i in layers)}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The list of dense layers, every layer having experts else."""
        return {self.step: 1, self.dense: [i for i, experts in enumerate(config.moe_layers) if not experts]}


@dataclass(frozen=True)
class AllLayers:
    """Every layer has experts (Mixtral)."""

    attributes = ("moe_layers",)
    keys: tuple[str, ...] = ()

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """A flag a layer."""
        return {"moe_layers": (True,) * done["num_hidden_layers"]}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """Nothing to write: a model with dense layers is refused by its traits."""
        return {}


@dataclass(frozen=True)
class SharedExperts:
    """The width of all shared experts together: their number, `default` if absent, times a routed expert's (DeepSeek)."""

    default: int = 0
    key: str = "n_shared_experts"
    attributes = ("shared_expert_intermediate_size",)

    @property
    def keys(self) -> tuple[str, ...]:
        """The config key it understands."""
        return (self.key,)

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """The width, 0 where there are none."""
        return {
            "shared_expert_intermediate_size": (config.get(self.key, self.default) or 0) * done["moe_intermediate_size"]
        }

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """Their number.

        Raises:
            Refused: the width is not a multiple of a routed expert's.
        """
        number, rest = divmod(config.shared_expert_intermediate_size, config.moe_intermediate_size)
        if rest:
            raise Refused(
                f"{target} has shared experts of whole multiples of {config.moe_intermediate_size}; the checkpoint's "
                f"are {config.shared_expert_intermediate_size} wide"
            )
        return {self.key: number or None}


@dataclass(frozen=True)
class NormalisedScores:
    """Whether chosen experts' scores are divided by their sum: in published DeepSeek code never where one is chosen."""

    key: str = "norm_topk_prob"
    attributes = ("norm_topk_prob",)

    @property
    def keys(self) -> tuple[str, ...]:
        """The config key it understands."""
        return (self.key,)

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """Whether they are."""
        return {"norm_topk_prob": bool(config.get(self.key)) and done["num_experts_per_tok"] > 1}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The key.

        Raises:
            Refused: one expert is chosen, and weighed by 1.
        """
        if config.norm_topk_prob and config.num_experts_per_tok == 1:
            raise Refused(f"{target} weighs an expert chosen alone by its score; the checkpoint weighs it by 1")
        return {self.key: config.norm_topk_prob}


AnyField = (
    LeadingDense
    | NormalisedScores
    | SparseStep
    | AllLayers
    | SharedExperts
    | Field
    | Fixed
    | HeadDim
    | SquareRoot
    | SoftmaxScale
    | Window
    | Rope
    | RopeParameters
)

LLAMA_FIELDS: tuple[AnyField, ...] = (
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "intermediate_size"),
    Field("num_hidden_layers", "num_hidden_layers"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_key_value_heads", "num_key_value_heads", default="=num_attention_heads"),
    Field("vocab_size", "vocab_size"),
    Field("rms_norm_eps", "rms_norm_eps", default=1e-6),
    Field("max_position_embeddings", "max_position_embeddings", aliases=("max_sequence_length",), default=2048),
    Field("hidden_act", "hidden_act", default="silu"),
    Field("tie_word_embeddings", "tie_word_embeddings", default=False),
    HeadDim(),
    Rope(),
)
"""Llama's own keys, used for every attribute a spec does not mention (defaults: transformers' LlamaConfig)."""
