"""Baichuan 13B (first version): ALiBi in place of a rotary embedding, a plain head.

Source: modeling_baichuan.py and configuration_baichuan.py published with baichuan-inc/Baichuan-13B-Base. Its config class
knows `model_max_length` and `gradient_checkpointing`, and no `max_position_embeddings`.
"""

from dataclasses import replace

from llmconvert.spec.language import Field, Fixed, HeadDim, Sign
from llmconvert.spec.rope import Rope
from llmconvert.specs.baichuan import PLAIN_HEAD, SEVEN, THIRTEEN
from llmconvert.specs.baichuan import SPEC as BAICHUAN

ALIBI = (
    Sign(code="alibi"),
    Sign(values=THIRTEEN),
    Sign(present=("gradient_checkpointing",), absent=("max_position_embeddings",), unlike=(SEVEN,)),
)

FIELDS = (
    Field("max_position_embeddings", "model_max_length", aliases=("max_position_embeddings",), default=4096),
    Rope(fixed=10_000.0, scaling=()),
    HeadDim(None),
    Fixed("num_key_value_heads", "=num_attention_heads"),
    Fixed("alibi", True),
)

SPEC = replace(
    BAICHUAN,
    name="baichuan_13b",
    title="Baichuan 13B",
    architectures=("BaichuanForCausalLM",),
    config=(
        *FIELDS,
        Fixed("qkv_bias o_bias mlp_bias norm_head", False),
    ),
    drops=(),
    always=frozenset({"alibi"}),
    signs=(ALIBI, PLAIN_HEAD),
    told={"position_embedding": "ALIBI", "norm_head": False},
    default_target=False,
)
