"""Tiny checkpoints under the names models are published by, saved as their publishers save them.

Built on `checkpoints`: that module holds the shapes and the random weights; this one adds variants (transformers-5
configs, a sliding window, mixtures of experts with one tensor an expert), a tokenizer, and sparse files by weight map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import checkpoints
import torch
from torch import nn

_YI = {"rope_theta": 5e6, "num_key_value_heads": 2}
# name: (name in `checkpoints`, overrides of its config)
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_rope5": ("llama", {}),
    "yi_old": ("yi", {}),
    "yi": ("llama", _YI),
    "deepseek": ("llama_mha", {}),
    "chatglm3": ("chatglm2", {}),
    "mistral_sliding": ("mistral", {"sliding_window": 16}),
}
_SAME = (
    "llama", "llama_bias", "llama_tied", "qwen", "qwen_2023", "qwen2", "qwen2_tied", "baichuan", "baichuan2",
    "baichuan_13b", "chatglm2", "glm4_9b", "glm", "glm4", "mistral", "internlm2", "phi3", "gemma", "granite",
    "seed_oss", "ernie4_5", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3",
    "moonlight", "glm4_moe", "deepseek_moe",
)  # fmt: skip
ARCHITECTURES: tuple[str, ...] = (*_SAME, *_VARIANTS)

_TEXT = ["the quick brown fox jumps over the lazy dog", "one head normalises what another head attends to"]
_TEMPLATE = "{% for message in messages %}<s>{{ message.role }} {{ message.content }}</s>{% endfor %}"


def _native(arch: str, seed: int, overrides: Mapping[str, Any]) -> nn.Module:
    model = checkpoints.build_native(arch, seed, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if arch == "gemma" and parameter.ndim == 1:
                parameter.sub_(1.0)  # its norms multiply by 1 + weight
    return model


def make(
    arch: str, directory: Path, *, dtype: str = "float32", seed: int = 0, shards: bool = True, tokenizer: bool = False,
    fmt: str = "safetensors", config_form: str = "4", **overrides: Any,
) -> Path:  # fmt: skip
    """Write a complete tiny checkpoint.

    Args:
        arch: one of `ARCHITECTURES`.
        directory: made if absent.
        dtype: of the weights, as torch names it.
        seed: of the weights.
        shards: three files with an index, fused groups across them; else one file.
        tokenizer: write a fast tokenizer with a chat template too.
        fmt: safetensors or bin.
        config_form: "4" for config.json as transformers 4 wrote it, "5" as 5 does; remote-code models have one form.
        overrides: config values.
    """
    directory.mkdir(parents=True, exist_ok=True)
    base, extra = _VARIANTS.get(arch, (arch, {}))
    overrides = {**extra, **overrides}
    if base in checkpoints.REMOTE:
        model, config = checkpoints.build_remote(base, seed, **overrides)
        state, config = model.state_dict(), {**config, "torch_dtype": dtype}
    else:
        state, config = checkpoints.saved(_native(base, seed, overrides))
        config["dtype"] = dtype
        if config_form == "4" and arch != "llama_rope5":
            config = checkpoints._as_transformers_4(config)
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": config.get("eos_token_id", 2), "max_new_tokens": 20}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    checkpoints.write_weights(state, directory, 3 if shards else 1, fmt)
    if tokenizer:
        _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(_TEXT, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = _TEMPLATE
    # Version 5 puts the template into a file of its own unless told not to; older readers look in the config.
    fast.save_pretrained(directory, save_jinja_files=False)


def make_sparse(
    config: Mapping[str, Any], weight_map: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], directory: Path,
    dtype: str = "BF16",
) -> Path:  # fmt: skip
    """Write config.json, an index and safetensors files of full size whose data are holes.

    Args:
        config: for config.json.
        weight_map: tensor name to file name.
        shapes: tensor name to shape, for the same names.
        directory: made if absent.
        dtype: of every tensor, as safetensors names it.
    """
    width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}[dtype]
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(set(weight_map.values())):
        end, header = 0, {}
        for name in sorted(name for name, place in weight_map.items() if place == file):
            start, end = end, end + width * prod(shapes[name])
            header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + end)
    total = sum(width * prod(shapes[name]) for name in weight_map)
    index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(dict(config)))
    return directory
