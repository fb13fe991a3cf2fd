"""GLM-4-0414 (dense): GLM with RMSNorms on the outputs of attention and MLP.

Source: transformers Glm4Config and Glm4ForCausalLM.
"""

from llmconvert.canonical.model import GATE, LAYER, UP
from llmconvert.spec.language import Field, Fixed, HeadDim, Spec, key_value_heads, row
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="glm4",
    title="GLM-4-0414, GLM-Z1",
    family="glm",
    model_types=("glm4",),
    architectures=("Glm4ForCausalLM",),
    config=(
        Rope(partial=0.5, partial_key="partial_rotary_factor", scaling=()),
        Fixed("rotary_interleaved branch_output_norm", True),
        key_value_heads(2),
        HeadDim("head_dim", default=128),
        Field("max_position_embeddings", "max_position_embeddings", default=131072),
        Field("rms_norm_eps", "rms_norm_eps", default=1.5625e-7),
        Field("qkv_bias", "attention_bias", default=True),
        Fixed("o_bias mlp_bias", False),
    ),
    weights=(row(LAYER + "mlp.gate_up_proj.{p}", GATE, UP),),
    holds=frozenset(
        {"qkv_bias", "tied_embeddings", "grouped_query", "partial_rotary", "interleaved_rotary", "explicit_head_dim",
         "activation", "branch_output_norm"}
    ),
    always=frozenset({"interleaved_rotary", "branch_output_norm"}),
    default_target=False,
)  # fmt: skip
