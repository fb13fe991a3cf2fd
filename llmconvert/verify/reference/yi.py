"""Yi in its first form, from the Yi report (arXiv:2403.04652) and the tensor names of November 2023."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmconvert.verify.reference.common import RMSNorm, angles, attend, positions, require, rotate_halves, split_heads
from llmconvert.verify.reference.gated import GatedMLP
from llmconvert.verify.reference.llamalike import Block, Decoder, decode


class Rotary(NamedTuple):
    """A rotary embedding.

    Attributes:
        theta: its base.
        factor: positions are divided by it (linear scaling).
    """

    theta: float
    factor: float = 1.0


class Attention(nn.Module):
    """Llama's attention under Llama's own names: grouped queries, rotary embedding by halves."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, rotary: Rotary, bias: bool = False) -> None:
        """Linear maps, all with a bias or none."""
        super().__init__()
        d = hidden // heads
        self.q_proj = nn.Linear(hidden, heads * d, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * d, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * d, bias=bias)
        self.o_proj = nn.Linear(heads * d, hidden, bias=bias)
        self.heads, self.kv_heads, self.rotary = heads, kv_heads, rotary

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Same shape as `x`."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = split_heads(q, self.heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)
        angle = angles(position_ids, q.shape[-1], *self.rotary)
        return self.o_proj(attend(rotate_halves(q, angle), rotate_halves(k, angle), v, attention_mask))  # type: ignore[no-any-return]


class YiForCausalLM(Decoder):
    """Llama's computation with `ln1` and `ln2` for the two norms."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build from config.json."""
        super().__init__()
        hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config.get("rms_norm_eps", 1e-5)
        require(config, hidden_act="silu", rope_scaling=None, attention_bias=False)
        kv_heads, theta = config.get("num_key_value_heads", 4) or heads, float(config.get("rope_theta", 5e6))
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(
            Block(
                {"ln1": RMSNorm(hidden, eps), "self_attn": Attention(hidden, heads, kv_heads, Rotary(theta)),
                 "ln2": RMSNorm(hidden, eps), "mlp": GatedMLP(hidden, config["intermediate_size"])}
            )
            for _ in range(config["num_hidden_layers"])
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
