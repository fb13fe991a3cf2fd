"""Gemma (first generation): scaled embeddings, norms that multiply by 1 + weight, a tied head, GELU.

Source: transformers GemmaConfig and GemmaForCausalLM. `gelu` in its config files means the tanh approximation.
"""

from llmconvert.spec.language import Field, Fixed, HeadDim, Spec, SquareRoot, key_value_heads

SPEC = Spec(
    name="gemma",
    title="Gemma 2B, 7B (first generation)",
    family="gemma",
    model_types=("gemma",),
    architectures=("GemmaForCausalLM",),
    config=(
        Field("hidden_act", "hidden_activation", aliases=("hidden_act",), default="gelu_pytorch_tanh",
              values=(("gelu", "gelu_pytorch_tanh"),)),
        Field("tie_word_embeddings", "tie_word_embeddings", default=True),
        Field("max_position_embeddings", "max_position_embeddings", default=8192),
        key_value_heads(16),
        HeadDim("head_dim", default=256),
        SquareRoot("embedding_multiplier", "hidden_size"),
        Fixed("unit_offset_norm embedding_multiplier_rounded", True),
        Fixed("qkv_bias o_bias mlp_bias", False, keys=("attention_bias",)),
    ),
    holds=frozenset({"tied_embeddings", "grouped_query", "explicit_head_dim", "activation"}),
    always=frozenset({"unit_offset_norm", "rounded_embedding_multiplier"}),
)  # fmt: skip
