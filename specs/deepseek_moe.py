"""DeepSeek-MoE-16b: Llama with routed and shared experts, the first layers dense.

Source: deepseek-ai/deepseek-moe-16b-base, modeling_deepseek.py and its config.json.
"""

from llmconvert.spec.language import Field, Fixed, LeadingDense, NormalisedScores, SharedExperts, Spec, key_value_heads
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="deepseek_moe",
    title="DeepSeek-MoE-16b",
    family="deepseek",
    model_types=("deepseek",),
    architectures=("DeepseekForCausalLM",),
    config=(
        Field("num_experts", "n_routed_experts"),
        Field("num_experts_per_tok", "num_experts_per_tok"),
        Field("moe_intermediate_size", "moe_intermediate_size"),
        NormalisedScores(),
        Rope(scaling=("dynamic", "linear"), two_keys=True),
        key_value_heads(32),
        LeadingDense(),
        SharedExperts(),
        Field("qkv_bias o_bias", "attention_bias", default=False),
        Fixed("mlp_bias", False),
    ),
    requires={"scoring_func": "softmax", "moe_layer_freq": 1},
    holds=frozenset(
        {"moe", "dense_layers", "shared_experts", "qkv_bias", "o_bias", "tied_embeddings", "grouped_query",
         "rope_scaling", "activation"}
    ),
    always=frozenset({"moe"}),
    coupled=(("qkv_bias", "o_bias"),),
    default_target=False,
)  # fmt: skip
