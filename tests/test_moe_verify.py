"""Mixtures of experts beside each other: what is different is seen, placed and named; what is equal raises no alarm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import test_fp8
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmconvert.converters.huggingface import convert
from llmconvert.errors import Refused
from llmconvert.verify import experts
from llmconvert.verify.layerwise import LayerwiseModel
from llmconvert.verify.logits import DIFFERENT, LogitsReport, compare_logits
from llmconvert.verify.page import render_page

MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "deepseek_moe"]
State = dict[str, Tensor]


def spoiled(source: Path, directory: Path, edit: Callable[[State], None]) -> Path:
    """A copy of a checkpoint with its tensors edited, in one file."""
    state = checkpoints.tensors(source)
    edit(state)
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _expert(state: State, layer: int, expert: int, part: int) -> str:
    """The name of an expert's gate, up or down matrix, in either spelling."""
    spellings = [("mlp", ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2"))]
    names = [f"model.layers.{layer}.{mlp}.experts.{expert}.{parts[part]}.weight" for mlp, parts in spellings]
    return next(name for name in names if name in state)


def swap_experts(state: State) -> None:
    for part in range(3):
        a, b = _expert(state, 2, 0, part), _expert(state, 2, 1, part)
        state[a], state[b] = state[b].clone(), state[a].clone()


def change_down(state: State) -> None:
    state[_expert(state, 2, 1, 2)][3, 5] += 0.05


def permute_router(state: State) -> None:
    name = next(n for n in state if n.startswith("model.layers.2.") and n.endswith((".gate.weight",)))
    state[name] = state[name].roll(1, 0).contiguous()


def drop_bias(state: State) -> None:
    state["model.layers.2.mlp.gate.e_score_correction_bias"].zero_()


def drop_shared(state: State) -> None:
    for name in state:
        if name.startswith("model.layers.2.") and ".shared_expert" in name and name.endswith("down_proj.weight"):
            state[name].zero_()


def compared(a: Path, b: Path, load: str) -> LogitsReport:
    return compare_logits(a, b, device="cpu", load=load, greedy_tokens=0)


@pytest.mark.parametrize("load", ["layers", "whole"])
@pytest.mark.parametrize("arch", MOE)
def test_equal_models_are_equal_and_so_are_their_routers(arch: str, load: str, tmp_path: Path) -> None:
    source = tiny.make(arch, tmp_path / "a")
    report = compared(source, spoiled(source, tmp_path / "b", lambda state: None), load)
    assert report.verdict and report.routing is not None
    layers = 3 if arch in ("mixtral", "qwen3_moe") else 2
    chosen = json.loads((source / "config.json").read_text())["num_experts_per_tok"]
    assert report.routing["choices"] == report.num_tokens * chosen * layers
    assert report.routing["different"] == 0 and report.routing["layers"] == []


FAULTS = [
    *((arch, edit, words) for arch in MOE for edit, words in (
        (change_down, "experts make of the same tokens: 1"), (permute_router, "sends tokens to other experts"))),
    *((arch, swap_experts, "experts make of the same tokens: 0, 1") for arch in MOE),
    ("deepseek_v3", drop_bias, "sends tokens to other experts"), ("glm4_moe", drop_bias, "sends tokens to other experts"),
    *((arch, drop_shared, "the shared experts") for arch in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "edit", "words"), FAULTS, ids=[f"{a}-{e.__name__}" for a, e, _ in FAULTS])
def test_a_fault_is_one_line_with_its_tensors(
    arch: str, edit: Callable[[State], None], words: str, tmp_path: Path
) -> None:
    source = tiny.make(arch, tmp_path / "a")
    other = spoiled(source, tmp_path / "b", edit)
    report = compared(source, other, "layers")
    assert not report.verdict and report.kind == DIFFERENT
    (departure,) = report.departures
    assert departure.place == "layer 2, mlp"
    before, after = checkpoints.tensors(source), checkpoints.tensors(other)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    if arch == "deepseek_moe":  # our own reference has its experts as modules: the half is named
        return
    assert words in departure.why
    assert changed <= set(departure.second) if edit is not change_down else changed < set(departure.second)
    if edit in (swap_experts, change_down):
        assert all(".experts." in name for name in departure.second) and len(departure.second) <= 6
    assert report.routing is not None
    rerouted = edit in (permute_router, drop_bias)
    assert bool(report.routing["different"]) == rerouted and report.routing["layers"] == ([2] if rerouted else [])
    if rerouted:
        example = report.routing["examples"][0]
        assert example["layer"] == 2 and len(example["first"]) == len(example["second"]) > 0


def test_router_decisions_stand_in_the_reports(tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3", tmp_path / "a", tokenizer=True)
    other = spoiled(source, tmp_path / "b", drop_bias)
    command = [
        sys.executable,
        "-m",
        "llmconvert",
        "verify",
        str(source),
        str(other),
        "--report",
        str(tmp_path / "r.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 5
    line = next(line for line in done.stdout.splitlines() if "choices differ" in line)
    assert "router" in line and "in layer 2" in line
    page = (tmp_path / "r.html").read_text()
    assert "Router decisions" in page and "first sends to" in page
    assert "Router decisions" not in render_page(
        {**compared(source, source, "layers").to_dict(), "routing": None}, "a", "b"
    )


def test_what_was_never_chosen_is_told(tmp_path: Path) -> None:
    def idle(state: State) -> None:
        state["model.layers.2.mlp.gate.e_score_correction_bias"][6:] = -100.0

    source = spoiled(tiny.make("deepseek_v3", tmp_path / "a", n_group=1, topk_group=1), tmp_path / "b", idle)
    routing = compared(source, source, "layers").routing
    assert routing is not None and routing["experts"] == 16 and routing["chosen"] == 14


def test_fused_on_disk_runs_by_layers_too(tmp_path: Path) -> None:
    source = tiny.make("qwen3_moe", tmp_path / "a")

    def fuse(state: State) -> None:
        for layer in range(3):
            stem = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                [state.pop(f"{stem}.{j}.{p}_proj.weight") for j in range(8)] for p in ("gate", "up", "down")
            )
            state[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
            state[f"{stem}.down_proj"] = torch.stack(down)

    report = compared(source, spoiled(source, tmp_path / "b", fuse), "layers")
    assert report.verdict and report.max_abs == 0.0


def test_experts_that_compute_something_else_are_not_taken_for_known(tmp_path: Path) -> None:
    source = tiny.make("qwen3_moe", tmp_path / "a")
    model = LayerwiseModel(source, torch.float32, "cpu", whole=False)
    module = model.layers[0].get_submodule("mlp.experts")
    assert isinstance(module, nn.Module) and experts.fused_experts(model.layers[0]).keys() == {"mlp.experts"}

    class Odd(type(module)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return super().forward(hidden_states, top_k_index, top_k_weights) * 1.5

    module.__class__ = Odd
    assert experts.fused_experts(model.layers[0]) == {}


@pytest.mark.parametrize("arch", ["deepseek_v3", "qwen3_moe", "qwen2"])
def test_fp8_is_read_by_the_formula_and_proved(arch: str, tmp_path: Path) -> None:
    source = test_fp8.make(arch, tmp_path / "src")
    report = convert(source, tmp_path / "dst", to=arch)
    assert report.logits is not None and report.logits["kind"] == "bit-equal"
    kept = convert(source, tmp_path / "kept", to=arch, keep_fp8=True)
    assert kept.logits is not None and kept.logits["kind"] == "bit-equal"
    with pytest.raises(Refused, match="run by layers"):
        compared(source, tmp_path / "dst", "whole")

    def off_by_one(state: State) -> None:
        name = next(n for n in state if n.endswith("_scale_inv") and min(state[n].shape) > 2)
        state[name] = state[name].roll(1, 1).contiguous()

    assert not compared(spoiled(source, tmp_path / "b", off_by_one), tmp_path / "dst", "layers").verdict


def test_what_is_made_fp8_is_judged_by_what_that_costs(tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3", tmp_path / "src", dtype="bfloat16")
    report = convert(source, tmp_path / "dst", to="deepseek_v3", dtype="fp8-block128")
    assert report.logits is not None and "float8_e4m3fn" in report.logits["reason"]


_PEAK = """
import sys, torch, threading, time
from pathlib import Path
from llmconvert.verify.layerwise import LayerwiseModel
from llmconvert.verify.probes import make_probes
source = Path(sys.argv[1])
probes = make_probes((source,), 131, 256)
model = LayerwiseModel(source, torch.float32, "cpu", whole=False)
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
model._experts and [setattr(s, "_matrices", s.read) for _, s in model._experts.values()]  # nothing kept
base, peak, stop = anonymous(), 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
model.forward(probes[:1]); stop = True; thread.join()
print(peak - base)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_expert_not_of_all(tmp_path: Path) -> None:
    peaks = []
    for count in (4, 32):
        source = checkpoints.make(
            "qwen3_moe", tmp_path / str(count), num_hidden_layers=1, hidden_size=512, moe_intermediate_size=1024,
            num_experts=count, num_local_experts=count, num_experts_per_tok=4, form=5,
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(source)], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parent.parent, 
            env={"PATH": "/usr/bin", "PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        )  # fmt: skip
        peaks.append(int(done.stdout))
    expert = 3 * 512 * 1024 * 4
    assert peaks[1] < peaks[0] + 4 * expert < 32 * expert, [p / expert for p in peaks]
