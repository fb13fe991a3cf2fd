"""The way home from Megatron: dtypes, biases, companions, targets, and copies that have drifted apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch

from llmconvert.converters.huggingface import convert
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.merge import merge_checkpoint
from llmconvert.converters.megatron.reshard import reshard_checkpoint
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.errors import BadInput, Refused, Usage

GRID = Grid(tp=2, pp=3)


def same(left: Path, right: Path) -> None:
    """Two checkpoints hold the same tensors, bit for bit."""
    before, after = checkpoints.tensors(left), checkpoints.tensors(right)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def trained(ranks: Path, directory: Path) -> Path:
    """A split checkpoint as a training run saves it: rank files alone, nothing of ours beside them."""
    shutil.copytree(ranks / "release", directory / "iter_0000007")
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    return directory


def edit(ranks: Path, change: Any) -> None:
    """Change each rank's state dict: `change(rank folder's name, state)`."""
    for path in sorted(ranks.rglob("model_optim_rng.pt")):
        value = torch.load(path, weights_only=False)
        change(path.parent.name, value["model"])
        torch.save(value, path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_split_rounds_what_it_folds_as_convert_does(dtype: str, tmp_path: Path) -> None:
    source = tiny.make("granite", tmp_path / "source", dtype="bfloat16")
    convert(source, tmp_path / "llama", to="llama", dtype=dtype, verify="weights")
    split_checkpoint(source, tmp_path / "ranks", GRID, dtype=dtype, verify="weights")
    merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", to="llama", verify="weights")
    same(tmp_path / "llama", tmp_path / "merged")


def test_folded_numbers_are_rounded_once(tmp_path: Path) -> None:
    """Granite's residual multiplier times down_proj, in float32, and then to the dtype asked for."""
    source = tiny.make("granite", tmp_path / "source", dtype="bfloat16")
    before = checkpoints.tensors(source)
    for dtype in ("float32", "float16"):
        split_checkpoint(source, tmp_path / dtype, Grid(), dtype=dtype, verify="weights")
        path = tmp_path / dtype / "release" / "mp_rank_00" / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)["model"]
        for layer in range(3):
            stem = f"model.layers.{layer}."
            exact = before[f"{stem}mlp.down_proj.weight"].float() * 0.3
            found = state[f"decoder.layers.{layer}.mlp.linear_fc2.weight"]
            assert torch.equal(found, exact.to(getattr(torch, dtype)))


def test_merge_rounds_as_convert_does(tmp_path: Path) -> None:
    """A rewrite with arithmetic on the way out: heads doubled with zeros, q times the square root of two."""
    source = tiny.make("llama", tmp_path / "source", dtype="bfloat16")
    split_checkpoint(source, tmp_path / "ranks", GRID, verify="weights")
    for dtype in (None, "float32", "float16"):
        convert(source, tmp_path / f"converted{dtype}", to="chatglm", dtype=dtype, verify="weights")
        merge_checkpoint(tmp_path / "ranks", tmp_path / f"merged{dtype}", to="chatglm", dtype=dtype, verify="weights")
        same(tmp_path / f"converted{dtype}", tmp_path / f"merged{dtype}")


ATTENTION_BIASES = {
    "llama": ("llama", {"attention_bias": True}),
    "internlm2": ("internlm2", {"bias": True}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "granite": ("granite", {"attention_bias": True}),
}


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
@pytest.mark.parametrize("name", ATTENTION_BIASES)
def test_biases_of_attention_alone_come_home(name: str, fmt: str, tmp_path: Path) -> None:
    arch, overrides = ATTENTION_BIASES[name]
    source = tiny.make(arch, tmp_path / "source", dtype="float32", **overrides)
    report = split_checkpoint(source, tmp_path / "ranks", GRID, fmt=fmt, verify="weights")
    assert any("zero bias" in step["name"] for step in report.steps)
    report = merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    assert any("leave out the zero biases" in step["name"] for step in report.steps)
    assert any(why == "checked to be zero" for why in report.dropped.values())
    if name != "granite":  # its multipliers were folded: to rounding
        same(source, tmp_path / "merged")
    # Without the record, from the args alone: in an architecture that has biases on the MLP they are kept, as zeros.
    report = merge_checkpoint(trained(tmp_path / "ranks", tmp_path / "trained"), tmp_path / "plain",
                              to="llama" if name != "qwen3" else None, verify="weights")  # fmt: skip
    assert not report.failure


def moved(rank: str, state: dict[str, torch.Tensor]) -> None:
    """What training may make of a bias that was zero."""
    state["decoder.layers.0.mlp.linear_fc2.bias"][0] = 0.5


def test_biases_that_training_made_stay(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source", attention_bias=True)
    split_checkpoint(source, tmp_path / "ranks", GRID, verify="weights")
    edit(tmp_path / "ranks", moved)
    merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    assert read(tmp_path / "merged" / "config.json")["mlp_bias"] is True
    assert checkpoints.tensors(tmp_path / "merged")["model.layers.0.mlp.down_proj.bias"][0] == 0.5


def test_biases_that_training_made_are_not_dropped(tmp_path: Path) -> None:
    source = tiny.make("internlm2", tmp_path / "source", bias=True)
    split_checkpoint(source, tmp_path / "ranks", GRID, verify="weights")
    edit(tmp_path / "ranks", moved)
    with pytest.raises(Refused, match="cannot hold `mlp_bias`.*not zero"):
        merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("arch", ["deepseek_moe", "qwen3_moe"])
def test_mixtures_with_a_bias_on_o_are_refused(arch: str, tmp_path: Path) -> None:
    """Megatron's add_bias_linear would give the router and the experts biases, and shared experts refuse it."""
    source = tiny.make(arch, tmp_path / "source")
    config, state = read(source / "config.json"), checkpoints.tensors(source)
    (source / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    state |= {
        name.replace("weight", "bias"): torch.randn(len(tensor), generator=torch.Generator().manual_seed(0))
        for name, tensor in state.items() if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
    }  # fmt: skip
    checkpoints.write_weights(state, source)
    with pytest.raises(Refused, match="`o_bias`.*not zero") as refusal:
        split_checkpoint(source, tmp_path / "ranks", Grid(), verify="weights")
    assert "with experts not on all" in (refusal.value.hint or "")
    for name, tensor in state.items():
        if name.endswith("o_proj.bias"):
            tensor.zero_()
    checkpoints.write_weights(state, source)
    split_checkpoint(source, tmp_path / "ranks", Grid(ep=2), verify="weights")
    merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    same(source, tmp_path / "merged")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A Qwen2 checkpoint with a tokenizer, its ranks, and those as a training run saves them."""
    folder = tmp_path_factory.mktemp("qwen")
    source = tiny.make("qwen2", folder / "source", tokenizer=True, rms_norm_eps=1e-5, config_form="5")
    split_checkpoint(source, folder / "ranks", GRID, verify="weights")
    return source, folder / "ranks", trained(folder / "ranks", folder / "trained")


@pytest.mark.parametrize("how", ["directory", "file", "beside"])
def test_the_way_home_from_training_is_whole(how: str, qwen: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, ranks, run = qwen
    config: Path | None = ranks / "hf"
    if how == "file":
        config = ranks / "hf" / "config.json"
    elif how == "beside":
        run, config = Path(shutil.copytree(run, tmp_path / "run")), None
        shutil.copytree(ranks / "hf", run / "hf")
    report = merge_checkpoint(run, tmp_path / "merged", config=config, device="cpu")
    assert report.target_architecture == "qwen2" and report.logits is not None
    same(source, tmp_path / "merged")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert read(tmp_path / "merged" / name) == read(source / name), name
    assert any("config.json is the original one" in note for note in report.notes)


def test_token_ids_come_along_into_another_dialect(qwen: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, ranks, run = qwen
    merge_checkpoint(run, tmp_path / "merged", to="llama", config=ranks / "hf", verify="weights")
    config, own = (read(folder / "config.json") for folder in (tmp_path / "merged", source))
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert {key: config[key] for key in keys} == {key: own[key] for key in keys} and config["model_type"] == "llama"
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_config_that_no_longer_describes_the_model_is_written_anew(
    qwen: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, ranks, run = qwen
    folder = Path(shutil.copytree(ranks / "hf", tmp_path / "hf"))
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 3e-3}))
    report = merge_checkpoint(run, tmp_path / "merged", config=folder, verify="weights")
    written = read(tmp_path / "merged" / "config.json")
    assert written["rms_norm_eps"] == 1e-5 and written["eos_token_id"] == config["eos_token_id"]
    assert not any("original" in note for note in report.notes)


def test_reshard_takes_the_companions_along(qwen: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, ranks, run = qwen
    reshard_checkpoint(run, tmp_path / "again", Grid(tp=1, pp=1), config=ranks / "hf", verify="weights")
    merge_checkpoint(tmp_path / "again", tmp_path / "merged", verify="weights")
    same(source, tmp_path / "merged")
    assert read(tmp_path / "merged" / "config.json") == read(source / "config.json")
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_weights_beside_the_config_are_not_taken(qwen: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, _, run = qwen
    report = merge_checkpoint(run, tmp_path / "merged", config=source, verify="weights")
    same(source, tmp_path / "merged")
    assert set(report.not_carried.values()) == {"weights, which the ranks hold"} and len(report.not_carried) == 3


def test_a_family_means_what_it_means_to_convert(qwen: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, ranks, run = qwen
    for place in (ranks, run):
        report = merge_checkpoint(place, tmp_path / "out", to="qwen", vocab_size=131, verify="weights", dry_run=True)
        assert report.target_architecture == "qwen2"
    v1 = tiny.make("qwen", tmp_path / "v1")
    split_checkpoint(v1, tmp_path / "v1-ranks", GRID, verify="weights")
    assert (
        merge_checkpoint(tmp_path / "v1-ranks", tmp_path / "out", to="qwen", dry_run=True).target_architecture == "qwen1"
    )


def test_a_quantised_model_comes_home_as_what_it_is(tmp_path: Path) -> None:
    """What was dequantised on the way there is not called FP8 on the way back."""
    source = checkpoints.make("deepseek_v3", tmp_path / "source", dtype=torch.bfloat16, num_experts_per_tok=2)
    convert(source, tmp_path / "fp8", to="deepseek_v3", dtype="fp8-block128", verify="weights")
    split_checkpoint(tmp_path / "fp8", tmp_path / "ranks", Grid(ep=2), verify="weights")
    merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    config = read(tmp_path / "merged" / "config.json")
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"


def drifted(ranks: Path, directory: Path) -> Path:
    """Ranks whose norms have drifted apart a little, some more than others."""
    shutil.copytree(ranks, directory)

    def drift(rank: str, state: dict[str, torch.Tensor]) -> None:
        if rank.startswith("mp_rank_01"):
            for name, tensor in state.items():
                if name == "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight":
                    tensor += 2.0**-12
                elif name.endswith("layer_norm_weight"):
                    tensor[3] += 2.0**-14

    edit(directory, drift)
    return directory


@pytest.mark.parametrize("command", [merge_checkpoint, reshard_checkpoint])
def test_copies_that_drifted_apart_are_settled_when_asked_to(
    command: Any, qwen: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, ranks, _ = qwen
    apart = drifted(ranks, tmp_path / "ranks")
    more = (Grid(),) if command is reshard_checkpoint else ()
    most = (
        "most of all `decoder.layers.0.self_attention.linear_qkv.layer_norm_weight`, 0.00024 between [^;]*tensor rank 1"
    )
    with pytest.raises(BadInput, match=f"6 copies differ, {most}, where the largest entry is") as fault:
        command(apart, tmp_path / "out", *more, verify="weights")
    assert "`--replica first`" in (fault.value.hint or "") and "`--replica mean`" in (fault.value.hint or "")
    with pytest.raises(Usage, match="`median`"):
        command(apart, tmp_path / "out", *more, replica="median", verify="weights")
    with pytest.raises(Refused, match="no one model"):
        command(apart, tmp_path / "out", *more, replica="mean")
    before = checkpoints.tensors(source)
    for policy, share in (("first", 0.0), ("mean", 0.5)):
        report = command(apart, tmp_path / policy, *more, replica=policy, verify="weights")
        assert any("6 copies differ from the first rank's" in note and "0.00024" in note for note in report.notes)
        made = tmp_path / policy
        if command is reshard_checkpoint:
            merge_checkpoint(made, tmp_path / f"{policy}-hf", verify="weights")
            made = tmp_path / f"{policy}-hf"
        after = checkpoints.tensors(made)
        for name, tensor in before.items():
            moved = tensor.clone()
            if name.endswith("input_layernorm.weight"):
                moved += share * 2.0**-12 if share else 0.0
            elif name.endswith("post_attention_layernorm.weight"):
                moved[3] += share * 2.0**-14
            assert torch.allclose(after[name], moved, rtol=0, atol=2.0**-24), name
            if "layernorm" not in name:
                assert torch.equal(after[name], tensor), name


def test_a_tied_head_that_drifted_apart_is_settled(tmp_path: Path) -> None:
    source = tiny.make("qwen2_tied", tmp_path / "source")
    split_checkpoint(source, tmp_path / "ranks", GRID, verify="weights")

    def drift(rank: str, state: dict[str, torch.Tensor]) -> None:
        if "output_layer.weight" in state:
            state["output_layer.weight"][1] += 0.25

    edit(tmp_path / "ranks", drift)
    with pytest.raises(BadInput, match="embedding.* 1 copy differs, most of all"):
        merge_checkpoint(tmp_path / "ranks", tmp_path / "out", verify="weights")
    before = checkpoints.tensors(source)["model.embed_tokens.weight"]
    for policy, share in (("first", 0.0), ("mean", 0.125)):
        merge_checkpoint(tmp_path / "ranks", tmp_path / policy, replica=policy, verify="weights")
        after = checkpoints.tensors(tmp_path / policy)["model.embed_tokens.weight"]
        assert torch.allclose(after[1], before[1] + share, rtol=0, atol=1e-7)


def test_replicas_that_agree_need_no_policy(qwen: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, ranks, _ = qwen
    report = merge_checkpoint(ranks, tmp_path / "merged", replica="mean", device="cpu")
    same(source, tmp_path / "merged")
    assert not any("copies" in note for note in report.notes)
