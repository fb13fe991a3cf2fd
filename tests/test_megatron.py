"""Split and merge against the real megatron-core, and against rank files written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import megatron_oracle as oracle
import megatron_ranks as ranks
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from slowly import slowly
from test_megatron_oracle import LATENT

from llmconvert.checkpoint.torch_dist import open_torch_dist
from llmconvert.converters.equality import EQUAL, compare_weights
from llmconvert.converters.megatron import grid as grids
from llmconvert.converters.megatron.merge import merge_checkpoint
from llmconvert.converters.megatron.reshard import reshard_checkpoint
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.errors import Refused
from llmconvert.verify.logits import compare_logits

needs_megatron = pytest.mark.skipif(not oracle.AVAILABLE, reason="needs megatron-core and psutil")
TOLERANCE = 1e-5


def own(grid: oracle.Grid) -> grids.Grid:
    """The oracle's grid as ours."""
    return grids.Grid(
        grid.tp, grid.pp, grid.vpp or 1, grid.first, grid.last, grid.embedding_counts, grid.loss_counts, grid.layout,
        grid.ep, grid.etp,
    )  # fmt: skip


def source_of(case: ranks.Case, directory: Path) -> Path:
    """The transformers model of a case, saved by transformers, and the layers it leaves out beside it, as published."""
    model = ranks.build(case)
    model.save_pretrained(directory)
    if case.mtp:
        state, layers = checkpoints.tensors(directory), model.config.num_hidden_layers
        for name, tensor in ranks.tensors(case).items():
            if name.startswith(tuple(f"model.layers.{layers + k}." for k in range(case.mtp))):
                state |= _apart(name, tensor)
        for k in range(case.mtp):
            state[f"model.layers.{layers + k}.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
            state[f"model.layers.{layers + k}.shared_head.head.weight"] = state["lm_head.weight"].clone()
        save_file(
            {name: t.contiguous() for name, t in state.items()}, directory / "model.safetensors", {"format": "pt"}
        )
    return directory


def _apart(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fused experts, one by one."""
    stem, found, kind = name.partition("experts.")
    if not found or kind not in ("gate_up_proj", "down_proj"):
        return {name: tensor}
    result = {}
    for j, expert in enumerate(tensor):
        parts = (
            {"down_proj": expert}
            if kind == "down_proj"
            else dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
        )
        result |= {f"{stem}experts.{j}.{part}.weight": value for part, value in parts.items()}
    return result


ALL = {**ranks.CASES, **ranks.LARGE_CASES}
# Their rank files are compared byte by byte with those written by hand, which megatron-core loads: one grid each here.
LOADED = {**ranks.CASES, **{name: case for name, case in ranks.LARGE_CASES.items() if not name.endswith(("tp1", "_tp2", "_ep2"))},
          **{name: ranks.LARGE_CASES[name] for name in (
              "qwen2_moe_pp2_ep2", "mixtral_pp2_ep2", "deepseek_v3_pp2_ep2", "deepseek_v3_tp2_ep2_etp1")}}  # fmt: skip
TARGETS = {
    "qwen2": "qwen2", "qwen2_tied": "qwen2", "qwen3": "qwen3", "glm": "glm", "mixtral": "mixtral", "qwen2_moe": "qwen2_moe",
    **{name: name.removeprefix("megatron_") for name in checkpoints.LARGE},
}  # fmt: skip


def relative(found: np.ndarray | oracle.Failed, wanted: np.ndarray) -> float:
    if isinstance(found, oracle.Failed):
        raise found
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@needs_megatron
@pytest.mark.parametrize("fmt", [*slowly(["torch"]), "torch_dist"])
def test_megatron_core_loads_what_split_writes_and_gives_the_logits_of_transformers(fmt: str, tmp_path: Path) -> None:
    jobs = []
    for name, case in LOADED.items():
        source = source_of(case, tmp_path / name / "hf")
        split_checkpoint(
            source,
            tmp_path / name / "ranks",
            own(case.grid),
            fmt=fmt,
            transformer_impl="local",
            divisible_by=1,
            verify="weights",
        )
        args = torch.load(next((tmp_path / name / "ranks").rglob("*.pt")), weights_only=False)["args"]
        model = replace(ranks.model_of(case), padded_vocab_size=args.padded_vocab_size)
        jobs.append(oracle.Load(model, case.grid, tmp_path / name / "ranks", fmt, ranks.input_ids()))
    errors = {
        name: relative(found, ranks.expected(case))
        for (name, case), found in zip(LOADED.items(), oracle.run(jobs), strict=True)
    }
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize("name", ALL)
def test_shards_are_those_written_by_hand(name: str, tmp_path: Path) -> None:
    case = ALL[name]
    source = source_of(case, tmp_path / "hf")
    split_checkpoint(
        source, tmp_path / "ranks", own(case.grid), transformer_impl="local", divisible_by=1, verify="weights"
    )
    for (p, v, t, e), expected in ranks.shards(case).items():
        folder = (
            f"mp_rank_{t:02d}" + (f"_{p:03d}" if case.grid.pp > 1 else "") + (f"_{e:03d}" if case.grid.ep > 1 else "")
        )
        path = tmp_path / "ranks" / "release" / folder / "model_optim_rng.pt"
        whole = torch.load(path, weights_only=False, mmap=True)
        found = whole["model" if case.grid.vpp is None else f"model{v}"]
        found = {key: tensor for key, tensor in found.items() if not key.endswith("_extra_state")}
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            if "word_embeddings" not in key and "output_layer" not in key:  # padded to another size by hand
                assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ALL)
def test_hand_written_ranks_merge_to_the_tensors_of_transformers(name: str, tmp_path: Path) -> None:
    case = ALL[name]
    source = source_of(case, tmp_path / "hf")
    ranks.write(case, tmp_path / "ranks")
    target = TARGETS.get(case.arch, "llama")
    merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", to=target, config=source, verify="weights")
    before, after = checkpoints.tensors(source), checkpoints.tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize(
    "arch", ["qwen", "baichuan", "baichuan2", "chatglm2", "glm4_9b", "internlm2", "yi_old", "qwen3"]
)
def test_split_and_merge_bring_every_dialect_back(arch: str, tmp_path: Path) -> None:
    source = tiny.make(arch, tmp_path / "source", dtype="bfloat16", tokenizer=True)
    split_checkpoint(source, tmp_path / "ranks", grids.Grid(tp=2, pp=3), verify="weights")
    if arch == "baichuan2":  # its head was folded, one way
        merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", to="llama", verify="weights")
        return
    report = merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    before, after = checkpoints.tensors(source), checkpoints.tensors(tmp_path / "merged")
    before = {name: tensor for name, tensor in before.items() if not name.endswith("inv_freq")}
    assert before.keys() == after.keys() and report.target_architecture != "llama"
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    config, again = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "merged"))
    assert config == again
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@needs_megatron
@pytest.mark.slow
def test_what_megatron_core_saves_merges_to_the_same_tensors(tmp_path: Path) -> None:
    """Both formats, several grids, stacked layers and not: one random model, saved by the real thing."""
    model = oracle.Model(add_qkv_bias=True, num_layers=4)
    ids = ranks.input_ids()
    saves = {
        "torch": oracle.Save(model, oracle.Grid(tp=2, pp=2), tmp_path / "torch", "torch", ids, seed=1),
        "dist": oracle.Save(model, oracle.Grid(tp=2, pp=2), tmp_path / "dist", "torch_dist", ids, seed=1),
        "layers": oracle.Save(
            model, oracle.Grid(tp=2, pp=2), tmp_path / "layers", "torch_dist", ids, 1, {"non_homogeneous_layers": True}
        ),
        "halves": oracle.Save(
            model, oracle.Grid(tp=2), tmp_path / "halves", "torch_dist", ids, 1, {"singleton_local_shards": True}
        ),
    }  # fmt: skip
    logits = dict(zip(saves, oracle.run(list(saves.values())), strict=True))
    found = {}
    for name in saves:
        report = merge_checkpoint(tmp_path / name, tmp_path / f"{name}-hf", to="qwen2", vocab_size=131, device="cpu")
        assert report.logits is not None and report.logits["kind"] == "equal to rounding"
        found[name] = checkpoints.tensors(tmp_path / f"{name}-hf")
    for name in ("dist", "layers"):
        assert found[name].keys() == found["torch"].keys()
        for key, tensor in found["torch"].items():
            assert torch.equal(found[name][key], tensor), (name, key)
    import transformers

    for name, wanted in logits.items():
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf", attn_implementation="eager")
        with torch.no_grad():
            given = hf(torch.from_numpy(ids)).logits.numpy()
        assert relative(wanted, given) <= TOLERANCE, name


_MIXTURE = oracle.Model(
    num_layers=3, add_qkv_bias=True, num_experts=6, moe_ffn_hidden_size=40, moe_router_topk=3,
    moe_router_pre_softmax=True, moe_shared_expert_intermediate_size=56, moe_shared_expert_gate=True,
)  # fmt: skip


@needs_megatron
@pytest.mark.slow
@pytest.mark.parametrize(("model", "to"), [(_MIXTURE, "qwen2_moe"), (LATENT, "deepseek_v3")], ids=["mixture", "latent"])
def test_what_megatron_core_saves_of_large_models_merges(model: oracle.Model, to: str, tmp_path: Path) -> None:
    """Expert ranks, their tensor ranks, stacked layers, layers apart, halves apart: one random model."""
    ids, etp1 = ranks.input_ids(), oracle.Grid(tp=2, ep=2, etp=1)
    saves = {
        "torch": oracle.Save(model, oracle.Grid(tp=2, ep=2), tmp_path / "torch", "torch", ids, seed=1),
        "etp1": oracle.Save(model, etp1, tmp_path / "etp1", "torch", ids, seed=1),
        "dist": oracle.Save(model, oracle.Grid(ep=2), tmp_path / "dist", "torch_dist", ids, seed=1),
        "layers": oracle.Save(model, etp1, tmp_path / "layers", "torch_dist", ids, 1, {"non_homogeneous_layers": True}),
        "halves": oracle.Save(
            model, oracle.Grid(tp=2), tmp_path / "halves", "torch_dist", ids, 1, {"singleton_local_shards": True}
        ),
    }
    logits = dict(zip(saves, oracle.run(list(saves.values())), strict=True))
    import transformers

    for name, wanted in logits.items():
        assert not isinstance(wanted, oracle.Failed), wanted
        merge_checkpoint(tmp_path / name, tmp_path / f"{name}-hf", to=to, vocab_size=131, verify="weights")
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf", attn_implementation="eager")
        with torch.no_grad():
            given = hf(torch.from_numpy(ids)).logits.numpy()
        assert relative(wanted[0] if model.mtp_num_layers else wanted, given) <= TOLERANCE, name
        if model.mtp_num_layers:
            state = checkpoints.tensors(tmp_path / f"{name}-hf")
            assert torch.equal(state["model.layers.3.embed_tokens.weight"], state["model.embed_tokens.weight"])
            assert (
                sum(key.startswith("model.layers.3.") for key in state)
                == sum(key.startswith("model.layers.2.") for key in state) + 6
            )


@needs_megatron
@pytest.mark.slow
def test_what_megatron_core_saves_with_a_distributed_optimizer_merges(tmp_path: Path) -> None:
    """With experts the optimizers are chained, and the names of their state say so."""
    ids, grid = ranks.input_ids(), oracle.Grid(ep=2)
    dense = oracle.Model(num_layers=2)
    jobs = {
        "plain": oracle.Save(_MIXTURE, grid, tmp_path / "plain", "torch_dist", ids, seed=1),
        **{kind: oracle.Save(_MIXTURE, grid, tmp_path / kind, "torch_dist", ids, seed=1, optimizer=kind)
           for kind in ("dp_reshardable", "fully_reshardable")},
        "dense": oracle.Save(dense, oracle.Grid(tp=2), tmp_path / "dense", "torch_dist", ids, seed=1,
                             optimizer="dp_reshardable"),
    }  # fmt: skip
    for name, found in zip(jobs, oracle.run(list(jobs.values())), strict=True):
        assert not isinstance(found, oracle.Failed), (name, found)
    names = {name: set(open_torch_dist(tmp_path / name / "iter_0000001").tensors) for name in jobs}
    assert any(each.startswith("chained_1.optimizer.distributed.") for each in names["dp_reshardable"])
    assert any(each.startswith("optimizer.state.exp_avg.decoder.") for each in names["fully_reshardable"])
    assert any(each.startswith("optimizer.distributed.") for each in names["dense"])
    found = {}
    for name in jobs:
        to = "llama" if name == "dense" else "qwen2_moe"
        report = merge_checkpoint(tmp_path / name, tmp_path / f"{name}-hf", to=to, vocab_size=131, verify="weights")
        assert name == "plain" or any("GB of optimizer" in note for note in report.notes)
        found[name] = checkpoints.tensors(tmp_path / f"{name}-hf")
    for name in ("dp_reshardable", "fully_reshardable"):
        assert found[name].keys() == found["plain"].keys()
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in found["plain"].items())


LARGE = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_moe",
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "moonlight",
    "glm4_moe",
]


# Groups of experts that both score by their best two, and YaRN's settings that Megatron-LM has.
ALIKE: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "num_experts_per_tok": 2, "max_position_embeddings": 16384, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 4096}},
    "glm4_moe": {"num_experts_per_tok": 2, "head_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize("arch", LARGE)
def test_large_models_come_back_from_every_form(arch: str, tmp_path: Path) -> None:
    """Both formats, both spellings, grouped experts, uneven stages; and over another grid on the way."""
    overrides = {"num_experts_per_tok": 2} if arch in ("deepseek_v3", "glm4_moe") else {}  # groups alike, see LARGE
    source = checkpoints.make(arch, tmp_path / "source", dtype=torch.bfloat16, **overrides)
    before = checkpoints.tensors(source)
    config = json.loads((source / "config.json").read_text())
    for k, (grid, options) in enumerate([
        (grids.Grid(tp=2, ep=4, pp=2, first=1), {"transformer_impl": "transformer_engine", "grouped": True}),
        (grids.Grid(tp=2, ep=2, etp=1, pp=3), {"transformer_impl": "local"}),
        (grids.Grid(ep=2, pp=2, vpp=1, last=1), {"transformer_impl": "transformer_engine", "fmt": "torch_dist"}),
        (grids.Grid(), {"transformer_impl": "local", "fmt": "torch_dist"}),
    ]):  # fmt: skip
        ranks_, again, merged = (tmp_path / f"{name}{k}" for name in ("ranks", "again", "merged"))
        split_checkpoint(source, ranks_, grid, verify="weights", **options)
        reshard_checkpoint(
            ranks_, again, grids.Grid(tp=2, ep=2, pp=3), fmt=("torch_dist", "torch")[k % 2], verify="weights"
        )
        for place in (ranks_, again):
            merge_checkpoint(place, merged, verify="weights", overwrite=True)
            after = checkpoints.tensors(merged)
            assert before.keys() == after.keys()
            assert all(
                torch.equal(tensor, after[key]) and tensor.dtype == after[key].dtype for key, tensor in before.items()
            )
            assert json.loads((merged / "config.json").read_text()) == config


def test_known_differences_are_told(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "source", rms_norm_eps=1e-5)
    report = split_checkpoint(source, tmp_path / "ranks", grids.Grid(), verify="weights")
    assert any("scored by its best 2, in megatron-core by its best 3" in note for note in report.notes)
    assert any("eps of 1e-06, in megatron-core that of the others, 1e-05" in note for note in report.notes)
    report = merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    assert any("scored by its best 2" in note for note in report.notes)
    same = checkpoints.make("deepseek_v3", tmp_path / "same", **ALIKE["deepseek_v3"])
    notes = split_checkpoint(same, tmp_path / "ranks2", grids.Grid(), verify="weights").notes
    assert not any("megatron-core" in note or "Megatron-LM" in note for note in notes)


@pytest.mark.parametrize(("fmt", "to"), [*slowly([("torch", "torch_dist"), ("torch_dist", "torch")]), ("torch", "torch")])
def test_reshard_from_either_format_to_either(fmt: str, to: str, tmp_path: Path) -> None:
    source = tiny.make("qwen3", tmp_path / "source", tokenizer=True)
    split_checkpoint(source, tmp_path / "one", grids.Grid(tp=2, pp=3), fmt=fmt, verify="weights")
    reshard_checkpoint(tmp_path / "one", tmp_path / "two", grids.Grid(tp=1, pp=2, first=1), fmt=to, device="cpu")
    report = merge_checkpoint(tmp_path / "two", tmp_path / "merged", device="cpu")
    assert report.target_architecture == "qwen3"
    before, after = checkpoints.tensors(source), checkpoints.tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize("arch", [*slowly(LARGE[:-1]), LARGE[-1]])
def test_large_models_are_proved_by_logits_and_by_router_decisions(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "source", **ALIKE.get(arch, {}))
    grid = grids.Grid(tp=2, ep=2, pp=2, first=1)
    if arch == "deepseek_v2":
        with pytest.raises(Refused, match="scored by its best 1, in megatron-core by its best 3"):
            split_checkpoint(source, tmp_path / "ranks", grid)
        return
    report = split_checkpoint(source, tmp_path / "ranks", grid)
    assert report.logits is not None and report.logits["kind"] == "equal to rounding"
    assert report.logits["routing"]["different"] == 0 and report.logits["routing"]["choices"] > 400
    reshard_checkpoint(tmp_path / "ranks", tmp_path / "again", grids.Grid(ep=4, tp=2, etp=1), fmt="torch_dist")
    report = merge_checkpoint(tmp_path / "again", tmp_path / "merged")
    assert report.logits is not None and report.logits["routing"]["different"] == 0
    assert (
        compare_weights(source, tmp_path / "ranks").kind
        == compare_weights(tmp_path / "again", tmp_path / "merged").kind
        == EQUAL
    )


FAULTY = ["mlp.router.weight", "mlp.experts.local_experts.1.linear_fc2.weight", "mlp.shared_experts.linear_fc1.weight",
          "self_attention.linear_kv_up_proj.weight"]  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_in_one_rank_of_a_large_model_is_placed(name: str, tmp_path: Path) -> None:
    source = checkpoints.make("moonlight", tmp_path / "source")
    split_checkpoint(source, tmp_path / "ranks", grids.Grid(ep=2), verify="weights")
    for path in sorted((tmp_path / "ranks").rglob("*.pt"))[: 1 if "local_experts" in name else 2]:
        state = torch.load(path, weights_only=False)
        tensor = state["model"][f"decoder.layers.1.{name}"]
        tensor[:2] = tensor[:2].flip(0)
        torch.save(state, path)
    report = compare_logits(source, tmp_path / "ranks", device="cpu", greedy_tokens=0)
    (departure,) = report.departures
    assert departure.place == f"layer 1, {'attention' if 'attention' in name else 'mlp'}"
    why = {
        "router": "sends tokens to other experts",
        "local_experts": "what experts make of the same tokens: 1",
        "shared": "the shared experts",
    }
    assert all(words in departure.why for key, words in why.items() if key in name)
    assert any(name in tensor for tensor in departure.second)
