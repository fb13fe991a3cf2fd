"""ChatGLM2, ChatGLM3 and glm-4-9b (remote-code form), from the GLM report (arXiv:2406.12793) and the published names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmconvert.verify.reference.common import (
    RMSNorm,
    angles,
    attend,
    positions,
    require,
    rotate_neighbours,
    split_heads,
)
from llmconvert.verify.reference.llamalike import Block, Decoder, decode


class _Attention(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, self.heads, d = config["hidden_size"], config["num_attention_heads"], config.get("kv_channels", 128)
        self.grouped = bool(config.get("multi_query_attention"))
        self.kv_heads = config.get("multi_query_group_num", 1) if self.grouped else self.heads
        self.sizes = (self.heads * d, self.kv_heads * d, self.kv_heads * d)
        self.query_key_value = nn.Linear(hidden, sum(self.sizes), bias=bool(config.get("add_qkv_bias")))
        self.dense = nn.Linear(self.heads * d, hidden, bias=False)
        self.rotated, self.theta = d // 2, 10000.0 * config.get("rope_ratio", 1)

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        packed = self.query_key_value(x)
        if self.grouped:
            q, k, v = packed.split(self.sizes, -1)
            q, k, v = split_heads(q, self.heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)
        else:  # each head's query, key and value lie together
            q, k, v = split_heads(packed, self.heads).chunk(3, -1)
        angle, r = angles(position_ids, self.rotated, self.theta), self.rotated
        q, k = (torch.cat((rotate_neighbours(t[..., :r], angle), t[..., r:]), -1) for t in (q, k))
        return self.dense(attend(q, k, v, attention_mask))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.dense_4h_to_h = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(functional.silu(gate) * up)  # type: ignore[no-any-return]


class ChatGLMForConditionalGeneration(Decoder):
    """The decoder of ChatGLM2 and later."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build from config.json."""
        super().__init__()
        hidden, eps, vocab = config["hidden_size"], config.get("layernorm_epsilon", 1e-5), config["padded_vocab_size"]
        require(config, rmsnorm=True, post_layer_norm=True, add_bias_linear=False)
        require(config, apply_residual_connection_post_layernorm=False)
        self.transformer = nn.Module()
        self.transformer.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(vocab, hidden)})
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            Block(
                {"input_layernorm": RMSNorm(hidden, eps), "self_attention": _Attention(config),
                 "post_attention_layernorm": RMSNorm(hidden, eps), "mlp": _MLP(hidden, config["ffn_hidden_size"])}
            )
            for _ in range(config["num_layers"])
        )  # fmt: skip
        self.transformer.encoder.final_layernorm = RMSNorm(hidden, eps)
        self.transformer.output_layer = nn.Linear(hidden, vocab, bias=False)
        rotated = config.get("kv_channels", 128) // 2
        self.transformer.rotary_pos_emb = nn.Module()
        frequencies = 1.0 / 10000 ** (torch.arange(0, rotated, 2).float() / rotated)
        self.transformer.rotary_pos_emb.register_buffer("inv_freq", frequencies)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] for ids [batch, tokens]."""
        parts = self.transformer
        hidden = decode(
            parts.embedding["word_embeddings"](input_ids),
            positions(input_ids, attention_mask, position_ids),
            attention_mask,
            parts.encoder.layers,
        )
        return parts.output_layer(parts.encoder.final_layernorm(hidden))  # type: ignore[no-any-return]
