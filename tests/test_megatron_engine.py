"""Megatron-LM's default layers, those of Transformer Engine: what is written for them loads, strictly.

The layers are megatron-core's own; under them is `engine_standin`, since Transformer Engine itself needs CUDA.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import megatron_oracle as oracle
import megatron_ranks as ranks
import pytest
import torch
from test_megatron import own, relative, source_of
from test_megatron_oracle import LATENT, MIXTURE

from llmconvert.converters.megatron import layout
from llmconvert.converters.megatron.merge import merge_checkpoint
from llmconvert.converters.megatron.parts import states_beside
from llmconvert.converters.megatron.split import split_checkpoint

pytestmark = pytest.mark.skipif(not oracle.AVAILABLE, reason="needs megatron-core and psutil")
TOLERANCE = 1e-5

DENSE = ("tp2", "tp4_one_kv_head", "tied_pp2", "vpp2", "qkv_bias_tp4", "qk_norm", "biases", "biases_of_attention",
         "rotary_interleaved_half")  # fmt: skip
LARGE = (
    "qwen2_moe_second_layer_dense", "qwen3_moe_tp2_ep2_etp1", "mixtral_ep2", "deepseek_v3_pp2_ep2",
    "deepseek_v3_yarn_two_mtp", "deepseek_v2_tp2", "glm4_moe_tp2_ep2", "deepseek_v3_dense",
)  # fmt: skip
CASES = {name: ranks.CASES[name] for name in DENSE} | {name: ranks.LARGE_CASES[name] for name in LARGE}
GROUPED = ("mixtral_ep2", "deepseek_v3_pp2_ep2", "qwen3_moe_tp2_ep2_etp1")


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
def test_the_default_layers_load_what_split_writes_and_give_the_logits_of_transformers(
    fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: dict[str, oracle.Load] = {}
    for name, case in CASES.items():
        source = source_of(case, tmp_path / name / "hf")
        for grouped in (False, True) if name in GROUPED else (False,):
            folder = tmp_path / name / f"ranks{grouped}"
            split_checkpoint(source, folder, own(case.grid), fmt=fmt, grouped=grouped, divisible_by=1, verify="weights")
            args = torch.load(next(folder.rglob("*.pt")), weights_only=False)["args"]
            model = ranks.model_of(case)
            model = replace(model, padded_vocab_size=args.padded_vocab_size, moe_grouped_gemm=grouped)
            name_ = f"{name}{', grouped' if grouped else ''}"
            jobs[name_] = oracle.Load(model, case.grid, folder, fmt, ranks.input_ids(), engine=True)
    # A control: without the states that only Transformer Engine's modules have it does not load.
    bare = tmp_path / "bare"
    with monkeypatch.context() as patch:
        patch.setattr(layout, "states_beside", lambda name, engine: states_beside(name, engine=False))
        split_checkpoint(
            tmp_path / "tp2" / "hf", bare, own(CASES["tp2"].grid), fmt=fmt, divisible_by=1, verify="weights"
        )
    lacking = replace(jobs["tp2"], directory=bare)
    *results, refused = oracle.run([*jobs.values(), lacking])
    errors = {
        name: relative(found, ranks.expected(CASES[name.removesuffix(", grouped")]))
        for name, found in zip(jobs, results, strict=True)
    }
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}
    assert isinstance(refused, oracle.Failed) and "final_layernorm._extra_state" in str(refused)


SAVED = {
    "dense": (oracle.Model(add_qkv_bias=True, qk_layernorm=True), oracle.Grid(tp=2, pp=2), "qwen3"),
    "mixture": (replace(MIXTURE, qk_layernorm=False, moe_grouped_gemm=True), oracle.Grid(tp=2, ep=2, etp=1), "qwen2_moe"),
    "latent": (replace(LATENT, moe_grouped_gemm=True), oracle.Grid(tp=2, ep=2), "deepseek_v3"),
}  # fmt: skip


def test_what_the_default_layers_save_merges(tmp_path: Path) -> None:
    """With its extra states, its fused norms and its grouped experts."""
    jobs = {
        f"{name}-{fmt}": oracle.Save(model, grid, tmp_path / f"{name}-{fmt}", fmt, ranks.input_ids(), seed=1, engine=True)
        for name, (model, grid, _) in SAVED.items() for fmt in ("torch", "torch_dist")
    }  # fmt: skip
    import transformers

    for name, wanted in zip(jobs, oracle.run(list(jobs.values())), strict=True):
        model, _, to = SAVED[name.partition("-")[0]]
        assert not isinstance(wanted, oracle.Failed), wanted
        merge_checkpoint(tmp_path / name, tmp_path / f"{name}-hf", to=to, vocab_size=131, verify="weights")
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf", attn_implementation="eager")
        with torch.no_grad():
            given = hf(torch.from_numpy(ranks.input_ids())).logits.numpy()
        assert relative(wanted[0] if model.mtp_num_layers else wanted, given) <= TOLERANCE, name
