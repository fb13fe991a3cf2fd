"""Llama 1 to 3, and every model published in Llama's form (Yi-1.5, DeepSeek LLM, R1-Distill-Llama, SmolLM, ...).

Source: transformers LlamaConfig and LlamaForCausalLM. `attention_bias` puts a bias on q, k, v and o alike.
"""

from llmconvert.spec.language import Drop, Field, Spec

SPEC = Spec(
    name="llama",
    title="Llama, and models published in its form",
    family="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    config=(
        Field("qkv_bias o_bias", "attention_bias", default=False),
        Field("mlp_bias", "mlp_bias", default=False),
    ),
    drops=(Drop("model.layers.{i}.self_attn.rotary_emb.inv_freq", "recomputed from the config"),),
    holds=frozenset(
        {"qkv_bias", "o_bias", "mlp_bias", "tied_embeddings", "padded_rotary", "grouped_query", "explicit_head_dim",
         "rope_scaling", "activation"}
    ),
    coupled=(("qkv_bias", "o_bias"),),
)  # fmt: skip
