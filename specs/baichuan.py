"""Baichuan and Baichuan2, 7B (rotary) and 13B (ALiBi).

Source: modeling_baichuan.py published with baichuan-inc/Baichuan-7B and Baichuan2-7B-Base. The 7B of version 1 is
`BaiChuanForCausalLM`; `BaichuanForCausalLM` with rotary embeddings is version 2, whose head (NormHead) is normalised
at inference; so is the head of anything with version 2's vocabulary of 125,696. The 13B models, `BaichuanForCausalLM` in
both versions, state no `max_position_embeddings`.
"""

from llmconvert.canonical.model import K, Q, V
from llmconvert.spec.language import ByArchitecture, Drop, Field, Fixed, HeadDim, Spec, WithoutKey, row
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="baichuan",
    title="Baichuan, Baichuan2",
    family="baichuan",
    model_types=("baichuan",),
    architectures=("BaiChuanForCausalLM", "BaichuanForCausalLM"),
    config=(
        Field("max_position_embeddings", "max_position_embeddings", also=("model_max_length",)),
        Rope(fixed=10_000.0, scaling=()),
        HeadDim(None),
        ByArchitecture("norm_head", "BaichuanForCausalLM", ("vocab_size", 125_696), "max_position_embeddings"),
        WithoutKey("alibi", "max_position_embeddings", "BaichuanForCausalLM"),
        Fixed("tie_word_embeddings", False, keys=("tie_word_embeddings",)),
        Fixed("qkv_bias o_bias mlp_bias", False),
    ),
    weights=(row("model.layers.{i}.self_attn.W_pack.{p}", Q, K, V),),
    drops=(Drop("model.layers.{i}.self_attn.rotary_emb.inv_freq", "recomputed from the config"),),
    holds=frozenset({"activation", "norm_head", "alibi"}),
    constants={"tie_word_embeddings": False},
    ignores=("gradient_checkpointing", "z_loss_weight", "tokenizer_class"),
)
