"""Faults a converter could make, each found at its layer, its half and its tensor; and differences that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import tiny
import torch
from safetensors.torch import save_file
from slowly import slowly
from torch import Tensor

from llmconvert.canonical import lowerings
from llmconvert.canonical.model import CanonicalModel
from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.converters.huggingface import convert
from llmconvert.converters.planning import plan_conversion
from llmconvert.converters.returning import return_pairs
from llmconvert.errors import ProofFailed
from llmconvert.verify.logits import DIFFERENT, REORDERED, ROUNDED, LogitsReport, compare_logits
from llmconvert.verify.roundtrip import compare

State = dict[str, Tensor]
Edit = Callable[[State], None]
_ATTENTION, _MLP = "model.layers.{}.self_attn.{}_proj.{}", "model.layers.{}.mlp.{}_proj.weight"


def _swap(state: State, one: str, two: str) -> None:
    state[one], state[two] = state[two].clone(), state[one].clone()


def swap_q_and_k(state: State) -> None:
    for kind in ("weight", "bias"):
        _swap(state, _ATTENTION.format(1, "q", kind), _ATTENTION.format(1, "k", kind))


def swap_gate_and_up(state: State) -> None:
    _swap(state, _MLP.format(2, "gate"), _MLP.format(2, "up"))


def _permute(kind: str) -> Edit:
    def edit(state: State) -> None:
        weight = state[_ATTENTION.format(2, kind, "weight")]
        weight[8:16] = weight[8:16].roll(1, 0)

    return edit


def zero_bias(kind: str) -> Edit:
    def edit(state: State) -> None:
        state[_ATTENTION.format(1, kind, "bias")].zero_()

    return edit


def take_neighbour(state: State) -> None:
    for name in [name for name in state if name.startswith("model.layers.1.")]:
        state[name] = state[name.replace("layers.1.", "layers.2.")].clone()


def round_one(state: State) -> None:
    name = _MLP.format(1, "down")
    state[name] = state[name].bfloat16().float()


def shift_head(state: State) -> None:
    state["lm_head.weight"] = state["lm_head.weight"].roll(1, 0)


def move_embedding(state: State) -> None:
    state["model.embed_tokens.weight"][7] *= 1.001


def wrong_norm(state: State) -> None:
    state["model.layers.1.post_attention_layernorm.weight"][3] += 0.01


def wrong_last_norm(state: State) -> None:
    state["model.norm.weight"] *= 1.01


# architecture, what is done to its Llama, layer, part, the tensor to be named (and no other module's), words of the cause
FAULTS: list[tuple[str, Edit, int | None, str, set[str], str]] = [
    ("qwen", swap_q_and_k, 1, "attention", {"q_proj", "k_proj"}, "one for the other"),
    ("qwen", swap_gate_and_up, 2, "mlp", {"gate_proj", "up_proj"}, "one for the other"),
    ("internlm2", _permute("q"), 2, "attention", {"q_proj", "k_proj"}, "order of q_proj"),
    ("internlm2", _permute("k"), 2, "attention", {"q_proj", "k_proj"}, "order of q_proj's or k_proj's rows"),
    ("internlm2", _permute("v"), 2, "attention", {"v_proj"}, "order of v_proj"),
    ("internlm2", _permute("o"), 2, "attention", {"o_proj"}, "last matrix"),
    ("qwen", zero_bias("q"), 1, "attention", {"q_proj"}, "of self_attn.q_proj"),
    ("chatglm2", zero_bias("k"), 1, "attention", {"k_proj"}, "of self_attn.k_proj"),
    ("qwen2", zero_bias("v"), 1, "attention", {"v_proj"}, "of self_attn.v_proj"),
    ("baichuan", take_neighbour, 1, "attention", {"input_layernorm"}, "weight"),
    ("glm4_9b", round_one, 1, "mlp", {"down_proj"}, "last matrix"),
    ("yi_old", wrong_norm, 1, "mlp", {"post_attention_layernorm"}, "weight"),
    ("llama", move_embedding, None, "embedding", {"embed_tokens"}, "embedding"),
    ("yi_old", shift_head, None, "lm_head", {"lm_head"}, "another order"),
    ("phi3", wrong_last_norm, None, "norm", {"norm"}, "last norm"),
]  # fmt: skip


def _converted(arch: str, folder: Path, dtype: str = "float32") -> tuple[Path, Path]:
    source = tiny.make(arch, folder / "source", dtype=dtype)
    convert(source, folder / "result", to="llama", verify="none")
    return source, folder / "result"


def _edit(directory: Path, edit: Edit) -> None:
    state = checkpoints.tensors(directory)
    edit(state)
    save_file({name: t.contiguous() for name, t in state.items()}, directory / "model.safetensors", {"format": "pt"})


def _modules(names: tuple[str, ...]) -> set[str]:
    return {name.rsplit(".", 2)[-2] for name in names}


def _found(report: LogitsReport, layer: int | None, part: str, modules: set[str]) -> None:
    assert not report.verdict and report.kind == DIFFERENT
    first = report.departures[0]
    assert (first.layer, first.part) == (layer, part), report.departures
    assert _modules(first.second) == modules, first
    assert first.first and first.place in report.reason


@pytest.mark.parametrize("load", [*slowly(["whole"]), "layers"])
@pytest.mark.parametrize(
    ("arch", "edit", "layer", "part", "modules", "words"),
    FAULTS,
    ids=[f"{f[0]}-{f[3]}-{k}" for k, f in enumerate(FAULTS)],
)
def test_a_fault_is_found_where_it_is(
    arch: str, edit: Edit, layer: int | None, part: str, modules: set[str], words: str, load: str, tmp_path: Path
) -> None:
    source, result = _converted(arch, tmp_path)
    assert compare_logits(source, result, device="cpu", load=load, greedy_tokens=0).verdict
    _edit(result, edit)
    report = compare_logits(source, result, device="cpu", load=load, greedy_tokens=0)
    _found(report, layer, part, modules)
    assert words in report.departures[0].why
    if edit is not take_neighbour:
        assert len(report.departures) == 1, "one fault, one place"
    else:
        assert {d.layer for d in report.departures} == {1}


def test_weights_of_a_neighbour_are_named_in_both_halves(tmp_path: Path) -> None:
    source, result = _converted("baichuan", tmp_path)
    _edit(result, take_neighbour)
    report = compare_logits(source, result, device="cpu", greedy_tokens=0)
    assert [(d.layer, d.part) for d in report.departures] == [(1, "attention"), (1, "mlp")]


def _set(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


def test_another_theta_is_a_matter_of_positions_in_every_layer(tmp_path: Path) -> None:
    source, result = _converted("qwen", tmp_path)
    _set(result, rope_theta=2e6)
    report = compare_logits(source, result, device="cpu", greedy_tokens=0)
    _found(report, 0, "attention", {"q_proj", "k_proj"})
    assert [(d.layer, d.part) for d in report.departures] == [(i, "attention") for i in range(3)]
    assert all("rotary angles" in d.why for d in report.departures)


def test_another_epsilon_is_told_from_another_weight(tmp_path: Path) -> None:
    source, result = _converted("internlm2", tmp_path)
    _set(result, rms_norm_eps=1e-4)
    report = compare_logits(source, result, device="cpu", greedy_tokens=0)
    _found(report, 0, "attention", {"input_layernorm"})
    assert [d.place for d in report.departures] == [
        *(f"layer {i}, {part}" for i in range(3) for part in ("attention", "mlp")), "norm"]  # fmt: skip
    assert all("epsilon" in d.why for d in report.departures)


FORGOTTEN = [
    ("chatglm2", "interleaved_rotary", 0, "attention", {"q_proj", "k_proj"}, "interleaved"),
    ("baichuan2", "norm_head", None, "lm_head", {"lm_head"}, "NormHead"),
    ("gemma", "unit_offset_norm", 0, "attention", {"input_layernorm"}, "weight"),
    ("granite", "residual_multiplier", 0, "attention", {"o_proj"}, "last matrix"),
    ("granite", "logits_scaling", None, "lm_head", {"lm_head"}, "scaled"),
]


@pytest.mark.parametrize(("arch", "trait", "layer", "part", "modules", "words"), FORGOTTEN)
def test_a_forgotten_rewrite_is_found(
    arch: str, trait: str, layer: int | None, part: str, modules: set[str], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    step = lowerings.REMOVE[trait]

    def forget(model: CanonicalModel) -> CanonicalModel:
        return replace(model, config=step.apply(model).config)

    monkeypatch.setitem(lowerings.REMOVE, trait, replace(step, apply=forget))
    source = tiny.make(arch, tmp_path / "source")
    convert(source, tmp_path / "result", to="llama", verify="none")
    rounded = {name: "float32" for name in open_checkpoint(tmp_path / "result").tensors}
    report = compare_logits(source, tmp_path / "result", device="cpu", greedy_tokens=0, rounded=rounded)
    _found(report, layer, part, modules)
    assert words in report.departures[0].why
    # What `convert` does of itself: a proof fails, nothing is published, the record stays with the work.
    with pytest.raises(ProofFailed) as failure:
        convert(source, tmp_path / "again", to="llama", device="cpu")
    assert not (tmp_path / "again").exists() and failure.value.exit_code == 5
    record = json.loads((tmp_path / ".again.llmconvert-partial" / "output" / "llmconvert-report.json").read_text())
    assert record["published"] is False and record["failure"] in failure.value.what


def test_a_tied_head_untied_wrongly(tmp_path: Path) -> None:
    source, result = _converted("llama_tied", tmp_path)

    def untie(state: State) -> None:
        state["lm_head.weight"] = torch.cat((state["model.embed_tokens.weight"][:-1], torch.zeros(1, 48)))

    _edit(result, untie)
    _set(result, tie_word_embeddings=False)
    report = compare_logits(source, result, device="cpu", greedy_tokens=0)
    _found(report, None, "lm_head", {"lm_head"})
    assert report.departures[0].first == ("model.embed_tokens.weight",)
    assert "1 of 131 rows" in report.departures[0].why


@pytest.mark.parametrize("arch", ["qwen2", "glm4_9b", "baichuan2"])
def test_one_unit_in_the_last_place_is_found(arch: str, tmp_path: Path) -> None:
    source, result = _converted(arch, tmp_path)
    name = _ATTENTION.format(2, "k", "weight")

    def nudge(state: State) -> None:
        state[name].view(torch.int32).view(-1)[77] += 1

    conversion = plan_conversion(source, "llama", max_shard_size="5GB")
    compare(return_pairs(conversion, open_checkpoint(result)), workers=2)
    _edit(result, nudge)
    with pytest.raises(ProofFailed, match="layers.2|h.2"):
        compare(return_pairs(conversion, open_checkpoint(result)), workers=2)
    if arch != "baichuan2":  # whose head is rounded by design
        seen = compare_logits(source, result, device="cpu", greedy_tokens=0, dtype="float64")
        assert [d.place for d in seen.departures] == ["layer 2, attention"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_nobody_asked_for_is_a_difference_and_asked_for_is_none(dtype: str, tmp_path: Path) -> None:
    source, result = _converted("internlm2", tmp_path)
    _edit(result, lambda state: state.update({n: t.to(getattr(torch, dtype)) for n, t in state.items()}))
    report = compare_logits(source, result, device="cpu", greedy_tokens=0)
    assert report.kind == DIFFERENT and not report.verdict
    asked = compare_logits(source, result, device="cpu", greedy_tokens=0, rounded=dtype)
    assert asked.kind == ROUNDED and asked.verdict
    # A fault that the logits alone would excuse as rounding is seen where it is.
    factor = 1 + 8 * torch.finfo(getattr(torch, dtype)).eps

    def scale(state: State) -> None:
        state[_MLP.format(1, "down")] *= factor

    _edit(result, scale)
    faulty = compare_logits(source, result, device="cpu", greedy_tokens=0, rounded=dtype)
    _found(faulty, 1, "mlp", {"down_proj"})


@pytest.mark.parametrize("arch", ["llama", "qwen2", "glm", "gemma", "mistral_sliding"])
@pytest.mark.parametrize("dtype", [*slowly(["float32"]), "bfloat16"])
def test_another_attention_kernel_is_no_difference(arch: str, dtype: str, tmp_path: Path) -> None:
    source = tiny.make(arch, tmp_path / "source")
    report = compare_logits(source, source, device="cpu", attention="eager,sdpa", dtype=dtype)
    assert report.verdict and report.kind == REORDERED, report
    assert report.max_abs > 0 and report.relative <= report.floor


@pytest.mark.parametrize("dtype", ["float32", *slowly(["bfloat16", "float16"])])
@pytest.mark.parametrize("arch", ["glm", "ernie4_5", "chatglm2", "glm4_9b", "phi3"])
def test_permuted_rows_are_no_difference(arch: str, dtype: str, tmp_path: Path) -> None:
    source, result = _converted(arch, tmp_path, dtype)
    report = compare_logits(source, result, device="cpu", greedy_tokens=0)
    assert report.verdict and report.kind == REORDERED and report.relative <= report.floor
    assert report.exact_relative < report.tolerance / 2**5, "well within"


def test_another_number_of_layers_is_a_difference(tmp_path: Path) -> None:
    one = tiny.make("llama", tmp_path / "one")
    two = tiny.make("llama", tmp_path / "two", num_hidden_layers=2)
    report = compare_logits(one, two, device="cpu", greedy_tokens=0)
    assert not report.verdict and "3 and 2 layers" in report.note


def test_a_gap_nobody_sees_at_16_bits_is_seen(tmp_path: Path) -> None:
    """In bfloat16 both compute the same bits; the weights are not the same all the same."""
    one = tiny.make("llama", tmp_path / "one", shards=False)
    two = Path(shutil.copytree(one, tmp_path / "two"))
    _edit(two, lambda state: state.update({n: t.bfloat16().float() for n, t in state.items()}))
    report = compare_logits(one, two, device="cpu", dtype="bfloat16")
    assert report.max_abs == 0.0 and report.kind == DIFFERENT and not report.verdict
