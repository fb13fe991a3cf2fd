"""Rewards of two checkpoints compared, in float64, each run by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmconvert.errors import BadInput
from llmconvert.verify.float64 import float64_throughout
from llmconvert.verify.layerwise import LayerwiseModel
from llmconvert.verify.logits import resolve_device
from llmconvert.verify.models import FileWeights, check_file, load_classifier, read_config
from llmconvert.verify.probes import Probe, limits, make_probes

_ALLOWED = 1e-9
"""Of the hidden states' scale; equal functions differ by about 1e-15 in float64, and float32 rounding by 1e-7."""

_ALLOWED_ROUNDED = 2e-2
"""Where weights were rounded to 16 bits on purpose."""


def _head(directory: Path) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a value head, from the weights or from a file of its own; None where there is none."""
    weights = FileWeights(directory)
    found = {name.rpartition("v_head.")[2]: weights.read(name) for name in weights.shapes if "v_head." in name}
    for name in ("value_head.safetensors", "value_head.bin"):
        path = directory / name
        if not found and path.is_file():
            from safetensors.torch import load_file

            check_file(directory, path)
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            found = {key.removeprefix("v_head."): tensor for key, tensor in state.items()}
    return found.get("summary.weight"), found.get("summary.bias")


@torch.no_grad()
def _states(
    directory: Path, probes: list[Probe], device: str, *, bias_counts: bool = True
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Per probe the states the head is given, [batch, tokens, hidden], and the rewards of the last real tokens."""
    architectures = read_config(directory).get("architectures") or []
    if any(name.endswith(("ForSequenceClassification", "ForRewardModel")) for name in architectures):
        states, rewards = [], []
        with float64_throughout():
            model = load_classifier(directory, torch.float64, device)
            for probe in probes:
                inputs = {
                    "attention_mask": probe.attention_mask.to(device), "position_ids": probe.position_ids.to(device)
                }  # fmt: skip
                ids = probe.input_ids.to(device)
                states.append(model.base_model(input_ids=ids, **inputs, use_cache=False).last_hidden_state)  # type: ignore[operator]
                rewards.append(model.score(states[-1])[:, -1, 0])  # type: ignore[operator]
        return states, rewards
    runner = LayerwiseModel(directory, torch.float64, device, whole=False)
    weight, bias = _head(directory)
    streams = runner.begin(probes)
    for index in range(len(runner.layers)):
        with runner.block(index):
            streams = [seen.out for seen in runner.layer(index, streams)]
    states = [state for state, _ in runner.end(streams)]
    if weight is None:
        return states, [None] * len(states)
    constant = 0.0 if bias is None or not bias_counts else float(bias.double())
    return states, [state[:, -1] @ weight[0].double().to(device) + constant for state in states]


def compare_rewards(
    source: Path, written: Path, *, device: str = "auto", rounded: bool = False, bias_counts: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Run two reward models, or a causal model and the reward model made of it, on the same tokens.

    What heads are given is compared at every real token, and the rewards of left-padded rows' last tokens.

    Args:
        source: a causal model, with or without a value head, or a sequence classifier.
        written: likewise.
        device: auto (CUDA where there is one), cpu, cuda:1.
        rounded: weights were rounded on the way.
        bias_counts: whether the source's value head's bias is part of its rewards; it may have been left out on purpose.
        progress: called with what is done, and of how much.

    Returns:
        `verdict`, `reason`, and the largest differences in parts of the scale.

    Raises:
        BadInput: the two are of different widths.
        LlmconvertError: one cannot be run.
    """
    place = resolve_device(device)
    vocab, longest = limits(read_config(source))
    probes = [p for p in make_probes([source], vocab, longest) if p.name in ("text", "random tokens")]
    progress(0, 2)
    left, first = _states(source, probes, place, bias_counts=bias_counts)
    progress(1, 2)
    right, second = _states(written, probes, place)
    progress(2, 2)
    states, rewards = 0.0, 0.0
    for probe, a, b in zip(probes, left, right, strict=True):
        if a.shape != b.shape:
            raise BadInput(f"states are {list(a.shape)} and {list(b.shape)}", where=str(written))
        kept = probe.kept.to(a.device)
        states = max(states, float((a - b)[kept].abs().max() / a[kept].abs().max()))
    for a_rewards, b_rewards in zip(first, second, strict=True):
        if a_rewards is not None and b_rewards is not None:
            scale = max(float(a_rewards.abs().max()), 1.0)
            rewards = max(rewards, float((a_rewards - b_rewards).abs().max()) / scale)
    allowed = _ALLOWED_ROUNDED if rounded else _ALLOWED
    verdict = states <= allowed and rewards <= allowed
    told = f"states differ by {states:.1e} of their scale, rewards by {rewards:.1e} (at most {allowed:.0e} allowed)"
    return {
        "verdict": verdict, "reason": told, "max_state_difference": states, "max_reward_difference": rewards,
        "allowed": allowed, "probes": [probe.describe() for probe in probes],
    }  # fmt: skip
