"""The proofs on CUDA: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import gpu
import pytest
import tiny
import torch
from safetensors.torch import save_file

from llmconvert.converters.huggingface import convert
from llmconvert.debug import attention_weights, cos_distance
from llmconvert.models import CanonicalForCausalLM
from llmconvert.models.modeling_canonical import choose_attention
from llmconvert.verify.logits import compare_logits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("case", list(gpu.cases()), ids=lambda case: case.name.replace(" ", "-"))
def test_proofs_hold(case: gpu.Case, tmp_path: Path) -> None:
    found = gpu.prove(case, tmp_path)
    if found is None:
        pytest.skip("Llama cannot hold it")
    assert found.verdict, found
    assert set(found.devices) <= {"cpu", "cuda"} and "cuda" in found.devices


@pytest.mark.parametrize("arch", ["llama", "baichuan_13b", "glm4_9b", "qwen"])
def test_a_fault_is_seen(arch: str, tmp_path: Path) -> None:
    one, two = (tiny.make(arch, tmp_path / side, shards=False) for side in ("one", "two"))
    state = checkpoints.tensors(two)
    name = next(name for name in state if "1.input_layernorm" in name or "1.ln_1" in name)
    state[name].view(-1)[3] += 1e-3
    save_file(state, two / "model.safetensors", metadata={"format": "pt"})
    for device in ("cuda", "cuda:0", "cpu,cuda"):
        report = compare_logits(one, two, device=device)
        assert not report.verdict and report.departures[0].place == "layer 1, attention"


def test_by_layers_takes_the_memory_of_a_block(tmp_path: Path) -> None:
    case = gpu.Case("by layers", "qwen2", load="layers", overrides=tuple(gpu.BILLION.items()))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert gpu.prove(case, tmp_path) is not None
    table = 4 * gpu.BILLION["vocab_size"] * gpu.BILLION["hidden_size"]
    assert torch.cuda.max_memory_allocated() < 3 * table + 2**30


@pytest.mark.parametrize("arch", ["gemma2", "baichuan_13b", "deepseek_v3", "qwen3", "llama"])
def test_the_canonical_class_computes_on_cuda_what_it_does_on_the_cpu(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "source")
    convert(source, tmp_path / "canonical", to="canonical", verify="weights")
    ids = torch.randint(3, 131, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = CanonicalForCausalLM.from_pretrained(tmp_path / "canonical")(ids).logits
        placed = CanonicalForCausalLM.from_pretrained(tmp_path / "canonical").set_device([0])
        assert (placed(ids.cuda()).logits.cpu() - wanted).abs().max() < 1e-3 * wanted.abs().max()
        half = CanonicalForCausalLM.from_pretrained(tmp_path / "canonical", dtype=torch.bfloat16, devices=[0])
        assert half.attention == choose_attention(half.config, torch.bfloat16, torch.device("cuda"))[0]
        assert (half(ids.cuda()).logits.cpu().float() - wanted).abs().max() < 0.2 * wanted.abs().max()
    here, there = (cos_distance(model, input_ids=ids[0]) for model in (placed, source))
    assert here.mean == pytest.approx(there.mean, abs=1e-3)
    weights = torch.tensor(attention_weights(half, 1, input_ids=ids[0]).weights)
    assert torch.allclose(weights.sum(-1), torch.ones(1), atol=2e-2)
