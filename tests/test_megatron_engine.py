"""Megatron-LM's default layers, those of Transformer Engine: what is written for them loads, strictly.

The layers are megatron-core's own; under them is `engine_standin`, since Transformer Engine itself needs CUDA.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import megatron_oracle as oracle
import megatron_ranks as ranks
import numpy as np
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


SAVED = {
    "dense": (oracle.Model(add_qkv_bias=True, qk_layernorm=True), oracle.Grid(tp=2, pp=2), "qwen3"),
    "mixture": (replace(MIXTURE, qk_layernorm=False, moe_grouped_gemm=True), oracle.Grid(tp=2, ep=2, etp=1), "qwen2_moe"),
    "latent": (replace(LATENT, moe_grouped_gemm=True), oracle.Grid(tp=2, ep=2), "deepseek_v3"),
}  # fmt: skip
FORMATS = ("torch", "torch_dist")
Results = dict[tuple[str, ...], np.ndarray | oracle.Failed]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """What the default layers make of what `split` writes, and what they save: (kind, case, format), in one launch."""
    folder, jobs = tmp_path_factory.mktemp("engine"), dict[tuple[str, ...], oracle.Load]()

    def load(name: str, fmt: str, kind: str) -> None:
        case, ranks_ = CASES[name], folder / f"{name}-{kind}-{fmt}"
        grouped = kind == "grouped"
        split_checkpoint(
            folder / name, ranks_, own(case.grid), fmt=fmt, grouped=grouped, divisible_by=1, verify="weights"
        )
        args = torch.load(next(ranks_.rglob("*.pt")), weights_only=False)["args"]
        model = replace(ranks.model_of(case), padded_vocab_size=args.padded_vocab_size, moe_grouped_gemm=grouped)
        jobs[kind, name, fmt] = oracle.Load(model, case.grid, ranks_, fmt, ranks.input_ids(), engine=True)

    for name, case in CASES.items():
        source_of(case, folder / name)
        for fmt in FORMATS:
            load(name, fmt, "sequential")
            if name in GROUPED:
                load(name, fmt, "grouped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "states_beside", lambda name, engine: states_beside(name, engine=False))
        for fmt in FORMATS:
            load("tp2", fmt, "bare")
    for name, (model, grid, _) in SAVED.items():
        for fmt in FORMATS:
            saved = folder / f"{name}-saved-{fmt}"
            jobs["saved", name, fmt] = oracle.Save(model, grid, saved, fmt, ranks.input_ids(), seed=1, engine=True)
    return folder, dict(zip(jobs, oracle.run(list(jobs.values())), strict=True))


def test_they_load_what_split_writes_and_give_the_logits_of_transformers(made: tuple[Path, Results]) -> None:
    errors = {
        key: relative(found, ranks.expected(CASES[key[1]]))
        for key, found in made[1].items() if key[0] in ("sequential", "grouped")
    }  # fmt: skip
    assert len(errors) == 2 * (len(CASES) + len(GROUPED))
    assert {key: error for key, error in errors.items() if error > TOLERANCE} == {}


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
def test_without_the_states_of_norms_they_do_not_load(fmt: str, made: tuple[Path, Results]) -> None:
    """The control: the states both implementations have are not all."""
    found = made[1]["bare", "tp2", fmt]
    assert isinstance(found, oracle.Failed) and "final_layernorm._extra_state" in str(found)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", SAVED)
def test_what_they_save_merges(name: str, fmt: str, made: tuple[Path, Results], tmp_path: Path) -> None:
    """With its states, its fused norms and its grouped experts."""
    import transformers

    folder, results = made
    (model, _, to), wanted = SAVED[name], results["saved", name, fmt]
    assert not isinstance(wanted, oracle.Failed), wanted
    merge_checkpoint(folder / f"{name}-saved-{fmt}", tmp_path / "hf", to=to, vocab_size=131, verify="weights")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    with torch.no_grad():
        given = hf(torch.from_numpy(ranks.input_ids())).logits.numpy()
    assert relative(wanted[0] if model.mtp_num_layers else wanted, given) <= TOLERANCE
