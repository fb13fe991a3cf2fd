"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with routed experts and a gated shared expert.

Source: transformers Qwen2MoeConfig and Qwen2MoeForCausalLM.
"""

from llmconvert.canonical.model import LAYER, SHARED_DOWN, SHARED_GATE, SHARED_UP
from llmconvert.spec.language import Field, Fixed, SparseStep, Spec, Window, key_value_heads, row

SPEC = Spec(
    name="qwen2_moe",
    title="Qwen1.5-MoE, Qwen2-MoE",
    family="qwen",
    model_types=("qwen2_moe",),
    architectures=("Qwen2MoeForCausalLM",),
    config=(
        Field("max_position_embeddings", "max_position_embeddings", default=32768),
        key_value_heads(16),
        Field("num_experts", "num_experts", aliases=("num_local_experts",)),
        Field("num_experts_per_tok", "num_experts_per_tok"),
        Field("moe_intermediate_size", "moe_intermediate_size"),
        Field("shared_expert_intermediate_size", "shared_expert_intermediate_size"),
        Field("norm_topk_prob", "norm_topk_prob", default=False),
        SparseStep(),
        Fixed("shared_expert_gate", True),
        Field("qkv_bias", "qkv_bias", default=True),
        Fixed("o_bias mlp_bias", False),
        Window(switch="use_sliding_window", from_layer="max_window_layers", first=28, default=4096),
    ),
    weights=(
        row(LAYER + "mlp.shared_expert.gate_proj.{p}", SHARED_GATE),
        row(LAYER + "mlp.shared_expert.up_proj.{p}", SHARED_UP),
        row(LAYER + "mlp.shared_expert.down_proj.{p}", SHARED_DOWN),
    ),
    holds=frozenset(
        {"moe", "dense_layers", "shared_experts", "shared_expert_gate", "qkv_bias", "tied_embeddings", "grouped_query",
         "rope_scaling", "explicit_head_dim", "activation", "sliding_window", "mixed_attention"}
    ),
    always=frozenset({"moe", "shared_experts", "shared_expert_gate"}),
    default_target=False,
)  # fmt: skip
