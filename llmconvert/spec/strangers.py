"""Checkpoints no spec claims: what they are, told from the config and the tensors, and the spec they come nearest to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmconvert.canonical.model import HEAD, CanonicalConfig, traits
from llmconvert.checkpoint.directory import listing
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.errors import BadInput, Refused
from llmconvert.spec.dialect import keys_read, read_config
from llmconvert.spec.expand import all_rows, bind
from llmconvert.spec.language import Spec
from llmconvert.tensors.expressions import Shape

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "language_model_config")
"""Where configs of multimodal models keep that of their language model (transformers, `get_text_config`; InternVL)."""

_TOWERS = {
    "vision": ("vision_config", "vision_tower", "mm_vision_tower", "visual", "vit_config", "vision_encoder", "img_processor"),
    "audio": ("audio_config", "audio_encoder", "audio_processor", "speech_config", "sound_config"),
}
"""Keys of config.json that speak of another kind of input."""

_TOWER_NAMES = {
    "vision": re.compile(r"(^|\.)(visual|vision\w*|vit|image_\w+|mm_projector|multi_modal_projector)\."),
    "audio": re.compile(r"(^|\.)(audio\w*|speech\w*)\."),
}
_LANGUAGE = re.compile(r"^(thinker\.)?(model\.)?(language_model|llm|text_model)\.(model\.)?")


@dataclass(frozen=True)
class Parts:
    """What a config speaks of.

    Attributes:
        towers: kinds of input beside text, such as `vision`.
        key: where the language model's config is nested, such as `text_config`; None where it is the config itself.
        language: the language model's config.
    """

    towers: tuple[str, ...]
    key: str | None
    language: Mapping[str, Any]


def parts(config: Mapping[str, Any]) -> Parts:
    """The language model in a config, and what is beside it."""
    key, language, around = None, config, [config]
    while nested := next((k for k in _NESTED if isinstance(language.get(k), dict)), None):
        key, language = nested if key is None else f"{key}.{nested}", language[nested]
        around.append(language)
    towers = (kind for kind, keys in _TOWERS.items() if any(where.get(k) for k in keys for where in around))
    return Parts(tuple(towers), key, language)


def towers(names: Iterable[str]) -> tuple[str, ...]:
    """Kinds of input beside text that the names of tensors speak of."""
    heads = {_head(name) for name in names}
    return tuple(kind for kind, pattern in _TOWER_NAMES.items() if any(map(pattern.search, heads)))


def _head(name: str) -> str:
    return ".".join(name.split(".")[:4]) + "."


def label(config: Mapping[str, Any]) -> str:
    """What a config calls its model."""
    named = config.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        return ", ".join(f"`{name}`" for name in architectures)
    return f"`{kind}`" + (f" ({', '.join(architectures)})" if architectures else "")


def template(name: str) -> str:
    """A tensor's kind: its name with the layer's number as {i} and the expert's as {j}."""
    return re.sub(r"\.\d+\.", ".{j}.", re.sub(r"\.\d+(?=\.)", ".{i}", name, count=1))


