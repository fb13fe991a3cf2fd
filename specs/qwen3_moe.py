"""Qwen3-MoE: Qwen3 with routed experts.

Source: transformers Qwen3MoeConfig and Qwen3MoeForCausalLM. Versions of transformers differ in the name of the number of
experts, so both are written.
"""

from llmconvert.spec.language import Field, Fixed, HeadDim, SparseStep, Spec, Window, key_value_heads

SPEC = Spec(
    name="qwen3_moe",
    title="Qwen3-MoE",
    family="qwen",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    config=(
        Field("max_position_embeddings", "max_position_embeddings", default=32768),
        key_value_heads(4),
        HeadDim("head_dim"),
        Field("num_experts", "num_experts", also=("num_local_experts",)),
        Field("num_experts_per_tok", "num_experts_per_tok"),
        Field("moe_intermediate_size", "moe_intermediate_size"),
        Field("norm_topk_prob", "norm_topk_prob", default=False),
        SparseStep(),
        Field("qkv_bias o_bias", "attention_bias", default=False),
        Fixed("mlp_bias", False),
        Fixed("qk_norm", True),
        Window(switch="use_sliding_window", default=4096),
    ),
    holds=frozenset(
        {"moe", "dense_layers", "qkv_bias", "o_bias", "tied_embeddings", "grouped_query", "rope_scaling",
         "explicit_head_dim", "activation", "qk_norm", "sliding_window"}
    ),
    always=frozenset({"moe", "qk_norm"}),
    coupled=(("qkv_bias", "o_bias"),),
    default_target=False,
)  # fmt: skip
