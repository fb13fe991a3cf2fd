"""The canonical layout itself: every trait, one scheme of names, one tensor an expert.

Its config.json states each attribute of `llmconvert.canonical.model.CanonicalConfig` under the attribute's own name, but
for the rotary base and rescaling, which are `rope_parameters`.
"""

from llmconvert.canonical.model import TRAITS
from llmconvert.spec.language import Field, Spec, Window
from llmconvert.spec.rope import RopeParameters

SPEC = Spec(
    name="canonical",
    title="the canonical layout, which holds every trait",
    family="canonical",
    model_types=("llmconvert",),
    architectures=("CanonicalForCausalLM",),
    config=(
        Field("head_dim", "head_dim"),
        Field("num_key_value_heads", "num_key_value_heads"),
        Field("rms_norm_eps", "rms_norm_eps"),
        Field("max_position_embeddings", "max_position_embeddings"),
        RopeParameters(),
        Field("rotary_dim", "rotary_dim"),
        Field("rotary_interleaved", "rotary_interleaved", default=False),
        Field("rotary_padded", "rotary_padded", default=False),
        Field("qkv_bias", "qkv_bias", default=False),
        Field("o_bias", "o_bias", default=False),
        Field("mlp_bias", "mlp_bias", default=False),
        Field("norm_head", "norm_head", default=False),
        Field("unit_offset_norm", "unit_offset_norm", default=False),
        Field("embedding_multiplier", "embedding_multiplier", default=1.0),
        Field("embedding_multiplier_rounded", "embedding_multiplier_rounded", default=False),
        Field("residual_multiplier", "residual_multiplier", default=1.0),
        Field("logits_scaling", "logits_scaling", default=1.0),
        Field("attention_multiplier", "attention_multiplier", default=None),
        Field("qk_norm", "qk_norm", default=False),
        Field("alibi", "alibi", default=False),
        Field("branch_output_norm", "branch_output_norm", default=False),
        Field("num_experts", "num_experts", default=0),
        Field("num_experts_per_tok", "num_experts_per_tok", default=0),
        Field("moe_layers", "moe_layers", default=()),
        Field("moe_intermediate_size", "moe_intermediate_size", default=0),
        Field("shared_expert_intermediate_size", "shared_expert_intermediate_size", default=0),
        Field("shared_expert_gate", "shared_expert_gate", default=False),
        Field("scoring_func", "scoring_func", default="softmax"),
        Field("norm_topk_prob", "norm_topk_prob", default=False),
        Field("routed_scaling_factor", "routed_scaling_factor", default=1.0),
        Field("topk_method", "topk_method", default="greedy"),
        Field("n_group", "n_group", default=1),
        Field("topk_group", "topk_group", default=1),
        Field("router_bias", "router_bias", default=False),
        Field("q_lora_rank", "q_lora_rank", default=None),
        Field("kv_lora_rank", "kv_lora_rank", default=None),
        Field("qk_nope_head_dim", "qk_nope_head_dim", default=0),
        Field("qk_rope_head_dim", "qk_rope_head_dim", default=0),
        Field("v_head_dim", "v_head_dim", default=0),
        Field("num_nextn_predict_layers", "num_nextn_predict_layers", default=0),
        Field("attn_logit_softcapping", "attn_logit_softcapping", default=None),
        Field("final_logit_softcapping", "final_logit_softcapping", default=None),
        Window(),
    ),
    constants={
        "auto_map": {
            "AutoConfig": "modeling_canonical.CanonicalModelConfig",
            "AutoModel": "modeling_canonical.CanonicalModel",
            "AutoModelForCausalLM": "modeling_canonical.CanonicalForCausalLM",
            "AutoModelForSequenceClassification": "modeling_canonical.CanonicalForRewardModel",
            "AutoModelForTokenClassification": "modeling_canonical.CanonicalForTokenClassification",
        }
    },
    code=("modeling_canonical.py",),
    holds=frozenset(TRAITS) - {"mtp_copies"},
)
