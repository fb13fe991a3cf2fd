"""The canonical config, the canonical tensor names, and the traits that set a model apart from plain Llama.

Names and shapes are those of transformers' LlamaForCausalLM; linear weights are [out, in]. What Llama lacks (experts,
latent attention, layers that predict further tokens) is named as in DeepSeek-V3, one tensor an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmconvert.tensors.expressions import Check, Expression

LAYER = "model.layers.{i}."
EMBED, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
Q, K, V, O = (LAYER + f"self_attn.{part}_proj" for part in "qkvo")  # noqa: E741
GATE, UP, DOWN = (LAYER + f"mlp.{part}_proj" for part in ("gate", "up", "down"))
INPUT_NORM, POST_NORM = LAYER + "input_layernorm", LAYER + "post_attention_layernorm"
Q_NORM, K_NORM = LAYER + "self_attn.q_norm", LAYER + "self_attn.k_norm"

POST_ATTENTION_NORM, POST_MLP_NORM = LAYER + "post_self_attn_layernorm", LAYER + "post_mlp_layernorm"
ROUTER = LAYER + "mlp.gate"
EXPERT = LAYER + "mlp.experts.{j}."
EXPERT_GATE, EXPERT_UP, EXPERT_DOWN = (EXPERT + f"{part}_proj" for part in ("gate", "up", "down"))
SHARED_GATE, SHARED_UP, SHARED_DOWN = (LAYER + f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down"))
SHARED_EXPERT_GATE = LAYER + "mlp.shared_expert_gate"
Q_A, Q_A_NORM, Q_B = (LAYER + f"self_attn.q_{part}" for part in ("a_proj", "a_layernorm", "b_proj"))
KV_A, KV_A_NORM, KV_B = (
    LAYER + f"self_attn.kv_{part}" for part in ("a_proj_with_mqa", "a_layernorm", "b_proj")
)  # fmt: skip
MTP_EMBED, MTP_EMBED_NORM, MTP_HIDDEN_NORM, MTP_PROJ = (
    LAYER + part for part in ("embed_tokens", "enorm", "hnorm", "eh_proj")
)  # fmt: skip
MTP_NORM, MTP_HEAD = LAYER + "shared_head.norm", LAYER + "shared_head.head"

LAYER_MODULES = (
    MTP_EMBED, MTP_EMBED_NORM, MTP_HIDDEN_NORM, MTP_PROJ,
    Q, Q_A, Q_A_NORM, Q_B, K, V, KV_A, KV_A_NORM, KV_B, O, Q_NORM, K_NORM,
    GATE, UP, DOWN, ROUTER, EXPERT_GATE, EXPERT_UP, EXPERT_DOWN,
    SHARED_GATE, SHARED_UP, SHARED_DOWN, SHARED_EXPERT_GATE,
    INPUT_NORM, POST_NORM, POST_ATTENTION_NORM, POST_MLP_NORM, MTP_NORM, MTP_HEAD,
)  # fmt: skip
MODULES = (EMBED, *LAYER_MODULES, NORM, HEAD)
"""Every module that owns parameters, in the order they are written."""

ROUTER_BIAS = "e_score_correction_bias"
PARAMS = ("weight", "bias", ROUTER_BIAS)
"""What a module's parameters are called."""

LATENT_NORM_EPS = 1e-6
"""Of the norms inside latent attention, whatever the config says (transformers, DeepSeek-V2's and V3's classes)."""


