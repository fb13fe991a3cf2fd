"""Qwen v1, from the technical report (arXiv:2309.16609) and the tensor names of Qwen/Qwen-7B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from llmconvert.verify.reference.common import RMSNorm, angles, attend, positions, require, rotate_halves, split_heads
from llmconvert.verify.reference.llamalike import Block, Decoder, decode


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, theta: float) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden, bias=False)
        self.heads, self.theta = heads, theta

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.c_attn(x).chunk(3, -1))
        angle = angles(position_ids, q.shape[-1], self.theta)
        return self.c_proj(attend(rotate_halves(q, angle), rotate_halves(k, angle), v, attention_mask))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(hidden, intermediate, bias=False), nn.Linear(hidden, intermediate, bias=False)
        self.c_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * functional.silu(self.w2(x)))  # type: ignore[no-any-return]


class QWenLMHeadModel(Decoder):
    """Qwen v1 within its training length.

    Raises:
        ValueError: on a sequence longer than `seq_length` while dynamic NTK or logn scaling is on.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build from config.json, in the form of 2023-08 or later."""
        super().__init__()

        def get(*keys: str) -> Any:
            return next(config[key] for key in keys if config.get(key) is not None)

        hidden, heads = get("hidden_size", "n_embd"), get("num_attention_heads", "n_head")
        require(config, rotary_pct=1.0, scale_attn_weights=True, no_bias=True, kv_channels=hidden // heads)
        eps, theta = config.get("layer_norm_epsilon", 1e-6), float(config.get("rotary_emb_base", 10000))
        intermediate = get("intermediate_size", "ffn_hidden_size") // 2
        vocab = get("vocab_size", "padded_vocab_size")
        self.limit = (
            get("seq_length", "n_positions")
            if config.get("use_dynamic_ntk", True) or config.get("use_logn_attn", True)
            else None
        )
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(vocab, hidden)
        self.transformer.h = nn.ModuleList(
            Block(
                {"ln_1": RMSNorm(hidden, eps), "attn": _Attention(hidden, heads, theta),
                 "ln_2": RMSNorm(hidden, eps), "mlp": _MLP(hidden, intermediate)}
            )
            for _ in range(get("num_hidden_layers", "n_layer"))
        )  # fmt: skip
        self.transformer.ln_f = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self._tie(config, "lm_head", "transformer.wte")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, vocabulary] for ids [batch, tokens]."""
        place = positions(input_ids, attention_mask, position_ids)
        if self.limit is not None and int(place.max()) >= self.limit:
            raise ValueError(
                f"positions beyond seq_length {self.limit} need dynamic NTK and logn scaling, which are not modelled"
            )
        hidden = decode(self.transformer.wte(input_ids), place, attention_mask, self.transformer.h)
        return self.lm_head(self.transformer.ln_f(hidden))  # type: ignore[no-any-return]
