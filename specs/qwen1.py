"""Qwen v1: GPT-2 style names, packed QKV with bias, `intermediate_size` twice the real one.

`qwen1` on the command line, where `qwen` is the family.

Source: configuration_qwen.py and modeling_qwen.py published with Qwen/Qwen-7B. `mlp.w2` is the gate, `mlp.w1` the
other half. A form of August 2023 spells the sizes n_embd, n_head, n_layer, ffn_hidden_size, n_positions.
"""

from llmconvert.canonical.model import DOWN, EMBED, GATE, INPUT_NORM, NORM, POST_NORM, UP, K, O, Q, V
from llmconvert.spec.language import Drop, Field, Fixed, HeadDim, Note, Spec, row
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="qwen1",
    title="Qwen v1",
    family="qwen",
    model_types=("qwen",),
    architectures=("QWenLMHeadModel",),
    config=(
        Field("hidden_size", "hidden_size", aliases=("n_embd",)),
        Field("num_hidden_layers", "num_hidden_layers", aliases=("n_layer",)),
        Field("num_attention_heads", "num_attention_heads", aliases=("n_head",)),
        Field("intermediate_size", "intermediate_size", aliases=("ffn_hidden_size",), times=0.5),
        Field("max_position_embeddings", "seq_length", aliases=("n_positions",)),
        Field("rms_norm_eps", "layer_norm_epsilon", default=1e-6),
        Field("vocab_size", "vocab_size", aliases=("padded_vocab_size",)),
        Rope(theta_key="rotary_emb_base", scaling=()),
        HeadDim("kv_channels", default=128),
        Fixed("num_key_value_heads", "=num_attention_heads"),
        Fixed("hidden_act", "silu"),
        Fixed("qkv_bias", True),
        Fixed("o_bias mlp_bias", False),
    ),
    weights=(
        row("transformer.wte.{p}", EMBED),
        row("transformer.h.{i}.attn.c_attn.{p}", Q, K, V),
        row("transformer.h.{i}.attn.c_proj.{p}", O),
        row("transformer.h.{i}.mlp.w1.{p}", UP),
        row("transformer.h.{i}.mlp.w2.{p}", GATE),
        row("transformer.h.{i}.mlp.c_proj.{p}", DOWN),
        row("transformer.h.{i}.ln_1.{p}", INPUT_NORM),
        row("transformer.h.{i}.ln_2.{p}", POST_NORM),
        row("transformer.ln_f.{p}", NORM),
    ),
    drops=(Drop("transformer.rotary_emb.inv_freq", "recomputed from the config"),),
    holds=frozenset({"tied_embeddings"}),
    always=frozenset({"qkv_bias"}),
    requires={"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True},
    constants={"use_dynamic_ntk": False, "use_logn_attn": False, "use_cache": True},
    ignores=("use_flash_attn", "bf16", "fp16", "fp32", "attn_dropout_prob", "emb_dropout_prob", "onnx_safe",
             "max_position_embeddings", "use_cache_quantization", "use_cache_kernel", "softmax_in_fp32",
             "tokenizer_class"),
    notes=(
        Note("use_dynamic_ntk", "dynamic NTK acts only beyond `seq_length`; the result is equal up to there",
             default=True),
        Note("use_logn_attn", "logn scaling acts only beyond `seq_length`; the result is equal up to there",
             default=True),
    ),
    default_target=False,
)  # fmt: skip
