"""Lift a checkpoint into the canonical model by its spec, and emit a canonical model in a spec's dialect."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmconvert.canonical import model as canonical
from llmconvert.canonical.bounds import check_attributes, check_extent
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel
from llmconvert.checkpoint.directory import Checkpoint
from llmconvert.checkpoint.dtypes import FLOATS, TO_NAME
from llmconvert.checkpoint.files import is_finite
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.errors import BadInput, Refused
from llmconvert.spec import keys
from llmconvert.spec.expand import all_rows, bind
from llmconvert.spec.language import Field, Spec
from llmconvert.spec.quantised import FP8, SCALE, quantisation
from llmconvert.tensors.expressions import Check, Expression, block_grid, cast, dequantize, stored

_SCALE_DTYPES = FLOATS | {"U8", "F8_E8M0"}

_BIASES = {"qkv_bias": canonical.Q, "o_bias": canonical.O, "mlp_bias": canonical.DOWN}
"""A module that has a bias where the attribute is true; in latent attention `qkv_bias` shows in the keys' and values'."""


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


def keys_read(spec: Spec) -> set[str]:
    """Every config key the spec understands."""
    by_fields = {key for f in spec.fields for key in f.keys}
    return by_fields | {*spec.ignores, *spec.constants, *spec.requires, *spec.told}


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
    endless = [key for key, value in config.items() if not is_finite(value)]
    if endless:
        raise BadInput(f"`{'`, `'.join(endless)}` holds NaN or Infinity, which is not JSON", where="config.json")
    keys.check_unread(config, keys_read(spec), spec.name)
    keys.check_required(config, {**spec.requires, **spec.told}, spec.name)
    values: dict[str, Any] = {}
    present = None if names is None else set(names)
    for f in spec.fields:
        try:
            found = f.read(config, values)
        except (TypeError, AttributeError, ValueError, ArithmeticError, LookupError) as error:
            raise BadInput(f"`{', '.join(f.keys)}` has a senseless value: {error}", where="config.json") from None
        check_attributes(found, "config.json")
        values |= found
    check_extent(values, "config.json", present)
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise BadInput("num_attention_heads is not a multiple of num_key_value_heads", where="config.json")
    if present is not None:
        _settle_biases(spec, config, values, present)
    if "mtp" in spec.holds:
        _settle_mtp(spec, values, present)
    _check_experts(values)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return CanonicalConfig(**values, dtype=dtype if isinstance(dtype, str) else None)


def _settle_biases(spec: Spec, config: Mapping[str, Any], values: dict[str, Any], names: set[str]) -> None:
    rows = {module: row for row in all_rows(spec) for module in row.modules}
    latent = {"qkv_bias": canonical.KV_A} if values.get("kv_lora_rank") else {}
    for attribute, module in (_BIASES | latent).items():
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


def _settle_mtp(spec: Spec, values: dict[str, Any], names: set[str] | None) -> None:
    """The tensors decide how many layers predict further tokens: fine-tuned checkpoints keep the key and lose the layers."""
    if names is None:
        values["mtp_copies"] = values["num_nextn_predict_layers"] > 0 and "mtp_copies" in spec.holds
        return
    stored = {row.modules[0]: row.stored.replace("{p}", "weight") for row in all_rows(spec)}
    first, count = values["num_hidden_layers"], 0
    while stored[canonical.MTP_PROJ].replace("{i}", str(first + count)) in names:
        count += 1
    values["num_nextn_predict_layers"] = count
    values["mtp_copies"] = stored[canonical.MTP_EMBED].replace("{i}", str(first)) in names


def _check_experts(values: Mapping[str, Any]) -> None:
    experts, groups = values.get("num_experts", 0), values.get("n_group", 1)
    if not experts:
        return
    chosen, best = values.get("num_experts_per_tok", 0), values.get("topk_group", 1)
    if not 0 < chosen <= experts:
        raise BadInput(f"num_experts_per_tok {chosen} of {experts} experts", where="config.json")
    if groups < 1 or experts % groups or not 0 < best <= groups or chosen > experts // groups * best:
        raise BadInput(f"{chosen} of {experts} experts in the best {best} of {groups} groups", where="config.json")


def lift(
    spec: Spec, checkpoint: Checkpoint, config: CanonicalConfig | None = None, *, dtype: str = "BF16",
    keep_fp8: bool = False,
) -> Lifted:  # fmt: skip
    """Read a checkpoint's headers by its spec.

    Args:
        spec: the dialect.
        checkpoint: with one tensor an expert: see `unfused`.
        config: its config, read; read here if None.
        dtype: the dtype code that FP8 weights are rounded to once they are dequantised.
        keep_fp8: leave FP8 weights as they are, each with its scales under its own name and `_scale_inv`.

    Raises:
        BadInput: tensors are missing, left over or misshapen; all are listed.
        Refused: the checkpoint is quantised in a way that is not understood, or its config cannot be read.
    """
    block = quantisation(checkpoint)
    c = config or read_config(spec, checkpoint.config, checkpoint.tensors)
    bindings = bind(spec, c, checkpoint.config)
    remaining = dict(checkpoint.tensors)
    dropped: dict[str, str] = {}
    for drop in spec.drops:
        for name in canonical.names(c, drop.stored):
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
        elif tensor.dtype == FP8 and block is not None:
            scale = remaining.pop(binding.stored + SCALE, None)
            grid = block_grid(tensor.shape, block) if len(tensor.shape) == 2 else None
            if scale is None:
                missing.append((binding.stored + SCALE, "the scales of an FP8 tensor"))
            elif scale.shape != grid or scale.dtype not in _SCALE_DTYPES:
                found = f"{scale.dtype} {list(scale.shape)}"
                misshapen.append((scale.name, f"{found}, expected one a block of {list(block)}: {grid}"))
            elif not keep_fp8:
                plain = cast(dequantize(stored(tensor), stored(scale), block), dtype)
                tensors |= binding.take_apart(plain, c)
            elif len(binding.parts) > 1:
                raise Refused(
                    f"`{binding.stored}` packs several tensors, so its FP8 numbers cannot be kept",
                    hint="leave out `--keep-fp8`: they are dequantised exactly",
                )
            else:
                tensors[binding.parts[0]] = stored(tensor)
                tensors[binding.parts[0] + SCALE] = stored(scale)
        elif tensor.dtype not in FLOATS:
            misshapen.append((binding.stored, f"dtype {tensor.dtype}, expected a float type"))
        else:
            tensors |= binding.take_apart(stored(tensor), c)
    checks = _aliases(spec, c, checkpoint.tensors, remaining, tensors, dropped)
    if missing or misshapen or remaining:
        raise _unexplained(spec, checkpoint, c, missing, misshapen, sorted(remaining))
    notes = tuple(note.text for note in spec.notes if note.concerns(checkpoint.config))
    predicted = checkpoint.config.get("num_nextn_predict_layers")
    if "mtp" in spec.holds and predicted is not None and predicted != c.num_nextn_predict_layers:
        notes += (
            f"config.json says num_nextn_predict_layers {predicted}, the checkpoint holds {c.num_nextn_predict_layers} "
            "such layers: the tensors are believed",
        )
    places = (place for name in canonical.shapes(c) for place in (name, name + SCALE))
    ordered = {name: tensors[name] for name in places if name in tensors}
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
    fixed = {**spec.constants, **spec.requires, **spec.told}
    return {**head, **carried, **fixed, **own, "torch_dtype": TO_NAME.get(dtype, "float32")}


def emit(spec: Spec, model: CanonicalModel, written: Mapping[str, Any]) -> dict[str, Expression]:
    """The stored tensors of a model in the spec's dialect, in writing order.

    Args:
        spec: the dialect.
        model: lowered to what the spec holds.
        written: the config.json that goes with them.

    Raises:
        Refused: tensors of several dtypes, or scales, cannot be packed into one.
    """
    result: dict[str, Expression] = {}
    for binding in bind(spec, model.config, written):
        result[binding.stored] = binding.put_together(model.tensors, model.config)
        scales = [name + SCALE for name in binding.parts if name + SCALE in model.tensors]
        if scales and len(binding.parts) > 1:
            raise Refused(
                f"`{binding.stored}` packs several tensors, which have scales of their own in FP8",
                hint="choose another target, or a 16-bit dtype",
            )
        if scales:
            result[binding.stored + SCALE] = model.tensors[scales[0]]
    return result
