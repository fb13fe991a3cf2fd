"""Runs of batch inference for tests: their data, their engines, and what they leave behind."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from children import popen_interruptible

from llmconvert.cli.app import main
from llmconvert.engine.tree import Tree
from llmconvert.infer import Infer
from llmconvert.infer.run import Summary
from llmconvert.infer.store import read_log, work_directory

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 131
ECHO, TRACED, STREAM, WRONG = (f"infer_engines:{name}" for name in ("Echo", "Traced", "Stream", "Wrong"))


def words(count: int, seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join(f"w{chosen.randrange(3, VOCABULARY)}" for _ in range(count))


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for a run: `model` with a config only, `data.jsonl` with 60 rows."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    write_rows(tmp_path / "data.jsonl", [{"prompt": words(seed % 9 + 1, seed), "id": seed} for seed in range(60)])
    return tmp_path


def orders(place: Path, **what: Any) -> None:
    (place / "orders.json").write_text(json.dumps(what))


def echo(place: Path, output: str = "out.jsonl", workers: int = 2, **options: Any) -> Summary:
    options = {"batch_size": 4, "devices": ["cpu"], "engine": ECHO, **options}
    return Infer(place / "model", place / "data.jsonl", place / output, workers, **options).run()


def expected_bytes(place: Path) -> bytes:
    rows = read_rows(place / "data.jsonl")
    return b"".join(json.dumps({**row, "output": json.dumps(row["prompt"])[::-1]}).encode() + b"\n" for row in rows)


def traced(place: Path) -> list[int]:
    return [int(line.split()[1]) for line in (place / "trace").read_text().splitlines()]


COMMAND = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from llmconvert.cli.app import main
main(sys.argv[1:])
"""


def start_command(place: Path, *arguments: str) -> list[str]:
    code = COMMAND.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", code, "infer", str(place / "model"), str(place / "data.jsonl")]
    options = [str(place / "out.jsonl"), "--engine", ECHO, "--devices", "cpu", "--batch-size", "4", "-q", *arguments]
    return [*command, *options]


def start(place: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return popen_interruptible(start_command(place, *arguments), stderr=subprocess.PIPE)


def logged(place: Path) -> list[int]:
    try:
        with Tree.at(work_directory(place / "out.jsonl")) as directory:
            logs = [name for name in directory.names() if name.endswith(".jsonl")]
            return [answer.row for log in logs for _, answer in read_log(directory, log) if answer is not None]
    except FileNotFoundError:
        return []


def workers_of(place: Path) -> set[int]:
    lines = (place / "trace").read_text().splitlines() if (place / "trace").exists() else []
    return {int(line.split()[0]) for line in lines}


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(what: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def run_main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["infer", *arguments])
    return int(caught.value.code or 0)
