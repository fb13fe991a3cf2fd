"""Companions of training: the loss of each data source, in a bare loop, in transformers' Trainer and in Megatron.

Names are imported when first used, so that neither torch nor transformers is loaded before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmconvert.training.channel_loss import NO_CHANNEL, ChannelLoss, ChannelLossMeter
    from llmconvert.training.megatron import MegatronChannelLoss
    from llmconvert.training.trainer import ChannelCollator, ChannelLossCallback, ChannelLossMixin, ChannelLossTrainer

_PUBLIC = {
    "ChannelCollator": "trainer",
    "ChannelLoss": "channel_loss",
    "ChannelLossCallback": "trainer",
    "ChannelLossMeter": "channel_loss",
    "ChannelLossMixin": "trainer",
    "ChannelLossTrainer": "trainer",
    "MegatronChannelLoss": "megatron",
    "NO_CHANNEL": "channel_loss",
}

__all__ = [
    "NO_CHANNEL",
    "ChannelCollator",
    "ChannelLoss",
    "ChannelLossCallback",
    "ChannelLossMeter",
    "ChannelLossMixin",
    "ChannelLossTrainer",
    "MegatronChannelLoss",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llmconvert.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmconvert.training.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
