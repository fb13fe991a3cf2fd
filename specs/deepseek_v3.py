"""DeepSeek-V3, R1, V3.1, and models of their shape (Moonlight, Kimi-K2): V2 with a sigmoid router and a routing bias.

Source: transformers DeepseekV3Config and DeepseekV3ForCausalLM; deepseek-ai/DeepSeek-V3, README_WEIGHTS.md, for the
layer that predicts a further token; arXiv:2412.19437.
"""

from llmconvert.spec.language import Field, Fixed, LeadingDense, SharedExperts, Spec, key_value_heads

SPEC = Spec(
    name="deepseek_v3",
    title="DeepSeek-V3, R1, V3.1, Moonlight, Kimi-K2",
    family="deepseek",
    model_types=("deepseek_v3", "kimi_k2"),
    architectures=("DeepseekV3ForCausalLM",),
    config=(
        Field("q_lora_rank", "q_lora_rank", default=1536, null=None),
        Field("kv_lora_rank", "kv_lora_rank"),
        Field("qk_nope_head_dim", "qk_nope_head_dim"),
        Field("head_dim qk_rope_head_dim", "qk_rope_head_dim"),
        Field("v_head_dim", "v_head_dim"),
        Field("num_experts", "n_routed_experts"),
        Field("num_experts_per_tok", "num_experts_per_tok"),
        Field("moe_intermediate_size", "moe_intermediate_size"),
        Field("routed_scaling_factor", "routed_scaling_factor", default=2.5),
        Field("norm_topk_prob", "norm_topk_prob", default=True),
        Field("n_group", "n_group", default=8),
        Field("topk_group", "topk_group", default=4),
        Field("num_nextn_predict_layers", "num_nextn_predict_layers", default=1),
        LeadingDense(default=3),
        SharedExperts(default=1),
        key_value_heads(128),
        Field("max_position_embeddings", "max_position_embeddings", default=4096),
        Fixed("scoring_func", "sigmoid"),
        Fixed("topk_method", "noaux_tc"),
        Fixed("router_bias rotary_interleaved", True),
        Field("qkv_bias o_bias", "attention_bias", default=False),
        Fixed("mlp_bias", False),
    ),
    requires={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True},
    ignores=("qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size"),
    holds=frozenset(
        {"moe", "dense_layers", "shared_experts", "sigmoid_router", "router_bias", "router_groups", "routed_scaling",
         "mla", "mtp", "mtp_copies", "tied_embeddings", "rope_scaling", "activation", "qkv_bias", "o_bias"}
    ),
    always=frozenset({"moe", "mla", "sigmoid_router", "router_bias"}),
    coupled=(("mtp", "mtp_copies"), ("qkv_bias", "o_bias")),
    published_code=True,
    default_target=False,
)  # fmt: skip
