"""Quantised checkpoints: block-wise FP8 is understood, everything else refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.directory import Checkpoint
from llmconvert.errors import BadInput, Refused
from llmconvert.tensors.expressions import Expression, Stored, block_scales, quantize

FP8 = "F8_E4M3"
SCALE = "_scale_inv"
"""What the name of a quantised tensor's scales ends in (DeepSeek-V3)."""

BLOCK = (128, 128)

_SUFFIXES = (".qweight", ".qzeros", ".g_idx", ".SCB", ".weight_format", ".weight_scale", ".weight_packed",
             ".quant_state.bitsandbytes__nf4", ".absmax", ".scales", ".biases")  # fmt: skip

Block = tuple[int, int]


def quantisation(checkpoint: Checkpoint) -> Block | None:
    """How a checkpoint is quantised: the block of its FP8 weights, or None where it is not quantised.

    Raises:
        Refused: it is quantised in another way; the method is named, from the config or from the tensors' names.
        BadInput: FP8 weights, and no size of their blocks in the config.
    """
    settings = checkpoint.config.get("quantization_config") or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    odd = sorted(name for name in checkpoint.tensors if name.endswith(_SUFFIXES))
    eight = sorted(name for name, tensor in checkpoint.tensors.items() if tensor.dtype.startswith("F8_E4M3"))
    if method == "fp8" and not odd:
        size = settings.get("weight_block_size")
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return (size[0], size[1])
        if not eight:
            return None
        raise Refused(
            "the checkpoint is FP8 without `weight_block_size`: one scale a tensor or a row is not understood",
            where=str(checkpoint.path),
            hint="convert the original 16-bit checkpoint",
        )
    if not settings and not odd and not eight:
        return None
    if eight and not settings and not odd:
        raise BadInput(
            f"`{eight[0]}` and {len(eight) - 1} more tensors are FP8, and config.json has no `quantization_config`",
            where=str(checkpoint.path),
            hint="copy the original config.json",
        )
    evidence = f"`{odd[0]}` and {len(odd) - 1} more such tensors" if odd else "`quantization_config`"
    raise Refused(
        f"the checkpoint is quantised ({method or 'unknown method'}: {evidence}); its numbers are not weights",
        where=str(checkpoint.path),
        hint="convert the original 16-bit checkpoint, or dequantise this one first with the library that made it",
    )


def settings(block: Block) -> dict[str, Any]:
    """The `quantization_config` of block-wise FP8, as DeepSeek-V3 and transformers write it."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}


_QUANTISED = frozenset(
    {canonical.Q, canonical.K, canonical.V, canonical.O, canonical.GATE, canonical.UP, canonical.DOWN,
     canonical.EXPERT_GATE, canonical.EXPERT_UP, canonical.EXPERT_DOWN, canonical.SHARED_GATE, canonical.SHARED_UP,
     canonical.SHARED_DOWN, canonical.Q_A, canonical.Q_B, canonical.KV_A, canonical.KV_B}
)  # fmt: skip
"""What DeepSeek quantises: the matrices of attention and MLPs; not the router, the embedding, the head or `eh_proj`."""


def quantised(tensors: Mapping[str, Expression], config: CanonicalConfig) -> dict[str, Expression]:
    """A model's tensors with the matrices of attention and MLPs in block-wise FP8, each followed by its scales."""
    names = {f"{name}.weight" for module, name, _ in canonical.placed(config) if module in _QUANTISED}
    result: dict[str, Expression] = {}
    for name, expression in tensors.items():
        result[name] = expression
        if name in names:
            scales = block_scales(expression, BLOCK)
            result[name], result[name + SCALE] = quantize(expression, scales, BLOCK), scales
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
