"""How many tokens a batch may have, from the memory there is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SHARE = 0.6
"""Of what the weights leave free. The rest is for activations, fragments, and a cache that grows by copying."""
_LEAST, _MOST = 1 << 26, 1 << 34
"""A processor gains nothing from more rows at a time than these bytes hold."""


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container it runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(limit).read_text()))
    return total


def share_of_host(weights: int, copies: int) -> int:
    """Bytes of this machine's memory for the keys and values of one of several copies.

    Args:
        weights: bytes of one copy's.
        copies: how many share the memory.
    """
    return min(_MOST, max(_LEAST, int(_SHARE * (host_memory() // (2 * copies) - weights))))


def cache_bytes(config: Any, itemsize: int) -> int:
    """Bytes of keys and values that a token leaves in the cache: 2 x layers x key/value heads x head dimension.

    For models that compress them it is more than they need.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None) or 1
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * int(text.num_hidden_layers) * int(groups) * int(width) * itemsize


def token_budget(model: Any, devices: Sequence[str], copies: int) -> int:
    """Most tokens of a batch: those whose cache and logits take a share of what the weights leave free.

    It is worked out from the memory a device has, not from what happens to be free, so that it is the same each time.

    Args:
        model: of transformers, loaded.
        devices: where it is.
        copies: how many copies share the host's memory.
    """
    import torch

    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if devices[0] == "cpu" or not torch.cuda.is_available():
        memory = host_memory() // (2 * copies)
    else:
        memory = sum(int(torch.cuda.get_device_properties(device).total_memory) for device in devices)
    itemsize: int = next(model.parameters()).element_size()
    text = model.config.get_text_config()
    # A row holds the logits of its last token in float32, copied a few times; charged to each token, that is on the safe
    # side. Activations of the prompt: a few times the widest layer.
    wide = max(int(getattr(text, "intermediate_size", None) or 0), 4 * int(text.hidden_size))
    each = cache_bytes(model.config, itemsize) + 4 * wide * itemsize
    budget: int = int(_SHARE * max(0, memory - weights)) // each
    return max(1, budget)
