"""Two checkpoints compared as models: the same is exactly the same, and any difference is seen."""

from __future__ import annotations

import gc
import itertools
import json
import math
import weakref
from pathlib import Path

import checkpoints
import pytest
import tiny
import torch
from safetensors.torch import save_file

from llmconvert.errors import BadInput, LlmconvertError, Refused, Usage
from llmconvert.verify import logits
from llmconvert.verify.logits import compare_logits
from llmconvert.verify.models import load_model


def _edit(directory: Path, name: str, amount: float) -> None:
    """Add to one element of one tensor, in a checkpoint of one file."""
    state = checkpoints.tensors(directory)
    state[name].view(-1)[3] += amount
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("arch, dtype", [
    *itertools.product(["llama", "qwen", "baichuan2", "glm4_9b", "gemma"], ["float32", "float64", "bfloat16"]),
    *itertools.product(["mixtral", "deepseek_v3"], ["float32", "bfloat16"]),  # torch groups no float64 matrices
])  # fmt: skip
def test_the_same_weights_give_exactly_zero(arch: str, dtype: str, tmp_path: Path) -> None:
    one, two = tiny.make(arch, tmp_path / "one"), tiny.make(arch, tmp_path / "two", shards=False, fmt="bin")
    report = compare_logits(one, two, dtype=dtype, device="cpu")
    assert report.verdict and report.reason == "every logit is bit-equal"
    assert report.relative == report.max_abs == report.mean_abs == 0.0
    assert abs(report.kl_divergence) < 1e-12
    assert report.top1_agreement == report.top5_agreement == report.greedy_agreement == 1.0
    assert report.num_tokens == 5 + 17 + 33 + 33


@pytest.mark.parametrize("arch", ["baichuan_13b", "yi_old", "internlm2", "chatglm3", "qwen_2023", "mistral_sliding"])
def test_every_loader_gives_finite_logits(arch: str, tmp_path: Path) -> None:
    one = tiny.make(arch, tmp_path / "one")
    report = compare_logits(one, one, device="cpu")
    assert report.verdict and math.isfinite(report.kl_divergence)


def test_both_forms_of_config_are_one_model(tmp_path: Path) -> None:
    one, two = tiny.make("llama", tmp_path / "one"), tiny.make("llama_rope5", tmp_path / "two")
    assert compare_logits(one, two, device="cpu").relative == 0.0


@pytest.mark.parametrize("arch, name", [
    ("llama", "model.layers.1.mlp.up_proj.weight"), ("qwen", "transformer.h.2.attn.c_attn.bias"),
    ("chatglm2", "transformer.encoder.layers.0.input_layernorm.weight"),
])  # fmt: skip
def test_one_changed_number_is_seen(arch: str, name: str, tmp_path: Path) -> None:
    one, two = (tiny.make(arch, tmp_path / side, shards=False) for side in ("one", "two"))
    _edit(two, name, 0.5)
    report = compare_logits(one, two, device="cpu")
    assert not report.verdict and report.relative > report.tolerance and "differ" in report.reason
    assert report.kl_divergence > 0 and report.mean_abs > 0
    assert compare_logits(one, two, device="cpu", rtol=1e3).verdict


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_number_that_is_not_finite_is_seen(dtype: str, tmp_path: Path) -> None:
    one, two = (tiny.make("llama", tmp_path / side, shards=False) for side in ("one", "two"))
    _edit(two, "model.norm.weight", math.inf)
    report = compare_logits(one, two, dtype=dtype, device="cpu")
    assert not report.verdict and "finite" in report.reason


