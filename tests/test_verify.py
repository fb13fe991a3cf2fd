"""`verify` and `roundtrip` as commands: exit codes, one JSON object, the page, what a failed proof leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import checkpoints
import pytest
import tiny
from safetensors.torch import save_file

from llmconvert.converters.equality import DIFFERENT, EQUAL, compare_weights
from llmconvert.converters.huggingface import convert
from llmconvert.converters.roundtrip import round_trip
from llmconvert.errors import Refused
from llmconvert.verify import models

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmconvert", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A Qwen v1, its Llama, and that Llama with a fault in layer 2's v_proj."""
    folder = tmp_path_factory.mktemp("pair")
    source = tiny.make("qwen", folder / "qwen", tokenizer=True)
    done = run("qwen-to-llama", source, folder / "llama", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    state = checkpoints.tensors(folder / "llama")
    state["model.layers.2.self_attn.v_proj.weight"] *= 1.001
    (folder / "faulty").mkdir()
    save_file(state, folder / "faulty" / "model.safetensors", metadata={"format": "pt"})
    (folder / "faulty" / "config.json").write_bytes((folder / "llama" / "config.json").read_bytes())
    return source, folder / "llama", folder / "faulty"


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_same_model(pair: tuple[Path, Path, Path]) -> None:
    source, llama, _ = pair
    done = run("verify", source, llama, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] and found["kind"] == "equal to rounding" and found["departures"] == []
    assert found["weights"]["kind"] == EQUAL
    assert found["exact_relative"] < found["tolerance"] < 1e-9 < found["relative"] < found["floor"]


def test_a_fault_is_an_exit_code_a_table_and_a_page(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, _, faulty = pair
    page = tmp_path / "report.html"
    done = run("verify", source, faulty, "--report", page, "--device", "cpu")
    assert done.returncode == 5 and "NOT the same model" in done.stdout
    assert "layer 2, attention" in done.stdout and "v_proj" in done.stdout and "Traceback" not in done.stderr
    reader = _Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    loaded = [a for _, a in reader.tags for key in ("src", "href") if key in a]
    assert not loaded, "the page needs nothing from elsewhere"
    assert "layer 2, attention" in reader.text and "model.layers.2.self_attn.v_proj.weight" in reader.text
    assert sum(tag == "polyline" for tag, _ in reader.tags) == 3 and sum(tag == "circle" for tag, _ in reader.tags) == 9
    for words in ("Worst tokens", "Frobenius norms", "transformer.h.1.attn.c_attn.weight", "far positions"):
        assert words in reader.text


def test_json_is_one_object_when_the_proof_fails(pair: tuple[Path, Path, Path]) -> None:
    source, _, faulty = pair
    done = run("verify", source, faulty, "--json", "--device", "cpu", "--load", "layers", "--compute-dtype", "float64")
    found = json.loads(done.stdout)
    assert done.returncode == 5 and not found["verdict"] and found["load"] == "layers"
    assert [(d["layer"], d["part"]) for d in found["departures"]] == [(2, "attention")]
    assert found["weights"]["different"] == ["model.layers.2.self_attn.v_proj.weight"]


@pytest.mark.parametrize(("max_abs", "code"), [("1e-12", 5), ("1e3", 0)])
def test_a_limit_of_ones_own(pair: tuple[Path, Path, Path], max_abs: str, code: int) -> None:
    source, llama, _ = pair
    done = run("verify", source, llama, "--json", "--max-abs", max_abs, "--device", "cpu", "--no-weights")
    assert done.returncode == code and json.loads(done.stdout)["max_abs_allowed"] == float(max_abs)


@pytest.mark.parametrize("arguments", [
    ["--compute-dtype", "int8"], ["--load", "half"], ["--device", "toaster"], ["--report", "/nowhere/at/all.html"],
    ["--prompts", "/nowhere.txt"],
])  # fmt: skip
def test_wrong_options_are_told(pair: tuple[Path, Path, Path], arguments: list[str]) -> None:
    done = run("verify", pair[0], pair[1], *arguments)
    assert done.returncode in (2, 4) and "error:" in done.stderr and "Traceback" not in done.stderr


def test_weights_are_compared_across_architectures(tmp_path: Path) -> None:
    glm, again = (
        tiny.make("glm4_9b", tmp_path / "glm"),
        tiny.make("glm4_9b", tmp_path / "again", shards=False, fmt="bin"),
    )
    assert compare_weights(glm, again).kind == EQUAL
    other = tiny.make("glm4_9b", tmp_path / "other", seed=1)
    found = compare_weights(glm, other)
    assert found.kind == DIFFERENT and len(found.different) == found.tensors - 3  # o_proj's zero biases
    assert compare_weights(glm, tiny.make("glm4_9b", tmp_path / "half", dtype="bfloat16")).kind == DIFFERENT
    assert compare_weights(glm, tiny.make("mixtral", tmp_path / "moe")).kind == DIFFERENT


@pytest.mark.parametrize("arch", ["chatglm3", "internlm2", "qwen2_tied"])
def test_there_and_back(arch: str, tmp_path: Path) -> None:
    source = tiny.make(arch, tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    found = round_trip(source, "llama", work_dir=tmp_path, device="cpu")
    assert found.verdict and not found.different and found.config
    assert found.there.logits["verdict"] and found.back.logits["verdict"]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_there_and_back_as_a_command(tmp_path: Path) -> None:
    source = tiny.make("yi_old", tmp_path / "source")
    done = run("roundtrip", source, "--to", "llama", "--json", "--device", "cpu")
    assert done.returncode == 0 and json.loads(done.stdout)["verdict"], done.stderr


def test_no_way_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused):
        round_trip(tiny.make("gemma", tmp_path / "source"), "llama", work_dir=tmp_path, device="cpu")


def test_logits_cannot_be_proved_without_torch(tmp_path: Path) -> None:
    source = tiny.make("internlm2", tmp_path / "source")
    code = (
        "import importlib.util, sys\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        f"from llmconvert.cli.app import main\nmain(['internlm2-to-llama', {str(source)!r}, {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "without torch" in done.stderr and "--verify weights" in done.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_a_source_no_code_runs_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(directory: Path) -> None:
        raise Refused("transformers cannot load it")

    monkeypatch.setattr(models, "check_runnable", nobody)
    source = tiny.make("qwen2", tmp_path / "source")
    with pytest.raises(Refused, match="cannot be run to compare logits") as refusal:
        convert(source, tmp_path / "out", to="llama")
    assert "--verify weights" in (refusal.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "out", to="llama", verify="weights")


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    """As packed numbers are, of a quantised checkpoint whose config says nothing of it."""
    source = checkpoints.make("llama", tmp_path / "src")
    state = checkpoints.tensors(source)
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"][:, :6].clone()
    checkpoints.write_weights(state, source)
    for load in ("whole", "layers"):
        done = run("verify", source, source, "--load", load, "--device", "cpu")
        assert done.returncode == 4, done.stderr
        assert "`model.layers.1.mlp.up_proj.weight` is [104, 6], not [104, 48]" in done.stderr, done.stderr
