"""Baichuan 7B (first version): query, key and value packed, rotary embedding, a plain head.

Source: modeling_baichuan.py and configuration_baichuan.py published with baichuan-inc/Baichuan-7B. Its class is
`BaiChuanForCausalLM`; the other three models of the family are `BaichuanForCausalLM` and told apart by their signs.
"""

from llmconvert.canonical.model import K, Q, V
from llmconvert.spec.language import Drop, Field, Fixed, HeadDim, Sign, Spec, row
from llmconvert.spec.rope import Rope

SEVEN, THIRTEEN = (
    {"num_attention_heads": 32, "num_hidden_layers": 32},
    {"num_attention_heads": 40, "num_hidden_layers": 40},
)
INV_FREQ = "model.layers.{i}.self_attn.rotary_emb.inv_freq"
ROTARY = (
    Sign(code="RotaryEmbedding", no_code="alibi"),
    Sign(stored=(INV_FREQ.replace("{i}", "0"),)),
    Sign(values=SEVEN),
    Sign(present=("max_position_embeddings",), absent=("gradient_checkpointing",), unlike=(THIRTEEN,)),
)
"""Signs of the 7B models. `max_position_embeddings` is a key of their config class, and not of the 13B's."""

PLAIN_HEAD = (Sign(no_code="NormHead"), Sign(values={"vocab_size": 64_000}))

FIELDS = (
    Field("max_position_embeddings", "max_position_embeddings", aliases=("model_max_length",), default=4096),
    Rope(fixed=10_000.0, scaling=()),
    HeadDim(None),
    Fixed("num_key_value_heads", "=num_attention_heads"),
)

SPEC = Spec(
    name="baichuan",
    title="Baichuan 7B",
    family="baichuan",
    model_types=("baichuan",),
    architectures=("BaiChuanForCausalLM",),
    config=(
        *FIELDS,
        Fixed("qkv_bias o_bias mlp_bias norm_head alibi", False),
    ),
    weights=(row("model.layers.{i}.self_attn.W_pack.{p}", Q, K, V),),
    drops=(Drop(INV_FREQ, "recomputed from the config"),),
    holds=frozenset({"activation", "tied_embeddings"}),
    ignores=("gradient_checkpointing", "z_loss_weight", "tokenizer_class"),
    signs=(ROTARY, PLAIN_HEAD),
    told={"position_embedding": "ROPE", "norm_head": False},
)
