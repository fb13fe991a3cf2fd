"""Phi-3 and Phi-4 (dense): packed QKV and packed gate and up.

Source: transformers Phi3Config and Phi3ForCausalLM. Phi-4-mini rotates three quarters of each head, in halves.
"""

from llmconvert.canonical.model import GATE, LAYER, UP, K, Q, V
from llmconvert.spec.language import Field, Fixed, HeadDim, Spec, Window, row
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="phi3",
    title="Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
    family="phi",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    config=(
        HeadDim("head_dim"),
        Rope(partial_key="partial_rotary_factor", scaling=("longrope",), bare_longrope=True, original=4096),
        Field("rms_norm_eps", "rms_norm_eps", default=1e-5),
        Field("max_position_embeddings", "max_position_embeddings", default=4096),
        Window(),
        Fixed("qkv_bias o_bias mlp_bias", False),
    ),
    weights=(row(LAYER + "self_attn.qkv_proj.{p}", Q, K, V), row(LAYER + "mlp.gate_up_proj.{p}", GATE, UP)),
    holds=frozenset(
        {"tied_embeddings", "grouped_query", "rope_scaling", "activation", "partial_rotary", "sliding_window",
         "explicit_head_dim"}
    ),
    ignores=("resid_pdrop", "embd_pdrop"),
)  # fmt: skip
