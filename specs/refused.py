"""Architectures that are recognised so that they can be refused with the reason.

Source of each reason: the published modelling code of the architecture.
"""

from llmconvert.spec.language import Refusal

REFUSALS = (
    Refusal("ChatGLM-6B (first version)", ("chatglm",), key="position_encoding_2d",
            why="two-dimensional rotary positions, a prefix mask, scaled post-norm residuals and LayerNorm biases "
                "have no form in Llama",
            instead="use ChatGLM2-6B or later, which converts"),
    Refusal("Mixtral", ("mixtral",), ("MixtralForCausalLM",), trait="moe"),
    Refusal("Qwen2-MoE", ("qwen2_moe",), ("Qwen2MoeForCausalLM",), trait="moe"),
    Refusal("Qwen3-MoE", ("qwen3_moe",), ("Qwen3MoeForCausalLM",), trait="moe"),
    Refusal("DeepSeek-MoE", ("deepseek",), ("DeepseekForCausalLM",), trait="moe"),
    Refusal("DeepSeek-V2", ("deepseek_v2",), ("DeepseekV2ForCausalLM",), trait="mla"),
    Refusal("DeepSeek-V3 or R1", ("deepseek_v3",), ("DeepseekV3ForCausalLM",), trait="mla"),
    Refusal("Kimi-K2", ("kimi_k2",), trait="mla"),
    Refusal("ERNIE 4.5 MoE", ("ernie4_5_moe",), ("Ernie4_5_MoeForCausalLM",), trait="moe"),
    Refusal("GPT-OSS", ("gpt_oss",), ("GptOssForCausalLM",), trait="moe"),
    Refusal("Granite MoE", ("granitemoe",), ("GraniteMoeForCausalLM",), trait="moe"),
    Refusal("GLM-4-0414", ("glm4",), ("Glm4ForCausalLM",), trait="branch_output_norm"),
    Refusal("GLM-4.5", ("glm4_moe",), ("Glm4MoeForCausalLM",), trait="moe"),
    Refusal("Gemma 2", ("gemma2",), ("Gemma2ForCausalLM",), trait="branch_output_norm"),
    Refusal("Gemma 3", ("gemma3", "gemma3_text"), ("Gemma3ForCausalLM",), trait="branch_output_norm"),
    Refusal("OLMo 2", ("olmo2",), ("Olmo2ForCausalLM",), trait="branch_output_norm"),
    Refusal("Hunyuan", ("hunyuan_v1_dense",), ("HunYuanDenseV1ForCausalLM",), trait="qk_norm"),
    Refusal("Llama 4", ("llama4", "llama4_text"), ("Llama4ForCausalLM",), trait="moe"),
    Refusal("StableLM", ("stablelm",), ("StableLmForCausalLM",),
            why="LayerNorm subtracts a mean that depends on the input, which RMSNorm cannot"),
    Refusal("Cohere Command", ("cohere", "cohere2"), ("CohereForCausalLM", "Cohere2ForCausalLM"),
            why="attention and MLP run in parallel on one LayerNorm, where Llama runs them in turn"),
)  # fmt: skip
