"""The oracle itself: real megatron-core gives transformers' logits for rank files written by hand, and not otherwise."""

from dataclasses import replace
from pathlib import Path

import megatron_oracle as oracle
import megatron_ranks as ranks
import numpy as np
import pytest
import torch
from megatron_oracle import Failed, Grid, Load, Model, Save

pytestmark = pytest.mark.skipif(not oracle.AVAILABLE, reason="needs megatron-core and psutil")

TOLERANCE = 1e-5


def relative(found: np.ndarray | Failed, wanted: np.ndarray) -> float:
    if isinstance(found, Failed):
        raise found
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# What TP, EP and PP do alone shows where they come together.
_LARGE_CASES = {
    name: case
    for name, case in ranks.LARGE_CASES.items()
    if case.grid.size > 2 or not name.endswith(("_tp1", "_tp2", "_ep2"))
}


@pytest.mark.parametrize(("cases", "controls"), [(ranks.CASES, ranks.CONTROLS), (_LARGE_CASES, ranks.LARGE_CONTROLS)])
def test_hand_written_ranks_give_the_logits_of_transformers(
    cases: dict[str, ranks.Case], controls: dict[str, ranks.Case], tmp_path: Path
) -> None:
    every = {**cases, **controls}
    jobs = [
        Load(ranks.model_of(case), case.grid, ranks.write(case, tmp_path / name), "torch", ranks.input_ids())
        for name, case in every.items()
    ]
    errors = {
        name: relative(found, ranks.expected(case))
        for (name, case), found in zip(every.items(), oracle.run(jobs), strict=True)
    }
    assert {name: error for name, error in errors.items() if name in cases and error > TOLERANCE} == {}
    assert {name: error for name, error in errors.items() if name in controls and error < 1e-2} == {}


def test_yarn_without_what_no_option_says_is_another_model(tmp_path: Path) -> None:
    """Kimi-K2's beta_fast is 1: with the 32 that Megatron-LM's command line leaves it at the same weights differ."""
    case = ranks.LARGE_CASES["deepseek_v2_tp1"]
    rope = {**case.overrides["rope_scaling"], "beta_fast": 1}
    case = replace(case, overrides={**case.overrides, "rope_scaling": rope})
    model, directory = ranks.model_of(case), ranks.write(case, tmp_path)
    models = [model, replace(model, beta_fast=32.0), replace(model, original_max_position_embeddings=4096)]
    assert (model.beta_fast, model.original_max_position_embeddings) == (1, 64)
    found = oracle.run([Load(each, case.grid, directory, "torch", ranks.input_ids()) for each in models])
    same, *others = (relative(each, ranks.expected(case)) for each in found)
    assert same <= TOLERANCE and min(others) > 1e-2


@pytest.mark.slow
def test_what_it_saves_it_loads_on_any_grid_and_strictly(tmp_path: Path) -> None:
    ids, model = ranks.input_ids(), Model(add_qkv_bias=True, qk_layernorm=True)
    tied, grid, files = Model(tied=True), Grid(tp=2, pp=2, vpp=2), tmp_path / "torch"
    shared, layers = tmp_path / "torch_dist", tmp_path / "torch_dist_by_layer"
    by_layer = {"non_homogeneous_layers": True}
    same = [
        [
            Save(model, grid, files, "torch", ids, seed=1),
            Load(model, grid, files, "torch", ids),
            Save(model, grid, shared, "torch_dist", ids, seed=1),
            Load(model, Grid(), shared, "torch_dist", ids),
            Load(model, Grid(tp=4), shared, "torch_dist", ids),
            Save(model, grid, layers, "torch_dist", ids, 1, by_layer),
            Load(model, Grid(pp=2), layers, "torch_dist", ids),
        ],
        [
            Save(tied, Grid(tp=2, pp=2), tmp_path / "tied", "torch_dist", ids, seed=2),
            Load(tied, Grid(pp=2), tmp_path / "tied", "torch_dist", ids),
            Load(tied, Grid(tp=2), tmp_path / "tied", "torch_dist", ids),
        ],
    ]
    refused = [
        Load(Model(), grid, files, "torch", ids),  # tensors too many
        Load(Model(add_bias_linear=True, qk_layernorm=True), grid, files, "torch", ids),  # and too few
        Load(model, Grid(tp=2, pp=2), files, "torch", ids),  # chunks the grid lacks
        Load(Model(add_bias_linear=True, qk_layernorm=True), Grid(tp=2), shared, "torch_dist", ids),
    ]
    case = ranks.CASES["tp2_pp2"]
    broken = ranks.write(case, tmp_path / "broken")
    path = broken / "iter_0000001" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    del state["model"]["decoder.layers.0.mlp.linear_fc2.weight"]
    torch.save(state, path)
    # One rank fails alone: the others must not wait for it.
    refused.append(Load(ranks.model_of(case), case.grid, broken, "torch", ids))
    last = Load(model, grid, files, "torch", ids)
    *results, sound = oracle.run([*same[0], *same[1], *refused, last])
    assert relative(sound, results[0]) == 0.0
    count = len(same[0])
    for group in (results[:count], results[count : count + len(same[1])]):
        assert isinstance(group[0], np.ndarray)
        assert max(relative(found, group[0]) for found in group) <= TOLERANCE
    why = ("Unexpected key", "Missing key", "the grid asks for", "CheckpointException", "0.mlp.linear_fc2.weight")
    for found, words in zip(results[-len(refused) :], why, strict=True):
        assert isinstance(found, Failed) and words in str(found)


