"""Architectures that are recognised, and that no spec reads, with the reason.

Each reason is something the canonical layout cannot say, so it holds whatever the target. Source: the published modelling
code of the architecture, as it stands in transformers.
"""

from llmconvert.spec.language import Refusal

REFUSALS = (
    Refusal("ChatGLM-6B (first version)", ("chatglm",), key="position_encoding_2d",
            why="it has two-dimensional rotary positions, a prefix mask, scaled post-norm residuals and LayerNorm biases",
            instead="use ChatGLM2-6B or later, which converts"),
    Refusal("ERNIE 4.5 MoE", ("ernie4_5_moe",), ("Ernie4_5_MoeForCausalLM",),
            why="its routing bias is stored as a matrix of one row (`mlp.moe_statics.e_score_correction_bias`), which no row "
                "of a spec takes apart"),
    Refusal("GPT-OSS", ("gpt_oss",), ("GptOssForCausalLM",),
            why="its attention has sinks, its experts a clamped SwiGLU that adds one to the linear half, and experts and "
                "router have biases"),
    Refusal("Granite MoE", ("granitemoe",), ("GraniteMoeForCausalLM",),
            why="its experts lie in one tensor a layer, `block_sparse_moe.input_linear`, which no row of a spec takes apart"),
    Refusal("Gemma 3", ("gemma3", "gemma3_text"), ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
            why="windowed layers have another rotary base than the others"),
    Refusal("OLMo 2", ("olmo2",), ("Olmo2ForCausalLM",),
            why="its layers have no norm before attention and MLP, only after them, and its query and key norms are taken "
                "over all heads at once"),
    Refusal("Hunyuan", ("hunyuan_v1_dense",), ("HunYuanDenseV1ForCausalLM",),
            why="its query and key norms come after the rotation, whose pairs they weigh apart"),
    Refusal("Llama 4", ("llama4", "llama4_text"), ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
            why="every fourth layer has no rotary embedding and scales its queries with the position, the others attend "
                "in chunks, and a router's score multiplies what an expert is given"),
    Refusal("StableLM", ("stablelm",), ("StableLmForCausalLM",),
            why="its norms are LayerNorms with biases, which subtract a mean that depends on the input"),
    Refusal("Cohere Command", ("cohere", "cohere2"), ("CohereForCausalLM", "Cohere2ForCausalLM"),
            why="attention and MLP run in parallel on one LayerNorm, where a layer here runs them in turn on RMSNorms"),
)  # fmt: skip
