"""Small models for architectures transformers lacks, written from their definitions, with the original tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmconvert.verify.reference.llamalike import Decoder


def find_reference(config: Mapping[str, Any]) -> type[Decoder] | None:
    """The reference class for a config.json, or None where transformers has one of its own."""
    from llmconvert.verify.reference import baichuan, chatglm, deepseek, internlm2, qwen, yi

    model_type, names = config.get("model_type"), set(config.get("architectures") or ())
    if model_type == "qwen" or "QWenLMHeadModel" in names:
        return qwen.QWenLMHeadModel
    if model_type == "baichuan":
        return baichuan.BaichuanForCausalLM
    if model_type == "chatglm":
        return None if config.get("position_encoding_2d") else chatglm.ChatGLMForConditionalGeneration
    if "YiForCausalLM" in names:
        return yi.YiForCausalLM
    if model_type == "deepseek":
        return deepseek.DeepseekForCausalLM
    if model_type == "internlm2":
        return internlm2.InternLM2ForCausalLM
    return None
