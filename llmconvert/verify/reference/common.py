"""The parts the reference models share: RMSNorm, rotary embedding, causal attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmconvert.errors import Refused


def require(config: Mapping[str, Any], **values: Any) -> None:
    """Refuse a config that asks for what the model does not compute; an absent key asks for nothing.

    Raises:
        Refused: a key is set, and not to the value given here.
    """
    wrong = [f"`{key}` {config[key]!r}" for key, value in values.items() if config.get(key) not in (None, value)]
    if wrong:
        raise Refused(
            f"the reference model does not compute {', '.join(wrong)}",
            where="config.json",
            hint="its logits would prove nothing; verify the weights alone",
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, 2019), computed in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        """A norm over the last axis, of length `size`."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm` with a weight given by the caller."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def frequencies(dims: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies theta^(-2j/dims): float32 [dims / 2], rounded as models round them."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    return 1.0 / theta**exponents


def angles(position_ids: Tensor, dims: int, theta: float, factor: float = 1.0) -> Tensor:
    """Rotary angles p · theta^(-2j/dims) / factor (Su et al., RoFormer, 2021): float64 [batch, tokens, dims / 2]."""
    # Rounded to float32 on the way, in this order, as models do everywhere: at position 10^5 exact angles would move
    # the logits by 1e-4 of their scale.
    return (position_ids.float()[..., None] * (frequencies(dims, theta, position_ids.device) / factor)).double()


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate pairs (j, j + d/2) of the last axis; x is [batch, heads, tokens, d]."""
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate pairs (2j, 2j + 1) of the last axis; x is [batch, heads, tokens, d]."""
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Causal softmax attention, scale 1/sqrt(d).

    Args:
        q: [batch, heads, tokens, d].
        k: [batch, kv_heads, tokens, d]; `v` alike. Key/value heads are shared by consecutive query heads.
        v: see `k`.
        attention_mask: [batch, tokens], 0 at padding; or None.
        bias: added to the scores, broadcast to [batch, heads, tokens, tokens]; or None.

    Returns:
        [batch, tokens, heads · d].
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    tokens = q.shape[2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    mixed = scores.softmax(-1, dtype=wide).to(q.dtype) @ v
    return mixed.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads · d] → [batch, heads, tokens, d]."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def positions(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Position ids as given, else counted from the first token that is not padding."""
    if position_ids is not None:
        return position_ids
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
