"""Quantised checkpoints: block-wise FP8 is understood, everything else named, counted where it can be, and refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.directory import Checkpoint, listing, read_json
from llmconvert.checkpoint.dtypes import FLOATS, ITEMSIZE
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.errors import BadInput, LlmconvertError, Refused
from llmconvert.tensors.evaluate import Reader
from llmconvert.tensors.expressions import Expression, Stored, block_scales, quantize

FP8 = "F8_E4M3"
SCALE = "_scale_inv"
"""What the name of a quantised tensor's scales ends in (DeepSeek-V3)."""

BLOCK = (128, 128)

Block = tuple[int, int]

SETTINGS_FILE = "hf_quant_config.json"
"""Where NVIDIA's modelopt says what it did; config.json may be silent (modelopt, export/unified_export_hf.py)."""

_SIGNS = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight_format|weight_scale(_2)?|weight_packed|weight_global_scale|scales|biases|W_q"
    r"|weight_qdata|absmax|quant_state\.bitsandbytes__\w+)$|(?<=\w)_blocks$"
)
"""What the names of tensors end in that only quantised checkpoints hold."""

_BESIDE = re.compile(
    r"\.(qzeros|g_idx|scales|biases|SCB|weight_format|weight_(scale(_inv|_2)?|global_scale|shape|zero_point|g_idx)"
    r"|(input|activation|output|k|v)_scale|input_global_scale|pre_quant_scale|weight\.(nested_)?(absmax|quant_map)"
    r"|weight\.quant_state\.bitsandbytes__\w+)$|_scale_inv$|(?<=\w)_scales$"
)
"""What the names of tensors end in that say how others are read, and are no weights themselves."""

_CODES = {"F8_E8M0": 32, "F8_E4M3": 16}
"""Codes that share a scale of this dtype, along the rows, in formats of four bits (MXFP4, NVFP4)."""


@dataclass(frozen=True)
class Form:
    """How a checkpoint's numbers are stored, where they are no plain weights.

    Attributes:
        name: as its makers call it, such as `gptq, 4 bits`.
        settings: what config.json says of it.
        signs: tensors that show it, sorted; empty where the settings alone say so.
        block: rows and columns that share a scale, of FP8 that is read; None for what is not.
        told: nothing but the settings speaks of it, and the tensors were there to see.
    """

    name: str
    settings: Mapping[str, Any]
    signs: tuple[str, ...]
    block: Block | None
    told: bool = False


def form_of(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor] | None, directory: Path | None = None
) -> Form | None:
    """How the numbers are stored, told from the config and the tensors' names; None for plain weights.

    Args:
        config: config.json.
        tensors: of the checkpoint; None where config.json alone is known.
        directory: where other tools may have left their settings.
    """
    found = _settings(config, directory)
    stored = tensors or {}
    signs = sorted(name for name, tensor in stored.items() if _is_sign(name, tensor))
    eight = sorted(name for name, tensor in stored.items() if tensor.dtype.startswith("F8_E4M3"))
    if not found and not signs and not eight:
        return None
    block = None
    if found.get("quant_method") == "fp8" and not signs:
        size = found.get("weight_block_size")
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            block = (size[0], size[1])
        elif tensors is not None and not eight:
            return None
    told = tensors is not None and not signs and not eight
    return Form(_name(found, signs), found, tuple(signs or eight), block, told)


def _is_sign(name: str, tensor: StoredTensor) -> bool:
    return _SIGNS.search(name) is not None and (tensor.dtype == "U8" or not name.endswith("_blocks"))


def _settings(config: Mapping[str, Any], directory: Path | None) -> Mapping[str, Any]:
    nested = [value for value in config.values() if isinstance(value, dict) and "num_hidden_layers" in value]
    for where in (config, *nested):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(where.get(key), dict) and where[key]:
                return dict(where[key])
    if directory is not None and (directory / SETTINGS_FILE).is_file():
        found = read_json(directory / SETTINGS_FILE).get("quantization")
        return found if isinstance(found, dict) else {}
    return {}


