"""The canonical modelling class and what goes with it.

Its classes are imported, and made known to transformers' Auto classes, when one is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmconvert.models.modeling_canonical import (
        CanonicalForCausalLM,
        CanonicalForRewardModel,
        CanonicalForTokenClassification,
        CanonicalModel,
        CanonicalModelConfig,
    )

__all__ = [
    "CanonicalForCausalLM",
    "CanonicalForRewardModel",
    "CanonicalForTokenClassification",
    "CanonicalModel",
    "CanonicalModelConfig",
    "register",
]


def register() -> None:
    """Make the Auto classes of transformers know `model_type: llmconvert`; done once, however often it is called."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from llmconvert.models import modeling_canonical as canonical

    AutoConfig.register("llmconvert", canonical.CanonicalModelConfig, exist_ok=True)
    for auto, cls in (
        (AutoModel, canonical.CanonicalModel),
        (AutoModelForCausalLM, canonical.CanonicalForCausalLM),
        (AutoModelForSequenceClassification, canonical.CanonicalForRewardModel),
        (AutoModelForTokenClassification, canonical.CanonicalForTokenClassification),
    ):
        auto.register(canonical.CanonicalModelConfig, cls, exist_ok=True)


def __getattr__(name: str) -> Any:
    # Torch and transformers are loaded when a class is asked for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmconvert.models import modeling_canonical

    register()
    return getattr(modeling_canonical, name)
