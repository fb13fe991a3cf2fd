"""Megatron checkpoints that are not what they should be: one message, the documented code, nothing written."""

from __future__ import annotations

import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmconvert.checkpoint.megatron import open_megatron
from llmconvert.checkpoint.torch_dist import open_torch_dist
from llmconvert.converters.megatron.grid import Grid, chunks, padded_vocabulary
from llmconvert.converters.megatron.merge import merge_checkpoint, open_model
from llmconvert.converters.megatron.reshard import reshard_checkpoint
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.errors import BadInput, LlmconvertError, ProofFailed, Refused, Usage
from llmconvert.verify.logits import compare_logits

Edit = Callable[[dict], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source, its ranks at TP 2 PP 3, and its `torch_dist` form."""
    folder = tmp_path_factory.mktemp("made")
    source = tiny.make("qwen2_tied", folder / "source")
    split_checkpoint(source, folder / "ranks", Grid(tp=2, pp=3), verify="weights")
    split_checkpoint(source, folder / "dist", Grid(), fmt="torch_dist", verify="weights")
    return source, folder / "ranks", folder / "dist"


def _edit(directory: Path, rank: str, edit: Edit) -> None:
    path = directory / "release" / rank / "model_optim_rng.pt"
    value = torch.load(path, weights_only=False)
    edit(value)
    torch.save(value, path)


def old_version(value: dict) -> None:
    value["checkpoint_version"] = 1.0


def no_model(value: dict) -> None:
    del value["model"]


def other_iteration(value: dict) -> None:
    value["iteration"] = 7


def drop_tensor(value: dict) -> None:
    del value["model"]["decoder.layers.0.mlp.linear_fc2.weight"]


def add_tensor(value: dict) -> None:
    value["model"]["decoder.layers.0.mlp.strange.weight"] = torch.zeros(2)


def reshape_tensor(value: dict) -> None:
    value["model"]["decoder.layers.0.mlp.linear_fc1.weight"] = torch.zeros(4, 48)


def change_copy(value: dict) -> None:
    value["model"]["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"][0] += 1


def untie(value: dict) -> None:
    value["model"]["output_layer.weight"][1, 1] += 1


def layernorm(value: dict) -> None:
    value["args"].normalization = "LayerNorm"


def experts(value: dict) -> None:
    value["args"].num_experts = 8


FAULTS: list[tuple[str, Edit, type[LlmconvertError], str]] = [
    ("mp_rank_00_000", old_version, Refused, "checkpoint_version"),
    ("mp_rank_01_001", no_model, BadInput, "no `model`"),
    ("mp_rank_01_001", other_iteration, BadInput, "iteration"),
    ("mp_rank_01_001", drop_tensor, BadInput, "linear_fc2.weight` of pipeline rank 1, chunk 0, tensor rank 1"),
    ("mp_rank_00_002", add_tensor, BadInput, "strange"),
    ("mp_rank_00_000", reshape_tensor, BadInput, "linear_fc1.weight"),
    ("mp_rank_01_000", change_copy, BadInput, "copy of .* tensor rank 0's"),
    ("mp_rank_00_002", untie, BadInput, "embedding"),
    ("mp_rank_00_000", layernorm, Refused, "LayerNorm"),
    ("mp_rank_00_000", experts, BadInput, "missing: .*router.weight"),
]


@pytest.mark.parametrize(("rank", "edit", "error", "words"), FAULTS, ids=[fault[1].__name__ for fault in FAULTS])
def test_a_faulty_rank_is_named(
    rank: str, edit: Edit, error: type[LlmconvertError], words: str, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    ranks = Path(shutil.copytree(made[1], tmp_path / "ranks"))
    _edit(ranks, rank, edit)
    for run in (
        lambda: merge_checkpoint(ranks, tmp_path / "out", verify="weights"),
        lambda: reshard_checkpoint(ranks, tmp_path / "out", Grid(), verify="weights"),
    ):
        with pytest.raises(error, match=words):
            run()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks"]


def test_a_missing_rank_and_a_truncated_one(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    ranks = Path(shutil.copytree(made[1], tmp_path / "ranks"))
    path = ranks / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="truncated"):
        open_megatron(ranks)
    path.unlink()
    with pytest.raises(BadInput, match="mp_rank_01_001"):
        open_megatron(ranks)
    (ranks / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(BadInput, match="iter_0000012"):
        open_megatron(ranks)


class _Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('it ran')",))


def test_a_hostile_pickle_is_not_run(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    ranks = Path(shutil.copytree(made[1], tmp_path / "ranks"))
    _edit(ranks, "mp_rank_00_000", lambda value: value.update(rng_state=_Hostile()))
    with pytest.raises(Refused, match="exec") as refusal:
        open_model(ranks)
    assert "--trust-pickle" in (refusal.value.hint or "")
    opened = open_model(ranks, trust_pickle=True)  # read past it: a stand-in, still not run
    assert opened.config.num_hidden_layers == 3
    dist = Path(shutil.copytree(made[2], tmp_path / "dist"))
    (dist / "release" / ".metadata").write_bytes(pickle.dumps(_Hostile()))
    with pytest.raises(BadInput, match="exec"):
        open_torch_dist(dist / "release")


def test_a_dist_checkpoint_cut_short_or_incomplete(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dist = Path(shutil.copytree(made[2], tmp_path / "dist"))
    data = dist / "release" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1000])
    with pytest.raises(BadInput, match="ends inside"):
        open_megatron(dist)
    data.unlink()
    with pytest.raises(BadInput, match="missing"):
        open_megatron(dist)


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
def test_an_iteration_is_written_and_found(fmt: str, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    split_checkpoint(made[0], tmp_path / "ranks", Grid(tp=2), fmt=fmt, iteration=12, verify="weights")
    assert (tmp_path / "ranks" / "latest_checkpointed_iteration.txt").read_text() == "12"
    opened = open_megatron(tmp_path / "ranks", iteration=12)
    assert opened.iteration == 12 and opened.release.name == "iter_0000012" and opened.args["iteration"] == 12
    with pytest.raises(BadInput, match="iter_0000013") as absent:
        open_megatron(tmp_path / "ranks", iteration=13)
    assert "12" in (absent.value.hint or "")
    with pytest.raises(Usage, match="at least 1"):
        split_checkpoint(made[0], tmp_path / "out", Grid(), iteration=0, verify="weights")


def test_optimizer_state_is_left_out_and_counted(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    ranks = Path(shutil.copytree(made[1], tmp_path / "ranks"))
    state = {"optimizer": {"exp_avg": torch.zeros(1000)}, "rng_state": [torch.zeros(10, dtype=torch.uint8)]}
    _edit(ranks, "mp_rank_00_000", lambda value: value.update(state))
    assert open_megatron(ranks).left_out == 4010
    report = merge_checkpoint(ranks, tmp_path / "out", verify="weights")
    assert any("optimizer" in note for note in report.notes)


def test_args_that_lack_a_size_take_it_from_a_config(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, ranks = made[0], Path(shutil.copytree(made[1], tmp_path / "ranks"))
    (ranks / "llmconvert.json").unlink()
    shutil.rmtree(ranks / "hf")

    def forget(value: dict) -> None:
        args = vars(value["args"])
        for key in ("vocab_size", "norm_epsilon", "layernorm_epsilon"):
            del args[key]
        value["args"] = Namespace(**args)

    for folder in sorted((ranks / "release").iterdir()):
        _edit(ranks, folder.name, forget)
    with pytest.raises(BadInput, match="vocabulary"):
        merge_checkpoint(ranks, tmp_path / "out", to="qwen2", verify="weights")
    with pytest.raises(BadInput, match="norm_epsilon"):
        merge_checkpoint(ranks, tmp_path / "out", to="qwen2", vocab_size=131, verify="weights")
    merge_checkpoint(ranks, tmp_path / "out", to="qwen2", config=source, verify="weights")
    assert compare_logits(source, tmp_path / "out", device="cpu", greedy_tokens=0).verdict


@pytest.mark.parametrize("options", [
    {"tp": 4}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"vpp": 2}, {"pp": 2, "first": 4}, {"pp": 2, "layout": "Et|ttL|"},
    {"pp": 3, "first": 1, "embedding_counts": True}, {"tp": 0},
])  # fmt: skip
def test_grids_a_model_cannot_be_cut_by_are_usage_errors(
    options: dict, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(Usage):
        split_checkpoint(made[0], tmp_path / "out", Grid(**options), verify="weights")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arch", ["baichuan_13b", "glm4", "mistral_sliding", "qwen2_yarn"])
def test_what_megatron_cannot_hold_is_refused(arch: str, tmp_path: Path) -> None:
    import checkpoints

    make = tiny.make if arch in tiny.ARCHITECTURES else checkpoints.make
    with pytest.raises(Refused):
        split_checkpoint(make(arch, tmp_path / "source"), tmp_path / "out", Grid(), verify="weights")


@pytest.mark.parametrize("name", ["self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"])
def test_a_fault_in_one_shard_is_found_by_the_logits(name: str, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    ranks = Path(shutil.copytree(made[1], tmp_path / "ranks"))

    def swap(value: dict) -> None:
        tensor = value["model"][f"decoder.layers.0.{name}"]
        tensor[:2] = tensor[:2].flip(0)

    _edit(ranks, "mp_rank_01_001", swap)
    report = compare_logits(made[0], ranks, device="cpu", greedy_tokens=0)
    part = "attention" if "attention" in name else "mlp"
    assert not report.verdict and [d.place for d in report.departures] == [f"layer 1, {part}"]
    assert f"mp_rank_01_001/0/decoder.layers.0.{name}" in report.departures[0].second
    with pytest.raises(ProofFailed):
        merged = merge_checkpoint(ranks, tmp_path / "out", verify="weights")
        found = compare_logits(made[0], tmp_path / "out", device="cpu", greedy_tokens=0)
        assert merged.published and not found.verdict
        raise ProofFailed("as it should: what was faulty stays faulty")


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 96), pp=st.integers(1, 8), vpp=st.integers(1, 4), first=st.none() | st.integers(0, 12),
    last=st.none() | st.integers(0, 12), counted=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_every_grid_that_is_taken_deals_every_layer_once(
    layers: int, pp: int, vpp: int, first: int | None, last: int | None, counted: tuple[bool, bool]
) -> None:
    try:
        found = chunks(layers, Grid(1, pp, vpp, first, last, *counted))
    except Usage:
        return
    assert [i for chunk in found for i in chunk.layers] == list(range(layers))
    assert [(c.pp_rank, c.vpp_chunk) for c in found] == [(p, v) for v in range(vpp) for p in range(pp)]
    assert [c.embedding for c in found] == [True] + [False] * (len(found) - 1)
    assert [c.head for c in found] == [False] * (len(found) - 1) + [True]


@given(st.integers(1, 10**6), st.integers(1, 16), st.sampled_from([1, 64, 128]))
def test_the_padded_vocabulary_is_the_least_that_ranks_share(size: int, tp: int, divisible: int) -> None:
    padded = padded_vocabulary(size, tp, divisible)
    assert padded >= size and padded % (tp * divisible) == 0 and padded - size < tp * divisible


def test_a_layout_names_the_layers_that_predict_further_tokens() -> None:
    assert [chunk.layers for chunk in chunks(3, Grid(pp=2, layout="Et|ttmL"), 1)] == [(0,), (1, 2)]
    for layout, further in (("Et|ttL", 1), ("Et|ttmL", 0), ("Et|ttmL", 2), ("Et|tt", 0)):
        with pytest.raises(Usage, match="is not a layout"):
            chunks(3, Grid(pp=2, layout=layout), further)
