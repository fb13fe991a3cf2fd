"""Yi in its first form (`YiForCausalLM`, November 2023): Llama with other names for the two norms.

Source: modeling_yi.py as first published with 01-ai/Yi-6B. Later Yi checkpoints are in Llama's own form.
"""

from llmconvert.canonical.model import INPUT_NORM, POST_NORM
from llmconvert.spec.language import Drop, Field, Fixed, Spec, key_value_heads, row
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="yi",
    title="Yi, first form (YiForCausalLM)",
    family="yi",
    model_types=("Yi", "yi"),
    architectures=("YiForCausalLM",),
    config=(
        Rope(default=5_000_000.0, scaling=()),
        key_value_heads(4),
        Field("max_position_embeddings", "max_position_embeddings", default=4096),
        Field("rms_norm_eps", "rms_norm_eps", default=1e-5),
        Fixed("qkv_bias o_bias mlp_bias", False),
    ),
    weights=(
        row("model.layers.{i}.ln1.{p}", INPUT_NORM),
        row("model.layers.{i}.ln2.{p}", POST_NORM),
    ),
    drops=(Drop("model.layers.{i}.self_attn.rotary_emb.inv_freq", "recomputed from the config"),),
    holds=frozenset({"grouped_query", "activation", "tied_embeddings"}),
    aka=("llama",),
)
