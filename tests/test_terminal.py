"""What reaches the terminal: names of a checkpoint are shown and never obeyed; help, progress, completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import checkpoints
import pytest
import typer
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from llmconvert.cli import app as commands
from llmconvert.cli.output import Output, Progress, show_error
from llmconvert.errors import BadInput, Usage
from llmconvert.spec.registry import registry
from llmconvert.terminal import json_text, printable
from llmconvert.verify.page import render_page

ROOT = Path(__file__).resolve().parent.parent
EVIL = "a\x1b[31m\x07\x9b2J\r\nerror: forged\u202eb\u2066\ud800[bold]c[/bold]:smile:\x7f"
"""Colours, a bell, a cleared screen, a forged line, turned writing, half a character, markup."""


def _cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmconvert", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, errors="surrogateescape"
    )


def _obeyed(text: str) -> set[str]:
    """Characters of a text that a terminal would act on."""
    return {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


def test_what_is_not_printable_is_shown_as_in_a_string() -> None:
    assert printable("Größe 模型 \u3000 →") == "Größe 模型 \u3000 →"
    assert printable("\x1b[0m\n\u202e\ud800") == r"\x1b[0m\n\u202e\ud800"
    assert printable("a\nb", lines=True) == "a\nb"
    assert not _obeyed(printable(EVIL)) and "\n" not in printable(EVIL)
    assert printable(printable(EVIL)) == printable(EVIL)
    for indent in (None, 2):
        text = json_text({EVIL: [EVIL, "模型", "\U0001f600\U000e0041"]}, indent=indent)
        assert not _obeyed(text) and json.loads(text) == {EVIL: [EVIL, "模型", "\U0001f600\U000e0041"]}
        assert "模型" in text
        assert json_text({EVIL: EVIL}, indent=indent, ascii_only=True).isascii()


def test_tables_errors_and_progress_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    for human in (table, Text(EVIL), EVIL):
        Output().result({}, human)
    Output(json_mode=True).result({EVIL: EVIL})
    for json_mode in (False, True):
        show_error(BadInput(EVIL, where=EVIL, hint=EVIL), json_mode=json_mode)
    shown = capsys.readouterr()
    assert not _obeyed(shown.out + shown.err)
    assert shown.out.count("[bold]c[/bold]:smile:") >= 5  # not taken for markup
    assert "\nerror: forged" not in shown.err


def test_a_name_of_millions_of_characters_does_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(BadInput("x" * 3_000_000), json_mode=False)
    assert len(capsys.readouterr().err) < 25_000


def test_the_html_page_is_escaped() -> None:
    part = {"layer": 1, "part": EVIL, "difference": 1.0, "why": EVIL, "first": [EVIL], "second": [EVIL]}
    token = {"probe": EVIL, "row": 0, "token": 1, "position": 1, "id": 5, "text": EVIL, "difference": 1.0,
             "first_best": EVIL, "second_best": EVIL}  # fmt: skip
    numbers = ("max_abs", "mean_abs", "relative", "floor", "exact_relative", "tolerance", "kl_divergence",
               "top1_agreement", "top5_agreement", "greedy_agreement", "num_tokens")  # fmt: skip
    found = {
        **dict.fromkeys(numbers, 1.0), "verdict": False, "reason": EVIL, "kind": EVIL, "note": EVIL, "dtype": "float32",
        "devices": ["cpu"], "load": "whole", "seconds": 1.0, "versions": {EVIL: EVIL}, "routing": None, "layers": [],
        "departures": [part], "worst_tokens": [token], "norms": [(EVIL, {EVIL: 1.0}, {EVIL: 1.0})],
        "probes": [{"name": EVIL, "rows": 1}],
    }  # fmt: skip
    page = render_page(found, EVIL, "<script>", {"kind": EVIL, "reason": EVIL})
    assert not _obeyed(page) and "<script>" not in page and page.count("forged") > 15
    page.encode("utf-8")


def _with_odd_tensor(source: Path) -> Path:
    """Give a checkpoint a tensor of an evil name, as JSON holds it; half a surrogate pair, the reader refuses."""
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = len(raw) - 8 - length
    header[EVIL.replace("\ud800", "")] = {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}
    body = json.dumps(header).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + raw[8 + length :] + bytes(8))
    return source


@pytest.mark.parametrize("command", [
    ("convert", "SRC", "DST", "--to", "mistral"), ("split", "SRC", "DST"), ("megatron-args", "SRC"), ("inspect", "SRC"),
    ("roundtrip", "SRC"), ("to-reward", "SRC", "DST"), ("new-spec", "SRC"),
])  # fmt: skip
def test_a_tensors_name_is_shown_and_not_obeyed(command: tuple[str, ...], tmp_path: Path) -> None:
    source = _with_odd_tensor(checkpoints.make("llama", tmp_path / "src", shards=1))
    own = [{"SRC": str(source), "DST": str(tmp_path / "dst")}.get(word, word) for word in command]
    for extra in ((), ("--json",)):
        done = _cli(*own, *extra)
        assert done.returncode == (0 if command[0] in ("inspect", "new-spec") else 4), done.stderr
        assert not _obeyed(done.stdout + done.stderr)
        assert "forged" in done.stdout + done.stderr and "\nerror: forged" not in done.stdout + done.stderr
        if extra:
            assert EVIL.partition("\x1b")[0] in str(json.loads(done.stdout))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_is_no_reason_to_fail(encoding: str, tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "模型")
    done = _cli("inspect", source, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and r"\u6a21" in done.stdout, done.stderr
    done = _cli("inspect", source, "--json", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout)["path"] == str(source)


def test_bare_commands_show_their_help_and_no_error() -> None:
    for arguments in ((), ("debug",), ("channel-loss",)):
        done = _cli(*arguments)
        assert done.returncode == Usage.exit_code
        assert done.stderr.startswith("Usage: llmconvert") and "error" not in done.stderr.splitlines()[0]
        assert "hint:" not in done.stderr


def _writing() -> list[str]:
    if not any(command.name == "convert" for command in commands.app.registered_commands):
        commands._register(registry())
    group = typer.main.get_command(commands.app)
    return [
        name
        for name, command in group.commands.items()
        if {"resume", "overwrite"} <= {parameter.name for parameter in command.params}
    ]


def test_to_go_on_and_to_start_again_are_not_asked_for_together() -> None:
    writing = _writing()
    assert {"convert", "qwen-to-llama", "to-reward", "split", "merge", "reshard", "infer"} <= set(writing)
    for name in writing:
        more = ["--to", "llama"] if name == "convert" else ["out"] if name == "infer" else []
        for order in (["--resume", "--overwrite"], ["--overwrite", "--resume"]):
            done = CliRunner().invoke(commands.app, [name, "nowhere", "nothing", *more, *order])
            assert isinstance(done.exception, Usage), (name, done.exception, done.output)
            assert "cannot be given together" in done.exception.what


def test_progress_without_a_terminal_has_units_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(enabled=True) as progress:
        for done, total in ((1_234, 5_678_901), (2_500_000_000_000, 3_000_000_000_000)):
            progress._said = -60.0
            progress("write", done, total)
    assert capsys.readouterr().err.splitlines() == ["write: 1.23 KB of 5.68 MB", "write: 2.50 TB of 3.00 TB"]


def test_the_shell_can_complete_commands() -> None:
    assert "--install-completion" in _cli("--help").stdout
    done = _cli(_LLMCONVERT_COMPLETE="complete_bash", COMP_WORDS="llmconvert qwen-to", COMP_CWORD="1")
    assert done.returncode == 0 and done.stdout.split() == ["qwen-to-llama"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_what_the_system_refuses_is_no_bug_of_ours(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src", shards=1)
    (tmp_path / "full").symlink_to("/dev/full")
    done = _cli("verify", source, source, "--report", tmp_path / "full")
    assert done.returncode == 6, done.stderr
    assert re.search(r"^error: the system refuses: No space left", done.stderr, re.MULTILINE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stdout_ends_in_one_message(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src", shards=1)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llmconvert", "inspect", str(source), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 6 and done.stderr.startswith("error: the system refuses: No space left"), done.stderr
    assert "Traceback" not in done.stderr
