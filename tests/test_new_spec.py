"""Drafted specs: they say what the tensors say, account for all of them, and hold nothing that runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import save_file

from llmconvert.cli.app import main
from llmconvert.converters.huggingface import convert
from llmconvert.errors import BadInput, Refused
from llmconvert.spec.draft import Draft, draft
from llmconvert.spec.expand import all_rows
from llmconvert.spec.language import Fixed, Spec
from llmconvert.spec.registry import load_file
from llmconvert.spec.strangers import template

ROOT = Path(__file__).resolve().parent.parent


def _spec(found: Draft, folder: Path) -> Spec:
    file = folder / "drafted.py"
    file.write_text(found.text)
    return load_file(file)


def _biases(spec: Spec) -> dict[str, bool]:
    """What a spec fixes of biases; nothing said means none."""
    fixed = {name: f.value for f in spec.config if isinstance(f, Fixed) for name in f.attributes}
    return {name: fixed.get(name, False) for name in ("qkv_bias", "o_bias", "mlp_bias")}


def _strange(source: Path, **changes: Any) -> Path:
    config = json.loads((source / "config.json").read_text())
    renamed = {"model_type": "strange", "architectures": ["StrangeForCausalLM"], **changes}
    (source / "config.json").write_text(json.dumps({**config, **renamed}))
    return source


def _listed(found: Draft) -> set[str]:
    return set(re.findall(r"# UNDECIDED: `(.*?)` \[", found.text))


def _accounted(found: Draft, spec: Spec, names: list[str]) -> set[str]:
    """Kinds of tensors that neither a row nor a drop nor a line for the author speaks of."""
    flags, biased = _biases(spec), set()
    parts = {"qkv_bias": "qkv", "o_bias": "o", "mlp_bias": ("gate", "up", "down")}
    for flag, heads in parts.items():
        biased |= {f"{head}_proj" for head in heads} if flags[flag] else set()
    known = set()
    for row in all_rows(spec):
        known.add(row.stored.replace("{p}", "weight"))
        if "{p}" in row.stored and all(module.rpartition(".")[2] in biased for module in row.modules):
            known.add(row.stored.replace("{p}", "bias"))
    known |= {drop.stored for drop in spec.drops} | _listed(found)
    return {template(name) for name in names if template(name) not in known and name not in known} - {
        re.sub(r"\.experts\.\d+\.", ".experts.{j}.", name) for name in known
    }


@pytest.mark.parametrize("arch", [name for name in checkpoints.ALL if not name.startswith(("deepseek_v", "glm4_moe", "moonlight"))])
def test_every_tensor_is_accounted_for(arch: str, tmp_path: Path) -> None:
    source = _strange(checkpoints.make(arch, tmp_path / "src"))
    found = draft(str(source))
    spec, names = _spec(found, tmp_path), sorted(checkpoints.tensors(source))
    assert not _accounted(found, spec, names)
    assert found.explained or found.undecided or "config.json" in found.remarks[0]
    if found.undecided == 0:
        assert found.explained, found.remarks
    assert f"left for you to decide: {found.undecided};" in found.remarks[1]


@pytest.mark.parametrize(("arch", "overrides", "expected"), [
    ("llama", {"attention_bias": True}, (True, True, False)), ("llama", {"mlp_bias": True}, (False, False, True)),
    ("llama", {}, (False, False, False)), ("llama_bias", {}, (True, True, True)), ("qwen2", {}, (True, False, False)),
    ("internlm2", {"bias": True}, (True, True, False)), ("chatglm2", {}, (True, False, False)),
])  # fmt: skip
def test_biases_are_what_the_tensors_have(
    arch: str, overrides: dict[str, Any], expected: tuple[bool, ...], tmp_path: Path
) -> None:
    source = _strange(checkpoints.make(arch, tmp_path / "src", **overrides))
    found = draft(str(source))
    assert tuple(_biases(_spec(found, tmp_path)).values()) == expected
    assert found.explained, found.remarks
    if arch == "llama":  # what it says of the biases converts, and they are all there
        convert(source, tmp_path / "out", to="llama", spec_file=tmp_path / "drafted.py", verify="weights")
        assert checkpoints.tensors(tmp_path / "out").keys() == checkpoints.tensors(source).keys()


def test_biases_on_some_projections_are_left_to_decide(tmp_path: Path) -> None:
    source = _strange(checkpoints.make("qwen2", tmp_path / "src", shards=1))
    state = {n: t for n, t in checkpoints.tensors(source).items() if not n.endswith("k_proj.bias")}
    state |= {f"model.layers.{i}.input_layernorm.bias": torch.ones(48) for i in range(3)}
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    found = draft(str(source))
    layer = "model.layers.{i}."
    assert _listed(found) == {
        f"{layer}self_attn.q_proj.bias", f"{layer}self_attn.v_proj.bias", f"{layer}input_layernorm.bias",
        f"{layer}mlp.up_proj.weight",
    }  # fmt: skip
    assert "it is in 2 of 3 layers" in found.text and "the canonical layout has no bias there" in found.text
    assert not any(_biases(_spec(found, tmp_path)).values()) and not found.explained


def test_layers_that_predict_further_tokens_are_listed_whole(tmp_path: Path) -> None:
    """As in MiMo-7B: Qwen2 with a layer of another name, whose three biases are tensors like all others."""
    source = _strange(checkpoints.make("qwen2", tmp_path / "src", shards=1))
    state = checkpoints.tensors(source)
    first = {n: t for n, t in state.items() if n.startswith("model.layers.0.")}
    mtp = {n.replace("model.layers.0.", "model.mtp_layers.0."): t.clone() for n, t in first.items()}
    mtp |= {f"model.mtp_layers.0.{n}.weight": torch.ones(48) for n in ("token_layernorm", "hidden_layernorm", "final_layernorm")}
    mtp["model.mtp_layers.0.input_proj.weight"] = torch.randn(48, 96)
    save_file(state | mtp, source / "model.safetensors", metadata={"format": "pt"})
    found = draft(str(source))
    assert _listed(found) == {template(name) for name in mtp}
    assert sum(kind.endswith(".bias") for kind in _listed(found)) == 3 and found.undecided == len(mtp)
    assert found.nearest == "qwen2" and "by its tensors it comes nearest to `qwen2`" in found.remarks[-1]


CANARIES = (
    '" + str(__import__("pathlib").Path(%r).write_text("ran")) + "',
    "\n        *[__import__('pathlib').Path(%r).write_text('ran')] * 0,\n        #",
    '"),)\nimport pathlib; pathlib.Path(%r).write_text("ran")\nx = (("',
)
"""What leaves a string, what leaves a comment, what leaves the list."""


@pytest.mark.parametrize("canary", range(len(CANARIES)))
@pytest.mark.parametrize("place", ["name", "bias", "model_type", "architectures", "key", "docstring"])
def test_nothing_of_a_checkpoint_runs(place: str, canary: int, tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    evil = CANARIES[canary] % str(owned)
    source = _strange(checkpoints.make("llama", tmp_path / "src", shards=1))
    state = checkpoints.tensors(source)
    if place == "name":  # a row of its own, and a line for the author
        state = {n.replace("input_layernorm", f"input_layernorm{evil}") if n.endswith("layernorm.weight") else n: t
                 for n, t in state.items()} | {f"odd\n{evil}": torch.ones(3)}  # fmt: skip
    elif place == "bias":
        state |= {f"{n.removesuffix('weight')}{evil}.bias": torch.ones(3) for n in state if "q_proj" in n}
    elif place == "key":
        _strange(source, **{f"bias{evil}": True})
        state |= {n.removesuffix("weight") + "bias": torch.ones(len(t)) for n, t in state.items() if "_proj" in n}
    else:
        value = f'"""\n{evil}\n"""' if place == "docstring" else evil
        _strange(source, **({"architectures": [value]} if place == "architectures" else {"model_type": value}))
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    found = draft(str(source))
    compile(found.text, "drafted", "exec")
    _spec(found, tmp_path)
    assert not owned.exists()
    assert "unreadable" not in found.remarks[0] and "does not run" not in found.remarks[0], found.remarks


@pytest.mark.parametrize("size", ["wide", -3, 0, 2.5, True, [48], {"a": 1}, None])
def test_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    source = _strange(checkpoints.make("llama", tmp_path / "src"), num_attention_heads=size)
    with pytest.raises(BadInput, match="num_attention_heads"):
        draft(str(source))


def test_a_multimodal_checkpoint_is_not_drafted(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    outer = {"model_type": "seer", "architectures": ["Seer"], "text_config": config, "vision_config": {"depth": 3}}
    (source / "config.json").write_text(json.dumps(outer))
    with pytest.raises(Refused, match=r"multimodal \(vision\).*`llama` \(LlamaForCausalLM\) is what spec `llama` reads"):
        draft(str(source))


def test_the_command(tmp_path: Path) -> None:
    source = _strange(checkpoints.make("yi", tmp_path / "src"))
    command = [sys.executable, "-m", "llmconvert", "new-spec", str(source)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "draft explains all" in shown.stderr
    found = json.loads(subprocess.check_output([*command, "--json"], cwd=ROOT))
    assert found["text"].rstrip() == shown.stdout.rstrip() and found["explained"] and found["nearest"] == "yi"
    assert found["undecided"] == 0 and found["output"] is None and len(found["remarks"]) == 3
    file = tmp_path / "spec.py"
    written = subprocess.run([*command, "-o", str(file), "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(written.stdout)["output"] == str(file) and file.read_text() == found["text"]
    again = subprocess.run([*command, "-o", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "the file exists" in again.stderr


def test_a_link_that_leads_nowhere_is_not_written_through(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    (tmp_path / "spec.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(SystemExit) as ended:
        main(["new-spec", str(source), "-o", str(tmp_path / "spec.py")])
    assert ended.value.code == 2 and not (tmp_path / "elsewhere.py").exists()
