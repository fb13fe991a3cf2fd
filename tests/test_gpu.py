"""The proofs on CUDA: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import gpu
import pytest
import tiny
import torch
from safetensors.torch import save_file

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
