"""One run shared by several processes, as torchrun starts them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
_SPLIT = ["--tp", "2", "--pp", "3", "--device", "cpu", "--workers", "1"]


def _launch(count: int, script: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        str(script),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def _script(folder: Path, *arguments: object, before: str = "") -> Path:
    path = folder / "run.py"
    given = [str(argument) for argument in arguments]
    path.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n{before}\n"
        f"from llmconvert.cli.app import main\nmain({given!r})\n"
    )
    return path


def _digests(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    source = tiny.make("qwen2", folder / "source", tokenizer=True)
    command = [sys.executable, "-m", "llmconvert", "split", str(source), str(folder / "ranks"), *_SPLIT]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return source, folder / "ranks"


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_processes_write_what_one_writes(count: int, alone: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = alone
    done = _launch(count, _script(tmp_path, "split", source, tmp_path / "ranks", *_SPLIT))
    assert done.returncode == 0, done.stderr
    assert _digests(tmp_path / "ranks") == _digests(expected)
    assert done.stdout.count("converted") == 1, "one process speaks for all"


def test_every_process_takes_its_share_and_a_killed_one_is_made_up_for(
    alone: tuple[Path, Path], tmp_path: Path
) -> None:
    source, expected = alone
    killed = (
        "real, calls = os.pwrite, [0]\n"
        "def dying(*arguments):\n"
        "    calls[0] += 1\n"
        "    if os.environ['RANK'] == '1' and calls[0] > 12: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "os.pwrite = dying"
    )
    done = _launch(2, _script(tmp_path, "split", source, tmp_path / "ranks", *_SPLIT, before=killed))
    assert done.returncode != 0 and not (tmp_path / "ranks").exists()
    work = tmp_path / ".ranks.llmconvert-partial"
    journals = sorted(work.glob("journal-*.jsonl"))
    assert len(journals) == 2 and journals[0].read_text() and all(path.exists() for path in journals)
    kept = sum(bool(line) for path in journals for line in path.read_text().splitlines())
    assert kept > 12
    again = _launch(4, _script(tmp_path, "split", source, tmp_path / "ranks", *_SPLIT, "--resume"))
    assert again.returncode == 0, again.stderr
    assert _digests(tmp_path / "ranks") == _digests(expected)


def test_a_fault_is_told_once_and_ends_all(alone: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "mine.txt").write_text("mine")
    done = _launch(2, _script(tmp_path, "split", alone[0], tmp_path / "ranks", *_SPLIT))
    assert done.returncode != 0 and "not empty" in done.stderr
    assert (tmp_path / "ranks" / "mine.txt").read_text() == "mine"
