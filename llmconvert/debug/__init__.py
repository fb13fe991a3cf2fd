"""Look inside a model: cosines between layers, the logit lens, attention weights.

`show_*` print a table and give back what it shows. They take any decoder in memory (transformers' classes, the canonical
one), or a checkpoint directory, which is read layer by layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmconvert.debug.measures import (
    AttentionWeights,
    CosDistance,
    Model,
    TopkToken,
    attention_weights,
    cos_distance,
    topk_token,
)
from llmconvert.debug.tables import Seen

__all__ = [
    "AttentionWeights",
    "CosDistance",
    "TopkToken",
    "attention_weights",
    "cos_distance",
    "show",
    "show_attention",
    "show_cos_distance",
    "show_topk_token",
    "topk_token",
]


def show(*found: Seen, png: str | Path | None = None) -> None:
    """Print one or two results of the same kind as a table, and draw them.

    Args:
        found: what `cos_distance`, `topk_token` or `attention_weights` gave.
        png: where to draw them; nowhere if None.
    """
    from llmconvert.debug import plots, tables
    from llmconvert.terminal import console

    console().print(tables.table(found))
    note = plots.save(found, Path(png)) if png is not None else None
    if note:
        print(f"note: {note}")


def show_cos_distance(
    model: Model, layer: int | None = None, *, png: str | Path | None = None, **options: Any
) -> CosDistance:
    """Show the cosine between what a layer is given and what it gives; see `cos_distance` for the arguments."""
    found = cos_distance(model, layer, **options)
    show(found, png=png)
    return found


def show_topk_token(
    model: Model, layer: int | None = None, K: int = 10, *, png: str | Path | None = None, **options: Any
) -> TopkToken:
    """Show the likeliest next tokens after a layer; see `topk_token` for the arguments."""
    found = topk_token(model, layer, K, **options)
    show(found, png=png)
    return found


def show_attention(
    model: Model, layer: int, tokenA: int | str | None = None, tokenB: int | str | None = None, *,
    png: str | Path | None = None, **options: Any,
) -> AttentionWeights:  # fmt: skip
    """Show a layer's attention weights, all or from `tokenA` to `tokenB`; see `attention_weights` for the arguments."""
    found = attention_weights(model, layer, tokenA, tokenB, **options)
    show(found, png=png)
    return found
