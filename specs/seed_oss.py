"""Seed-OSS: Llama with separate switches for the q, k, v biases and the o bias.

Source: transformers SeedOssConfig and SeedOssForCausalLM.
"""

from llmconvert.spec.language import Field, HeadDim, Spec, key_value_heads

SPEC = Spec(
    name="seed_oss",
    title="Seed-OSS",
    family="seed-oss",
    model_types=("seed_oss",),
    architectures=("SeedOssForCausalLM",),
    config=(
        Field("max_position_embeddings", "max_position_embeddings", default=524288),
        key_value_heads(8),
        HeadDim("head_dim", default=128),
        Field("qkv_bias", "attention_bias", default=True),
        Field("o_bias", "attention_out_bias", default=False),
        Field("mlp_bias", "mlp_bias", default=False),
    ),
    holds=frozenset(
        {"qkv_bias", "o_bias", "mlp_bias", "tied_embeddings", "grouped_query", "rope_scaling", "padded_rotary",
         "explicit_head_dim", "activation"}
    ),
    ignores=("residual_dropout",),
)  # fmt: skip
