"""What a checkpoint is stored in."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from llmconvert.checkpoint import open_checkpoint
from llmconvert.checkpoint.directory import read_json
from llmconvert.checkpoint.dtypes import FLOATS, FROM_NAME, TO_NAME
from llmconvert.errors import LlmconvertError


def stored_dtype(model: Path) -> tuple[str, str]:
    """What `--dtype auto` means for a checkpoint.

    Engines' own `auto` is another thing: transformers' is what config.json says, vLLM's never float32.

    Args:
        model: the checkpoint's directory.

    Returns:
        A dtype as torch names it, and whence it is known. `auto`, so that the engine decides, where neither the weights
        nor config.json say one.
    """
    try:
        config = read_json(model / "config.json")
    except LlmconvertError:
        return "auto", "the engine's choice"
    said = _said(config)
    if not any(key in section for section in _sections(config) for key in ("quantization_config", "compression_config")):
        held = _held(model)
        if held is not None:
            differs = said is not None and said != held
            return held, f"as the weights are stored; config.json says {said}" if differs else "as stored"
    return (said, "as config.json says") if said is not None else ("auto", "the engine's choice")


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(value for key, value in config.items() if key in ("text_config", "llm_config") and isinstance(value, dict))]


def _said(config: dict[str, Any]) -> str | None:
    for section in _sections(config):
        for key in ("dtype", "torch_dtype"):
            value = section.get(key)
            if isinstance(value, str) and value.removeprefix("torch.") in FROM_NAME:
                return value.removeprefix("torch.")
    return None


def _held(model: Path) -> str | None:
    """The type of most elements, where that is one to compute in."""
    try:
        tensors = open_checkpoint(model).tensors
    except LlmconvertError:  # the engine may read what we do not, or will say what is wrong
        return None
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[tensor.dtype] += math.prod(tensor.shape)
    if not elements:
        return None
    most = elements.most_common(1)[0][0]
    return TO_NAME[most] if most in FLOATS else None
