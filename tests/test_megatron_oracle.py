"""The oracle itself: real megatron-core gives transformers' logits for rank files written by hand, and not otherwise."""

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


def test_hand_written_ranks_give_the_logits_of_transformers(tmp_path: Path) -> None:
    cases = {**ranks.CASES, **ranks.CONTROLS}
    jobs = [
        Load(ranks.model_of(case), case.grid, ranks.write(case, tmp_path / name), "torch", ranks.input_ids())
        for name, case in cases.items()
    ]
    errors = {
        name: relative(found, ranks.expected(case))
        for (name, case), found in zip(cases.items(), oracle.run(jobs), strict=True)
    }
    assert {name: error for name, error in errors.items() if name in ranks.CASES and error > TOLERANCE} == {}
    assert {name: error for name, error in errors.items() if name in ranks.CONTROLS and error < 1e-2} == {}


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
