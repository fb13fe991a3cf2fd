"""Qwen1.5, Qwen2 and Qwen2.5 (dense): Llama with biases on q, k, v and none on o.

Source: transformers Qwen2Config and Qwen2ForCausalLM.
"""

from llmconvert.spec.language import Field, Fixed, Spec, Window, key_value_heads

SPEC = Spec(
    name="qwen2",
    title="Qwen1.5, Qwen2, Qwen2.5",
    family="qwen",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    config=(
        Field("max_position_embeddings", "max_position_embeddings", default=32768),
        key_value_heads(32),
        Fixed("qkv_bias", True),
        Fixed("o_bias mlp_bias", False),
        Window(switch="use_sliding_window", from_layer="max_window_layers", first=28, default=4096),
    ),
    holds=frozenset(
        {
            "qkv_bias",
            "tied_embeddings",
            "grouped_query",
            "rope_scaling",
            "padded_rotary",
            "explicit_head_dim",
            "activation",
            "sliding_window",
            "mixed_attention",
        }
    ),
    always=frozenset({"qkv_bias"}),
)
