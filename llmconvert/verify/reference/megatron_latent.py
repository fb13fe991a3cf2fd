"""Multi-head latent attention over Megatron shards (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Names are megatron-core's, in its local and its Transformer Engine spelling. Rotary pairs are neighbours; YaRN (Peng et al.,
arXiv:2309.00071) with DeepSeek's scales: the angles' amplitude is m(mscale) / m(mscale_all_dim) and scores are multiplied by
m(mscale_all_dim)², with m(a) = 0.1 · a · ln(factor) + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmconvert.errors import BadInput, Refused
from llmconvert.verify.reference.common import attend, frequencies, rms_norm, rotate_neighbours
from llmconvert.verify.reference.shards import Chunk, Shards


def _size(args: Mapping[str, Any], key: str) -> int:
    if args.get(key) is None:
        raise BadInput(f"the checkpoint's args lack `{key}`", where="args")
    return int(args[key])


class _Angles:
    """Rotary angles, their amplitude, and the factor on scores."""

    def __init__(self, args: Mapping[str, Any], dims: int) -> None:
        kind = args.get("rope_type") or "yarn"
        if kind not in ("rope", "yarn"):
            raise Refused(f"the Megatron reference does not compute rope_type {kind!r}", where="args")
        self.dims, self.base = dims, float(args.get("rotary_base") or 10000)
        self.factor = float(args.get("rotary_scaling_factor") or 40)
        amount, everywhere = float(args.get("mscale", 1.0)), float(args.get("mscale_all_dim", 0.0))
        self.scores, self.amplitude = self._m(everywhere) ** 2, 1.0
        self.yarn = kind == "yarn"
        if self.yarn:
            self.amplitude = self._m(amount) / self._m(everywhere)
            length = float(args.get("original_max_position_embeddings") or 4096)
            turns = (float(args.get("beta_fast") or 32), float(args.get("beta_slow") or 1))
            ends = [dims * math.log(length / (turn * 2 * math.pi)) / (2 * math.log(self.base)) for turn in turns]
            self.low, self.high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dims - 1)

    def _m(self, amount: float) -> float:
        return 0.1 * amount * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def __call__(self, position_ids: Tensor) -> Tensor:
        """Float64 [batch, tokens, dims / 2]."""
        speed = frequencies(self.dims, self.base, position_ids.device)
        if self.yarn:
            width = (self.high - self.low) or 0.001
            ramp = (torch.arange(self.dims // 2, dtype=torch.float32, device=speed.device) - self.low) / width
            slow = ramp.clamp(0, 1)
            speed = speed / self.factor * slow + speed * (1 - slow)
        return (position_ids.float()[..., None] * speed).double()


class LatentAttention(nn.Module):
    """Attention whose queries, keys and values are made from latents with a norm of their own."""

    def __init__(
        self, shards: Shards, chunk: Chunk, prefix: str, args: Mapping[str, Any], hidden: int, heads: int, eps: float
    ) -> None:
        """Look at the sizes.

        Raises:
            BadInput: one is missing.
            Refused: there are no norms, or the rotary embedding is another.
        """
        super().__init__()
        if not args.get("qk_layernorm"):
            raise Refused("the Megatron reference does not compute latent attention without norms", where="args")
        self.shards, self.chunk, self.prefix = shards, chunk, prefix + "self_attention."
        self.hidden, self.heads, self.eps = hidden, heads, eps
        self.q_rank = args.get("q_lora_rank")
        self.kv_rank, self.nope, self.rope, self.value = (
            _size(args, key) for key in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        )
        self.angles = _Angles(args, self.rope)

    def _latent(self, x: Tensor, kind: str, rank: int, extra: int = 0) -> tuple[Tensor, Tensor]:
        """The latent with its norm applied, and what is beside it."""
        down = self.shards.rows(self.chunk, (rank + extra, self.hidden), f"{self.prefix}linear_{kind}_down_proj.weight")
        both = functional.linear(x, down)
        names = (f"{self.prefix}{kind}_layernorm.weight", f"{self.prefix}linear_{kind}_up_proj.layer_norm_weight")
        return rms_norm(both[..., :rank], self.shards.copy(self.chunk, (rank,), *names), self.eps), both[..., rank:]

    def _up(self, x: Tensor, rank: int, name: str, each: int) -> Tensor:
        """One rank's heads: [batch, its heads, tokens, each]."""
        own = self.heads // self.shards.tp
        weight = self.shards.part(self.chunk, rank, (own * each, x.shape[-1]), f"{self.prefix}{name}.weight")
        return functional.linear(x, weight).reshape(*x.shape[:-1], own, each).transpose(1, 2)

    def _rotated(self, x: Tensor, angle: Tensor) -> Tensor:
        return rotate_neighbours(x, angle) * self.angles.amplitude

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What attention adds to the residual stream: [batch, tokens, hidden]."""
        angle = self.angles(position_ids)
        if self.q_rank is None:
            queries, name = x, "linear_q_proj"
        else:
            (queries, _), name = self._latent(x, "q", self.q_rank), "linear_q_up_proj"
        latent, shared = self._latent(x, "kv", self.kv_rank, self.rope)
        key = self._rotated(shared[:, None], angle)
        own, total = self.heads // self.shards.tp, torch.zeros_like(x)
        for rank in range(self.shards.tp):
            q = self._up(queries, rank, name, self.nope + self.rope)
            kv = self._up(latent, rank, "linear_kv_up_proj", self.nope + self.value)
            q = torch.cat((q[..., : self.nope], self._rotated(q[..., self.nope :], angle)), -1) * self.angles.scores
            k = torch.cat((kv[..., : self.nope], key.expand(-1, own, -1, -1)), -1)
            mixed = attend(q, k, kv[..., self.nope :], attention_mask)
            shape = (self.hidden, own * self.value)
            weight = self.shards.part(self.chunk, rank, shape, f"{self.prefix}linear_proj.weight")
            total = total + functional.linear(mixed, weight)
        return total
