"""`inspect` of a config.json alone: the numbers are those of the whole checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from sparse import make_sparse
from test_published import CONVERTS, PUBLISHED, _checkpoint

from llmconvert.cli import render
from llmconvert.converters.huggingface import convert
from llmconvert.converters.inspection import inspect
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.memory import Parallelism
from llmconvert.errors import LlmconvertError

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("architecture", "title", "named", "parameters", "memory", "config", "traits", "targets", "quantised", "bytes", "dtypes")


def _alone(source: Path, directory: Path) -> Path:
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    return directory


def _numbers(found: dict[str, Any], keys: tuple[str, ...] = NUMBERS) -> dict[str, Any]:
    return {key: found[key] for key in keys}


@pytest.mark.parametrize("arch", checkpoints.ALL)
def test_config_alone_counts_as_the_whole_does(arch: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if len(arch) % 2 else torch.float32
    source = checkpoints.make(arch, tmp_path / "src", dtype=dtype)
    whole, alone = inspect(source), inspect(_alone(source, tmp_path / "alone"))
    keys = NUMBERS if not whole["dropped"] else NUMBERS[:-2]  # of buffers a config says nothing
    assert _numbers(alone, keys) == _numbers(whole, keys)
    assert alone["tensors"] == whole["tensors"] - len(whole["dropped"]) and alone["files"] == []
    assert "counted from config.json alone" in alone["notes"][0] and "problem" not in alone
    # A file named is the file, whatever lies beside it.
    (source / "model-00001-of-00003.safetensors").unlink()
    named = inspect(source / "config.json")
    assert _numbers(named, keys) == _numbers(whole, keys) and named["path"] == str(source / "config.json")


@pytest.mark.parametrize(("arch", "grid"), [
    ("qwen2", Grid(tp=2, pp=3)), ("deepseek_v3", Grid(tp=2, ep=2)), ("qwen2_tied", Grid(tp=2, pp=3)), ("glm4", Grid(tp=2)),
])  # fmt: skip
def test_ranks_are_counted_alike(arch: str, grid: Grid, tmp_path: Path) -> None:
    source, asked = checkpoints.make(arch, tmp_path / "src"), Parallelism(grid, dp=4, zero=1)
    whole, alone = (inspect(path, parallelism=asked) for path in (source, _alone(source, tmp_path / "alone")))
    assert alone["memory"] == whole["memory"]
    assert ("ranks" in alone["memory"]) == (arch != "glm4")  # which megatron-core cannot hold, and that is said alike


@pytest.mark.parametrize("name", CONVERTS)
def test_published_configs_count_as_their_checkpoints(name: str, tmp_path: Path) -> None:
    source = _checkpoint(name, tmp_path / "src")
    whole, alone = inspect(source), inspect(source / "config.json")
    # Old configs are silent on o_proj biases, which the tensors show.
    silent = sum(size for n, size in whole["memory"]["parts"].items()) - sum(alone["memory"]["parts"].values())
    assert silent == (0 if name != "internlm-20b" else whole["parameters"] - alone["parameters"])
    assert alone["parameters"] == whole["parameters"] - silent


def test_a_model_of_7e9_parameters_trains_in_112_gb(tmp_path: Path) -> None:
    config = PUBLISHED["qwen2.5-7b-instruct"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path)
    assert found["parameters"] == 7_615_616_512
    assert found["memory"]["training"]["total"] == 16 * 7_615_616_512
    done = subprocess.run(
        [sys.executable, "-m", "llmconvert", "inspect", str(tmp_path / "config.json"), "--tp", "4", "--zero", "1", "--dp", "2"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for fragment in ("7,615,616,512 in 339 tensors, 15.23 GB", "121.85 GB", "8 ranks", "counted from config.json alone"):
        assert fragment in done.stdout
    assert "files" not in done.stdout


def test_fp8_is_counted_with_its_scales(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "src", dtype=torch.bfloat16)
    convert(source, tmp_path / "fp8", to="deepseek_v3", dtype="fp8-block128", verify="none")
    whole, alone = inspect(tmp_path / "fp8"), inspect(_alone(tmp_path / "fp8", tmp_path / "alone"))
    assert _numbers(alone) == _numbers(whole) and alone["tensors"] == whole["tensors"]
    assert alone["memory"]["inference"]["weights_fp8"] == whole["bytes"] == alone["bytes"]


def test_layers_beyond_the_config_are_told(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "src")
    assert any("predict further tokens" in note for note in inspect(source / "config.json")["notes"])


def test_an_index_without_its_files_is_a_config_alone(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src")
    whole = inspect(source)
    for path in sorted(source.glob("*.safetensors"))[1:]:
        path.unlink()
    with pytest.raises(LlmconvertError, match="is not there"):  # a download that broke off
        inspect(source)
    next(source.glob("*.safetensors")).unlink()
    alone = inspect(source)
    assert _numbers(alone) == _numbers(whole)
    assert "none of the files that `model.safetensors.index.json` names is there" in alone["notes"][0]


def test_what_no_spec_reads_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "architectures": ["OddForCausalLM"]}))
    found = inspect(tmp_path)
    assert found["parameters"] is None and found["problem"] == "no spec reads `odd` (OddForCausalLM)"
    text = render.inspection(found)
    assert "architecture  `odd` (OddForCausalLM): no spec reads it" in text and "parameters    not counted" in text
    assert "unknown" not in text


@pytest.mark.parametrize("name", ["mixtral-8x22b-wizardlm2", "deepseek-v3-base"])
def test_large_models_are_counted_in_seconds(name: str, tmp_path: Path) -> None:
    """Shapes are imagined for every expert; nothing is read."""
    config = PUBLISHED[name]["config"]
    source = make_sparse(config, {"model.embed_tokens.weight": (1, 1)}, tmp_path / "src")
    for path in source.glob("*.safetensors*"):
        path.unlink()
    found = inspect(source)
    assert found["parameters"] == {"mixtral-8x22b-wizardlm2": 140_620_634_112, "deepseek-v3-base": 684_489_845_504}[name]
