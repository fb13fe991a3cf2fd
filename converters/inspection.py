"""What a checkpoint is: architecture, sizes, dtypes, traits, shards, and where it can go."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from llmconvert.canonical.lowerings import lower
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel, traits
from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.checkpoint.megatron import is_megatron, open_megatron
from llmconvert.converters.megatron import arguments
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.opening import Opened, open_model
from llmconvert.converters.megatron.split import lower_to_megatron
from llmconvert.converters.memory import Parallelism, Written, describe_memory
from llmconvert.engine import manifest
from llmconvert.errors import LlmconvertError
from llmconvert.spec.dialect import Lifted, lift, read_config, write_config
from llmconvert.spec.fused import unfused
from llmconvert.spec.language import Spec
from llmconvert.spec.quantised import FP8
from llmconvert.spec.registry import registry

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
        "parameters": sum(math.prod(tensor.shape) for tensor in stored.values()),
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
    source: str | os.PathLike[str], *, spec_file: Path | None = None, parallelism: Parallelism | None = None
) -> dict[str, Any]:
    """Describe a checkpoint from its headers.

    Args:
        source: a directory or a hub id.
        spec_file: a spec from outside the package.
        parallelism: how to share the model out, for the memory of each rank; None for the ranks a Megatron checkpoint
            has, and the whole model alone elsewhere.

    Returns:
        A JSON-ready dictionary; `architecture` is None and `problem` says why where no spec explains the tensors.

    Raises:
        LlmconvertError: the directory cannot be opened at all, or cannot be shared out so.
    """
    if is_megatron(Path(source)):
        return _inspect_megatron(Path(source), parallelism)
    known = registry(spec_file)
    checkpoint = unfused(open_checkpoint(source))
    dtypes = Counter(TO_NAME.get(tensor.dtype, tensor.dtype) for tensor in checkpoint.tensors.values())
    result: dict[str, Any] = {
        "path": str(checkpoint.path),
        "architecture": None,
        "parameters": sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in checkpoint.files],
        "dtypes": dict(dtypes),
        "notes": list(checkpoint.notes),
    }
    made = manifest.read(checkpoint.path)
    if made is not None:
        result["made_from"] = (made.get("source") or {}).get("spec")
    try:
        spec = known.detect(checkpoint.config)
        result["architecture"], result["title"] = spec.name, spec.title
        config = read_config(spec, checkpoint.config, checkpoint.tensors)
        held = traits(config)
        result["traits"] = sorted(held)
        result["config"] = _sizes(config)
        lifted = lift(spec, checkpoint, config)
        result["notes"] += lifted.notes
        result["dropped"] = lifted.dropped
        result["targets"] = {
            target.name: _verdict(lifted, target)
            for target in known.specs.values()
            if target.target and target.name != spec.name
        }
    except LlmconvertError as error:
        result["problem"] = error.what
        result["hint"] = error.hint
        return result
    result["memory"] = describe_memory(
        lifted.model,
        parallelism,
        lambda: lower_to_megatron(lifted.model, checkpoint)[0],
        quantised=checkpoint.nbytes if FP8 in dtypes else None,
    )
    return result
