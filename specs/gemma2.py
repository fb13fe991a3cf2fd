"""Gemma 2: Gemma with norms on branch outputs, soft caps, and a sliding window on every other layer.

Source: transformers Gemma2Config and Gemma2ForCausalLM; arXiv:2408.00118.
"""

from llmconvert.canonical.model import LAYER, POST_ATTENTION_NORM, POST_MLP_NORM, POST_NORM
from llmconvert.spec.language import Field, Fixed, HeadDim, SoftmaxScale, Spec, SquareRoot, Window, key_value_heads, row

SPEC = Spec(
    name="gemma2",
    title="Gemma 2",
    family="gemma",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    config=(
        Field("hidden_act", "hidden_activation", aliases=("hidden_act",), default="gelu_pytorch_tanh"),
        Field("tie_word_embeddings", "tie_word_embeddings", default=True),
        Field("max_position_embeddings", "max_position_embeddings", default=8192),
        key_value_heads(4),
        HeadDim("head_dim", default=256),
        SquareRoot("embedding_multiplier", "hidden_size"),
        SoftmaxScale("query_pre_attn_scalar", power=-0.5, default=256),
        Field("attn_logit_softcapping", "attn_logit_softcapping", default=50.0, null=None),
        Field("final_logit_softcapping", "final_logit_softcapping", default=30.0, null=None),
        Window(default=4096, alternates=True),
        Fixed("unit_offset_norm embedding_multiplier_rounded branch_output_norm", True),
        Field("qkv_bias o_bias", "attention_bias", default=False),
        Fixed("mlp_bias", False),
    ),
    weights=(
        row(LAYER + "post_attention_layernorm.{p}", POST_ATTENTION_NORM),
        row(LAYER + "pre_feedforward_layernorm.{p}", POST_NORM),
        row(LAYER + "post_feedforward_layernorm.{p}", POST_MLP_NORM),
    ),
    requires={"use_bidirectional_attention": False},
    holds=frozenset(
        {"tied_embeddings", "grouped_query", "explicit_head_dim", "activation", "qkv_bias", "o_bias", "rope_scaling",
         "attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "mixed_attention"}
    ),
    always=frozenset({"unit_offset_norm", "rounded_embedding_multiplier", "branch_output_norm"}),
    coupled=(("qkv_bias", "o_bias"),),
    default_target=False,
)  # fmt: skip