def _name(settings: Mapping[str, Any], signs: Sequence[str]) -> str:
    method, bits = settings.get("quant_method"), settings.get("bits") or settings.get("w_bit")
    if method == "bitsandbytes":
        bits = 4 if settings.get("load_in_4bit") else 8
    if not method and settings.get("quant_algo"):
        method = "modelopt"
    if not method and bits and settings.get("group_size"):
        method = "mlx"
    if not method and signs:
        sign = _SIGNS.search(signs[0])
        endings = {"qweight": "gptq or awq", "qzeros": "gptq or awq", "g_idx": "gptq", "SCB": "bitsandbytes",
                   "absmax": "bitsandbytes", "_blocks": "mxfp4", "weight_packed": "compressed-tensors"}  # fmt: skip
        method = endings.get((sign[1] or sign[0]) if sign else "")
    detail = settings.get("format") or settings.get("quant_algo") or (f"{bits} bits" if bits else "")
    return f"{method or 'unknown method'}{f', {detail}' if detail else ''}"


def quantisation(checkpoint: Checkpoint) -> Block | None:
    """How a checkpoint is quantised: the block of its FP8 weights, or None where it is not quantised.

    Raises:
        Refused: it is quantised in another way; the method is named, from the config or from the tensors' names.
        BadInput: FP8 weights, and no size of their blocks in the config.
    """
    form = form_of(checkpoint.config, checkpoint.tensors, checkpoint.path)
    if form is not None and form.block is None:
        raise refusal(form, str(checkpoint.path))
    return None if form is None else form.block


def refusal(form: Form, where: str) -> LlmconvertError:
    """The error for a form that is not read."""
    original = "convert the original 16-bit checkpoint"
    if form.settings.get("quant_method") == "fp8" and (not form.signs or not _SIGNS.search(form.signs[0])):
        return Refused(
            "the checkpoint is FP8 without `weight_block_size`: one scale a tensor or a row is not understood",
            where=where,
            hint=original,
        )
    if not form.settings and not _SIGNS.search(form.signs[0]):
        return BadInput(
            f"{listing(list(form.signs), 2)} are FP8, and config.json has no `quantization_config`",
            where=where,
            hint="copy the original config.json",
        )
    if form.told:
        return Refused(
            f"config.json says that the checkpoint is quantised ({form.name}), and no tensor shows it",
            where=where,
            hint=f"{original}; if these weights were dequantised or merged, remove `quantization_config` from a copy of "
            "config.json",
        )
    shown = f": {listing(list(form.signs), 2)}" if form.signs else ""
    return Refused(
        f"the checkpoint is quantised ({form.name}{shown}); its numbers are not weights",
        where=where,
        hint=f"{original}, or dequantise this one first with the library that made it",
    )


def parameters(tensors: Mapping[str, StoredTensor], form: Form | None) -> int | None:
    """How many weights the tensors hold, packed ones taken apart, scales and the like left out.

    Args:
        tensors: of a checkpoint, by name.
        form: how they are stored; None for plain weights.

    Returns:
        Their number, or None where it cannot be told from what is known of the form.
    """
    total = 0
    for name, tensor in tensors.items():
        if form is None:
            total += prod(tensor.shape)
        elif not _beside(name, tensors):
            held = _held(name, tensor, tensors, form)
            if held is None:
                return None
            total += held
    return total


