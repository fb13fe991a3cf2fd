"""Channel losses the slow way, token by token in Python, and data to try them on; nothing here is ours to test."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NAMES = ["web", "code", "math"]
VOCABULARY = 37


def by_token(tokens: Iterable[tuple[str, float]]) -> dict[str, tuple[float, int]]:
    """Mean loss and count of each channel, of (channel, loss) of single tokens."""
    sums: dict[str, list[float]] = defaultdict(list)
    for channel, loss in tokens:
        sums[channel].append(loss)
    return {channel: (sum(losses) / len(losses), len(losses)) for channel, losses in sums.items()}


def of_rows(model: Any, rows: Iterable[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Channel losses of a causal model, one row at a time, without padding or packing."""
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
            for place, label in enumerate(row["labels"][1:]):
                if label != -100:
                    found.append((row["channel"], -float(torch.log_softmax(logits[place], 0)[label])))
    return by_token(found)


def rows(count: int, seed: int, channels: list[str] = NAMES) -> list[dict[str, Any]]:
    """Rows of 3 to 11 tokens, each of one channel, with prompts that do not count."""
    random_ = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [random_.randrange(VOCABULARY) for _ in range(random_.randrange(3, 12))]
        prompt = random_.randrange(len(ids) - 1)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "channel": random_.choice(channels)})
    return made


def pad(batch: list[dict[str, Any]], left: bool = False) -> dict[str, Tensor]:
    """A collator: rows padded to the longest."""
    width = max(len(row["input_ids"]) for row in batch)

    def filled(values: list[int], value: int) -> list[int]:
        more = [value] * (width - len(values))
        return [*more, *values] if left else [*values, *more]

    return {
        "input_ids": torch.tensor([filled(row["input_ids"], 0) for row in batch]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in batch]),
        "labels": torch.tensor([filled(row["labels"], -100) for row in batch]),
    }


def tiny_llama(seed: int = 0) -> Any:
    """A Llama of awkward shape, every weight of which matters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=True, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model
