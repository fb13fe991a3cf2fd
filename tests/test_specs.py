"""Specs as data: validation, detection, drafts, and the matrix of who reaches whom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest

from llmconvert.canonical.model import GATE, TRAITS, K, Q, V
from llmconvert.converters.huggingface import convert
from llmconvert.converters.matrix import matrix
from llmconvert.errors import BadInput, Refused
from llmconvert.spec.draft import draft
from llmconvert.spec.language import Field, Row, Spec
from llmconvert.spec.registry import load_file, registry
from llmconvert.spec.validate import validate
from llmconvert.verify.logits import compare_logits

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"name": "x", "title": "X", "family": "x", "model_types": ("x",), "architectures": ("X",)}

FAULTS = {
    "clash": (dict(weights=(Row("a.{i}.{p}", (Q,)), Row("b.{i}.{p}", (Q,)))), "two rows"),
    "same name": (dict(weights=(Row("a.{i}.{p}", (Q,)), Row("a.{i}.{p}", (K,)))), "stored by two rows"),
    "unknown module": (dict(weights=(Row("a.{i}.{p}", ("model.layers.{i}.odd",)),)), "not a canonical module"),
    "layer gap": (dict(weights=(Row("a.{p}", (Q,)),)), "per layer"),
    "empty": (dict(weights=(Row("a.{i}.{p}", ()),)), "holds no module"),
    "unknown pack": (dict(weights=(Row("a.{i}.{p}", (Q, K, V), "woven"),)), "woven"),
    "grouped what": (dict(weights=(Row("a.{i}.{p}", (Q, K), "grouped"),)), "grouped"),
    "unknown trait": (dict(holds=frozenset({"magic"})), "not a trait"),
    "impossible trait": (dict(coupled=(("moe", "mla"),)), "no lowering adds"),
    "unknown attribute": (dict(config=(Field("widths", "w"),)), "not a canonical attribute"),
    "bias without a place": (
        dict(weights=(Row("a.{i}.weight", (GATE,)),), config=(Field("mlp_bias", "b", default=False),)),
        "no place",
    ),
    "two fields": (dict(config=(Field("hidden_size", "a"), Field("hidden_size", "b"))), "two fields"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_in_specs_are_named(case: str) -> None:
    changes, fragment = FAULTS[case]
    with pytest.raises(BadInput, match=fragment) as caught:
        validate(Spec(**{**GOOD, **changes}), "file.py")
    assert caught.value.where == "file.py"


def test_shipped_specs_are_valid_and_data() -> None:
    known = registry()
    assert len(known.specs) >= 16
    for name, file in known.files.items():
        text = file.read_text()
        code = [line.split("#")[0].strip() for line in text.split('"""')[-1].splitlines()]
        assert not any(line.startswith(("if ", "for ", "def ", "while ")) for line in code), name


# Where the checkpoint's name is not the spec's, with or without a suffix.
DETECTED = {
    "qwen": "qwen1", "qwen_2023": "qwen1", "chatglm2": "chatglm", "chatglm_mha": "chatglm", "glm4_9b": "chatglm",
    "moonlight": "deepseek_v3",
}  # fmt: skip


@pytest.mark.parametrize("arch", checkpoints.ALL)
def test_detection(arch: str, tmp_path: Path) -> None:
    names = registry().specs
    longest = max((name for name in names if arch == name or arch.startswith(f"{name}_")), key=len, default=None)
    config = json.loads((checkpoints.make(arch, tmp_path) / "config.json").read_text())
    assert registry().detect(config).name == DETECTED.get(arch, longest)


def test_matrix_agrees_with_the_traits() -> None:
    verdicts = {(r.source, r.target): r for r in matrix(registry())}
    assert verdicts["qwen2", "llama"].verdict == "exact"
    assert verdicts["qwen3", "llama"].verdict == "no"
    assert "qk_norm" in verdicts["qwen3", "llama"].why
    assert verdicts["gemma", "llama"].verdict == "rounded"
    assert verdicts["granite", "llama"].verdict == "rounded"
    assert verdicts["llama", "gemma"].verdict == "no"
    assert "alibi" in verdicts["baichuan_13b", "llama"].why
    assert verdicts["baichuan2", "llama"].verdict == "one-way"
    assert verdicts["llama", "qwen1"].verdict == "exact"
    assert "sliding_window" in verdicts["mistral", "llama"].unless
    for r in verdicts.values():
        assert r.verdict != "no" or r.why
        assert set(r.unless) <= set(TRAITS)


@pytest.mark.parametrize("arch", ["yi", "internlm2", "qwen2", "chatglm2"])
def test_draft_explains_a_stranger(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src")
    found = draft(str(source))
    assert "explains all" in found.remarks[0], found.remarks
    file = tmp_path / "drafted.py"
    file.write_text(found.text)
    assert load_file(file).model_types


def test_drafted_spec_converts_an_unknown_architecture(tmp_path: Path) -> None:
    source = checkpoints.make("yi", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "model_type": "novel", "architectures": ["NovelForCausalLM"]})
    )
    with pytest.raises(Refused, match="no spec reads `novel`"):
        convert(source, tmp_path / "dst", to="llama")
    run = [sys.executable, "-m", "llmconvert"]
    file = tmp_path / "novel.py"
    subprocess.run([*run, "new-spec", str(source), "-o", str(file)], cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run(
        [*run, "convert", str(source), str(tmp_path / "dst"), "--to", "llama", "--spec", str(file), "--verify", "weights"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (source / "config.json").write_text(json.dumps(config))
    assert compare_logits(source, tmp_path / "dst").relative < 1e-5


def test_a_spec_that_does_not_run_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("SPEC = nonsense")
    with pytest.raises(BadInput, match="NameError"):
        load_file(file)