MIXTURE = Model(
    num_layers=3, add_qkv_bias=True, qk_layernorm=True, num_experts=6, moe_ffn_hidden_size=40, moe_router_topk=3,
    moe_router_pre_softmax=True, moe_shared_expert_intermediate_size=56, moe_shared_expert_gate=True,
)  # fmt: skip
# What a list of layers does to names in torch_dist, latent attention, and a layer for a further token.
LATENT = Model(
    num_layers=3, qk_layernorm=True, num_experts=8, moe_ffn_hidden_size=40, moe_router_topk=4,
    moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_topk_scaling_factor=2.5,
    moe_router_num_groups=4, moe_router_group_topk=2, moe_shared_expert_intermediate_size=80, moe_layer_freq=(0, 1, 1),
    mtp_num_layers=1, multi_latent_attention=True, q_lora_rank=24, kv_lora_rank=20, qk_head_dim=12,
    qk_pos_emb_head_dim=8, v_head_dim=10, norm_epsilon=1e-6,
)  # fmt: skip


def saved(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every rank file of format `torch`, by folder."""
    files = sorted(directory.glob("iter_0000001/*/model_optim_rng.pt"))
    every = {path.parent.name: torch.load(path, weights_only=False)["model"] for path in files}
    return {
        name: {key: value for key, value in part.items() if isinstance(value, torch.Tensor)}
        for name, part in every.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", [MIXTURE, LATENT], ids=["mixture", "latent"])
def test_what_it_saves_of_experts_it_loads_on_any_grid(model: Model, tmp_path: Path) -> None:
    ids, cut, apart = ranks.input_ids(), Grid(tp=2, ep=2), Grid(tp=2, ep=2, etp=1)
    staged = Grid(pp=2, ep=2, first=2)
    folders = {name: tmp_path / name for name in ("one", "torch", "apart", "staged", "dist", "layers", "halves")}
    groups = [
        [
            Save(model, cut, folders["torch"], "torch", ids, seed=1),
            Load(model, cut, folders["torch"], "torch", ids),
            Save(model, cut, folders["dist"], "torch_dist", ids, seed=1),
            *(Load(model, grid, folders["dist"], "torch_dist", ids) for grid in (Grid(), Grid(tp=4), apart, staged)),
            Save(model, cut, folders["layers"], "torch_dist", ids, 1, {"non_homogeneous_layers": True}),
            Load(model, staged, folders["layers"], "torch_dist", ids),
            Save(model, cut, folders["halves"], "torch_dist", ids, 1, {"singleton_local_shards": True}),
            *(Load(model, grid, folders["halves"], "torch_dist", ids) for grid in (cut, Grid(), staged)),
        ],
        [
            Save(model, apart, folders["apart"], "torch", ids, seed=1),
            Load(model, apart, folders["apart"], "torch", ids),
        ],
        [  # what no rank cuts does not depend on the grid
            Save(model, Grid(), folders["one"], "torch", ids, seed=1),
            Load(model, Grid(), folders["one"], "torch", ids),
            Save(model, staged, folders["staged"], "torch", ids, seed=1),
            Load(model, staged, folders["staged"], "torch", ids),
        ],
    ]
    refused = [
        Load(replace(model, num_experts=4), Grid(), folders["one"], "torch", ids),
        Load(replace(model, moe_shared_expert_intermediate_size=None), Grid(), folders["one"], "torch", ids),
        Load(replace(model, moe_ffn_hidden_size=32), Grid(), folders["dist"], "torch_dist", ids),
    ]
    results = oracle.run([job for group in groups for job in group] + refused)
    for group in groups:
        first, *others = (results.pop(0) for _ in group)
        assert isinstance(first, np.ndarray)
        assert max(relative(found, first) for found in others) <= TOLERANCE
    why = ("Unexpected key", "Unexpected key", "shape")
    for found, words in zip(results, why, strict=True):
        assert isinstance(found, Failed) and words in str(found)
    assert list(saved(folders["apart"])) == ["mp_rank_00_000", "mp_rank_01_001"]
    assert list(saved(folders["torch"])) == [f"mp_rank_0{tp}_00{ep}" for tp in (0, 1) for ep in (0, 1)]
    assert list(saved(folders["staged"])) == [f"mp_rank_00_00{pp}_00{ep}" for pp in (0, 1) for ep in (0, 1)]
    (whole,) = saved(folders["one"]).values()
    experts = [tensor for name, tensor in whole.items() if name.endswith("linear_fc2.weight") and ".local_" in name]
    assert len({tensor.numpy().tobytes() for tensor in experts}) == len(experts)
    assert all(tensor.std() > 0.05 for tensor in whole.values())
