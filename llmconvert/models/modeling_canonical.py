"""One decoder for every checkpoint in the canonical layout: Llama, and whatever sets open models apart from it.

The file stands alone beside a checkpoint: it needs torch and transformers (4.57 or later) and nothing else. Its methods
that look inside a model or stream text call llmconvert, which is then to be installed.

A trait that is not set costs nothing: with none this is Llama. Modules and names are Llama's; experts, latent attention
and layers that predict further tokens are named as in DeepSeek-V3, one module an expert.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PretrainedConfig, PreTrainedModel, __version__
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple, is_flash_attn_2_available, logging

logger = logging.get_logger(__name__)

_FIVE = int(__version__.split(".")[0]) >= 5
_LATENT_NORM_EPS = 1e-6  # of the norms inside latent attention, whatever the config says (DeepSeek-V2 and V3)
_SLIDING, _FULL = "sliding_attention", "full_attention"


class CanonicalModelConfig(PretrainedConfig):
    """What a canonical model is; config.json states each value under the name it has here.

    Names of LlamaConfig mean what they mean there. The others are described with
    `llmconvert.canonical.model.CanonicalConfig`, which has the same attributes.
    """

    model_type = "llmconvert"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,  # with `rope_theta` the form of transformers 4
        rope_parameters: dict[str, Any] | None = None,
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        rotary_padded: bool = False,
        tie_word_embeddings: bool = False,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        norm_head: bool = False,
        unit_offset_norm: bool = False,
        embedding_multiplier: float = 1.0,
        embedding_multiplier_rounded: bool = False,
        residual_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
        attention_multiplier: float | None = None,
        attn_logit_softcapping: float | None = None,
        final_logit_softcapping: float | None = None,
        qk_norm: bool = False,
        alibi: bool = False,
        branch_output_norm: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_layers: Sequence[bool] = (),
        moe_intermediate_size: int = 0,
        shared_expert_intermediate_size: int = 0,
        shared_expert_gate: bool = False,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        topk_method: str = "greedy",
        n_group: int = 1,
        topk_group: int = 1,
        router_bias: bool = False,
        q_lora_rank: int | None = None,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int = 0,
        qk_rope_head_dim: int = 0,
        v_head_dim: int = 0,
        num_nextn_predict_layers: int = 0,
        sliding_window: int | None = None,
        layer_types: Sequence[str] | None = None,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__", "tie_word_embeddings")}
        theta, scaling = given.pop("rope_theta"), given.pop("rope_scaling")
        rope = dict(given.pop("rope_parameters") or scaling or {})
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        for name, value in given.items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        if layer_types is None:
            del self.layer_types  # to transformers a config that has it has layers of several kinds
        self.tie_word_embeddings = tie_word_embeddings
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rotary_dim = rotary_dim or self.head_dim
        kind = rope.pop("type", None) or "default"
        self.rope_parameters = {"rope_theta": theta, "rope_type": kind, **rope}
        self.base_model_tp_plan = tensor_parallel_plan(self)

    @property
    def logit_scale(self) -> float:
        """What logits are multiplied by; engines that bring a head of their own (vLLM, TRL) read it here."""
        return 1.0 / self.logits_scaling

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON."""
        return {"layer_types": None, **super().to_dict()}

    def with_layers(self, layers: Sequence[int]) -> CanonicalModelConfig:
        """The config of a model that has some of this one's layers alone.

        Args:
            layers: their numbers, ascending; from `num_hidden_layers` on they predict further tokens.
        """
        kept = [layer for layer in layers if layer < self.num_hidden_layers]
        said = {
            **self.to_dict(), "num_hidden_layers": len(kept), "num_nextn_predict_layers": len(layers) - len(kept),
            "moe_layers": [self.has_experts(layer) for layer in kept] or [self.has_experts(self.num_hidden_layers)],
        }  # fmt: skip
        if said["layer_types"] is not None:
            said["layer_types"] = [said["layer_types"][layer] for layer in kept] or said["layer_types"][-1:]
        return type(self)(**said)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.num_experts > 0 and bool(self.moe_layers[min(layer, self.num_hidden_layers - 1)])

    def window(self, layer: int) -> int | None:
        """How many tokens back a layer sees, or None for all."""
        types = getattr(self, "layer_types", None)
        if types is not None and types[min(layer, self.num_hidden_layers - 1)] != _SLIDING:
            return None
        return self.sliding_window


