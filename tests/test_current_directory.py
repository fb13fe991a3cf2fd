"""Nothing in the current directory is run as code, not by llmconvert and not by the processes it starts.

Every command is given `.`, a checkpoint that comes with modules of its own. Each leaves a mark when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from infer_runs import ROOT, VOCABULARY
from test_infer import write_tokenizer

from llmconvert.errors import Refused
from llmconvert.verify.readers import read_log_probs

_NAMES = (
    "accelerate", "collections_abc", "datasets", "json", "multiprocessing", "numpy", "pathlib", "psutil", "pyarrow", "ray",
    "rich", "safetensors", "sitecustomize", "socket", "specs", "tokenizers", "torch", "transformers", "typer", "typing",
    "usercustomize", "vllm", "xxhash",
)  # fmt: skip
_CANARY = """
import os
open({mark!r}, "a").write(__name__ + "\\n")
raise ImportError("this must not be imported")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with modules of its own; the mark lies beside it."""
    directory = tiny.make("llama", tmp_path_factory.mktemp("here") / "model", shards=False)
    write_tokenizer(directory, VOCABULARY)
    for name in (*_NAMES, "llmconvert"):
        (directory / f"{name}.py").write_text(_CANARY.format(mark=str(directory.parent / "mark")))
    (directory / "evil.dist-info").mkdir()
    (directory / "evil.dist-info/entry_points.txt").write_text("[llmconvert.specs]\nevil = evil\n")
    (directory / "evil.py").write_text(_CANARY.format(mark=str(directory.parent / "mark")))
    (directory.parent / "data.jsonl").write_text('{"prompt": "w5 w6"}\n{"prompt": "w7"}\n')
    # As pip makes it: what is imported lies where Python finds it, and not in the current directory.
    (directory.parent / "bin").mkdir()
    command = "import sys\nfrom llmconvert.cli.app import main\nsys.exit(main())\n"
    (directory.parent / "bin/llmconvert").write_text(command)
    return directory


def run(
    checkpoint: Path, *arguments: str, start: tuple[str, ...] = (), path: str = str(ROOT), codes: tuple[int, ...] = (0,)
) -> str:
    start = start or (str(checkpoint.parent / "bin/llmconvert"),)
    environment = {**os.environ, "PYTHONPATH": path, "LLMCONVERT_VLLM_PYTHON": sys.executable}
    done = subprocess.run(
        [sys.executable, *start, *arguments], cwd=checkpoint, env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    mark = checkpoint.parent / "mark"
    assert not mark.exists(), f"{arguments} imported {mark.read_text()}"
    assert done.returncode in codes, done.stderr
    return done.stdout


INFER = ("infer", ".", "../data.jsonl", "../out.jsonl", "--devices", "cpu", "--max-new-tokens", "3", "--overwrite", "--json")


def test_the_modules_there_would_leave_a_mark(checkpoint: Path) -> None:
    """A test that cannot fail proves nothing."""
    mark = checkpoint.parent / "mark"
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    for start in (["-c", "import torch"], ["-m", "json.tool"], ["-c", "import json"], ["-m", "llmconvert"]):
        done = subprocess.run([sys.executable, *start], cwd=checkpoint, capture_output=True, text=True, env=own)
        assert done.returncode and "this must not be imported" in done.stderr and mark.exists()
        mark.unlink()
    own["PYTHONPATH"] = str(checkpoint)
    done = subprocess.run([sys.executable, "-c", "pass"], cwd=checkpoint, capture_output=True, env=own)
    assert mark.exists(), done.stderr  # sitecustomize
    mark.unlink()


def test_batch_inference_runs_nothing_of_the_checkpoint(checkpoint: Path) -> None:
    summary = json.loads(run(checkpoint, *INFER))
    assert summary["rows"] == 2 and summary["errors"] == 0


def test_an_engine_of_ones_own_is_found_where_pythonpath_says(checkpoint: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # This one starts interpreters of its own.
    assert json.loads(run(checkpoint, *INFER, "--engine", "infer_engines:Spawner", path=path))["errors"] == 0
    relative = os.pathsep.join([str(ROOT), os.path.relpath(ROOT / "tests", checkpoint)])
    assert json.loads(run(checkpoint, *INFER, "--engine", "infer_engines:Echo", path=relative))["rows"] == 2
    run(checkpoint, *INFER, "--engine", "evil:Class", codes=(2,))


def test_readers_run_nothing_of_the_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    with pytest.raises(Refused, match="vllm is not installed|No module named 'vllm'"):
        read_log_probs("vllm", Path("."), [[5, 3]], python=sys.executable)
    assert not (checkpoint.parent / "mark").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before 3.11 Python itself imports `runpy` from there")
def test_as_a_module_it_takes_the_current_directory_off_the_path(checkpoint: Path) -> None:
    """`-m` looks for llmconvert itself there first: that much is Python's, so that file is not there."""
    (checkpoint / "llmconvert.py").rename(checkpoint.parent / "away")
    try:
        run(checkpoint, "inspect", ".", start=("-m", "llmconvert"))
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        run(checkpoint, *INFER, "--engine", "infer_engines:Echo", start=("-m", "llmconvert"), path=path)
    finally:
        (checkpoint.parent / "away").rename(checkpoint / "llmconvert.py")
    run(checkpoint, "inspect", ".", start=("-P", "-m", "llmconvert"))


@pytest.mark.slow
def test_no_command_runs_anything_of_the_checkpoint(checkpoint: Path) -> None:
    run(checkpoint, "convert", ".", "../qwen2", "--to", "qwen2")
    # The interpreter named has no vLLM.
    run(checkpoint, "verify", ".", "../qwen2", "--reader", "vllm", codes=(3,))
    run(checkpoint, "inspect", ".", "--check", codes=(0, 2))
    weights = ("--verify", "weights")
    for arguments in (
        ("specs",), ("specs", "llama"), ("inspect", "."), ("llama-to-qwen", ".", "../a", *weights),
        ("roundtrip", ".", "--to", "mistral", *weights),
        ("convert", ".", "../canonical", "--to", "canonical", *weights), ("to-reward", ".", "../reward", *weights),
        ("split", ".", "../tp", "--tp", "2", *weights), ("reshard", "../tp", "../pp", "--pp", "3", *weights),
        ("merge", "../pp", "../merged", *weights), ("verify", ".", "../merged"), ("megatron-args", "."),
        ("new-spec", ".", "-o", "../spec.py"), ("debug", "topk-token", ".", "--prompt", "w5 w6 w7"),
    ):  # fmt: skip
        run(checkpoint, *arguments)
    run(checkpoint, *INFER, "--engine", "ray:hf", path=str(ROOT))


@pytest.mark.slow
def test_torchrun_runs_nothing_of_the_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "llmconvert.py").rename(checkpoint.parent / "away")
    code = "import sys; from torch.distributed.run import main; sys.argv[0] = 'torchrun'; main()"
    (checkpoint.parent / "bin/torchrun").write_text(code)
    try:
        run(
            checkpoint, "--nproc-per-node", "2", "-m", "llmconvert", "split", ".", "../shared", "--tp", "2",
            start=(str(checkpoint.parent / "bin/torchrun"),),
        )  # fmt: skip
    finally:
        (checkpoint.parent / "away").rename(checkpoint / "llmconvert.py")
