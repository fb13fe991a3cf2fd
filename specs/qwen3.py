"""Qwen3 (dense): Llama with an RMSNorm on every query and key head.

Source: transformers Qwen3Config and Qwen3ForCausalLM. Read, it can go nowhere but to itself; written, the norms are
made to do nothing.
"""

from llmconvert.spec.language import Field, Fixed, HeadDim, Spec, Window, key_value_heads

SPEC = Spec(
    name="qwen3",
    title="Qwen3 (dense)",
    family="qwen",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    config=(
        Field("max_position_embeddings", "max_position_embeddings", default=32768),
        key_value_heads(32),
        HeadDim("head_dim", default=128),
        Field("qkv_bias o_bias", "attention_bias", default=False),
        Fixed("mlp_bias", False),
        Fixed("qk_norm", True),
        Window(switch="use_sliding_window", from_layer="max_window_layers", first=28, default=4096),
    ),
    holds=frozenset(
        {"qkv_bias", "o_bias", "tied_embeddings", "grouped_query", "rope_scaling", "explicit_head_dim", "activation",
         "qk_norm", "sliding_window", "mixed_attention"}
    ),
    always=frozenset({"qk_norm"}),
    coupled=(("qkv_bias", "o_bias"),),
    default_target=False,
)  # fmt: skip
