"""InternLM2, from its report (arXiv:2403.17297), which describes the grouped packing of query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from llmconvert.verify.reference.common import RMSNorm, angles, attend, positions, require, rotate_halves
from llmconvert.verify.reference.llamalike import Block, Decoder, decode


class _Rotary(NamedTuple):
    theta: float
    factor: float
    dynamic: int | None
    """The length beyond which the base grows; None where positions are divided by the factor."""

    def angles(self, position_ids: Tensor, dims: int) -> Tensor:
        """Rotary angles; dynamic NTK scaling looks at the furthest position."""
        if self.dynamic is None:
            return angles(position_ids, dims, self.theta, self.factor)
        length = int(position_ids.max()) + 1
        growth = self.factor * length / self.dynamic - (self.factor - 1) if length > self.dynamic else 1.0
        return angles(position_ids, dims, self.theta * growth ** (dims / (dims - 2)))


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, rotary: _Rotary, bias: bool) -> None:
        super().__init__()
        d = hidden // heads
        self.wqkv = nn.Linear(hidden, (heads + 2 * kv_heads) * d, bias=bias)
        self.wo = nn.Linear(heads * d, hidden, bias=bias)
        self.kv_heads, self.group, self.rotary = kv_heads, heads // kv_heads, rotary

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        packed = self.wqkv(x).unflatten(-1, (self.kv_heads, self.group + 2, -1))
        q = packed[..., : self.group, :].flatten(2, 3).transpose(1, 2)
        k, v = packed[..., -2, :].transpose(1, 2), packed[..., -1, :].transpose(1, 2)
        angle = self.rotary.angles(position_ids, q.shape[-1])
        return self.wo(attend(rotate_halves(q, angle), rotate_halves(k, angle), v, attention_mask))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(hidden, intermediate, bias=False), nn.Linear(hidden, intermediate, bias=False)
        self.w2 = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class InternLM2ForCausalLM(Decoder):
    """InternLM2, with linear or dynamic rotary scaling.

    Raises:
        Refused: another kind of scaling.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build from config.json."""
        super().__init__()
        hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
        kv_heads, theta = config.get("num_key_value_heads") or heads, float(config.get("rope_theta", 10000))
        bias = bool(config.get("bias", True))
        scaling = config.get("rope_scaling") or {}
        kind = scaling.get("type", scaling.get("rope_type", "default"))
        if kind not in ("linear", "dynamic"):
            require(config, rope_scaling=None)
        require(config, hidden_act="silu")
        length = config.get("max_position_embeddings", 2048)
        rotary = _Rotary(theta, float(scaling.get("factor", 1)), length if kind == "dynamic" else None)
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(config["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(
            Block(
                {"attention_norm": RMSNorm(hidden, eps), "attention": _Attention(hidden, heads, kv_heads, rotary, bias),
                 "ffn_norm": RMSNorm(hidden, eps), "feed_forward": _MLP(hidden, config["intermediate_size"])}
            )
            for _ in range(config["num_hidden_layers"])
        )  # fmt: skip
        self.model.norm = RMSNorm(hidden, eps)
        self.output = nn.Linear(hidden, config["vocab_size"], bias=False)
        self._tie(config, "output", "model.tok_embeddings")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] for ids [batch, tokens]."""
        place = positions(input_ids, attention_mask, position_ids)
        hidden = decode(self.model.tok_embeddings(input_ids), place, attention_mask, self.model.layers)
        return self.output(self.model.norm(hidden))  # type: ignore[no-any-return]
