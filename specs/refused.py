"""Architectures that are recognised so that they can be refused with the reason.

Source of each reason: the published modelling code of the architecture.
"""

from llmconvert.spec.language import Refusal

REFUSALS = (
    Refusal("ChatGLM-6B (first version)", ("chatglm",), key="position_encoding_2d",
            why="two-dimensional rotary positions, a prefix mask, scaled post-norm residuals and LayerNorm biases "
                "have no form in Llama",
            instead="use ChatGLM2-6B or later, which converts"),
    Refusal("ERNIE 4.5 MoE", ("ernie4_5_moe",), ("Ernie4_5_MoeForCausalLM",), trait="moe"),
    Refusal("GPT-OSS", ("gpt_oss",), ("GptOssForCausalLM",), trait="moe"),
    Refusal("Granite MoE", ("granitemoe",), ("GraniteMoeForCausalLM",), trait="moe"),
    Refusal("Gemma 3", ("gemma3", "gemma3_text"), ("Gemma3ForCausalLM",), trait="branch_output_norm"),
    Refusal("OLMo 2", ("olmo2",), ("Olmo2ForCausalLM",), trait="branch_output_norm"),
    Refusal("Hunyuan", ("hunyuan_v1_dense",), ("HunYuanDenseV1ForCausalLM",), trait="qk_norm"),
    Refusal("Llama 4", ("llama4", "llama4_text"), ("Llama4ForCausalLM",), trait="moe"),
    Refusal("StableLM", ("stablelm",), ("StableLmForCausalLM",),
            why="LayerNorm subtracts a mean that depends on the input, which RMSNorm cannot"),
    Refusal("Cohere Command", ("cohere", "cohere2"), ("CohereForCausalLM", "Cohere2ForCausalLM"),
            why="attention and MLP run in parallel on one LayerNorm, where Llama runs them in turn"),
)  # fmt: skip
