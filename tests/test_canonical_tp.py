"""Tensor parallelism by transformers, on two processes: logits and every gradient are those of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
import transformers

from llmconvert.converters.huggingface import convert
from llmconvert.models import CanonicalForCausalLM, CanonicalModelConfig

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "llama_bias", "qwen3", "gemma2", "qwen2_moe", "deepseek_v2", "baichuan2"


def test_there_is_a_plan_where_it_is_right() -> None:
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    assert "layers.*.self_attn.q_proj" in CanonicalModelConfig().base_model_tp_plan
    assert CanonicalModelConfig(alibi=True).base_model_tp_plan is None  # slopes are of all heads
    assert (CanonicalModelConfig(**latent).base_model_tp_plan is None) == (transformers.__version__ < "5")
    assert "base_model_tp_plan" not in CanonicalModelConfig().to_dict()
    shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = ["lm_head" in CanonicalForCausalLM(CanonicalModelConfig(**shape, norm_head=is_)).tp_plan for is_ in (False, True)]
    assert heads == [transformers.__version__ >= "5", False], "a NormHead is no linear map; 4 leaves heads whole"


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 5 has another way to ask for it")
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    folders = []
    for arch in ARCHS:
        checkpoints.make(arch, tmp_path / arch / "source")
        convert(tmp_path / arch / "source", tmp_path / arch / "canonical", to="canonical", verify="weights")
        folders.append(str(tmp_path / arch / "canonical"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for size in (1, 2):
        command = [sys.executable, str(ROOT / "tests/canonical_tp_ranks.py")]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(port), *folders], env=environment, stderr=subprocess.PIPE
            )
            for rank in range(size)
        ]
        try:
            for rank in ranks:
                _, said = rank.communicate(timeout=400)
                assert rank.returncode == 0, said.decode()[-2000:]
        finally:
            for rank in ranks:
                rank.kill()
    for folder in folders:
        one, two = (torch.load(Path(folder) / f"found-{size}.pt") for size in (1, 2))
        assert one.keys() == two.keys() and len(one) > 20
        for name, wanted in one.items():
            assert (two[name] - wanted).abs().max() < 1e-4 * wanted.abs().max(), (folder, name)
