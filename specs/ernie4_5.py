"""ERNIE 4.5 (dense): Llama with interleaved rotary pairs and one switch for every bias.

Source: transformers Ernie4_5Config and Ernie4_5ForCausalLM.
"""

from llmconvert.spec.language import Field, Fixed, HeadDim, Spec, key_value_heads
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="ernie4_5",
    title="ERNIE 4.5 (dense)",
    family="ernie",
    model_types=("ernie4_5",),
    architectures=("Ernie4_5ForCausalLM",),
    config=(
        Rope(default=500_000.0, scaling=()),
        Field("max_position_embeddings", "max_position_embeddings", default=131072),
        Field("rms_norm_eps", "rms_norm_eps", default=1e-5),
        key_value_heads(2),
        HeadDim("head_dim", default=128),
        Fixed("rotary_interleaved", True),
        Field("tie_word_embeddings", "tie_word_embeddings", default=True),
        Field("qkv_bias o_bias mlp_bias", "use_bias", default=False),
    ),
    holds=frozenset(
        {"qkv_bias", "o_bias", "mlp_bias", "tied_embeddings", "grouped_query", "explicit_head_dim", "activation",
         "interleaved_rotary"}
    ),
    always=frozenset({"interleaved_rotary"}),
    coupled=(("qkv_bias", "o_bias", "mlp_bias"),),
)  # fmt: skip
