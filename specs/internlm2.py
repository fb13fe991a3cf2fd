"""InternLM2 and InternLM2.5: query, key and value packed head group by head group.

Source: modeling_internlm2.py published with internlm/internlm2-7b.
"""

from llmconvert.canonical.model import DOWN, EMBED, GATE, HEAD, INPUT_NORM, POST_NORM, UP, K, O, Q, V
from llmconvert.spec.language import Field, Fixed, HeadDim, Spec, row
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="internlm2",
    title="InternLM2, InternLM2.5",
    family="internlm2",
    model_types=("internlm2",),
    architectures=("InternLM2ForCausalLM",),
    config=(
        HeadDim(None),
        Rope(scaling=("dynamic", "linear"), two_keys=True),
        Field("qkv_bias o_bias", "bias", default=True),
        Fixed("mlp_bias", False, keys=("mlp_bias",)),
    ),
    weights=(
        row("model.tok_embeddings.{p}", EMBED),
        row("model.layers.{i}.attention.wqkv.{p}", Q, K, V, pack="grouped"),
        row("model.layers.{i}.attention.wo.{p}", O),
        row("model.layers.{i}.feed_forward.w1.weight", GATE),
        row("model.layers.{i}.feed_forward.w3.weight", UP),
        row("model.layers.{i}.feed_forward.w2.weight", DOWN),
        row("model.layers.{i}.attention_norm.{p}", INPUT_NORM),
        row("model.layers.{i}.ffn_norm.{p}", POST_NORM),
        row("output.{p}", HEAD),
    ),
    holds=frozenset({"qkv_bias", "o_bias", "grouped_query", "rope_scaling", "activation", "tied_embeddings"}),
    coupled=(("qkv_bias", "o_bias"),),
)