def language_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of the language model, by the names they have where it stands alone."""
    result: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if any(pattern.search(_head(name)) for pattern in _TOWER_NAMES.values()):
            continue
        rest = _LANGUAGE.sub("", name)
        prefixed = rest != name and not rest.startswith(("lm_head.", "output."))
        result[f"model.{rest}" if prefixed else rest] = tensor
    return result


@dataclass(frozen=True)
class Likeness:
    """How near a checkpoint comes to a spec; kinds are tensors' names with {i} for the layer and {j} for the expert.

    Attributes:
        spec: the spec.
        alike: kinds that are in both, of the same shape.
        unknown: kinds the spec has no row for.
        misshapen: kinds with the stored and the expected shape.
        missing: kinds the spec would have.
        fault: why the spec does not read the config as it is; None where it does.
    """

    spec: Spec
    alike: tuple[str, ...]
    unknown: tuple[str, ...]
    misshapen: tuple[tuple[str, Shape, Shape], ...]
    missing: tuple[str, ...]
    fault: str | None = None

    @property
    def differences(self) -> int:
        """Kinds of tensors in which they differ."""
        return len(self.unknown) + len(self.misshapen) + len(self.missing)

    @property
    def same(self) -> bool:
        """Nothing that can be seen differs."""
        return not self.differences and self.fault is None

    def __str__(self) -> str:
        """What differs, in a sentence."""
        total = len(self.alike) + len(self.unknown) + len(self.misshapen)
        found = f"by its tensors it comes nearest to `{self.spec.name}`, which has {len(self.alike)} of their {total} kinds"
        if not self.differences:
            found = f"its tensors are those of `{self.spec.name}` in name and shape"
        if self.unknown:
            found += f"; unknown there: {listing(list(self.unknown))}"
        if self.misshapen:
            name, own, expected = self.misshapen[0]
            more = f" and {len(self.misshapen) - 1} more" if len(self.misshapen) > 1 else ""
            found += f"; of another shape: `{name}` {list(own)}, there {list(expected)}{more}"
        if self.missing:
            found += f"; missing: {listing(list(self.missing))}"
        return found + (f"; but {self.fault}" if self.fault else "")


def nearest(
    specs: Iterable[Spec], config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], *, least: float = 0.5
) -> Likeness | None:
    """The spec whose tensors are most like a checkpoint's, in name and shape.

    Args:
        specs: to choose from; only such as can read the sizes in the config are near.
        config: the language model's.
        tensors: the language model's, one an expert.
        least: the share of kinds, or of tensors, that must be alike.

    Returns:
        The nearest, Llama where several are; None where none is near.
    """
    stored: dict[str, set[Shape]] = defaultdict(set)
    counts = Counter[str]()
    for name, tensor in tensors.items():
        stored[template(name)].add(tensor.shape)
        counts[template(name)] += 1
    close: list[tuple[tuple[int, bool, bool, bool, str], Likeness]] = []
    for spec in specs:
        # The canonical layout has names for everything, and is nobody's own.
        shown = _readable(spec, config, tensors) if spec.source and not spec.code else None
        if shown is not None:
            each = _likeness(spec, stored, _expected(spec, shown, config))
            share = max(len(each.alike) / max(1, len(stored)), sum(counts[k] for k in each.alike) / max(1, len(tensors)))
            if share >= least:
                each = replace(each, fault=_fault(spec, config, tensors))
                rank = (each.differences, not _is_own(spec, shown), each.fault is not None, spec.name != "llama", spec.name)
                close.append((rank, each))
    return min(close, key=lambda ranked: ranked[0])[1] if close else None


def _fault(spec: Spec, config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    try:
        read_config(spec, config, names)
    except (BadInput, Refused) as error:
        return error.what
    return None


def _likeness(spec: Spec, stored: Mapping[str, set[Shape]], expected: Mapping[str, set[Shape]]) -> Likeness:
    dropped = {template(re.sub(r"{\w}", "0", drop.stored)) for drop in spec.drops}
    alike = [kind for kind, shapes in stored.items() if kind in dropped or shapes <= expected.get(kind, set())]
    others = sorted(stored.keys() - set(alike))
    return Likeness(
        spec,
        tuple(sorted(alike)),
        tuple(kind for kind in others if kind not in expected),
        tuple((kind, min(stored[kind] - expected[kind]), min(expected[kind])) for kind in others if kind in expected),
        tuple(sorted(expected.keys() - stored.keys())),
    )


def _readable(spec: Spec, config: Mapping[str, Any], names: Collection[str]) -> CanonicalConfig | None:
    """A config as the spec reads its sizes; None where it cannot."""
    # What says nothing of shapes is no hindrance here.
    left_out = {*spec.requires, "rope_scaling", "rope_parameters"}
    readable = {key: config[key] for key in (keys_read(spec) & config.keys()) - left_out}
    head = next((row.stored for row in all_rows(spec) if HEAD in row.modules), "").replace("{p}", "weight")
    if head not in names and "tie_word_embeddings" not in config:
        readable["tie_word_embeddings"] = True
    for known in (names, None):  # the tensors decide which layers have biases, unless the config says otherwise
        try:
            return _small(read_config(spec, readable, known))
        except (BadInput, Refused):
            continue
    return None


def _expected(spec: Spec, config: CanonicalConfig, stated: Mapping[str, Any]) -> dict[str, set[Shape]]:
    """The kinds of tensors a model of this config has in the spec's architecture."""
    expected: dict[str, set[Shape]] = defaultdict(set)
    for binding in bind(spec, config, stated):
        expected[template(binding.stored)].add(binding.shape)
    return expected


def _is_own(spec: Spec, config: CanonicalConfig) -> bool:
    """Whether the architecture itself could have such a model, biases on q, k, v alone for one."""
    held = traits(config)
    return held <= spec.holds | spec.always and all(held.issuperset(group) or not held & set(group) for group in spec.coupled)


def _small(config: CanonicalConfig) -> CanonicalConfig:
    """A model with the same kinds of layers, and few of them."""
    kinds = tuple(sorted(set(config.moe_layers[: config.num_hidden_layers])))
    return replace(
        config, num_hidden_layers=max(1, len(kinds)), moe_layers=kinds, layer_types=None,
        num_nextn_predict_layers=min(1, config.num_nextn_predict_layers),
    )  # fmt: skip


def describe(
    specs: Iterable[Spec],
    claimed: Callable[[Mapping[str, Any]], Spec | Refused | None],
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor] | None,
) -> Refused:
    """The error for a checkpoint that no spec reads: what it is, what it comes nearest to, what differs.

    Args:
        specs: all there are.
        claimed: the spec that claims a config, or why such models are not read, or None where nobody knows it.
        config: config.json.
        tensors: of the checkpoint; None where they are not known.
    """
    found = parts(config)
    others = found.towers or towers(tensors or ())
    near = nearest(specs, found.language, language_names(tensors)) if tensors else None
    like = f"; {near}" if near else "; nor is any spec near by its tensors" if tensors else ""
    if not others and found.key is None:
        draft = "`llmconvert new-spec DIR` drafts a spec from the checkpoint; pass it with `--spec FILE.py`"
        if near is not None and near.same:
            draft = f"if its code computes what `{near.spec.name}` does, convert it with `--from {near.spec.name}`; else {draft}"
        return Refused(f"no spec reads {label(config)}{like}", where="config.json", hint=draft)
    what = f"{label(config)} is multimodal ({', '.join(others)}), and language models alone are read"
    if not others:
        what = f"{label(config)} keeps its language model's config under `{found.key}`, where it is not looked for"
    alone = "a checkpoint of its language model alone could be read"
    known = claimed(found.language)
    if found.key is None and known is None:
        return Refused(what + like, where="config.json", hint=f"{alone} if there were a spec for it")
    model = f"its language model {label(found.language) or '(not named)'}" if found.key else "its language model"
    if isinstance(known, Refused):
        return Refused(f"{what}; {model} is not read either: {known.what}", where="config.json", hint=known.hint)
    if known is not None:
        hint = f"{alone}: save it by itself, and convert that"
        return Refused(f"{what}; {model} is what spec `{known.name}` reads", where="config.json", hint=hint)
    return Refused(f"{what}; no spec reads {model}{like}", where="config.json", hint=f"{alone} if there were a spec for it")
