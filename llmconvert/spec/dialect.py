"""Lift a checkpoint into the canonical model by its spec, and emit a canonical model in a spec's dialect."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel
from llmconvert.checkpoint.directory import Checkpoint
from llmconvert.checkpoint.dtypes import FLOATS, TO_NAME
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.errors import BadInput, Refused
from llmconvert.spec import keys
from llmconvert.spec.expand import all_rows, bind
from llmconvert.spec.language import Field, Spec
from llmconvert.tensors.expressions import Check, Expression, stored

_INTEGERS = frozenset(f.name for f in dataclasses.fields(CanonicalConfig) if f.type == "int")

_QUANTISED_SUFFIXES = (".qweight", ".qzeros", ".g_idx", ".SCB", ".weight_format", ".weight_scale", ".weight_scale_inv",
                       ".weight_packed", ".quant_state.bitsandbytes__nf4", ".absmax", ".scales", ".biases")  # fmt: skip

_BIASES = {"qkv_bias": canonical.Q, "o_bias": canonical.O, "mlp_bias": canonical.DOWN}


@dataclass(frozen=True)
class Lifted:
    """A checkpoint read by its spec.

    Attributes:
        model: the canonical model; its checks hold what must be tested before it is trusted.
        dropped: stored tensors left out, and the reason.
        notes: what a user should know.
    """

    model: CanonicalModel
    dropped: dict[str, str]
    notes: tuple[str, ...]


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are quantised.

    Raises:
        Refused: naming the method, from the config or from the tensors' names.
    """
    settings = checkpoint.config.get("quantization_config")
    odd = sorted(name for name in checkpoint.tensors if name.endswith(_QUANTISED_SUFFIXES))
    if not settings and not odd:
        return
    method = (settings or {}).get("quant_method") if isinstance(settings, dict) else None
    evidence = f"`{odd[0]}` and {len(odd) - 1} more such tensors" if odd else "`quantization_config`"
    raise Refused(
        f"the checkpoint is quantised ({method or 'unknown method'}: {evidence}); its numbers are not weights",
        where=str(checkpoint.path),
        hint="convert the original 16-bit checkpoint, or dequantise this one first with the library that made it",
    )


def keys_read(spec: Spec) -> set[str]:
    """Every config key the spec understands."""
    return {key for f in spec.fields for key in f.keys} | set(spec.ignores) | set(spec.constants) | set(spec.requires)


def read_config(spec: Spec, config: Mapping[str, Any], names: Iterable[str] | None = None) -> CanonicalConfig:
    """A config.json in the spec's dialect as a canonical config.

    Args:
        spec: the dialect.
        config: the JSON object.
        names: the checkpoint's tensor names; they decide which projections have biases where the config is silent.

    Raises:
        BadInput: a key is missing, has a senseless value, or contradicts the tensors.
        Refused: a key nobody reads changes the maths.
    """
    keys.check_unread(config, keys_read(spec), spec.name)
    keys.check_required(config, spec.requires, spec.name)
    values: dict[str, Any] = {}
    for f in spec.fields:
        try:
            found = f.read(config, values)
        except (TypeError, AttributeError) as error:
            raise BadInput(f"`{', '.join(f.keys)}` has a senseless value: {error}", where="config.json") from None
        for attribute in _INTEGERS & set(found):
            value = found[attribute]
            if type(value) is not int or value <= 0:
                raise BadInput(f"`{attribute}` is {value!r}, which is not a positive whole number", where="config.json")
        values |= found
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise BadInput("num_attention_heads is not a multiple of num_key_value_heads", where="config.json")
    if names is not None:
        _settle_biases(spec, config, values, set(names))
    dtype = config.get("dtype") or config.get("torch_dtype")
    return CanonicalConfig(**values, dtype=dtype if isinstance(dtype, str) else None)


def _settle_biases(spec: Spec, config: Mapping[str, Any], values: dict[str, Any], names: set[str]) -> None:
    rows = {module: row for row in all_rows(spec) for module in row.modules}
    for attribute, module in _BIASES.items():
        field = next((f for f in spec.config if attribute in f.attributes), None)
        if not isinstance(field, Field) or "{p}" not in rows[module].stored:
            continue
        name = rows[module].stored.replace("{i}", "0").replace("{p}", "bias")
        present = name in names
        if config.get(field.key) is None:
            values[attribute] = present
        elif present and not values[attribute]:
            raise BadInput(
                f"`{field.key}` is {config[field.key]!r} but the checkpoint holds `{name}`: transformers would ignore it",
                where="config.json",
                hint=f"if the model was trained with biases, set `{field.key}` to true in a copy of config.json",
            )


