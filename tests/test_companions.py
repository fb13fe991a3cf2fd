"""Files beside the weights: whatever they are called and whatever the disk says of them, none is lost without a word."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import tiny

from llmconvert.checkpoint.directory import Checkpoint, open_checkpoint
from llmconvert.cli.app import main
from llmconvert.converters.companions import companions
from llmconvert.engine.manifest import check
from llmconvert.errors import InputOutput

MODULE = "tokenization_tiny.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("qwen2", tmp_path_factory.mktemp("made") / "src", tokenizer=True)


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "src")
    return tmp_path / "src"


def _furnish(source: Path, code: str = "from .words import WORDS\n", reference: str = "tokenization_tiny.Tiny") -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [reference, None]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / MODULE).write_text(code)
    (source / "words.py").write_text("WORDS = ()\n")
    (source / "additional_chat_templates").mkdir(exist_ok=True)
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


CALLS = ("stat", "lstat", "listdir", "scandir", "open", "readlink")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_disk_that_fails_for_a_moment_loses_no_file(
    source: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Every call there is fails once, and once for good: either it is told, or all is found."""
    _furnish(source)
    (source / "linked.jinja").symlink_to("additional_chat_templates/rag.jinja")
    checkpoint = open_checkpoint(source)
    expected, real, failed = companions(checkpoint), getattr(os, call), 0
    for lasting in (False, True):
        for step in range(1, 60):
            calls = 0

            def failing(path: object, *arguments: object, **named: object) -> object:
                nonlocal calls
                mine = str(path).startswith(str(source))
                calls += mine
                if mine and (calls == step or (lasting and calls > step)):  # noqa: B023
                    raise OSError(number, os.strerror(number), str(path))
                return real(path, *arguments, **named)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, failing)
                try:
                    assert companions(checkpoint) == expected, step
                except InputOutput as error:
                    assert str(source) in str(error.where)
                    failed += 1
    assert failed or call == "scandir" or call == "open"


@pytest.mark.parametrize("name", [MODULE, "words.py", "tokenizer.json", "additional_chat_templates"])
def test_a_stale_file_ends_in_one_message(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    _furnish(source)
    real = os.stat

    def stale(path: object, **named: object) -> os.stat_result:
        if str(path) == str(source / name):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stale)
    assert _run("convert", source, tmp_path / "dst", "--to", "llama", "--verify", "none") == 6
    assert name in capsys.readouterr().err and not (tmp_path / "dst").exists()


def test_a_module_that_cannot_be_read_ends_in_one_message(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it imports would stay behind."""
    _furnish(source)
    real = Path.open

    def failing(path: Path, *arguments: object) -> object:
        if path.name == MODULE:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(InputOutput, match="cannot read"):
        companions(open_checkpoint(source))


ODD = b"\xff\xfe.txt"


def test_names_that_are_no_text_stay_behind(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _furnish(source)
    for folder in ("", "additional_chat_templates"):
        (source / folder / os.fsdecode(ODD)).write_text("x")
    (source / os.fsdecode(b"\xff.pt")).write_text("x")
    (source / os.fsdecode(b"\xff.py")).write_text("x")
    (source / os.fsdecode(b"\xff")).mkdir()
    for command, destination in (("convert", tmp_path / "dst"), ("split", tmp_path / "ranks")):
        arguments = (command, source, destination, *(("--to", "llama") if command == "convert" else ()))
        assert _run(*arguments, "--verify", "none", "--json") == 0
        left = json.loads(capsys.readouterr().out)["not_carried"]
        names = {r"\xff\xfe.txt", r"additional_chat_templates/\xff\xfe.txt", r"\xff.pt", r"\xff.py", "\\xff/"}
        assert names <= left.keys() and "not UTF-8" in left[r"\xff\xfe.txt"]
        check(destination)
        assert _run("inspect", "--check", destination) == 0
        assert _run(*arguments, "--verify", "none", "--resume") == 0
        capsys.readouterr()


def test_a_folder_whose_name_is_no_text(source: Path, tmp_path: Path) -> None:
    """A source may have such a name; as a destination, which libraries are to load, it is refused."""
    odd = tmp_path / os.fsdecode(b"\xff\xfe")
    assert _run("convert", source, odd, "--to", "llama", "--verify", "weights") == 2
    assert not os.path.lexists(odd)
    source, destination = source.rename(odd), tmp_path / "dst"
    arguments = ("convert", source, destination, "--to", "llama", "--verify", "weights")
    assert _run(*arguments) == 0
    assert _run("inspect", "--check", destination) == 0
    assert _run(*arguments, "--resume") == 0


HOSTILE = {
    "deep": "-" * (1 << 20) + "1",
    "deeper": "a" + ".b" * (1 << 19),
    "long": "#" * (3 << 20) + "\nfrom .words import WORDS\n",
    "not Python": "class {",
    "no text": "a = 1\0\n",
}


@pytest.mark.parametrize("code", HOSTILE)
def test_code_nobody_can_read_is_carried_and_not_followed(source: Path, code: str) -> None:
    _furnish(source, HOSTILE[code])
    found = companions(open_checkpoint(source))
    assert MODULE in found.copies and "words.py" in found.left


@pytest.mark.parametrize(
    "reference", ["../../secret.Tiny", "/etc/secret.Tiny", "a/b.Tiny", "a\0b.Tiny", "...Tiny", "x" * 5000]
)
def test_references_that_lead_elsewhere_are_passed_over(source: Path, reference: str) -> None:
    (source.parent.parent / "secret.py").write_text("from .words import WORDS\n")
    _furnish(source, reference=reference)
    assert {MODULE, "words.py"} <= companions(open_checkpoint(source)).left.keys()


def test_the_style_of_a_tokenizers_code_is_nobodys_business(source: Path) -> None:
    _furnish(source, 'A = "\\d"\nB = 1 is 1\nfrom .words import WORDS\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {MODULE, "words.py"} <= companions(open_checkpoint(source)).copies.keys()


def test_a_module_that_is_a_link_out_is_called_so(source: Path) -> None:
    _furnish(source)
    shutil.move(source / "words.py", source.parent / "words.py")
    (source / "words.py").symlink_to("../words.py")
    found = companions(Checkpoint(source, {}, {}))
    assert found.left["words.py"] == "a symlink that leaves the checkpoint" and MODULE in found.copies


@pytest.mark.skipif(os.geteuid() == 0, reason="root may go anywhere")
def test_a_link_into_a_closed_folder_stays_behind(source: Path) -> None:
    closed = source.parent / "closed"
    closed.mkdir()
    (closed / "x.jinja").write_text("x")
    (source / "x.jinja").symlink_to(closed / "x.jinja")
    closed.chmod(0)
    try:
        assert companions(open_checkpoint(source)).left["x.jinja"] == "a symlink that leaves the checkpoint"
    finally:
        closed.chmod(0o700)