def choose_attention(config: CanonicalModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The fastest attention implementation of transformers that computes a model's attention.

    Args:
        config: of the model.
        dtype: it is computed in.
        device: it is on.

    Returns:
        The implementation's name, and why it was chosen.
    """
    heads = config.head_dim if config.kv_lora_rank is None else config.qk_nope_head_dim + config.qk_rope_head_dim
    against = {
        "the device is not CUDA": device.type != "cuda",
        f"{str(dtype).removeprefix('torch.')} is not 16 bits wide": dtype not in (torch.float16, torch.bfloat16),
        "ALiBi needs a bias on the scores": config.alibi,
        f"heads of {heads} are wider than 256": heads > 256,
        "flash_attn is not installed": not is_flash_attn_2_available(),
    }
    reasons = [reason for reason, holds in against.items() if holds]
    if not reasons:
        return "flash_attention_2", "installed, and it computes all this model needs"
    why = f"not flash attention: {reasons[0]}"
    if config.attn_logit_softcapping is not None:
        return "eager", f"{why}; not SDPA: it has no soft cap"
    return "sdpa", why


def tensor_parallel_plan(config: CanonicalModelConfig) -> dict[str, str] | None:
    """How matrices are cut for tensor parallelism, by transformers and by engines that follow it (vLLM).

    None with ALiBi, whose slopes are of all heads, and with latent attention under transformers 4, which has no way to
    cut it.
    """
    latent = config.kv_lora_rank is not None
    if config.alibi or (latent and not _FIVE):
        return None
    attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
    if latent:
        attention = {"q_proj" if config.q_lora_rank is None else "q_b_proj": "colwise", "o_proj": "rowwise"}
        attention |= {"kv_a_proj_with_mqa": "mla_kv_a_proj", "kv_b_proj": "colwise"}
    elif config.qk_norm and _FIVE:
        attention |= dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")
    plan = {f"layers.*.self_attn.{name}": style for name, style in attention.items()}
    parts = ["mlp"] * (not config.num_experts or not all(config.moe_layers))
    parts += ["mlp.experts.*"] * (config.num_experts > 0)
    parts += ["mlp.shared_experts"] * (config.num_experts > 0 and config.shared_expert_intermediate_size > 0)
    for part in parts:
        plan |= {f"layers.*.{part}.{name}": "colwise" for name in ("gate_proj", "up_proj")}
        plan[f"layers.*.{part}.down_proj"] = "rowwise"
    if config.tie_word_embeddings and _FIVE:
        plan["embed_tokens"] = "embedding_rowwise"  # as the head it is tied to
    return plan


def check_attention(config: CanonicalModelConfig, implementation: Any) -> None:
    """Check that an attention implementation computes a model, before one is run that computes something else.

    Args:
        config: of the model.
        implementation: its name in transformers, or a dictionary with it under "", or None for transformers' choice.

    Raises:
        ValueError: it does not, and why.
    """
    name = implementation.get("") if isinstance(implementation, dict) else implementation
    if name is None:
        return
    # Those that add the biases a mask has to the scores, and all those of transformers and llmconvert.
    biased = name in ("eager", "sdpa") or name.startswith("sequence_parallel")
    known = biased or name.removeprefix("paged|") in ("eager", "sdpa", "flex_attention") or "flash" in name
    if config.alibi and not biased:
        raise ValueError(f"{name} has no biases on attention scores, which ALiBi needs: use sdpa or eager")
    if config.attn_logit_softcapping is not None and name.endswith("sdpa"):
        raise ValueError(f"{name} has no soft cap on attention scores, which this model has: use eager")
    if config.norm_head and not known:
        raise ValueError(
            f"{name} is of an engine that computes logits by itself, without the NormHead this model has: "
            "`llmconvert convert SRC DST --to llama` folds it into the weights where that can be"
        )


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes, float32 [heads]: 2^(-8k/n) for a power of two, interpolated otherwise (Press et al., 2021)."""
    power = 1 << (heads.bit_length() - 1)
    whole = [2.0 ** (-8.0 * (k + 1) / power) for k in range(power)]
    return torch.tensor(whole + [2.0 ** (-4.0 * (2 * k + 1) / power) for k in range(heads - power)])


def rotate_pairs(x: Tensor) -> Tensor:
    """What `rotate_half` is for neighbouring pairs: (x0, x1) → (-x1, x0) along the last axis."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


class CanonicalRotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines of the rotated dimensions, in the order the heads' dimensions have."""

    def __init__(self, config: CanonicalModelConfig) -> None:
        """Of a config; rescaling is transformers' own."""
        scaling = {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"}
        llama = LlamaConfig(
            # One head of the rotated dimensions: nothing else of the shape is read, and widths that are no multiple of
            # the number of heads are refused.
            hidden_size=config.rotary_dim,
            num_attention_heads=1,
            head_dim=config.rotary_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_theta=config.rope_parameters["rope_theta"],
            rope_scaling=None if scaling.get("rope_type", "default") == "default" else scaling,
        )
        super().__init__(llama)
        self.interleaved = config.rotary_interleaved
        self.unrotated = (config.head_dim - config.rotary_dim) // 2 if config.rotary_padded else 0

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [batch, tokens, rotated dimensions] in `x`'s dtype, for positions [batch, tokens]."""
        cos, sin = (part[..., : part.shape[-1] // 2] for part in super().forward(x, position_ids))
        if self.unrotated:
            cos = functional.pad(cos, (0, self.unrotated), value=self.attention_scaling)
            sin = functional.pad(sin, (0, self.unrotated))
        if self.interleaved:
            return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def _rotate(x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """Rotate the leading dimensions of heads, [batch, heads, tokens, dimensions]."""
    if position_embeddings is None:
        return x
    cos, sin = (part[:, None] for part in position_embeddings)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned * cos + (rotate_pairs if interleaved else rotate_half)(turned) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _norm(config: CanonicalModelConfig, size: int, eps: float | None = None) -> nn.Module:
    cls = Gemma2RMSNorm if config.unit_offset_norm else LlamaRMSNorm
    norm: nn.Module = cls(size, eps=config.rms_norm_eps if eps is None else eps)
    return norm


class CanonicalAttention(nn.Module):
    """Causal self-attention through transformers' attention interface; grouped, or latent where there is `kv_lora_rank`."""

    def __init__(self, config: CanonicalModelConfig, layer_idx: int) -> None:
        """Of one layer."""
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.sliding_window = config.window(layer_idx)
        self.latent = config.kv_lora_rank is not None
        self.num_key_value_groups = 1 if self.latent else config.num_attention_heads // config.num_key_value_heads
        if self.latent:
            self._make_latent(config)
        else:
            self._make_grouped(config)
        if config.attention_multiplier is not None:
            self.scaling = config.attention_multiplier

    def _make_grouped(self, config: CanonicalModelConfig) -> None:
        hidden, q = config.hidden_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.head_dim = self.value_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(hidden, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, hidden, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = _norm(config, config.head_dim), _norm(config, config.head_dim)

    def _make_latent(self, config: CanonicalModelConfig) -> None:
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.head_dim, self.value_dim = self.nope + self.rope, config.v_head_dim
        self.scaling = self.head_dim**-0.5
        rope = config.rope_parameters
        if rope["rope_type"] != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
            # YaRN's temperature, on the scores and not on the rotation (DeepSeek-V2, section 3.1.4; YaRN, section 3.4).
            self.scaling *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=config.qkv_bias)
            self.q_a_layernorm = _norm(config, config.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + self.rope, bias=config.qkv_bias)
        self.kv_a_layernorm = _norm(config, rank, _LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(rank, heads * (self.nope + self.value_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.value_dim, hidden, bias=config.o_bias)

    def _grouped(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, cache: Cache | None, *place: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(x).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = (_rotate(part, position_embeddings, self.config.rotary_interleaved) for part in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, *place)
        return q, k, v

    def _expanded(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, cache: Cache | None, *place: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values out of the latents, [batch, heads, tokens, dimensions]; the cache holds latents."""
        q = self.q_proj(x) if self.config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split((self.config.kv_lora_rank, self.rope), -1)
        latent = self.kv_a_layernorm(latent)
        q_rope, k_rope = (
            _rotate(part, position_embeddings, self.config.rotary_interleaved) for part in (q_rope, k_rope)
        )
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx, *place)
        expanded = self.kv_b_proj(latent[:, 0]).unflatten(-1, (-1, self.nope + self.value_dim)).transpose(1, 2)
        k_nope, v = expanded.split((self.nope, self.value_dim), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), -1)
        return torch.cat((q_nope, q_rope), -1), k, v

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output, [batch, tokens, hidden], and the weights where the implementation gives them."""
        project = self._expanded if self.latent else self._grouped
        # Without it transformers 4 puts every token at the start of a cache of fixed size; 5 counts by itself.
        place = () if _FIVE else ({"cache_position": kwargs.get("cache_position")},)
        q, k, v = project(hidden_states, position_embeddings, past_key_values, *place)
        name = self.config._attn_implementation
        # Looked up in the body and called once: by that engines with an attention of their own (vLLM) know the module.
        if _FIVE:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get(name, eager_attention_forward)
        padding = self.head_dim - self.value_dim if "flash" in name else 0
        if padding > 0:
            v = functional.pad(v, (0, padding))
        mixed, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.config.attn_logit_softcapping,
            **kwargs,
        )
        if padding > 0:
            mixed = mixed[..., : self.value_dim]
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class CanonicalMLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer, 2020)."""

    def __init__(self, config: CanonicalModelConfig, intermediate_size: int, bias: bool = False) -> None:
        """Of a width."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class CanonicalRouter(nn.Module):
    """Which experts each token goes to, and their weights; float32 throughout.

    No nn.Linear, which adapters and quantisers would replace: what it gives is not a linear map's.
    """

    def __init__(self, config: CanonicalModelConfig) -> None:
        """Of a layer."""
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.recording = False  # keep the logits of the next call, as `recorded`
        if config.router_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' numbers and weights, [tokens, num_experts_per_tok], for [tokens, hidden]."""
        c = self.config
        logits = functional.linear(x.float(), self.weight.float())
        if self.recording:
            self.recorded = logits
        scores = logits.sigmoid() if c.scoring_func == "sigmoid" else logits.softmax(-1)
        choice = scores + self.e_score_correction_bias if c.router_bias else scores
        if c.topk_method != "greedy" and c.n_group > 1:
            groups = choice.unflatten(-1, (c.n_group, -1))
            # A group's score: its best two (DeepSeek-V3, section 2.1.2), or its best (DeepSeek-V2, section 2.2.1).
            best = groups.topk(2, -1)[0].sum(-1) if c.topk_method == "noaux_tc" else groups.amax(-1)
            kept = torch.zeros_like(best).scatter_(-1, best.topk(c.topk_group, -1)[1], 1.0).bool()
            choice = groups.masked_fill(~kept[..., None], -math.inf).flatten(-2)
        chosen = choice.topk(c.num_experts_per_tok, -1)[1]
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * c.routed_scaling_factor


class CanonicalExperts(nn.ModuleList):
    """The routed experts of a layer."""

    def __init__(self, config: CanonicalModelConfig) -> None:
        """`num_experts` MLPs."""
        super().__init__(CanonicalMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        self.num_experts = config.num_experts

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, [tokens, hidden] for [tokens, hidden]."""
        result = torch.zeros_like(x)
        for number in top_k_index.unique().tolist():
            tokens, slots = (top_k_index == number).nonzero(as_tuple=True)
            weighed = self[number](x[tokens]) * top_k_weights[tokens, slots, None]
            result.index_add_(0, tokens, weighed.to(result.dtype))
        return result


class CanonicalMoE(nn.Module):
    """A mixture of experts: each token goes to its best experts, and to the shared ones, which are one MLP."""

    def __init__(self, config: CanonicalModelConfig) -> None:
        """Of a layer."""
        super().__init__()
        self.gate, self.experts = CanonicalRouter(config), CanonicalExperts(config)
        self.shared_experts = (
            CanonicalMLP(config, config.shared_expert_intermediate_size)
            if config.shared_expert_intermediate_size
            else None
        )
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        flat = x.flatten(0, -2)
        result = self.experts(flat, *self.gate(flat))
        if self.shared_experts is not None:
            shared = self.shared_experts(flat)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(flat).sigmoid() * shared
            result = result + shared
        return result.view_as(x)


class CanonicalDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm block, with norms on its branches' outputs where the config has them."""

    def __init__(self, config: CanonicalModelConfig, layer_idx: int) -> None:
        """The layer of a number; from `num_hidden_layers` on they predict further tokens."""
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = _norm(config, config.hidden_size)
        self.self_attn = CanonicalAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        experts = config.has_experts(layer_idx)
        self.mlp = CanonicalMoE(config) if experts else CanonicalMLP(config, config.intermediate_size, config.mlp_bias)
        self.branch_output_norm = config.branch_output_norm
        if config.branch_output_norm:
            self.post_self_attn_layernorm = _norm(config, config.hidden_size)
            self.post_mlp_layernorm = _norm(config, config.hidden_size)
        if layer_idx >= config.num_hidden_layers:
            self.enorm, self.hnorm = _norm(config, config.hidden_size), _norm(config, config.hidden_size)
            self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
            self.shared_head = nn.ModuleDict({"norm": _norm(config, config.hidden_size)})

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Same shape as `hidden_states`, [batch, tokens, hidden]; the rest goes to the attention."""
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs)
        if self.branch_output_norm:
            mixed = self.post_self_attn_layernorm(mixed)
        hidden_states = hidden_states + self._scaled(mixed)
        changed = self.mlp(self.post_attention_layernorm(hidden_states))
        if self.branch_output_norm:
            changed = self.post_mlp_layernorm(changed)
        return hidden_states + self._scaled(changed)

    def _scaled(self, branch: Tensor) -> Tensor:
        return branch if self.residual_multiplier == 1.0 else branch * self.residual_multiplier


class CanonicalEmbedding(nn.Embedding):
    """The input embedding; where its vectors are scaled, that is part of it, as in Gemma."""

    def __init__(self, config: CanonicalModelConfig) -> None:
        """Of a vocabulary."""
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.multiplier, self.rounded = config.embedding_multiplier, config.embedding_multiplier_rounded

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors, [..., hidden] for ids [...]."""
        vectors = super().forward(input_ids)
        if self.multiplier == 1.0:
            return vectors
        if self.rounded:
            return vectors * torch.tensor(self.multiplier, dtype=vectors.dtype, device=vectors.device)
        return vectors * self.multiplier


class CanonicalNormHead(nn.Module):
    """The output embedding with its rows scaled to unit length before use (Baichuan 2, section 2.5).

    No nn.Linear, and without the bias one has: what would take its weight for the matrix that makes logits (a fused
    head, an adapter, a larger vocabulary in a new nn.Linear) comes to an error.
    """

    def __init__(self, config: CanonicalModelConfig) -> None:
        """Of a vocabulary."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def __getattr__(self, name: str) -> Any:
        if name == "bias":
            raise AttributeError(
                "a NormHead has no `bias`: its weight is scaled row by row before use, and is no linear map's"
            )
        return super().__getattr__(name)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits, [..., vocabulary]."""
        return functional.linear(hidden_states, functional.normalize(self.weight))


class CanonicalPreTrainedModel(PreTrainedModel):
    """What transformers is to know of all canonical models."""

    config_class = CanonicalModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CanonicalDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CanonicalModelConfig, *args: Any, **kwargs: Any) -> None:
        """Without weights of its own."""
        # Read while transformers settles the implementation, so before anything else.
        self._supports_flash_attn = self._supports_flex_attn = not config.alibi
        self._supports_sdpa = config.attn_logit_softcapping is None
        self._keep_in_fp32_modules_strict = ["e_score_correction_bias"] if config.router_bias else []
        check_attention(config, config._attn_implementation)
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gemma2RMSNorm):
            nn.init.zeros_(module.weight)
        elif isinstance(module, CanonicalRouter | CanonicalNormHead):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers'; what would compute something else is refused."""
        check_attention(self.config, attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # which transformers tells by a phrase in the source

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, devices: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """As transformers', which maps weights straight in and initialises none; and with two choices made where left open.

        Args:
            name_or_path: a directory or hub id.
            args: as transformers'.
            devices: spread the layers over these (numbers of CUDA devices, or anything torch takes for a device).
            kwargs: as transformers'. `attn_implementation`: chosen by `choose_attention` where neither it nor the
                config's is given.
        """
        config = kwargs.get("config")
        if not isinstance(config, PretrainedConfig):
            given = {k: kwargs[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in kwargs}
            found, _ = CanonicalModelConfig.get_config_dict(name_or_path, **given)
            if found.get("model_type") not in (None, CanonicalModelConfig.model_type):
                raise ValueError(
                    f"{name_or_path} is of type `{found['model_type']}`, not in the canonical layout: "
                    "`llmconvert convert SRC DST --to canonical` first"
                )
            config = CanonicalModelConfig.from_dict(found)
        if devices is not None:
            with torch.device("meta"):
                empty = cls(config)
            kwargs["device_map"] = _companion("llmconvert.models.devices").layer_device_map(empty, devices)
        # The Auto classes put what they are asked for into the config they make.
        if kwargs.get("attn_implementation") is None and config._attn_implementation is None:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype", "auto" if _FIVE else None))
            dtype = getattr(config, "dtype", None) if dtype == "auto" else dtype
            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
            kwargs["attn_implementation"], why = choose_attention(
                config, dtype, _first_device(kwargs.get("device_map"))
            )
            logger.info("attention: %s (%s)", kwargs["attn_implementation"], why)
        made = super().from_pretrained(name_or_path, *args, **kwargs)
        _rest(made[0] if isinstance(made, tuple) else made)
        return made

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"attention={self.attention}"

    @property
    def attention(self) -> str:
        """The attention implementation in use."""
        return str(self.config._attn_implementation)

    def set_device(self, devices: Sequence[Any] | Any) -> CanonicalPreTrainedModel:
        """Spread the layers over devices, in order and by size, whatever CUDA_VISIBLE_DEVICES says.

        Args:
            devices: one device, or several: numbers of CUDA devices, or anything torch takes for a device.
        """
        _companion("llmconvert.models.devices").set_device(self, devices)
        return self


def _rest(model: CanonicalPreTrainedModel) -> None:
    """Layers that predict further tokens are held and saved; transformers has no training or inference with them."""
    for layer in getattr(model, "model", model).layers[model.config.num_hidden_layers :]:
        layer.requires_grad_(False)


def _first_device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and device_map:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device_map if device_map is not None else "cpu")


def _companion(module: str) -> Any:
    """A module of llmconvert, for what this file leaves to it.

    Raises:
        ImportError: llmconvert is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError("this needs llmconvert: pip install 'llmconvert[verify]'") from error


_MASK = inspect.signature(create_causal_mask).parameters


class CanonicalModel(CanonicalPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: CanonicalModelConfig) -> None:
        """With weights drawn at random, unless on the meta device."""
        super().__init__(config)
        self.embed_tokens = CanonicalEmbedding(config)
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.layers = nn.ModuleList(CanonicalDecoderLayer(config, i) for i in range(layers))
        self.norm = _norm(config, config.hidden_size)
        self.rotary_emb = CanonicalRotaryEmbedding(config)
        self.post_init()
        _rest(self)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embed_tokens = value

    def _masks(
        self,
        embeds: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        cache: Cache | None,
        position_ids: Tensor,
        past: int,
    ) -> dict[str, Any]:
        """A mask a type of layer, in the form the attention implementation takes."""
        if isinstance(attention_mask, dict):  # made by `generate` already, for a cache of fixed size
            return {kind: self._biased(mask, embeds, position_ids, past) for kind, mask in attention_mask.items()}
        arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds" if "inputs_embeds" in _MASK else "input_embeds": embeds,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        if "cache_position" in _MASK:
            arguments["cache_position"] = torch.arange(past, past + embeds.shape[1], device=embeds.device)
        if self.config.alibi and "allow_is_causal_skip" in _MASK:
            arguments["allow_is_causal_skip"] = False  # there is to be a mask that biases are added to
        windows = {self.config.window(i) is not None for i in range(self.config.num_hidden_layers)}
        makers = {_SLIDING: create_sliding_window_causal_mask, _FULL: create_causal_mask}
        masks = {kind: make(**arguments) for kind, make in makers.items() if (kind == _SLIDING) in windows}
        return {kind: self._biased(mask, embeds, position_ids, past) for kind, mask in masks.items()}

    def _biased(self, mask: Any, embeds: Tensor, position_ids: Tensor, past: int) -> Any:
        """The mask as it is without ALiBi; else with ALiBi's biases, [batch, heads, queries, keys] in the embeddings' dtype.

        A row of scores may be shifted by any constant, so distances are counted from the query, where they round least:
        between positions where all are known, else between places.
        """
        if not self.config.alibi:
            return mask
        device, tokens = embeds.device, embeds.shape[1]
        if mask is None:
            keys = torch.arange(past + tokens, device=device)
            mask = (keys <= past + torch.arange(tokens, device=device)[:, None])[None, None]
        if mask.shape[-2] == mask.shape[-1] == position_ids.shape[-1]:
            queries = keys = position_ids
        else:
            queries = past + torch.arange(mask.shape[-2], device=device)[None]
            keys = torch.arange(mask.shape[-1], device=device)[None]
        distance = (keys[:, None, :] - queries[:, :, None])[:, None]
        bias = (alibi_slopes(self.config.num_attention_heads).to(device)[:, None, None] * distance).to(embeds.dtype)
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(embeds.dtype).min)
        return torch.where(mask == 0, bias, mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
        """As LlamaModel's.

        Args:
            input_ids: [batch, tokens].
            attention_mask: [batch, tokens so far], 0 at padding; or a mask of four axes.
            position_ids: [batch, tokens]; where they start again, so does a sequence packed into the row.
            past_key_values: the cache.
            inputs_embeds: [batch, tokens, hidden], in place of ids: what the embedding gives, scaled where it scales.
            use_cache: give a cache back.
            output_hidden_states: give the residual stream before each layer, and the last after the norm.
            output_attentions: give the attention weights; eager attention alone has them.
            output_router_logits: give every router's logits, float32 [tokens, num_experts].
            kwargs: go to the attention implementation.

        Raises:
            ValueError: not exactly one of ids and embeddings is given, or weights are asked of an implementation that
                gives none.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"{config._attn_implementation} gives no attention weights: set_attn_implementation('eager')"
            )
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.training and self.layers[0].gradient_checkpointing):
            past_key_values = DynamicCache(config=config)
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        if not _FIVE:
            if config.kv_lora_rank is not None and past_key_values is not None and past_key_values.is_compileable:
                raise ValueError("transformers 4 has no cache of fixed size for latent attention: use a dynamic one")
            kwargs["cache_position"] = torch.arange(past, past + embeds.shape[1], device=embeds.device)
        masks = self._masks(embeds, attention_mask, past_key_values, position_ids, past)
        hidden = embeds
        rotation = None if config.alibi else self.rotary_emb(hidden, position_ids)
        streams: list[Tensor] = []
        weights: list[Tensor] = []
        hooks = []
        if output_attentions:
            hooks = [
                layer.self_attn.register_forward_hook(lambda _, __, out: weights.append(out[1]))
                for layer in self.layers[: config.num_hidden_layers]
            ]
        mixed = [i for i in range(config.num_hidden_layers) if output_router_logits and config.has_experts(i)]
        routers = [self.layers[i].mlp.gate for i in mixed]
        for router in routers:
            router.recording = True
        for i, layer in enumerate(self.layers[: config.num_hidden_layers]):
            streams.append(hidden)
            hidden = layer(
                hidden,
                attention_mask=masks[_FULL if config.window(i) is None else _SLIDING],
                position_embeddings=rotation,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        for hook in hooks:
            hook.remove()
        hidden = self.norm(hidden)
        found = {
            "last_hidden_state": hidden,
            "past_key_values": past_key_values if use_cache else None,
            "hidden_states": (*streams, hidden) if output_hidden_states else None,
            "attentions": tuple(weights) if output_attentions else None,
        }
        if not output_router_logits:
            return BaseModelOutputWithPast(**found)
        for router in routers:
            router.recording = False
        logits = tuple(router.__dict__.pop("recorded") for router in routers)
        return MoeModelOutputWithPast(**found, router_logits=logits)


class CanonicalForCausalLM(CanonicalPreTrainedModel, GenerationMixin):
    """The decoder with its head, and ways to look inside it."""

    _tied_weights_keys: Any = {"lm_head.weight": "model.embed_tokens.weight"} if _FIVE else ["lm_head.weight"]
    _tp_plan: Any = {"lm_head": "colwise_gather_output" if _FIVE else "colwise_rep"}

    def __init__(self, config: CanonicalModelConfig) -> None:
        """With weights drawn at random, unless on the meta device."""
        super().__init__(config)
        self.model = CanonicalModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = (
            CanonicalNormHead(config) if config.norm_head
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )  # fmt: skip
        self.post_init()
        if config.norm_head:
            self._tp_plan.pop("lm_head", None)  # plans cut linear maps only

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """As LlamaForCausalLM's: logits [batch, tokens, vocabulary], and with `labels` [batch, tokens] the loss.

        Args:
            input_ids: see `CanonicalModel.forward`, as the others not named here.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: ids to predict, not shifted; -100 where there are none.
            use_cache: see there.
            output_hidden_states: see there.
            output_attentions: see there.
            output_router_logits: see there; the loss then has the load-balancing loss of Mixtral's class, times the
                config's `router_aux_loss_coef`. If None, as the config says, where it comes from one that says it.
            logits_to_keep: of so many last tokens (0: all), or at these positions.
            kwargs: go to the decoder and to the loss.
        """
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", None)
        balanced = bool(output_router_logits) and any(
            map(self.config.has_experts, range(self.config.num_hidden_layers))
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=balanced,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        found = {
            "loss": loss,
            "logits": logits,
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if not balanced:
            return CausalLMOutputWithPast(**found)
        auxiliary = load_balancing_loss_func(
            outputs.router_logits, self.config.num_experts, self.config.num_experts_per_tok, attention_mask
        )
        if loss is not None:
            found["loss"] = loss + getattr(self.config, "router_aux_loss_coef", 0.0) * auxiliary.to(loss.device)
        return MoeCausalLMOutputWithPast(**found, aux_loss=auxiliary, router_logits=outputs.router_logits)

    def stream_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, giving tokens and text as they come: see `llmconvert.models.streaming.stream_generate`."""
        return _companion("llmconvert.models.streaming").stream_generate(self, *args, **kwargs)

    def show_cos_distance(self, *args: Any, **kwargs: Any) -> Any:
        """Cosine between what layers are given and what they make of it: see `llmconvert.debug.show_cos_distance`."""
        return _companion("llmconvert.debug").show_cos_distance(self, *args, **kwargs)

    def show_topk_token(self, *args: Any, **kwargs: Any) -> Any:
        """The likeliest next tokens after a layer, the logit lens: see `llmconvert.debug.show_topk_token`."""
        return _companion("llmconvert.debug").show_topk_token(self, *args, **kwargs)

    def show_attention(self, *args: Any, **kwargs: Any) -> Any:
        """Attention weights of one layer: see `llmconvert.debug.show_attention`."""
        return _companion("llmconvert.debug").show_attention(self, *args, **kwargs)


def last_tokens(attention_mask: Tensor) -> Tensor:
    """The index of the last token that is not padding, [batch], whichever side is padded.

    Args:
        attention_mask: [batch, tokens], 0 at padding.

    Raises:
        ValueError: a row is all padding.
    """
    if not attention_mask.any(-1).all():
        raise ValueError("a row is all padding: there is no last token")
    places = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (places * (attention_mask != 0)).argmax(-1)


class CanonicalForRewardModel(CanonicalPreTrainedModel):
    """The decoder with a linear map of its last real token's state to `num_labels` numbers; one is a reward."""

    accepts_loss_kwargs = False  # the loss is a batch's mean, which Trainer is to divide by the batches of a step

    def __init__(self, config: CanonicalModelConfig) -> None:
        """With weights drawn at random, unless on the meta device."""
        super().__init__(config)
        self.model = CanonicalModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:  # fmt: skip
        """Rewards, `logits` [batch, num_labels].

        Args:
            input_ids: [batch, tokens].
            attention_mask: [batch, tokens], 0 at padding on either side. Without it tokens equal to `pad_token_id` after
                the last other one are padding.
            labels: rewards to come near to in the mean square, [batch]; or classes, where there are several labels.
            kwargs: as of `CanonicalModel.forward`.

        Raises:
            ValueError: rows of several lengths cannot be told apart: no mask and no `pad_token_id`.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = outputs.last_hidden_state
        if attention_mask is not None:
            last = last_tokens(attention_mask)
        elif input_ids is not None and self.config.pad_token_id is not None:
            last = last_tokens(input_ids != self.config.pad_token_id)
        elif hidden.shape[0] == 1:
            last = torch.tensor([hidden.shape[1] - 1], device=hidden.device)
        else:
            raise ValueError("give an attention_mask, or set pad_token_id: the last real token of a row is not known")
        rewards = self.score(hidden[torch.arange(len(last), device=hidden.device), last.to(hidden.device)])
        loss = None
        if labels is not None:
            wide = rewards.float()
            one = self.config.num_labels == 1
            loss = (
                functional.mse_loss(wide[:, 0], labels.float().view(-1)) if one
                else functional.cross_entropy(wide, labels)
            )  # fmt: skip
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=rewards,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CanonicalForTokenClassification(CanonicalPreTrainedModel):
    """The decoder with an affine map of each token's state to `num_labels` numbers, as LlamaForTokenClassification."""

    accepts_loss_kwargs = False  # as in CanonicalForRewardModel

    def __init__(self, config: CanonicalModelConfig) -> None:
        """With weights drawn at random, unless on the meta device."""
        super().__init__(config)
        self.model = CanonicalModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:  # fmt: skip
        """Scores of classes, `logits` [batch, tokens, num_labels].

        Args:
            input_ids: [batch, tokens].
            attention_mask: [batch, tokens], 0 at padding.
            labels: classes, [batch, tokens]; -100 where there are none.
            kwargs: as of `CanonicalModel.forward`.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# Trainer shifts labels it smooths for models of these names, and pipelines take them for text generation.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(CanonicalModelConfig.model_type, CanonicalForCausalLM.__name__)

# So that `save_pretrained` puts this file beside the weights, and `auto_map` into config.json.
_REGISTERED: tuple[tuple[Callable[..., None], str | None], ...] = (
    (CanonicalModelConfig.register_for_auto_class, None),
    (CanonicalModel.register_for_auto_class, "AutoModel"),
    (CanonicalForCausalLM.register_for_auto_class, "AutoModelForCausalLM"),
    (CanonicalForRewardModel.register_for_auto_class, "AutoModelForSequenceClassification"),
    (CanonicalForTokenClassification.register_for_auto_class, "AutoModelForTokenClassification"),
)
for _register, _name in _REGISTERED:
    _register(*((_name,) if _name else ()))
