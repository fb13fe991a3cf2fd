"""Granite 3 (dense): Llama with four multipliers.

Source: transformers GraniteConfig and GraniteForCausalLM.
"""

from llmconvert.spec.language import Field, SoftmaxScale, Spec

SPEC = Spec(
    name="granite",
    title="Granite 3 (dense)",
    family="granite",
    model_types=("granite",),
    architectures=("GraniteForCausalLM",),
    config=(
        Field("embedding_multiplier", "embedding_multiplier", default=1.0),
        Field("residual_multiplier", "residual_multiplier", default=1.0),
        Field("logits_scaling", "logits_scaling", default=1.0),
        SoftmaxScale("attention_multiplier"),
        Field("qkv_bias o_bias", "attention_bias", default=False),
        Field("mlp_bias", "mlp_bias", default=False),
    ),
    holds=frozenset(
        {"qkv_bias", "o_bias", "mlp_bias", "tied_embeddings", "grouped_query", "rope_scaling", "padded_rotary",
         "activation", "embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"}
    ),
    coupled=(("qkv_bias", "o_bias"),),
)  # fmt: skip
