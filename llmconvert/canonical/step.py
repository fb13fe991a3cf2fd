"""What a rewrite is: a step and its undoing, and how to edit the tensors of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from llmconvert.canonical.model import CanonicalConfig, CanonicalModel, names
from llmconvert.tensors.expressions import Expression, cast

Rewrite = Callable[[Expression], Expression]

EXACT, ROUNDED, ONE_WAY = "bit-exact", "exact to rounding", "exact, not reversible"


@dataclass(frozen=True)
class Step:
    """One rewrite.

    Attributes:
        name: what it does, as shown in plans and reports.
        exactness: EXACT (bits only move), ROUNDED (one float rounding an element), or ONE_WAY.
        why: why the function computed by the model stays the same.
        apply: model → model.
        undo: (rewritten model, config before) → model; None for ONE_WAY.
        lossy: modules whose tensors do not come back by `undo`.
    """

    name: str
    exactness: str
    why: str
    apply: Callable[[CanonicalModel], CanonicalModel]
    undo: Callable[[CanonicalModel, CanonicalConfig], CanonicalModel] | None
    lossy: tuple[str, ...] = ()


def edit(
    model: CanonicalModel, modules: Collection[str], rewrite: Rewrite, params: tuple[str, ...] = ("weight", "bias")
) -> dict[str, Expression]:
    """The model's tensors with `rewrite` applied to some parameters of some modules, wherever they are."""
    tensors = dict(model.tensors)
    for module in modules:
        for name in names(model.config, module):
            for param in params:
                if f"{name}.{param}" in tensors:
                    tensors[f"{name}.{param}"] = rewrite(tensors[f"{name}.{param}"])
    return tensors


def rounded(rewrite: Rewrite) -> Rewrite:
    """Compute in float32, round once to the tensor's own type."""
    return lambda expression: cast(rewrite(expression), expression.dtype)
