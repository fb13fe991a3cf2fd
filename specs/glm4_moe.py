"""GLM-4.5 and GLM-4.6: grouped-query attention, half of each head rotated by halves, experts routed as in DeepSeek-V3.

Source: transformers Glm4MoeConfig and Glm4MoeForCausalLM.
"""

from llmconvert.spec.language import Field, Fixed, HeadDim, LeadingDense, SharedExperts, Spec, key_value_heads
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="glm4_moe",
    title="GLM-4.5, GLM-4.6",
    family="glm",
    model_types=("glm4_moe",),
    architectures=("Glm4MoeForCausalLM",),
    config=(
        Field("max_position_embeddings", "max_position_embeddings", default=131072),
        Field("rms_norm_eps", "rms_norm_eps", default=1e-5),
        key_value_heads(8),
        HeadDim("head_dim"),
        Rope(partial=0.5, partial_key="partial_rotary_factor"),
        Field("qkv_bias", "attention_bias", default=False),
        Fixed("o_bias mlp_bias", False),
        Field("qk_norm", "use_qk_norm", default=False),
        Field("num_experts", "n_routed_experts"),
        Field("num_experts_per_tok", "num_experts_per_tok"),
        Field("moe_intermediate_size", "moe_intermediate_size"),
        Field("routed_scaling_factor", "routed_scaling_factor", default=1.0),
        Field("norm_topk_prob", "norm_topk_prob", default=True),
        Field("n_group", "n_group", default=1),
        Field("topk_group", "topk_group", default=1),
        Field("num_nextn_predict_layers", "num_nextn_predict_layers", default=1),
        LeadingDense(default=1),
        SharedExperts(default=1),
        Fixed("scoring_func", "sigmoid"),
        Fixed("topk_method", "noaux_tc"),
        Fixed("router_bias", True),
    ),
    holds=frozenset(
        {"moe", "dense_layers", "shared_experts", "sigmoid_router", "router_bias", "router_groups", "routed_scaling",
         "mtp", "mtp_copies", "qk_norm", "qkv_bias", "tied_embeddings", "grouped_query", "explicit_head_dim",
         "partial_rotary", "rope_scaling", "activation"}
    ),
    always=frozenset({"moe", "sigmoid_router", "router_bias", "shared_experts"}),
    coupled=(("mtp", "mtp_copies"),),
    default_target=False,
)  # fmt: skip
