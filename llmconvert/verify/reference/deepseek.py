"""DeepSeek-MoE-16b, from its paper (arXiv:2401.06066) and the tensor names of deepseek-ai/deepseek-moe-16b-base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmconvert.verify.reference.common import RMSNorm, positions, require
from llmconvert.verify.reference.gated import GatedMLP
from llmconvert.verify.reference.llamalike import Block, Decoder, decode
from llmconvert.verify.reference.yi import Attention, Rotary


class _Router(nn.Module):
    """Scores of all experts, by a softmax in at least float32; the best are kept, as they are unless told otherwise.

    Divided by their sum where `norm_topk_prob` says so, but never where one alone is chosen (`MoEGate.forward`).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config["n_routed_experts"], config["hidden_size"]))
        self.chosen = config["num_experts_per_tok"]
        self.normalised = bool(config.get("norm_topk_prob")) and self.chosen > 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For [tokens, hidden] the chosen experts' weights and numbers, [tokens, chosen]."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scores = nn.functional.linear(x.to(wide), self.weight.to(wide)).softmax(-1)
        weights, experts = scores.topk(self.chosen, -1)
        return (weights / weights.sum(-1, keepdim=True) if self.normalised else weights), experts


class _Experts(nn.ModuleList):
    """The routed experts."""

    def __init__(self, hidden: int, width: int, number: int) -> None:
        super().__init__(GatedMLP(hidden, width) for _ in range(number))
        self.num_experts = number

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs: [tokens, hidden] for [tokens, hidden]."""
        result = torch.zeros_like(x)
        for number, expert in enumerate(self):
            tokens, slots = (top_k_index == number).nonzero(as_tuple=True)
            if len(tokens):
                result[tokens] += expert(x[tokens]) * top_k_weights[tokens, slots, None].to(x.dtype)
        return result


class _MixtureOfExperts(nn.Module):
    """Each token goes to its best experts, and to the shared ones, which are one MLP."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = _Router(config)
        self.experts = _Experts(hidden, width, config["n_routed_experts"])
        shared = config.get("n_shared_experts")
        self.shared_experts = GatedMLP(hidden, width * shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.gate(flat)
        result: Tensor = self.experts(flat, experts, weights)
        if self.shared_experts is not None:
            result = result + self.shared_experts(flat)
        return result.view_as(x)


class DeepseekForCausalLM(Decoder):
    """Llama whose layers, but for the first, are mixtures of experts."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build from config.json."""
        super().__init__()
        hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
        require(config, hidden_act="silu", scoring_func="softmax", moe_layer_freq=1)
        scaling = config.get("rope_scaling") or {}
        if scaling.get("type") != "linear":
            require(config, rope_scaling=None)
        rotary = Rotary(float(config.get("rope_theta", 10000)), float(scaling.get("factor", 1)))
        kv_heads, bias = config.get("num_key_value_heads", 32) or heads, bool(config.get("attention_bias"))
        dense = config.get("first_k_dense_replace") or 0
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(
            Block(
                {"input_layernorm": RMSNorm(hidden, eps), "self_attn": Attention(hidden, heads, kv_heads, rotary, bias),
                 "post_attention_layernorm": RMSNorm(hidden, eps),
                 "mlp": GatedMLP(hidden, config["intermediate_size"]) if i < dense else _MixtureOfExperts(config)}
            )
            for i in range(config["num_hidden_layers"])
        )  # fmt: skip
        self.model.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)
        self._tie(config, "lm_head", "model.embed_tokens")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] for ids [batch, tokens]."""
        place = positions(input_ids, attention_mask, position_ids)
        hidden = decode(self.model.embed_tokens(input_ids), place, attention_mask, self.model.layers)
        return self.lm_head(self.model.norm(hidden))  # type: ignore[no-any-return]
