"""Mistral 7B, Devstral and other dense Mistral models: Llama with an optional sliding window.

Source: transformers MistralConfig and MistralForCausalLM. A missing `sliding_window` means 4096; null means none.
"""

from llmconvert.spec.language import Field, Fixed, Spec, Window, key_value_heads

SPEC = Spec(
    name="mistral",
    title="Mistral (dense)",
    family="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    config=(
        Field("max_position_embeddings", "max_position_embeddings", default=131072),
        key_value_heads(8),
        Window(default=4096),
        Fixed("qkv_bias o_bias mlp_bias", False),
    ),
    holds=frozenset(
        {"tied_embeddings", "grouped_query", "rope_scaling", "padded_rotary", "explicit_head_dim", "activation",
         "sliding_window"}
    ),
)  # fmt: skip
