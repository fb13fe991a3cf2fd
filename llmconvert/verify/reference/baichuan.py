"""Baichuan and Baichuan2, 7B (rotary) and 13B (ALiBi), from the Baichuan 2 report (arXiv:2309.10305) and the published names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmconvert.errors import Refused
from llmconvert.verify.reference.common import RMSNorm, angles, attend, positions, require, rotate_halves, split_heads
from llmconvert.verify.reference.gated import GatedMLP
from llmconvert.verify.reference.llamalike import Block, Decoder, decode


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


def form(config: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a model has ALiBi, and whether its head is normalised.

    The 7B of version 1 alone has the class name `BaiChuanForCausalLM`. The others are told by what a converter states
    (`position_embedding`, `norm_head`), by the published numbers of heads, layers and tokens, or by keys that one config
    class has and the other has not: `max_position_embeddings` (7B), `gradient_checkpointing` (13B), `z_loss_weight`
    (version 2).

    Raises:
        Refused: config.json does not tell.
    """
    position, norm_head = config.get("position_embedding"), config.get("norm_head")
    if position in ("ROPE", "ALIBI") and isinstance(norm_head, bool):
        return position == "ALIBI", norm_head
    if "BaiChuanForCausalLM" in (config.get("architectures") or ()):
        return False, False
    size = config["num_attention_heads"], config["num_hidden_layers"]
    keys = {key for key in ("max_position_embeddings", "gradient_checkpointing") if config.get(key) is not None}
    seven, thirteen = size == (32, 32), size == (40, 40)
    if not seven and not thirteen:
        seven, thirteen = keys == {"max_position_embeddings"}, keys == {"gradient_checkpointing"}
    second = config["vocab_size"] == 125696 or config.get("z_loss_weight") is not None
    if seven:
        return False, True
    if thirteen and (second or config["vocab_size"] == 64000):
        return True, second
    raise Refused(
        "config.json does not tell which of the models called `BaichuanForCausalLM` this is",
        where="config.json",
        hint='state `"position_embedding": "ROPE"` or `"ALIBI"`, and `"norm_head": true` or `false`, in a copy of config.json',
    )


class BaichuanForCausalLM(Decoder):
    """Baichuan in all four forms; see `form`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build from config.json."""
        super().__init__()
        hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
        require(config, hidden_act="silu")
        alibi, norm_head = form(config)
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
        self._tie(config, "lm_head", "model.embed_tokens")

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
