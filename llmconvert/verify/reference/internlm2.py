"""InternLM2, from its report (arXiv:2403.17297), which describes the grouped packing of query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from llmconvert.verify.reference.common import RMSNorm, angles, attend, positions, require, rotate_halves
from llmconvert.verify.reference.llamalike import Block, decode


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, theta: float, factor: float, bias: bool) -> None:
        super().__init__()
        d = hidden // heads
        self.wqkv = nn.Linear(hidden, (heads + 2 * kv_heads) * d, bias=bias)
        self.wo = nn.Linear(heads * d, hidden, bias=bias)
        self.kv_heads, self.group, self.theta, self.factor = kv_heads, heads // kv_heads, theta, factor

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        packed = self.wqkv(x).unflatten(-1, (self.kv_heads, self.group + 2, -1))
        q = packed[..., : self.group, :].flatten(2, 3).transpose(1, 2)
        k, v = packed[..., -2, :].transpose(1, 2), packed[..., -1, :].transpose(1, 2)
        angle = angles(position_ids, q.shape[-1], self.theta, self.factor)
        return self.wo(attend(rotate_halves(q, angle), rotate_halves(k, angle), v, attention_mask))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(hidden, intermediate, bias=False), nn.Linear(hidden, intermediate, bias=False)
        self.w2 = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class InternLM2ForCausalLM(nn.Module):
    """InternLM2, with linear rotary scaling, and with dynamic scaling up to the length beyond which it acts.

    Raises:
        Refused: another kind of scaling.
        ValueError: on positions where dynamic scaling would act.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build from config.json."""
        super().__init__()
        hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config["rms_norm_eps"]
        kv_heads, theta = config["num_key_value_heads"], float(config["rope_theta"])
        bias = bool(config.get("bias"))
        scaling = config.get("rope_scaling") or {}
        kind = scaling.get("type", scaling.get("rope_type", "default"))
        if kind not in ("linear", "dynamic"):
            require(config, rope_scaling=None)
        require(config, hidden_act="silu", mlp_bias=False)
        factor = float(scaling["factor"]) if kind == "linear" else 1.0
        self.limit = config["max_position_embeddings"] if kind == "dynamic" else None
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(config["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(
            Block(
                {"attention_norm": RMSNorm(hidden, eps), "attention": _Attention(hidden, heads, kv_heads, theta, factor, bias),
                 "ffn_norm": RMSNorm(hidden, eps), "feed_forward": _MLP(hidden, config["intermediate_size"])}
            )
            for _ in range(config["num_hidden_layers"])
        )  # fmt: skip
        self.model.norm = RMSNorm(hidden, eps)
        self.output = nn.Linear(hidden, config["vocab_size"], bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] for ids [batch, tokens]."""
        place = positions(input_ids, attention_mask, position_ids)
        if self.limit is not None and int(place.max()) >= self.limit:
            raise ValueError(f"positions beyond {self.limit} need dynamic rotary scaling, which is not modelled")
        hidden = decode(self.model.tok_embeddings(input_ids), place, attention_mask, self.model.layers)
        return self.output(self.model.norm(hidden))  # type: ignore[no-any-return]
