"""Baichuan2 7B: Baichuan 7B whose head (NormHead) is normalised at inference.

Source: modeling_baichuan.py and configuration_baichuan.py published with baichuan-inc/Baichuan2-7B-Base. The first forward
pass overwrites the head's weight by the normalised one, and with it the embedding of a tied model, which is therefore refused.
"""

from dataclasses import replace

from llmconvert.spec.language import Fixed
from llmconvert.specs.baichuan import ROTARY, ROTATED
from llmconvert.specs.baichuan import SPEC as BAICHUAN

SPEC = replace(
    BAICHUAN,
    name="baichuan2",
    title="Baichuan2 7B",
    architectures=("BaichuanForCausalLM",),
    config=(*ROTATED, Fixed("norm_head", True)),
    holds=BAICHUAN.holds - {"tied_embeddings"},
    always=frozenset({"norm_head"}),
    requires={"tie_word_embeddings": False},
    signs=(ROTARY,),
    told={"position_embedding": "ROPE", "norm_head": True},
    default_target=False,
)