def lift(spec: Spec, checkpoint: Checkpoint, config: CanonicalConfig | None = None) -> Lifted:
    """Read a checkpoint's headers by its spec.

    Raises:
        BadInput: tensors are missing, left over or misshapen; all are listed.
        Refused: the checkpoint is quantised, or its config cannot be read.
    """
    refuse_quantised(checkpoint)
    c = config or read_config(spec, checkpoint.config, checkpoint.tensors)
    bindings = bind(spec, c)
    remaining = dict(checkpoint.tensors)
    dropped: dict[str, str] = {}
    for drop in spec.drops:
        for i in range(c.num_hidden_layers if "{i}" in drop.stored else 1):
            name = drop.stored.replace("{i}", str(i))
            if name in remaining:
                dropped[name] = drop.why
                del remaining[name]
    tensors: dict[str, Expression] = {}
    missing: list[tuple[str, str]] = []
    misshapen: list[tuple[str, str]] = []
    for binding in bindings:
        tensor = remaining.pop(binding.stored, None)
        if tensor is None:
            missing.append((binding.stored, f"{list(binding.shape)}"))
        elif tensor.shape != binding.shape:
            misshapen.append((binding.stored, f"{list(tensor.shape)}, expected {list(binding.shape)}"))
        elif tensor.dtype not in FLOATS:
            misshapen.append((binding.stored, f"dtype {tensor.dtype}, expected a float type"))
        else:
            tensors |= binding.take_apart(stored(tensor), c)
    checks = _aliases(spec, c, checkpoint.tensors, remaining, tensors, dropped)
    if missing or misshapen or remaining:
        raise _unexplained(spec, checkpoint, c, missing, misshapen, sorted(remaining))
    notes = tuple(n.text for n in spec.notes if checkpoint.config.get(n.key) not in (None, False, 1, 1.0))
    ordered = {name: tensors[name] for name in canonical.shapes(c)}
    return Lifted(CanonicalModel(c, ordered, tuple(checks)), dropped, checkpoint.notes + notes)


def _aliases(
    spec: Spec,
    config: CanonicalConfig,
    everything: Mapping[str, StoredTensor],
    remaining: dict[str, StoredTensor],
    tensors: Mapping[str, Expression],
    dropped: dict[str, str],
) -> list[Check]:
    """Leave out a second copy of the head, to be checked equal: a tied head stored after all, or an `lm_head` alias."""
    rows = {module: row.stored.replace("{p}", "weight") for row in all_rows(spec) for module in row.modules}
    original = canonical.EMBED if config.tie_word_embeddings else canonical.HEAD
    checks = []
    for name in {rows[canonical.HEAD], "lm_head.weight"}:
        expression = tensors.get(f"{original}.weight")
        if name in remaining and expression is not None:
            copy = stored(remaining.pop(name))
            dropped[name] = f"a copy of `{rows[original]}`"
            hint = " (if it is not, set `tie_word_embeddings` to false in a copy of config.json)"
            if copy.shape != expression.shape or copy.dtype != expression.dtype:
                raise BadInput(f"`{name}` should be a copy of `{rows[original]}` but differs in shape or dtype" + hint)
            checks.append(Check(name, copy, expression, f"it should be a copy of `{rows[original]}`" + hint))
    return checks


def _group(entries: list[tuple[str, str]]) -> list[str]:
    """Lines for a list of (tensor, remark), layers of one template in one line."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, remark in entries:
        groups[re.sub(r"\.\d+\.", ".{i}.", name), remark].append(name)
    return [
        f"`{names[0]}`{f' and {len(names) - 1} more like it' if len(names) > 1 else ''}{f' {remark}' if remark else ''}"
        for (_, remark), names in groups.items()
    ]


def _unexplained(
    spec: Spec,
    checkpoint: Checkpoint,
    config: CanonicalConfig,
    missing: list[tuple[str, str]],
    misshapen: list[tuple[str, str]],
    extra: list[str],
) -> BadInput:
    lines = []
    for title, entries in (("missing", missing), ("wrong", misshapen), ("unknown", [(name, "") for name in extra])):
        groups = _group(entries)
        if groups:
            shown = groups[:12] + ([f"and {len(groups) - 12} more kinds"] if len(groups) > 12 else [])
            lines.append(f"{len(entries)} {title}: " + "; ".join(shown))
    what = f"the tensors are not those of a {spec.name} model with {config.num_hidden_layers} layers: " + " | ".join(
        lines
    )
    hint = "the download may be incomplete, or config.json may belong to another checkpoint"
    if missing and any(name.startswith(("lm_head", "output")) for name, _ in missing) and len(missing) == 1:
        hint = "if the head is tied to the embedding, set `tie_word_embeddings` to true in a copy of config.json"
    elif extra and not missing and not misshapen:
        hint = f"if this is another architecture, draft a spec for it: `llmconvert new-spec {checkpoint.path}`"
    return BadInput(what, where=str(checkpoint.path), hint=hint)


def write_config(spec: Spec, config: CanonicalConfig, carried: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json in the spec's dialect.

    Args:
        spec: the dialect.
        config: the model; lowered to what the spec holds.
        carried: keys taken over unchanged, such as token ids.
        dtype: the weights' dtype code, written as `torch_dtype`, which every version of transformers reads.

    Raises:
        Refused: the dialect has no way to say something.
    """
    own: dict[str, Any] = {}
    for f in spec.fields:
        own |= f.write(config, spec.name)
    head: dict[str, Any] = {"architectures": [spec.architectures[0]], "model_type": spec.model_types[0]}
    # An absent token id would be filled in by the target class with one of its own.
    head |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {**head, **carried, **spec.constants, **spec.requires, **own, "torch_dtype": TO_NAME.get(dtype, "float32")}


def emit(spec: Spec, model: CanonicalModel) -> dict[str, Expression]:
    """The stored tensors of a model in the spec's dialect, in writing order."""
    return {b.stored: b.put_together(model.tensors, model.config) for b in bind(spec, model.config)}