def _beside(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    if name.endswith(".scale"):  # DeepSeek-V4's; elsewhere it may be a norm's weight
        scaled = tensors.get(name.removesuffix("scale") + "weight")
        return scaled is not None and scaled.dtype not in FLOATS
    return _BESIDE.search(name) is not None


def _held(name: str, tensor: StoredTensor, tensors: Mapping[str, StoredTensor], form: Form) -> int | None:
    """Weights in one stored tensor.

    Layouts: gptq and awq as in AutoGPTQ and AutoAWQ; `weight_packed` as in compressed-tensors; `_blocks` as in gpt-oss;
    bitsandbytes; MLX (mlx.core.quantize); DeepSeek-V4's and modelopt's matrices of four-bit codes.
    """
    size, (module, _, leaf) = prod(tensor.shape), name.rpartition(".")
    if tensor.dtype in FLOATS or tensor.dtype.startswith(("F8_E4M3", "F8_E5M2")):
        return size
    if tensor.dtype in ("I64", "BOOL"):
        return 0  # tables of indices, masks
    four = tensor.dtype == "U8" and (leaf == "weight_packed" or name.endswith("_blocks") or f"{name}.absmax" in tensors)
    if four:
        return 2 * size
    bits = form.settings.get("bits") or form.settings.get("w_bit")
    if leaf == "qweight" and len(tensor.shape) == 2:
        scales, order = tensors.get(f"{module}.scales"), tensors.get(f"{module}.g_idx")
        if scales is not None and scales.shape[-1] != tensor.shape[1]:
            return tensor.shape[0] * scales.shape[-1]  # packed along the output
        inputs = order.shape[0] if order is not None else _unpacked(tensor.shape[0], bits)
        return None if inputs is None else inputs * tensor.shape[1]
    if leaf == "weight_packed":
        return _product(tensors.get(f"{module}.weight_shape")) or _unpacked(size, _group_bits(form.settings))
    if leaf == "weight" and tensor.dtype == "U32" and f"{module}.scales" in tensors:
        own = form.settings.get(module)
        return _unpacked(size, own.get("bits", bits) if isinstance(own, dict) else bits)
    if leaf == "weight" and tensor.dtype == "I8" and f"{module}.SCB" in tensors:
        return size
    scale = tensors.get(f"{module}.weight_scale") or tensors.get(f"{module}.scale")
    if leaf == "weight" and tensor.dtype in ("I8", "U8") and scale is not None and tensor.shape:
        if scale.shape and scale.shape[-1] * _CODES.get(scale.dtype, 0) == 2 * tensor.shape[-1]:
            return 2 * size
        return size if tensor.dtype == "I8" and scale.dtype in FLOATS else None
    return None


def _unpacked(words: int, bits: Any) -> int | None:
    return words * 32 // bits if type(bits) is int and 0 < bits <= 32 else None


def _group_bits(settings: Mapping[str, Any]) -> int | None:
    """The width all groups of compressed-tensors' settings agree on."""
    groups = settings.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    widths = {each.get("num_bits") for each in weights if isinstance(each, dict)}
    return widths.pop() if len(widths) == 1 else None


def _product(shape: StoredTensor | None) -> int | None:
    """The size a stored shape speaks of; None where there is none, or nothing in it."""
    if shape is None or shape.dtype not in ("I64", "I32") or not 0 < shape.nbytes <= 64:
        return None
    raw = bytearray(shape.nbytes)
    with Reader() as reader:
        reader.read_into(shape, memoryview(raw), 0)
    width = ITEMSIZE[shape.dtype]
    return prod(int.from_bytes(raw[i : i + width], "little", signed=True) for i in range(0, len(raw), width)) or None


def settings(block: Block) -> dict[str, Any]:
    """The `quantization_config` of block-wise FP8, as DeepSeek-V3 and transformers write it."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}


_QUANTISED = frozenset(
    {canonical.Q, canonical.K, canonical.V, canonical.O, canonical.GATE, canonical.UP, canonical.DOWN,
     canonical.EXPERT_GATE, canonical.EXPERT_UP, canonical.EXPERT_DOWN, canonical.SHARED_GATE, canonical.SHARED_UP,
     canonical.SHARED_DOWN, canonical.Q_A, canonical.Q_B, canonical.KV_A, canonical.KV_B}
)  # fmt: skip
"""What DeepSeek quantises: the matrices of attention and MLPs; not the router, the embedding, the head or `eh_proj`."""


def quantised(
    tensors: Mapping[str, Expression], config: CanonicalConfig, block: Block = BLOCK
) -> dict[str, Expression]:
    """A model's tensors with the matrices of attention and MLPs in block-wise FP8, each followed by its scales."""
    names = {f"{name}.weight" for module, name, _ in canonical.placed(config) if module in _QUANTISED}
    result: dict[str, Expression] = {}
    for name, expression in tensors.items():
        result[name] = expression
        if name in names:
            scales = block_scales(expression, block)
            result[name], result[name + SCALE] = quantize(expression, scales, block), scales
    return result


def check_kept(before: Mapping[str, Expression], after: Mapping[str, Expression]) -> None:
    """Check that FP8 tensors to be kept as they are were not rewritten.

    Raises:
        Refused: one was.
    """
    for scale in (name for name in before if name.endswith(SCALE)):
        name = scale.removesuffix(SCALE)
        if not isinstance(after.get(name), Stored) or scale not in after:
            raise Refused(
                f"`{name}` is rewritten on the way, so its FP8 numbers cannot be kept",
                hint="leave out `--keep-fp8`: they are dequantised exactly",
            )
