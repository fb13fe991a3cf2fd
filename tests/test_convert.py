"""Every architecture to Llama and back: logits by models that are not ours, bytes by safetensors itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from slowly import slowly

from llmconvert.canonical import lowerings
from llmconvert.canonical.model import CanonicalModel
from llmconvert.converters.huggingface import convert
from llmconvert.verify.logits import compare_logits

# Largest difference allowed, relative to the largest logit; 0.0 where only bytes move and no sum is reordered.
TO_LLAMA = {
    "qwen": 1e-5, "qwen_2023": 1e-5, "qwen2": 0.0, "qwen2_tied": 0.0, "qwen2_yarn": 0.0, "baichuan": 1e-5,
    "baichuan2": 1e-5, "yi": 1e-5, "chatglm2": 1e-5, "chatglm_mha": 1e-5, "glm4_9b": 1e-5, "glm": 1e-5,
    "mistral": 0.0, "internlm2": 1e-5, "phi3": 1e-5, "phi3_partial": 1e-4, "phi3_longrope": 1e-5,
    "phi3_partial_longrope": 1e-5, "gemma": 1e-5, "granite": 1e-5,
    "seed_oss": 0.0, "ernie4_5": 1e-5, "ernie4_5_tied": 1e-5, "llama": 0.0, "llama_bias": 0.0, "llama_llama3": 0.0,
}  # fmt: skip
BACK = {
    "qwen": "qwen", "qwen_2023": "qwen", "qwen2": "qwen", "qwen2_tied": "qwen", "qwen2_yarn": "qwen",
    "baichuan": "baichuan", "yi": "yi", "chatglm2": "chatglm", "chatglm_mha": "chatglm", "glm4_9b": "chatglm",
    "glm": "glm", "mistral": "mistral", "internlm2": "internlm2", "phi3": "phi", "phi3_partial": "phi", "phi3_longrope": "phi",
    "seed_oss": "seed-oss", "ernie4_5": "ernie", "ernie4_5_tied": "ernie",
}  # fmt: skip


@pytest.mark.parametrize("arch", TO_LLAMA)
def test_to_llama_keeps_the_logits(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src")
    report = convert(source, tmp_path / "dst", to="llama", max_shard_size="60KB", verify="weights")
    assert report.published
    result = compare_logits(source, tmp_path / "dst")
    assert result.relative <= TO_LLAMA[arch], result
    assert result.greedy_agreement == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slowly([torch.float32, torch.float16])])
@pytest.mark.parametrize("arch", BACK)
def test_back_is_bitwise(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src", dtype=dtype)
    convert(source, tmp_path / "llama", to="llama", max_shard_size="60KB", verify="weights")
    convert(tmp_path / "llama", tmp_path / "back", to=BACK[arch], verify="weights")
    before, after = checkpoints.tensors(source), checkpoints.tensors(tmp_path / "back")
    before = {name: tensor for name, tensor in before.items() if not name.endswith("inv_freq")}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


# From plain Llama to everything that can hold it, read by the target's own model.
FROM_LLAMA = {
    "qwen": ("llama_mha", 1e-5), "qwen2": ("llama_mha", 0.0), "qwen3": ("llama", 1e-4), "baichuan": ("llama_10k", 1e-5),
    "yi": ("llama_mha", 1e-5), "chatglm": ("llama", 1e-4), "glm": ("llama", 1e-4), "mistral": ("llama", 0.0),
    "internlm2": ("llama_mha", 1e-5), "phi3": ("llama_mha", 1e-5), "granite": ("llama_mha", 1e-5),
    "seed_oss": ("llama_bias_no_mlp", 0.0), "ernie4_5": ("llama_bias", 1e-4), "deepseek": ("llama", 0.0),
}  # fmt: skip
_VARIANTS = {
    "llama_10k": ("llama_mha", {"rope_theta": 10000.0}),
    "llama_bias_no_mlp": ("llama_bias", {"mlp_bias": False}),
}


@pytest.mark.parametrize("target", FROM_LLAMA)
def test_from_llama_keeps_the_logits(target: str, tmp_path: Path) -> None:
    name, tolerance = FROM_LLAMA[target]
    arch, overrides = _VARIANTS.get(name, (name, {}))
    source = checkpoints.make(arch, tmp_path / "src", **overrides)
    convert(source, tmp_path / "dst", to=target, verify="weights")
    result = compare_logits(source, tmp_path / "dst", greedy_tokens=0)
    assert result.relative <= tolerance, result


@pytest.mark.parametrize("form", [4, 5])
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_form(form: int, fmt: str, shards: int, tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src", form=form, fmt=fmt, shards=shards)
    convert(source, tmp_path / "dst", to="llama", verify="weights")
    assert compare_logits(source, tmp_path / "dst").relative == 0.0


@pytest.mark.parametrize("source_arch", ["glm", "internlm2", *slowly(["qwen2", "phi3"])])
@pytest.mark.parametrize("target", ["mistral", "llama", "phi3"])
def test_any_to_any(source_arch: str, target: str, tmp_path: Path) -> None:
    overrides = {"attention_bias": False} if source_arch == "glm" else {}
    if source_arch == "qwen2" and target != "llama":
        pytest.skip("their targets have no biases")
    source = checkpoints.make(source_arch, tmp_path / "src", **overrides)
    convert(source, tmp_path / "dst", to=target, verify="weights")
    assert compare_logits(source, tmp_path / "dst").relative <= 1e-5


# Each quirk, converted as if it were not there: the control that shows the comparison would notice.
QUIRKS = [
    ("chatglm2", "interleaved_rotary"), ("chatglm2", "partial_rotary"), ("glm", "interleaved_rotary"),
    ("ernie4_5", "interleaved_rotary"), ("phi3_partial", "partial_rotary"), ("baichuan2", "norm_head"),
    ("gemma", "unit_offset_norm"), ("gemma", "rounded_embedding_multiplier"), ("granite", "embedding_multiplier"),
    ("granite", "residual_multiplier"), ("granite", "logits_scaling"), ("granite", "attention_multiplier"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "trait"), QUIRKS)
def test_every_quirk_matters(arch: str, trait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = lowerings.REMOVE[trait]

    def forget(model: CanonicalModel) -> CanonicalModel:
        return replace(model, config=step.apply(model).config)

    monkeypatch.setitem(lowerings.REMOVE, trait, replace(step, apply=forget))
    source = checkpoints.make(arch, tmp_path / "src")
    convert(source, tmp_path / "dst", to="llama", verify="none")
    assert compare_logits(source, tmp_path / "dst").relative > 1e-2


def test_an_attention_factor_scales_what_is_rotated_and_nothing_else(tmp_path: Path) -> None:
    """There and home to rounding, both proved by logits: LongRoPE on part of each head (Phi-4-mini)."""
    checkpoints.make("phi3_partial_longrope", tmp_path / "a")
    for source, target in (("a", "llama"), ("llama", "phi3")):
        report = convert(tmp_path / source, tmp_path / target, to=target)
        assert any("attention factor" in step["name"] for step in report.steps)
        assert report.logits is not None and report.logits["verdict"]
