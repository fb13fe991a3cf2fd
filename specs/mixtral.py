"""Mixtral: Llama with a mixture of experts in every layer.

Source: transformers MixtralConfig and MixtralForCausalLM. The chosen experts' scores always sum to one.
"""

from llmconvert.canonical.model import EXPERT_DOWN, EXPERT_GATE, EXPERT_UP, LAYER, ROUTER
from llmconvert.spec.language import AllLayers, Field, Fixed, Spec, Window, key_value_heads, row
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="mixtral",
    title="Mixtral",
    family="mistral",
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    config=(
        Field("moe_intermediate_size intermediate_size", "intermediate_size"),
        Field("num_experts", "num_local_experts", aliases=("num_experts",)),
        Field("num_experts_per_tok", "num_experts_per_tok"),
        Field("max_position_embeddings", "max_position_embeddings", default=131072),
        Field("rms_norm_eps", "rms_norm_eps", default=1e-5),
        key_value_heads(8),
        AllLayers(),
        Rope(default=1e6),
        Fixed("norm_topk_prob", True),
        Fixed("qkv_bias o_bias mlp_bias", False),
        Window(),
    ),
    weights=(
        row(LAYER + "block_sparse_moe.gate.{p}", ROUTER),
        row(LAYER + "block_sparse_moe.experts.{j}.w1.{p}", EXPERT_GATE),
        row(LAYER + "block_sparse_moe.experts.{j}.w3.{p}", EXPERT_UP),
        row(LAYER + "block_sparse_moe.experts.{j}.w2.{p}", EXPERT_DOWN),
    ),
    drops=(),
    ignores=("router_jitter_noise",),
    holds=frozenset(
        {"moe", "tied_embeddings", "grouped_query", "rope_scaling", "explicit_head_dim", "activation", "sliding_window"}
    ),
    always=frozenset({"moe"}),
    default_target=False,
)
