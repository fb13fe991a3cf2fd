"""The canonical config, the canonical tensor names, and the traits that set a model apart from plain Llama.

Names and shapes are those of transformers' LlamaForCausalLM; linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmconvert.tensors.expressions import Check, Expression

LAYER = "model.layers.{i}."
EMBED, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
Q, K, V, O = (LAYER + f"self_attn.{part}_proj" for part in "qkvo")  # noqa: E741
GATE, UP, DOWN = (LAYER + f"mlp.{part}_proj" for part in ("gate", "up", "down"))
INPUT_NORM, POST_NORM = LAYER + "input_layernorm", LAYER + "post_attention_layernorm"
Q_NORM, K_NORM = LAYER + "self_attn.q_norm", LAYER + "self_attn.k_norm"

MODULES = (EMBED, Q, K, V, O, Q_NORM, K_NORM, GATE, UP, DOWN, INPUT_NORM, POST_NORM, NORM, HEAD)
"""Every module that owns parameters, in the order they are written."""


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
        qkv_bias, o_bias, mlp_bias: which projections carry a bias.
        norm_head: the head's rows are normalised at inference (Baichuan2's NormHead).
        unit_offset_norm: norms multiply by 1 + weight (Gemma).
        embedding_multiplier, residual_multiplier, logits_scaling: as in GraniteConfig; 1 in Llama.
        embedding_multiplier_rounded: the multiplier is rounded to the embeddings' dtype before it is used (Gemma).
        attention_multiplier: the softmax scale; None for head_dim ** -0.5.
        alibi, qk_norm, moe, mla, branch_output_norm: what their names say in the literature.
        sliding_window: attention reaches this many tokens back; None for all.
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
    qk_norm: bool = False
    alibi: bool = False
    moe: bool = False
    mla: bool = False
    branch_output_norm: bool = False
    sliding_window: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Trait:
    """One departure from plain Llama.

    Attributes:
        name: as specs and reports call it.
        meaning: what it is, in a phrase.
        obstacle: why a model without the trait cannot compute the same function; "" where a lowering removes it.
        instead: what to do when it is refused.
    """

    name: str
    meaning: str
    obstacle: str = ""
    instead: str = ""


_KEEP = "keep the checkpoint in its own architecture"

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
        Trait("moe", "a mixture of experts", "a dense MLP cannot route tokens to experts", _KEEP),
        Trait("mla", "multi-head latent attention with an RMSNorm inside the low-rank path",
              "the norm between the two low-rank factors depends on the input", _KEEP),
        Trait("branch_output_norm", "RMSNorms on the outputs of attention and MLP",
              "they divide by a length that depends on the input", _KEEP),
        Trait("sliding_window", "attention reaches only a window of past tokens, shorter than the context",
              "the target attends to all past tokens, so logits differ beyond the window",
              "if you only use contexts up to the window, set `max_position_embeddings` to it in a copy of config.json"),
    )
}  # fmt: skip
"""Every trait, by name."""


def traits(config: CanonicalConfig) -> frozenset[str]:
    """The names of the traits a config has."""
    window = config.sliding_window
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
        "interleaved_rotary": config.rotary_interleaved,
        "partial_rotary": config.rotary_dim < config.head_dim and not config.rotary_padded,
        "padded_rotary": config.rotary_dim < config.head_dim and config.rotary_padded,
        "grouped_query": config.num_key_value_heads != config.num_attention_heads,
        "explicit_head_dim": config.head_dim * config.num_attention_heads != config.hidden_size,
        "rope_scaling": config.rope_scaling is not None,
        "activation": config.hidden_act != "silu",
        "qk_norm": config.qk_norm,
        "alibi": config.alibi,
        "moe": config.moe,
        "mla": config.mla,
        "branch_output_norm": config.branch_output_norm,
        "sliding_window": window is not None and window < config.max_position_embeddings,
    }
    return frozenset(name for name, present in held.items() if present)


def shapes(config: CanonicalConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every canonical tensor of a model, by full name, in writing order."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices: dict[str, tuple[int, int]] = {
        Q: (q, c.hidden_size), K: (kv, c.hidden_size), V: (kv, c.hidden_size), O: (c.hidden_size, q),
        GATE: (c.intermediate_size, c.hidden_size), UP: (c.intermediate_size, c.hidden_size),
        DOWN: (c.hidden_size, c.intermediate_size), EMBED: (c.vocab_size, c.hidden_size),
        HEAD: (c.vocab_size, c.hidden_size),
    }  # fmt: skip
    vectors = {INPUT_NORM: c.hidden_size, POST_NORM: c.hidden_size, NORM: c.hidden_size}
    if c.qk_norm:
        vectors |= {Q_NORM: c.head_dim, K_NORM: c.head_dim}
    biased = {m for m in (Q, K, V) if c.qkv_bias} | {m for m in (O,) if c.o_bias}
    biased |= {m for m in (GATE, UP, DOWN) if c.mlp_bias}
    result: dict[str, tuple[int, ...]] = {}

    def add(module: str, i: int = 0) -> None:
        name = module.replace("{i}", str(i))
        if module in vectors:
            result[f"{name}.weight"] = (vectors[module],)
        elif module in matrices and not (module == HEAD and c.tie_word_embeddings):
            result[f"{name}.weight"] = matrices[module]
            if module in biased:
                result[f"{name}.bias"] = matrices[module][:1]

    add(EMBED)
    for i in range(c.num_hidden_layers):
        for module in MODULES:
            if "{i}" in module:
                add(module, i)
    add(NORM)
    add(HEAD)
    return result


@dataclass(frozen=True)
class CanonicalModel:
    """A model between reading and writing: its config and its tensors as expressions, by canonical name."""

    config: CanonicalConfig
    tensors: dict[str, Expression]
    checks: tuple[Check, ...] = field(default=())