def test_a_difference_only_far_positions_show_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (tiny.make("llama", tmp_path / side, rope_theta=theta, max_position_embeddings=131072)
                for side, theta in (("one", 1e6), ("two", 1.00002e6)))  # fmt: skip
    assert not compare_logits(one, two, device="cpu").verdict
    probes = logits._probes
    monkeypatch.setattr(logits, "_probes", lambda *args, **kwargs: probes(*args, **kwargs)[:1])
    assert compare_logits(one, two, device="cpu").verdict  # without the far probe it passes for the same


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_implementations_agree(dtype: str, tmp_path: Path) -> None:
    """One model under a reference class and under transformers' own, renamed here by hand."""
    one = tiny.make("yi_old", tmp_path / "one", shards=False)
    two = tiny.make("yi", tmp_path / "two", shards=False, head_dim=8)
    renamed = {name.replace(".ln1.", ".input_layernorm.").replace(".ln2.", ".post_attention_layernorm."): tensor
               for name, tensor in checkpoints.tensors(one).items()}  # fmt: skip
    save_file(renamed, two / "model.safetensors", metadata={"format": "pt"})
    report = compare_logits(one, two, dtype=dtype, device="cpu", rtol=1e-5)
    assert report.verdict and report.relative > 0, report


def test_the_probes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    one, two = (tiny.make("llama", tmp_path / f"{seed}", seed=seed) for seed in (1, 2))
    first, again, other = (compare_logits(one, two, device="cpu", seed=seed) for seed in (0, 0, 1))
    assert first == again and first.max_abs != other.max_abs


def test_one_model_is_gone_before_the_next_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiny.make("qwen", tmp_path / "one")
    seen: list[weakref.ref[torch.nn.Module]] = []

    def load(directory: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
        gc.collect()
        assert all(model() is None for model in seen)
        model = load_model(directory, dtype, device)
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setattr(logits, "load_model", load)
    compare_logits(one, one, device="cpu")
    assert len(seen) == 2


def test_the_report_is_json(tmp_path: Path) -> None:
    one = tiny.make("llama", tmp_path / "one")
    found = json.loads(json.dumps(compare_logits(one, one, device="cpu").to_dict()))
    assert found["verdict"] is True and found["device"] == "cpu" and found["tolerance"] == 1e-4


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = tiny.make("llama", tmp_path / "one", shards=False)
    with pytest.raises(Usage, match="float8"):
        compare_logits(one, one, dtype="float8")
    with pytest.raises(Usage, match="131 and 137"):
        compare_logits(one, tiny.make("llama", tmp_path / "wide", vocab_size=137))
    with pytest.raises(LlmconvertError):
        compare_logits(one, tmp_path / "nowhere")


@pytest.mark.parametrize("arch, name", [("llama", "model.norm.weight"), ("qwen", "transformer.ln_f.weight")])
def test_a_missing_tensor_is_bad_input(arch: str, name: str, tmp_path: Path) -> None:
    one = tiny.make(arch, tmp_path / "one", shards=False)
    state = checkpoints.tensors(one)
    del state[name]
    save_file(state, one / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput):
        load_model(one, torch.float32, "cpu")


def test_a_tensor_too_many_is_bad_input_for_a_reference_model(tmp_path: Path) -> None:
    one = tiny.make("chatglm2", tmp_path / "one", shards=False)
    state = checkpoints.tensors(one) | {"transformer.encoder.layers.0.mlp.dense_h_to_4h.bias": torch.zeros(208)}
    save_file(state, one / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="dense_h_to_4h.bias"):
        load_model(one, torch.float32, "cpu")


def test_a_model_nobody_knows_is_refused(tmp_path: Path) -> None:
    one = tiny.make("llama", tmp_path / "one")
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    with pytest.raises(Refused):
        load_model(one, torch.float32, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("arch", ["llama", "baichuan_13b", "glm4_9b", "qwen"])
def test_on_cuda(arch: str, tmp_path: Path) -> None:
    one, two = (tiny.make(arch, tmp_path / side, shards=False) for side in ("one", "two"))
    report = compare_logits(one, two)
    assert report.device == "cuda" and report.relative == 0.0
    _edit(two, next(name for name in checkpoints.tensors(two) if "input_layernorm" in name or "ln_1" in name), 0.5)
    assert not compare_logits(one, two, device="cuda:0").verdict
