"""Baichuan2 13B: Baichuan 13B whose head (NormHead) is normalised at inference.

Source: modeling_baichuan.py published with baichuan-inc/Baichuan2-13B-Base, which holds its config class too.
As in Baichuan2 7B, a tied head is refused.
"""

from dataclasses import replace

from llmconvert.spec.language import Fixed, Sign
from llmconvert.specs.baichuan_13b import ALIBI, BIASED
from llmconvert.specs.baichuan_13b import SPEC as BAICHUAN

NORM_HEAD = (Sign(code="NormHead"), Sign(values={"vocab_size": 125_696}), Sign(present=("z_loss_weight",)))

SPEC = replace(
    BAICHUAN,
    name="baichuan2_13b",
    title="Baichuan2 13B",
    config=(*BIASED, Fixed("norm_head", True)),
    holds=BAICHUAN.holds - {"tied_embeddings"},
    always=frozenset({"alibi", "norm_head"}),
    requires={"tie_word_embeddings": False},
    signs=(ALIBI, NORM_HEAD),
    told={"position_embedding": "ALIBI", "norm_head": True},
)
