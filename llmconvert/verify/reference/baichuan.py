"""Baichuan and Baichuan2, 7B (rotary) and 13B (ALiBi), from the Baichuan 2 report (arXiv:2309.10305) and the published names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmconvert.verify.reference.common import RMSNorm, angles, attend, positions, require, rotate_halves, split_heads
from llmconvert.verify.reference.gated import GatedMLP
from llmconvert.verify.reference.llamalike import Block, decode


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes (Press et al., 2021): 2^(-8k/n) for a power of two, interpolated otherwise."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (k + 1) / power) for k in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * k + 1) / power) for k in range(heads - power)]
    return torch.tensor(slopes)


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, alibi: bool) -> None:
        super().__init__()
        self.W_pack, self.o_proj = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.heads, self.alibi = heads, alibi

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.W_pack(x).chunk(3, -1))
        if self.alibi:
            slopes = alibi_slopes(self.heads).to(q)[None, :, None, None]
            bias = slopes * position_ids[:, None, None, :].to(q.dtype)
            return self.o_proj(attend(q, k, v, attention_mask, bias))  # type: ignore[no-any-return]
        angle = angles(position_ids, q.shape[-1], 10000.0)
        return self.o_proj(attend(rotate_halves(q, angle), rotate_halves(k, angle), v, attention_mask))  # type: ignore[no-any-return]


class NormHead(nn.Linear):
    """Baichuan 2's head: the rows of the weight are scaled to unit length before use."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary]."""
        return functional.linear(hidden, functional.normalize(self.weight))


class BaichuanForCausalLM(nn.Module):
    """Baichuan in all four forms.

    The head is normalised (NormHead) for version 2: the vocabulary of 125,696, or the class name `BaichuanForCausalLM`
    on a rotary model (version 1 of the 7B spells it `BaiChuanForCausalLM`).
    """

    def __init__(self, config: Mapping[str, Any], norm_head: bool | None = None) -> None:
        """Build from config.json; `norm_head` overrides what it says."""
        super().__init__()
        hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config["rms_norm_eps"]
        require(config, hidden_act="silu")
        alibi = config.get("max_position_embeddings") is None
        if norm_head is None:
            second = not alibi and "BaichuanForCausalLM" in (config.get("architectures") or ())
            norm_head = second or config["vocab_size"] == 125696
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(
            Block(
                {"input_layernorm": RMSNorm(hidden, eps), "self_attn": _Attention(hidden, heads, alibi),
                 "post_attention_layernorm": RMSNorm(hidden, eps), "mlp": GatedMLP(hidden, config["intermediate_size"])}
            )
            for _ in range(config["num_hidden_layers"])
        )  # fmt: skip
        self.model.norm = RMSNorm(hidden, eps)
        self.lm_head = (NormHead if norm_head else nn.Linear)(hidden, config["vocab_size"], bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] for ids [batch, tokens]."""
        hidden = decode(
            self.model.embed_tokens(input_ids),
            positions(input_ids, attention_mask, position_ids),
            attention_mask,
            self.model.layers,
        )
        return self.lm_head(self.model.norm(hidden))  # type: ignore[no-any-return]
