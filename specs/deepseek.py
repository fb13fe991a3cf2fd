"""DeepSeek LLM 7B and 67B (dense) and R1-Distill-Llama: Llama in name and in fact. Not DeepSeek-MoE, V2 or V3.

Source: the model cards and config.json files of deepseek-ai on the Hugging Face hub.
"""

from dataclasses import replace

from llmconvert.specs.llama import SPEC as LLAMA

SPEC = replace(
    LLAMA,
    name="deepseek",
    title="DeepSeek LLM (dense), R1-Distill-Llama: Llama's form",
    family="deepseek",
    source=False,
    aka=("llama",),
)
