"""DeepSeek-V2 and V2-Lite: latent attention, routed and shared experts.

Source: transformers DeepseekV2Config and DeepseekV2ForCausalLM; arXiv:2405.04434. Scores are never normalised there.
"""

from llmconvert.spec.language import Field, Fixed, LeadingDense, SharedExperts, Spec, key_value_heads

SPEC = Spec(
    name="deepseek_v2",
    title="DeepSeek-V2, V2-Lite, V2.5",
    family="deepseek",
    model_types=("deepseek_v2",),
    architectures=("DeepseekV2ForCausalLM",),
    config=(
        Field("q_lora_rank", "q_lora_rank", default=1536, null=None),
        Field("kv_lora_rank", "kv_lora_rank"),
        Field("qk_nope_head_dim", "qk_nope_head_dim"),
        Field("head_dim qk_rope_head_dim", "qk_rope_head_dim"),
        Field("v_head_dim", "v_head_dim"),
        Field("num_experts", "n_routed_experts"),
        Field("num_experts_per_tok", "num_experts_per_tok"),
        Field("moe_intermediate_size", "moe_intermediate_size"),
        Field("routed_scaling_factor", "routed_scaling_factor", default=1.0),
        Field("topk_method", "topk_method", default="greedy"),
        Field("n_group", "n_group", default=1),
        Field("topk_group", "topk_group", default=1),
        LeadingDense(),
        SharedExperts(default=2),
        key_value_heads(32),
        Fixed("norm_topk_prob", False),
        Fixed("rotary_interleaved", True),
        Field("qkv_bias o_bias", "attention_bias", default=False),
        Fixed("mlp_bias", False),
    ),
    requires={"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1, "mlp_bias": False},
    ignores=("qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size"),
    holds=frozenset(
        {"moe", "dense_layers", "shared_experts", "router_groups", "routed_scaling", "mla", "tied_embeddings",
         "rope_scaling", "activation", "qkv_bias", "o_bias"}
    ),
    always=frozenset({"moe", "mla"}),
    coupled=(("qkv_bias", "o_bias"),),
    published_code=True,
    default_target=False,
)  # fmt: skip
