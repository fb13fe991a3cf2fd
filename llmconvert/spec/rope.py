"""Rotary embedding settings in every form config.json files use, both ways.

Forms in the wild: `rope_theta` with `rope_scaling` (transformers 4), `rope_parameters` (transformers 5), both;
`type` or `rope_type` inside. Written out: always `rope_theta` and `rope_scaling`, which every version reads right;
`rope_parameters` alone is read by transformers 4 as theta 10000 without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmconvert.canonical.model import CanonicalConfig
from llmconvert.errors import BadInput, Refused

SCALING_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")

_ZERO_FREQUENCY = 1e30
"""A factor that divides a frequency down to nothing; `Infinity` is not JSON."""


@dataclass(frozen=True)
class Rope:
    """How an architecture's config states its rotary embedding.

    Attributes:
        theta_key: the key of the base frequency.
        default: the base where the key is absent, or None where it must be there.
        times: base = value × times.
        fixed: the base, where the code fixes it and the config has no key.
        partial: rotated share of each head where the config has no `partial_rotary_factor`.
        partial_key: the key of that share; None where the code fixes it.
        scaling: the rescaling types the architecture's code knows; () for none.
        two_keys: the dictionary of a rescaling has exactly the keys type and factor, as config classes insist that
            were published before there were others.
        original: the original context length where no key states it; None for the model's own.
        bare_longrope: longrope has exactly the keys type, short_factor and long_factor, as Phi3Config of
            transformers 4 insists; the rest is derived from the two context lengths.
    """

    theta_key: str = "rope_theta"
    default: float | None = 10000.0
    times: float = 1.0
    fixed: float | None = None
    partial: float = 1.0
    partial_key: str | None = None
    scaling: tuple[str, ...] = SCALING_TYPES
    two_keys: bool = False
    original: int | None = None
    bare_longrope: bool = False

    attributes = ("rope_theta", "rotary_dim", "rope_scaling", "rotary_padded")

    @property
    def keys(self) -> tuple[str, ...]:
        """Config keys this field reads."""
        own = ("rope_parameters", "rope_scaling", "original_max_position_embeddings")
        return (
            *own,
            *((self.theta_key,) if self.fixed is None else ()),
            *((self.partial_key,) if self.partial_key else ()),
        )

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the canonical attributes; `done` holds head_dim and max_position_embeddings.

        Raises:
            BadInput: two forms contradict each other, or a needed key is absent.
            Refused: a rescaling type that is not known.
        """
        head_dim, max_position_embeddings = done["head_dim"], done["max_position_embeddings"]
        parameters = dict(config.get("rope_parameters") or {})
        if any(isinstance(value, dict) for value in parameters.values()):
            raise Refused("rotary settings differ by layer (nested `rope_parameters`)", where="config.json")
        theta = self._theta(config, parameters)
        scaling = dict(config.get("rope_scaling") or parameters)
        scaling.pop("rope_theta", None)
        share = scaling.pop("partial_rotary_factor", None)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        kind = "longrope" if kind == "su" else kind
        if self.partial_key is not None:
            share = parameters.get("partial_rotary_factor", config.get(self.partial_key, self.partial))
            if share is None and self.partial != 1.0:
                raise Refused(
                    f"`{self.partial_key}` is null, which readers take for 1 or stop at", where="config.json",
                    hint=f"state it, or leave it out of a copy of config.json for {self.partial:g}",
                )  # fmt: skip
        elif self.partial == 1.0 and (share or config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise Refused(
                "`partial_rotary_factor` is set on an architecture whose readers disagree on it "
                "(transformers ignores it, vLLM honours it)",
                where="config.json",
                hint="remove the key if the model was trained with full rotary embeddings",
            )
        rotary_dim = int(head_dim * (share or self.partial))
        if kind == "default":
            return {"rope_theta": theta, "rotary_dim": rotary_dim, "rope_scaling": None, "rotary_padded": False}
        if kind not in self.scaling:
            raise Refused(f"the rotary rescaling `{kind}` is not known for this architecture", where="config.json")
        if kind not in ("default", "longrope", "llama3") and not _positive(scaling.get("factor")):
            raise BadInput(
                f"`rope_scaling` is `{kind}` and its `factor` is {scaling.get('factor')!r}, not a positive number",
                where="config.json",
            )
        original = config.get("original_max_position_embeddings")
        if original is None and kind == "longrope":
            original = scaling.get("original_max_position_embeddings", self.original)
        if original is not None and kind in ("longrope", "yarn", "llama3"):
            scaling["original_max_position_embeddings"] = original
        scaling["rope_type"] = kind
        padded = _read_padding(scaling, theta, head_dim) if rotary_dim == head_dim else None
        if padded is not None:
            return padded
        if kind == "longrope":
            _complete_longrope(scaling, max_position_embeddings)
        return {"rope_theta": theta, "rotary_dim": rotary_dim, "rope_scaling": scaling, "rotary_padded": False}

    def _theta(self, config: Mapping[str, Any], parameters: Mapping[str, Any]) -> float:
        if self.fixed is not None:
            return self.fixed
        inside, outside = parameters.get("rope_theta"), config.get(self.theta_key)
        if inside is not None and outside is not None and inside != outside:
            raise BadInput(
                f"`rope_parameters` says rope_theta {inside}, `{self.theta_key}` says {outside}", where="config.json"
            )
        value = inside if inside is not None else outside
        if value is None:
            if self.default is None:
                raise BadInput(f"the key `{self.theta_key}` is missing", where="config.json")
            return self.default
        return float(value) * self.times

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The config keys for a canonical config.

        Raises:
            Refused: the architecture has no way to say it.
        """
        theta, scaling = config.rope_theta, dict(config.rope_scaling) if config.rope_scaling else None
        if config.rotary_padded and config.rotary_dim < config.head_dim:
            theta, scaling = _write_padding(config)
        if scaling is not None and scaling["rope_type"] not in self.scaling:
            known = ", ".join(self.scaling) or "none"
            raise Refused(f"{target} cannot hold rotary rescaling `{scaling['rope_type']}` (it knows {known})")
        if self.fixed is not None:
            if theta != self.fixed:
                raise Refused(f"{target} fixes rope_theta to {self.fixed:g}; the checkpoint has {theta:g}")
            return {}
        value = theta / self.times
        written: dict[str, Any] = {self.theta_key: int(value) if self.times != 1.0 and value.is_integer() else value}
        share = config.rotary_dim / config.head_dim
        if self.partial_key is not None:
            written[self.partial_key] = share
        elif not config.rotary_padded and share != self.partial:
            raise Refused(f"{target} rotates {self.partial:g} of each head; the checkpoint {share:g}")
        if self.scaling:
            written["rope_scaling"] = scaling and {**scaling, "type": scaling["rope_type"]}
            if scaling and self.two_keys:
                written["rope_scaling"] = _two_keys(scaling, target)
            if scaling and self.bare_longrope:
                written["rope_scaling"] = _bare(scaling, config.max_position_embeddings, target)
            original = scaling and scaling.get("original_max_position_embeddings")
            if scaling and scaling["rope_type"] == "longrope" and original != config.max_position_embeddings:
                # transformers 4 looks for it here only, and Phi3Config has a default of its own.
                written["original_max_position_embeddings"] = original
        return written


@dataclass(frozen=True)
class RopeParameters:
    """Base and rescaling as the canonical class has them, in the form of transformers 5; both forms are read.

    A config of an unknown type with `rope_scaling` breaks transformers 5.23, which looks at it to find a tokenizer.
    """

    attributes = ("rope_theta", "rope_scaling")
    keys: tuple[str, ...] = ("rope_parameters", "rope_theta", "rope_scaling")

    def read(self, config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
        """Base and rescaling.

        Raises:
            BadInput: there is no base.
        """
        parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = parameters.pop("rope_theta", config.get("rope_theta"))
        if theta is None:
            raise BadInput("`rope_parameters` has no `rope_theta`", where="config.json")
        parameters["rope_type"] = parameters.get("rope_type") or parameters.pop("type", "default")
        return {"rope_theta": theta, "rope_scaling": None if parameters["rope_type"] == "default" else parameters}

    def write(self, config: CanonicalConfig, target: str) -> dict[str, Any]:
        """The key."""
        return {
            "rope_parameters": {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
        }


def _complete_longrope(scaling: dict[str, Any], max_position_embeddings: int) -> None:
    """State factor and attention factor, which Phi-3 derives from two context lengths (LongRoPE, section 3)."""
    original = scaling.setdefault("original_max_position_embeddings", max_position_embeddings)
    factor = scaling.get("factor") or max(1.0, max_position_embeddings / original)
    scaling["factor"] = factor
    if scaling.get("attention_factor") is None:
        scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _two_keys(scaling: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Type and factor, where nothing else is set."""
    further = sorted(key for key in scaling if key not in ("rope_type", "type", "factor") and scaling[key] is not None)
    if further:
        raise Refused(f"{target} has no form of {', '.join(f'`{key}`' for key in further)} in `rope_scaling`")
    return {"type": scaling["rope_type"], "factor": float(scaling["factor"])}


def _bare(scaling: Mapping[str, Any], max_position_embeddings: int, target: str) -> dict[str, Any]:
    """Longrope without what follows from the context lengths, which must indeed follow."""
    bare = {"type": "longrope", "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}
    derived = {**bare, "original_max_position_embeddings": scaling["original_max_position_embeddings"]}
    _complete_longrope(derived, max_position_embeddings)
    for key in ("factor", "attention_factor"):
        if not math.isclose(derived[key], scaling[key], rel_tol=1e-9):
            raise Refused(
                f"{target} derives longrope's `{key}` ({derived[key]:g}); the checkpoint has {scaling[key]:g}"
            )
    return bare


def _write_padding(config: CanonicalConfig) -> tuple[float, dict[str, Any]]:
    """Zero frequencies for the unrotated pairs, in the one form transformers 4.4x to 5.x and vLLM all read."""
    half, turned = config.head_dim // 2, config.rotary_dim // 2
    length = config.max_position_embeddings
    scaling = dict(config.rope_scaling) if config.rope_scaling else {}
    if scaling and scaling["rope_type"] != "longrope":
        raise Refused(f"partial rotary with rescaling `{scaling['rope_type']}` has no form in stock Llama")
    tail = [_ZERO_FREQUENCY] * (half - turned)
    scaling = {
        "rope_type": "longrope",
        "short_factor": [*scaling.get("short_factor", [1.0] * turned), *tail],
        "long_factor": [*scaling.get("long_factor", [1.0] * turned), *tail],
        "factor": scaling.get("factor", 1.0),
        "attention_factor": scaling.get("attention_factor", 1.0),
        "original_max_position_embeddings": scaling.get("original_max_position_embeddings", length),
    }
    return float(config.rope_theta ** (config.head_dim / config.rotary_dim)), scaling


def _read_padding(scaling: Mapping[str, Any], theta: float, head_dim: int) -> dict[str, Any] | None:
    short, long = scaling.get("short_factor"), scaling.get("long_factor")
    if scaling["rope_type"] != "longrope" or not short or not long or len(short) != len(long):
        return None
    turned = sum(factor < _ZERO_FREQUENCY for factor in short)
    tails = [*short[turned:], *long[turned:]]
    if turned == len(short) or turned == 0 or any(f != _ZERO_FREQUENCY for f in tails) or len(short) != head_dim // 2:
        return None
    plain = all(f == 1.0 for f in (*short[:turned], *long[:turned])) and scaling.get("attention_factor") == 1.0
    rest = {**scaling, "short_factor": short[:turned], "long_factor": long[:turned]}
    return {
        "rope_theta": float(f"{theta ** (2 * turned / head_dim):.12g}"),
        "rotary_dim": 2 * turned,
        "rope_scaling": None if plain else rest,
        "rotary_padded": True,
    }
