"""What a checkpoint is: architecture, sizes, dtypes, traits, shards, and where it can go."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from llmconvert.canonical.lowerings import lower
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel, shapes, traits
from llmconvert.checkpoint import config as checked
from llmconvert.checkpoint.directory import (
    WEIGHT_FILES,
    Checkpoint,
    no_weights,
    open_checkpoint,
    read_json,
    refuse_pointers,
)
from llmconvert.checkpoint.dtypes import FROM_NAME, TO_NAME
from llmconvert.checkpoint.megatron import is_megatron, open_megatron
from llmconvert.converters.megatron import arguments
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.opening import Opened, open_model
from llmconvert.converters.megatron.split import lower_to_megatron
from llmconvert.converters.memory import Parallelism, Written, describe_memory
from llmconvert.engine import manifest
from llmconvert.errors import LlmconvertError, Refused
from llmconvert.spec.dialect import Lifted, emit, lift, read_config, write_config
from llmconvert.spec.fused import unfused
from llmconvert.spec.language import Spec
from llmconvert.spec.quantised import FP8, Block, Form, form_of, parameters, quantised, refusal
from llmconvert.spec.registry import Registry, registry
from llmconvert.spec.strangers import label
from llmconvert.tensors.expressions import Expression, Fill

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "rotary_dim",
)  # fmt: skip
_LARGE_SIZES = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank",
    "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "num_nextn_predict_layers",
)  # fmt: skip


def _sizes(config: CanonicalConfig) -> dict[str, Any]:
    """What a model measures, and, where it has them, its experts and latents."""
    large = {key: getattr(config, key) for key in _LARGE_SIZES}
    return {key: getattr(config, key) for key in _SIZES} | {key: value for key, value in large.items() if value}


def _written(opened: Opened) -> Written:
    """How a Megatron checkpoint is cut."""
    c = opened.checkpoint
    grid = arguments.grid_of(c.args, c.tp, c.pp, c.vpp, c.ep, c.etp) if c.format == "torch" else Grid()
    return Written(grid, opened.cut.padded_vocab_size, opened.transformer_impl)


def _inspect_megatron(directory: Path, parallelism: Parallelism | None) -> dict[str, Any]:
    """Describe a Megatron checkpoint; `problem` says so where its arguments do not explain its tensors."""
    checkpoint = open_megatron(directory, trust_pickle=True)
    stored = checkpoint.stored
    made = (manifest.read(directory) or {}).get("source") or {}
    grid = f"TP {checkpoint.tp}, PP {checkpoint.pp}" + (f", VPP {checkpoint.vpp}" if checkpoint.vpp > 1 else "")
    grid += f", EP {checkpoint.ep}, ETP {checkpoint.etp}" if checkpoint.ep > 1 else ""
    result: dict[str, Any] = {
        "path": str(directory),
        "architecture": "megatron",
        "title": f"Megatron, format {checkpoint.format}, {grid}, iteration {checkpoint.iteration}",
        "parameters": sum(prod(tensor.shape) for tensor in stored.values()),
        "bytes": sum(tensor.nbytes for tensor in stored.values()),
        "tensors": len(stored),
        "files": [
            {"name": str(path.relative_to(directory)), "bytes": path.stat().st_size}
            for path in sorted({tensor.path for tensor in stored.values()})
        ],
        "dtypes": dict(Counter(TO_NAME.get(tensor.dtype, tensor.dtype) for tensor in stored.values())),
        "notes": [f"{checkpoint.left_out} bytes of optimizer and random state"] if checkpoint.left_out else [],
        "grid": {key: getattr(checkpoint, key) for key in ("tp", "pp", "vpp", "ep", "etp")},
        "made_from": made.get("spec"),
    }
    try:
        opened = open_model(directory, trust_pickle=True)
        result["config"] = _sizes(opened.config)
        result["traits"] = sorted(traits(opened.config))
        result["title"] += f", {opened.transformer_impl} names"
    except LlmconvertError as error:
        result["problem"], result["hint"] = error.what, error.hint
        return result
    model = CanonicalModel(opened.config, opened.joined.tensors)
    result["memory"] = describe_memory(model, parallelism, lambda: model, written=_written(opened))
    return result


def _verdict(lifted: Lifted, target: Spec) -> str:
    """`yes`, a condition on the data that headers cannot decide, or why not."""
    try:
        model, _ = lower(lifted.model, target.name, target.holds, target.always, target.coupled)
        write_config(target, model.config, {}, "F32")
    except LlmconvertError as error:
        return error.what
    open_checks = {check.why for check in model.checks} - {check.why for check in lifted.model.checks}
    return "if: " + "; ".join(sorted(open_checks)) if open_checks else "yes"


def inspect(
    source: str | os.PathLike[str], *, source_name: str | None = None, spec_file: Path | None = None,
    parallelism: Parallelism | None = None,
) -> dict[str, Any]:
    """Describe a checkpoint from its headers, or from its config.json alone.

    Args:
        source: a directory or a hub id; a config.json, or a directory with one and no weights, is enough to count.
        source_name: the checkpoint's spec; told from config.json if None.
        spec_file: a spec from outside the package.
        parallelism: how to share the model out, for the memory of each rank; None for the ranks a Megatron checkpoint
            has, and the whole model alone elsewhere.

    Returns:
        A JSON-ready dictionary; `architecture` is None and `problem` says why where no spec explains the tensors, and
        `parameters` is None where they cannot be counted.

    Raises:
        LlmconvertError: the directory cannot be opened at all, or cannot be shared out so.
    """
    if is_megatron(Path(source)):
        return _inspect_megatron(Path(source), parallelism)
    known = registry(spec_file)
    alone = _config_alone(Path(source))
    if alone is not None:
        return _inspect_config(known, *alone, parallelism, source_name)
    checkpoint = unfused(open_checkpoint(source))
    form = form_of(checkpoint.config, checkpoint.tensors, checkpoint.path)
    dtypes = Counter(TO_NAME.get(tensor.dtype, tensor.dtype) for tensor in checkpoint.tensors.values())
    result: dict[str, Any] = {
        "path": str(checkpoint.path),
        "architecture": None,
        "named": label(checkpoint.config),
        "quantised": form.name if form else None,
        "parameters": parameters(checkpoint.tensors, form),
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in checkpoint.files],
        "dtypes": dict(dtypes),
        "notes": list(checkpoint.notes),
    }
    made = manifest.read(checkpoint.path)
    if made is not None:
        result["made_from"] = (made.get("source") or {}).get("spec")
    if form is not None and form.block is None:
        return _inspect_unread(known, checkpoint, form, result, parallelism, source_name)
    try:
        spec = known.identify(checkpoint, source_name)
        result["architecture"], result["title"] = spec.name, spec.title
        config = read_config(spec, checkpoint.config, checkpoint.tensors)
        result |= _measured(config)
        lifted = lift(spec, checkpoint, config)
    except LlmconvertError as error:
        return result | {"problem": error.what, "hint": error.hint}
    result["parameters"] = sum(prod(expression.shape) for expression in lifted.model.tensors.values())
    result["notes"] += lifted.notes
    result["dropped"] = lifted.dropped
    result["targets"] = _targets(known, spec, lifted)
    result["memory"] = describe_memory(
        lifted.model,
        parallelism,
        lambda: lower_to_megatron(lifted.model, checkpoint)[0],
        quantised=checkpoint.nbytes if FP8 in dtypes else None,
    )
    return result


def _measured(config: CanonicalConfig) -> dict[str, Any]:
    return {"traits": sorted(traits(config)), "config": _sizes(config)}


def _targets(known: Registry, spec: Spec, lifted: Lifted) -> dict[str, str]:
    return {
        target.name: _verdict(lifted, target)
        for target in known.specs.values()
        if target.target and target.name != spec.name
    }


def _inspect_unread(
    known: Registry, checkpoint: Checkpoint, form: Form, result: dict[str, Any], parallelism: Parallelism | None,
    source_name: str | None,
) -> dict[str, Any]:  # fmt: skip
    """A checkpoint whose numbers are not read: what config.json says of it is counted all the same."""
    try:
        known.identify(checkpoint, source_name)
    except LlmconvertError as error:
        result |= {"problem": error.what, "hint": error.hint}
    try:
        spec = known.get(source_name) if source_name else known.detect(checkpoint.config, checkpoint.tensors, checkpoint.path)
        result["architecture"], result["title"] = spec.name, spec.title
        config = read_config(spec, checkpoint.config)
    except LlmconvertError:
        return result
    model = _imagined(config, checkpoint.config)
    result |= _measured(config) | {"parameters": sum(prod(e.shape) for e in model.tensors.values())}
    result["memory"] = describe_memory(
        model, parallelism, lambda: lower_to_megatron(model, checkpoint)[0], unread=checkpoint.nbytes
    )
    return result


def _config_alone(source: Path) -> tuple[Path, dict[str, Any], str] | None:
    """Where a config.json is all there is or all that is asked for: where it is, the object, and what to say of it."""
    if source.is_file() and source.suffix == ".json":
        refuse_pointers(source.parent, [source.name])
        config = read_json(source)
        checked.check_config(config, str(source))
        return source, config, "counted from config.json alone, from the sizes it names"
    names = set(os.listdir(source)) if source.is_dir() else set()
    if "config.json" not in names:
        return None
    index = next((name for pair in WEIGHT_FILES for name in pair if name in names), None)
    why = no_weights(source, names).what
    if index is not None:
        refuse_pointers(source, [index])
        files = read_json(source / index).get("weight_map") if index.endswith(".json") else {"": index}
        if not isinstance(files, dict) or any(str(name) in names for name in files.values()):
            return None
        why = f"none of the files that `{index}` names is there"
    refuse_pointers(source, ["config.json"])
    return source, checked.read_config(source), f"counted from config.json alone: {why}"


def _imagined(config: CanonicalConfig, said: Mapping[str, Any]) -> CanonicalModel:
    """A model of the shapes a config names, in the dtype it names, with nothing in it."""
    dtype = FROM_NAME.get(str(said.get("dtype") or said.get("torch_dtype")), "BF16")
    return CanonicalModel(config, {name: Fill(shape, dtype, 0.0) for name, shape in shapes(config).items()})


def _stored(spec: Spec, model: CanonicalModel, said: Mapping[str, Any], block: Block | None) -> dict[str, Expression]:
    """The tensors a model has in files of its architecture; canonical ones where packed FP8 has no one form."""
    tensors = quantised(model.tensors, model.config, block) if block else model.tensors
    try:
        return emit(spec, replace(model, tensors=tensors), said)
    except Refused:
        return tensors


def _inspect_config(
    known: Registry, path: Path, said: dict[str, Any], note: str, parallelism: Parallelism | None, source_name: str | None
) -> dict[str, Any]:
    """Describe a model from its config.json: the same numbers as with weights, which are not looked at."""
    directory = path if path.is_dir() else path.parent
    form = form_of(said, None, directory)
    result: dict[str, Any] = {
        "path": str(path), "architecture": None, "named": label(said), "quantised": form.name if form else None,
        "parameters": None, "bytes": None, "tensors": None, "files": [], "dtypes": {}, "notes": [note],
    }  # fmt: skip
    try:
        spec = known.get(source_name) if source_name else known.detect(said, None, path if path.is_dir() else None)
        result["architecture"], result["title"] = spec.name, spec.title
        config = read_config(spec, said)
    except LlmconvertError as error:
        return result | {"problem": error.what, "hint": error.hint}
    model = _imagined(config, said)
    stored = _stored(spec, model, said, form.block if form else None)
    nbytes = sum(expression.nbytes for expression in stored.values())
    result |= _measured(config)
    result["parameters"] = sum(prod(expression.shape) for expression in model.tensors.values())
    if said.get("dtype") is None and said.get("torch_dtype") is None:
        result["notes"].append("config.json names no dtype: counted in bfloat16")
    if config.num_nextn_predict_layers:
        result["notes"].append("layers that predict further tokens are counted, which a fine-tuned checkpoint may lack")
    if form is not None and form.block is None:
        unread = refusal(form, str(directory))
        result |= {"problem": unread.what, "hint": unread.hint}
    else:
        kinds = Counter(TO_NAME.get(expression.dtype, expression.dtype) for expression in stored.values())
        result |= {"bytes": nbytes, "tensors": len(stored)}
        result["dtypes"] = dict(kinds)
        result["targets"] = _targets(known, spec, Lifted(model, {}, ()))
    nowhere = Checkpoint(directory, said, {})
    result["memory"] = describe_memory(
        model, parallelism, lambda: lower_to_megatron(model, nowhere)[0],
        quantised=nbytes if form and form.block else None,
    )  # fmt: skip
    return result