@dataclass(frozen=True)
class CanonicalConfig:
    """What a model is, whatever its architecture calls it.

    Attributes named as in LlamaConfig mean what they mean there. The others:

    Attributes:
        rotary_dim: dimensions of each head that are rotated; `head_dim` when all are.
        rotary_interleaved: rotated pairs are (2j, 2j+1), not (j, j + rotary_dim/2).
        rotary_padded: a partial rotation spread over the whole head: pair j is (j, j + head_dim/2) and the pairs
            from rotary_dim/2 on have frequency zero. The only form of partial rotation stock Llama can run.
        rope_theta: the base over `rotary_dim` dimensions.
        qkv_bias, o_bias, mlp_bias: which projections carry a bias; with latent attention `qkv_bias` is that of what leads
            to the latents, `q_a_proj` and `kv_a_proj_with_mqa`.
        norm_head: the head's rows are normalised at inference (Baichuan2's NormHead).
        unit_offset_norm: norms multiply by 1 + weight (Gemma).
        embedding_multiplier, residual_multiplier, logits_scaling: as in GraniteConfig; 1 in Llama.
        embedding_multiplier_rounded: the multiplier is rounded to the embeddings' dtype before it is used (Gemma).
        attention_multiplier: the softmax scale; None for head_dim ** -0.5.
        attn_logit_softcapping: attention scores pass through cap · tanh(score / cap) (Gemma 2); None for none.
        final_logit_softcapping: so do logits.
        alibi, qk_norm, branch_output_norm: what their names say in the literature.
        num_experts: routed experts of a layer that has them; 0 in a dense model.
        moe_layers: for each layer whether it has experts. Layers that predict further tokens are as the last.
        moe_intermediate_size: of one routed expert.
        shared_expert_intermediate_size: of all shared experts together, which are one MLP; 0 for none.
        shared_expert_gate: what shared experts give is multiplied by the sigmoid of a linear map (Qwen2-MoE).
        scoring_func: of the router, `softmax` or `sigmoid`.
        norm_topk_prob: the chosen experts' scores are divided by their sum.
        routed_scaling_factor: what routed experts give is multiplied by this.
        topk_method, n_group, topk_group: experts are chosen among the best `topk_group` of `n_group` groups, a group's
            score being its best expert's (`group_limited_greedy`) or its best two's with the bias (`noaux_tc`).
        router_bias: a bias takes part in choosing experts and not in weighing them (DeepSeek-V3).
        kv_lora_rank: width of the keys' and values' latent; None without latent attention. With it `head_dim` is
            `qk_rope_head_dim`, and the rotary pairs are neighbours.
        q_lora_rank: width of the queries' latent; None where they have none.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of a head with latent attention.
        num_nextn_predict_layers: layers after the last that predict further tokens (DeepSeek-V3, section 2.2).
        mtp_copies: they carry copies of the embedding and of the head.
        sliding_window: attention reaches this many tokens back; None for all.
        layer_types: for each layer `sliding_attention` or `full_attention`, where not all are alike; else None, and
            a window is every layer's.
        dtype: the dtype the config names, or None.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rotary_dim: int
    rope_scaling: Mapping[str, Any] | None = None
    rotary_interleaved: bool = False
    rotary_padded: bool = False
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norm_head: bool = False
    unit_offset_norm: bool = False
    embedding_multiplier: float = 1.0
    embedding_multiplier_rounded: bool = False
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    qk_norm: bool = False
    alibi: bool = False
    branch_output_norm: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_layers: tuple[bool, ...] = ()
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1
    router_bias: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    num_nextn_predict_layers: int = 0
    mtp_copies: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    dtype: str | None = None

    @property
    def layers(self) -> range:
        """Numbers of all layers, those that predict further tokens last."""
        return range(self.num_hidden_layers + self.num_nextn_predict_layers)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.num_experts > 0 and self.moe_layers[min(layer, self.num_hidden_layers - 1)]


@dataclass(frozen=True)
class Trait:
    """One departure from plain Llama.

    Attributes:
        name: as specs and reports call it.
        meaning: what it is, in a phrase.
        obstacle: why a model without the trait cannot compute the same function; "" where a lowering removes it.
        instead: what to do when it is refused.
        part_of: a trait it goes with, whose refusal says enough.
    """

    name: str
    meaning: str
    obstacle: str = ""
    instead: str = ""
    part_of: str = ""


_KEEP = "keep the checkpoint in its own architecture"
_MEGATRON = _KEEP + ", or train from it in Megatron (`llmconvert split`)"

TRAITS = {
    trait.name: trait
    for trait in (
        Trait("qkv_bias", "biases on the query, key and value projections"),
        Trait("o_bias", "a bias on the attention output projection"),
        Trait("mlp_bias", "biases on the MLP projections"),
        Trait("tied_embeddings", "the head is the embedding matrix"),
        Trait("norm_head", "NormHead: the head's rows are normalised at inference"),
        Trait("unit_offset_norm", "norms multiply by 1 + weight"),
        Trait("embedding_multiplier", "embeddings are multiplied by a constant"),
        Trait("rounded_embedding_multiplier", "embeddings are multiplied by a constant rounded to their dtype"),
        Trait("residual_multiplier", "each branch is multiplied by a constant before it is added"),
        Trait("logits_scaling", "logits are divided by a constant"),
        Trait("attention_multiplier", "the softmax scale is not head_dim ** -0.5"),
        Trait("interleaved_rotary", "rotary pairs are neighbouring dimensions"),
        Trait("partial_rotary", "only part of each head is rotated"),
        Trait("padded_rotary", "part of the rotary frequencies are zero"),
        Trait("grouped_query", "fewer key/value heads than query heads"),
        Trait("explicit_head_dim", "head_dim is not hidden_size / num_attention_heads",
              "the target derives head_dim from hidden_size and num_attention_heads", "choose a target with a `head_dim` of its own"),
        Trait("rope_scaling", "rotary frequencies are rescaled (YaRN, linear, llama3, ...)",
              "the target has no key for it", "choose a target that reads `rope_scaling`, such as llama"),
        Trait("activation", "the MLP's activation is not SiLU", "the target's activation is fixed to SiLU", _KEEP),
        Trait("qk_norm", "an RMSNorm on each query and key head",
              "it divides by a length that depends on the input, which no weights can reproduce",
              _KEEP + ", or train from it in a framework that has q/k norms (Megatron's --qk-layernorm)"),
        Trait("alibi", "ALiBi: linear position biases in the attention scores, no rotary embedding",
              "rotary embeddings cannot express a bias that grows with distance", _KEEP + "; the 7B models of the family do convert"),
        Trait("moe", "a mixture of experts", "a dense MLP cannot route tokens to experts", _MEGATRON),
        Trait("dense_layers", "some layers are dense, the others mixtures of experts",
              "the target's layers are all mixtures of experts", _MEGATRON, "moe"),
        Trait("shared_experts", "experts that every token goes to", "the target has no experts beside the routed ones",
              _MEGATRON, "moe"),
        Trait("shared_expert_gate", "shared experts are gated by the input", "the target adds shared experts as they are",
              _MEGATRON, "moe"),
        Trait("sigmoid_router", "the router scores experts by a sigmoid",
              "the target scores them by a softmax, which weighs each against all others", _MEGATRON, "moe"),
        Trait("router_bias", "a bias takes part in choosing experts and not in weighing them",
              "the target weighs experts by the scores it chooses them by", _MEGATRON, "moe"),
        Trait("router_groups", "experts are chosen among the best groups of experts",
              "the target chooses among all experts", _MEGATRON, "moe"),
        Trait("routed_scaling", "what routed experts give is multiplied by a constant", "the target has no key for it", _MEGATRON, "moe"),
        Trait("mla", "multi-head latent attention with an RMSNorm inside the low-rank path",
              "the norm between the two low-rank factors depends on the input", _MEGATRON),
        Trait("mtp", "layers that predict further tokens", "the target has no such layers, and they are not dropped unasked", _MEGATRON),
        Trait("mtp_copies", "the layers that predict further tokens carry copies of the embedding and the head"),
        Trait("branch_output_norm", "RMSNorms on the outputs of attention and MLP",
              "they divide by a length that depends on the input", _KEEP),
        Trait("attn_logit_softcapping", "attention scores are capped by a tanh", "no weights make up for a tanh", _KEEP),
        Trait("final_logit_softcapping", "logits are capped by a tanh", "no weights make up for a tanh", _KEEP),
        Trait("sliding_window", "attention reaches only a window of past tokens, shorter than the context",
              "the target attends to all past tokens, so logits differ beyond the window",
              "if you only use contexts up to the window, set `max_position_embeddings` to it in a copy of config.json"),
        Trait("mixed_attention", "the sliding window is some layers' only", "the target's layers all attend alike",
              _KEEP, "sliding_window"),
    )
}  # fmt: skip
"""Every trait, by name."""


def traits(config: CanonicalConfig) -> frozenset[str]:
    """The names of the traits a config has."""
    window = config.sliding_window
    windowed = window is not None and window < config.max_position_embeddings
    held = {
        "qkv_bias": config.qkv_bias,
        "o_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "tied_embeddings": config.tie_word_embeddings,
        "norm_head": config.norm_head,
        "unit_offset_norm": config.unit_offset_norm,
        "embedding_multiplier": config.embedding_multiplier != 1.0 and not config.embedding_multiplier_rounded,
        "rounded_embedding_multiplier": config.embedding_multiplier != 1.0 and config.embedding_multiplier_rounded,
        "residual_multiplier": config.residual_multiplier != 1.0,
        "logits_scaling": config.logits_scaling != 1.0,
        "attention_multiplier": config.attention_multiplier is not None,
        "interleaved_rotary": config.rotary_interleaved and config.kv_lora_rank is None,
        "partial_rotary": config.rotary_dim < config.head_dim and not config.rotary_padded,
        "padded_rotary": config.rotary_dim < config.head_dim and config.rotary_padded,
        "grouped_query": config.num_key_value_heads != config.num_attention_heads,
        "explicit_head_dim": config.kv_lora_rank is None
        and config.head_dim * config.num_attention_heads != config.hidden_size,
        "rope_scaling": config.rope_scaling is not None,
        "activation": config.hidden_act != "silu",
        "qk_norm": config.qk_norm,
        "alibi": config.alibi,
        "moe": config.num_experts > 0,
        "dense_layers": config.num_experts > 0 and not all(config.moe_layers),
        "shared_experts": config.shared_expert_intermediate_size > 0,
        "shared_expert_gate": config.shared_expert_gate,
        "sigmoid_router": config.scoring_func == "sigmoid",
        "router_bias": config.router_bias,
        "router_groups": config.n_group > 1 and config.topk_method != "greedy",
        "routed_scaling": config.routed_scaling_factor != 1.0,
        "mla": config.kv_lora_rank is not None,
        "mtp": config.num_nextn_predict_layers > 0,
        "mtp_copies": config.num_nextn_predict_layers > 0 and config.mtp_copies,
        "branch_output_norm": config.branch_output_norm,
        "attn_logit_softcapping": config.attn_logit_softcapping is not None,
        "final_logit_softcapping": config.final_logit_softcapping is not None,
        "sliding_window": windowed,
        "mixed_attention": windowed and config.layer_types is not None,
    }
    return frozenset(name for name, present in held.items() if present)


def names(config: CanonicalConfig, module: str) -> list[str]:
    """Every name a module may have in a model: one for each layer and expert its template speaks of."""
    layered = [module.replace("{i}", str(i)) for i in config.layers] if "{i}" in module else [module]
    if "{j}" not in module:
        return layered
    return [name.replace("{j}", str(j)) for name in layered for j in range(config.num_experts)]


def placed(config: CanonicalConfig) -> Iterator[tuple[str, str, int]]:
    """(module, its name, its layer) of all modules a model may have, in writing order; the layer is 0 outside of layers."""
    yield EMBED, EMBED, 0
    experts = [module for module in LAYER_MODULES if "{j}" in module]
    for i in config.layers:
        for module in LAYER_MODULES:
            name = module.replace("{i}", str(i))
            if module not in experts:
                yield module, name, i
            elif module == experts[0] and config.has_experts(i):
                for j in range(config.num_experts):
                    for each in experts:
                        yield each, each.replace("{i}", str(i)).replace("{j}", str(j)), i
    yield NORM, NORM, 0
    yield HEAD, HEAD, 0


def _gated(modules: tuple[str, str, str], hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    gate, up, down = modules
    return {gate: (intermediate, hidden), up: (intermediate, hidden), down: (hidden, intermediate)}


def _attention(c: CanonicalConfig) -> dict[str, tuple[int, ...]]:
    heads, h = c.num_attention_heads, c.hidden_size
    if c.kv_lora_rank is None:
        q, kv = heads * c.head_dim, c.num_key_value_heads * c.head_dim
        norms = {Q_NORM: (c.head_dim,), K_NORM: (c.head_dim,)} if c.qk_norm else {}
        return {Q: (q, h), K: (kv, h), V: (kv, h), O: (h, q), **norms}
    q, rank = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank
    queries = {Q: (q, h)} if rank is None else {Q_A: (rank, h), Q_A_NORM: (rank,), Q_B: (q, rank)}
    latent, up = c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim)
    keys = {KV_A: (latent + c.qk_rope_head_dim, h), KV_A_NORM: (latent,), KV_B: (up, latent)}
    return {**queries, **keys, O: (h, heads * c.v_head_dim)}


def _layer(c: CanonicalConfig, experts: bool, predicts: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a layer, by module."""
    h, found = c.hidden_size, _attention(c)
    if experts:
        found |= {ROUTER: (c.num_experts, h)}
        found |= _gated((EXPERT_GATE, EXPERT_UP, EXPERT_DOWN), h, c.moe_intermediate_size)
        if c.shared_expert_intermediate_size:
            found |= _gated((SHARED_GATE, SHARED_UP, SHARED_DOWN), h, c.shared_expert_intermediate_size)
        if c.shared_expert_gate:
            found[SHARED_EXPERT_GATE] = (1, h)
    else:
        found |= _gated((GATE, UP, DOWN), h, c.intermediate_size)
    found |= {INPUT_NORM: (h,), POST_NORM: (h,)}
    if c.branch_output_norm:
        found |= {POST_ATTENTION_NORM: (h,), POST_MLP_NORM: (h,)}
    if predicts:
        found |= {MTP_EMBED_NORM: (h,), MTP_HIDDEN_NORM: (h,), MTP_PROJ: (h, 2 * h), MTP_NORM: (h,)}
        if c.mtp_copies:
            found |= {MTP_EMBED: (c.vocab_size, h), MTP_HEAD: (c.vocab_size, h)}
    return found


