"""Experts stored as one tensor for all of a layer, as transformers 5 holds them in memory, seen as one tensor each."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from llmconvert.checkpoint.config import MAX_EXPERTS
from llmconvert.checkpoint.directory import Checkpoint
from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.checkpoint.stored import StoredTensor

_HALVES = {
    ".mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    ".mlp.experts.down_proj": ("down_proj",),
}  # fmt: skip


def unfused(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with one tensor an expert, under the names experts have when they are stored one by one.

    `mlp.experts.gate_up_proj` is [experts, 2·intermediate, hidden], gate above up; `mlp.experts.down_proj` is [experts,
    hidden, intermediate]. Their parts lie in one piece each, so that nothing is moved.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        ending = next((ending for ending in _HALVES if name.endswith(ending)), None)
        plausible = len(tensor.shape) == 3 and tensor.shape[0] <= MAX_EXPERTS and tensor.nbytes > 0
        if ending is None or not plausible or tensor.shape[1] % len(_HALVES[ending]):
            tensors[name] = tensor
            continue
        parts = _HALVES[ending]
        shape = (tensor.shape[1] // len(parts), tensor.shape[2])
        size = prod(shape) * ITEMSIZE[tensor.dtype]
        for k in range(tensor.shape[0] * len(parts)):
            expert, half = divmod(k, len(parts))
            own = f"{name.removesuffix(ending)}.mlp.experts.{expert}.{parts[half]}.weight"
            tensors[own] = tensor._replace(name=own, offset=tensor.offset + k * size, shape=shape)
    return replace(checkpoint, tensors=tensors)
