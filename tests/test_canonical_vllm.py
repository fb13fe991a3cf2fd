"""vLLM's transformers backend runs the canonical class, with the code that lies beside the weights and no llmconvert.

Its log-probabilities are held against those of the class in transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from children import vllm_python
from test_models import VARIANTS

from llmconvert.converters.huggingface import convert
from llmconvert.models import CanonicalForCausalLM

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

# Its attention on a processor takes heads of 32 and more, its experts multiples of 32.
_EXPERTS = {"hidden_size": 96, "moe_intermediate_size": 64}
SHAPES = {
    "deepseek_v3": {**_EXPERTS, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20},
    "qwen2_moe": {
        **_EXPERTS, "num_attention_heads": 3, "num_key_value_heads": 1, "shared_expert_intermediate_size": 96,
    },
}  # fmt: skip


def _ask(arch: str, folder: Path) -> tuple[Path, list[list[int]], dict[str, Any]]:
    base, overrides = VARIANTS.get(arch, (arch, {}))
    shape = SHAPES.get(base, {"head_dim": 32} if base in checkpoints.NATIVE else {})
    checkpoints.make(base, folder / "source", **{**overrides, **shape})
    convert(folder / "source", folder / "canonical", to="canonical", verify="weights")
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 131, (count,), generator=generator).tolist() for count in (21, 9, 30)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    command = [vllm_python(), str(ROOT / "tests/canonical_vllm.py"), "canonical", "prompts.json", "answer.json"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_MODULES_CACHE": str(folder / "code")
    }
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (folder / "answer.json").exists(), run.stdout[-2000:] + run.stderr[-2000:]
    return folder / "canonical", prompts, json.loads((folder / "answer.json").read_text())


@pytest.mark.parametrize("arch", ["gemma2", "granite", "glm4", "qwen2_moe", "deepseek_v3"])
def test_vllm_computes_the_model(arch: str, tmp_path: Path) -> None:
    canonical, prompts, answer = _ask(arch, tmp_path)
    assert "refused" not in answer, answer
    model = CanonicalForCausalLM.from_pretrained(canonical, attn_implementation="eager")
    for ids, found, made in zip(prompts, answer["log_probs"], answer["made"], strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            whole = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        wanted = scores[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert (torch.tensor(found) - wanted).abs().max() < 1e-3
        assert whole[0, len(ids) :].tolist() == made


@pytest.mark.parametrize(("arch", "why"), [("baichuan_13b", "ALiBi"), ("baichuan2", "NormHead")])
def test_what_vllm_would_leave_out_is_refused(arch: str, why: str, tmp_path: Path) -> None:
    _, _, answer = _ask(arch, tmp_path)
    assert why in answer.get("refused", ""), answer