def shapes(config: CanonicalConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every canonical tensor of a model, by full name, in writing order."""
    c = config
    kinds: dict[tuple[bool, bool], dict[str, tuple[int, ...]]] = {}
    around = {EMBED: (c.vocab_size, c.hidden_size), NORM: (c.hidden_size,)}
    if not c.tie_word_embeddings:
        around[HEAD] = (c.vocab_size, c.hidden_size)
    inward = (Q, K, V) if c.kv_lora_rank is None else (Q_A, KV_A)
    biased = {m for m in inward if c.qkv_bias} | {m for m in (O,) if c.o_bias}
    biased |= {m for m in (GATE, UP, DOWN) if c.mlp_bias}
    result: dict[str, tuple[int, ...]] = {}
    for module, name, i in placed(c):
        if "{i}" in module:
            kind = c.has_experts(i), i >= c.num_hidden_layers
            if kind not in kinds:
                kinds[kind] = _layer(c, *kind)
            shape = kinds[kind].get(module)
        else:
            shape = around.get(module)
        if shape is None:
            continue
        result[f"{name}.weight"] = shape
        if module in biased:
            result[f"{name}.bias"] = shape[:1]
        if module == ROUTER and c.router_bias:
            result[f"{name}.{ROUTER_BIAS}"] = shape[:1]
    return result


@dataclass(frozen=True)
class CanonicalModel:
    """A model between reading and writing.

    Attributes:
        config: what it is.
        tensors: expressions, by canonical name.
        checks: facts about the data that it relies on.
        dtype: the code of the dtype all numbers will be rounded to in the end; None where each keeps its own.
    """

    config: CanonicalConfig
    tensors: dict[str, Expression]
    checks: tuple[Check, ...] = field(default=())
    dtype: str | None = None
