"""ChatGLM2-6B, ChatGLM3-6B and glm-4-9b in remote-code form: packed QKV and MLP, rotary on half of each head, interleaved.

Source: configuration_chatglm.py and modeling_chatglm.py published with THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b.
Without `multi_query_attention`, which is false where it is absent, each head's query, key and value lie together.
"""

from llmconvert.canonical.model import DOWN, EMBED, GATE, HEAD, INPUT_NORM, NORM, POST_NORM, UP, K, O, Q, V
from llmconvert.spec.language import Drop, Field, Fixed, HeadDim, Note, Spec, row
from llmconvert.spec.rope import Rope

SPEC = Spec(
    name="chatglm",
    title="ChatGLM2, ChatGLM3, glm-4-9b (remote code)",
    family="chatglm",
    model_types=("chatglm",),
    architectures=("ChatGLMForConditionalGeneration", "ChatGLMModel"),
    config=(
        Field("num_hidden_layers", "num_layers", aliases=("num_hidden_layers",)),
        Field("intermediate_size", "ffn_hidden_size"),
        Field("num_key_value_heads", "multi_query_group_num", only_if="multi_query_attention", otherwise="=num_attention_heads",
              default=1),
        Field("vocab_size", "padded_vocab_size"),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Field("max_position_embeddings", "seq_length", default=2048),
        Field("qkv_bias", "add_qkv_bias", default=False),
        HeadDim("kv_channels", default=128),
        Rope(theta_key="rope_ratio", times=10_000.0, default=10_000.0, partial=0.5, scaling=()),
        Fixed("rotary_interleaved", True),
        Fixed("hidden_act", "silu"),
        Fixed("tie_word_embeddings", False, keys=("tie_word_embeddings",)),
        Fixed("o_bias mlp_bias", False),
    ),
    weights=(
        row("transformer.embedding.word_embeddings.{p}", EMBED),
        row("transformer.encoder.layers.{i}.self_attention.query_key_value.{p}", Q, K, V,
            otherwise=("multi_query_attention", "grouped")),
        row("transformer.encoder.layers.{i}.self_attention.dense.weight", O),
        row("transformer.encoder.layers.{i}.mlp.dense_h_to_4h.weight", GATE, UP),
        row("transformer.encoder.layers.{i}.mlp.dense_4h_to_h.weight", DOWN),
        row("transformer.encoder.layers.{i}.input_layernorm.{p}", INPUT_NORM),
        row("transformer.encoder.layers.{i}.post_attention_layernorm.{p}", POST_NORM),
        row("transformer.encoder.final_layernorm.{p}", NORM),
        row("transformer.output_layer.{p}", HEAD),
    ),
    drops=(Drop("transformer.rotary_pos_emb.inv_freq", "recomputed from the config"),),
    holds=frozenset({"qkv_bias", "grouped_query", "partial_rotary", "interleaved_rotary", "explicit_head_dim"}),
    always=frozenset({"partial_rotary", "interleaved_rotary"}),
    requires={"rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False, "quantization_bit": 0,
              "apply_residual_connection_post_layernorm": False},
    constants={"original_rope": True, "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True,
               "fp32_residual_connection": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
               "bias_dropout_fusion": True, "tie_word_embeddings": False},
    ignores=("vocab_size", "classifier_dropout", "pre_seq_len", "prefix_projection"),
    notes=(Note("rope_ratio", "`rope_ratio` multiplies the rotary base in glm-4-9b's code alone: that of ChatGLM2-6B and "
                "ChatGLM3-6B does not read it, and some loaders of their 32k models scale positions by it",
                neutral=(None, 1), written=True),),
)  # fmt: skip
