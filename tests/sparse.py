"""Checkpoints of full size that take no disk: real headers over sparse files, to plan and inspect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.safetensors import layout


def make_sparse(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path,
    *,
    dtype: str = "BF16",
    shards: int = 3,
) -> Path:
    """Write config.json, an index and header-only safetensors files; tensors are dealt round-robin over the shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(shapes)
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: (dtype, shapes[name]) for name in names[k::shards]}
        prefix, _ = layout(part)
        weight_map |= dict.fromkeys(part, file)
        size = len(prefix) + sum(2 * _count(shape) for _, shape in part.values())
        with (directory / file).open("wb") as handle:
            handle.write(prefix)
            handle.truncate(size)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
