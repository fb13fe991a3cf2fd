"""The work directory of batch inference: what is damaged, planted, full, in the way, or finished already."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from infer_runs import (
    ECHO,
    ROOT,
    echo,
    expected_bytes,
    logged,
    make_place,
    orders,
    start,
    start_command,
    traced,
    until,
    write_rows,
)  # fmt: skip

from llmconvert.errors import BadInput, InputOutput, LlmconvertError, Usage
from llmconvert.infer import merge as merging
from llmconvert.infer.store import Answer, Log, Store, of_log_line, record_file, to_log_line, work_directory

place = pytest.fixture(make_place)

KNOWN = {"model", "data.jsonl", "out.jsonl", ".out.jsonl.llmconvert-infer.json", "trace", "orders.json", "elsewhere"}


def clean(place: Path) -> bool:
    """Whether nothing lies about but what belongs there."""
    return {path.name for path in place.iterdir() if not path.name.startswith("ready-")} <= KNOWN


@pytest.fixture
def unfinished(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of which every answer is there, and the output not: its one log."""
    with monkeypatch.context() as patched:
        patched.setattr("llmconvert.infer.run.merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            echo(place, workers=1)
    (log,) = work_directory(place / "out.jsonl").glob("answers-*.jsonl")
    assert len(log.read_bytes().splitlines()) == 60 and not (place / "out.jsonl").exists()
    return log


# -- finished runs --------------------------------------------------------------------------------


def test_a_finished_run_resumes_to_nothing(place: Path) -> None:
    first = echo(place)
    state = [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(place.iterdir())]
    again = echo(place, resume=True, workers=3)
    assert again.already_finished and not first.already_finished
    assert (again.rows, again.errors, again.tokens, again.resumed, again.new_tokens) == (60, 0, 60, 60, 0)
    assert state == [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(place.iterdir())]
    with pytest.raises(Usage, match="another run made it: it differs in sampling$|another run made it: it differs in sampling "):
        echo(place, resume=True, seed=5)
    with pytest.raises(Usage, match="it differs in data"):
        write_rows(place / "data.jsonl", [{"prompt": "w5"}])
        echo(place, resume=True)


def test_the_command_says_that_a_run_is_finished(place: Path) -> None:
    for code in (0, 0):
        run = start(place, "--resume")
        _, said = run.communicate(timeout=60)
        assert run.returncode == code, said
    write_rows(place / "data.jsonl", ["nonsense"])
    for _ in range(2):  # what ended in 4 ends in 4
        run = start(place, *(["--overwrite"] if _ == 0 else ["--resume"]))
        run.communicate(timeout=60)
        assert run.returncode == 4


def test_an_output_that_was_changed_since_is_not_a_finished_run(place: Path) -> None:
    echo(place)
    out, record = place / "out.jsonl", record_file(place / "out.jsonl")
    whole, known = out.read_bytes(), record.read_bytes()
    out.write_bytes(whole.replace(b'"id": 30', b'"id": 31'))
    with pytest.raises(Usage, match="the output exists"):
        echo(place, resume=True)
    out.write_bytes(whole)
    for damaged in (
        b"", b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"run": 5, "output": {}}',
        known.replace(b'"rows": 60', b'"rows": "60"'), known.replace(b'"run": {', b'"run": [], "more": {'),
    ):  # fmt: skip
        record.write_bytes(damaged)
        with pytest.raises(Usage, match="the output exists"):
            echo(place, resume=True)
    record.unlink()
    record.symlink_to(place / "elsewhere")
    with pytest.raises(LlmconvertError):
        echo(place, resume=True)
    record.unlink()
    out.unlink()
    assert echo(place, resume=True).rows == 60 and out.read_bytes() == whole and clean(place)


@pytest.mark.parametrize("moment", ["before the output", "before the record", "before the end"])
@pytest.mark.parametrize("old", [False, True])
def test_a_kill_around_publishing_leaves_the_old_or_the_new(
    moment: str, old: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data = place / "out.jsonl", (place / "data.jsonl").read_bytes()
    if old:
        write_rows(place / "data.jsonl", [{"prompt": "w5", "id": 1}])
        echo(place)
        (place / "data.jsonl").write_bytes(data)
    before = out.read_bytes() if old else None
    rename, link = os.rename, os.link

    def killed(call: Callable[..., None]) -> Callable[..., None]:
        def named(source: Any, target: Any, *rest: Any, **options: Any) -> None:
            made = {"out.jsonl": "before the output", record_file(out).name: "before the record"}.get(str(target))
            if made == moment:
                raise KeyboardInterrupt
            call(source, target, *rest, **options)

        return named

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed(rename))
        patched.setattr(os, "link", killed(link))
        if moment == "before the end":
            patched.setattr(Store, "discard", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            echo(place, overwrite=old)
    now = out.read_bytes() if out.exists() else None
    assert now == (before if moment == "before the output" else expected_bytes(place))
    done = len(traced(place))
    assert echo(place, resume=True).resumed == 60 and len(traced(place)) == done
    assert out.read_bytes() == expected_bytes(place) and clean(place)
    assert echo(place, resume=True).already_finished


def test_an_output_that_appears_meanwhile_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = place / "out.jsonl", merging.merge

    def late(*arguments: Any) -> Any:
        out.write_text("somebody else's")
        return whole(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("llmconvert.infer.run.merge", late)
        with pytest.raises(Usage, match="appeared while"):
            echo(place)
    with pytest.raises(Usage, match="appeared while"):
        echo(place, resume=True)
    assert out.read_text() == "somebody else's"
    out.unlink()
    assert echo(place, resume=True).resumed == 60 and out.read_bytes() == expected_bytes(place)


def test_without_hard_links_nothing_is_replaced_either(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    whole, out = merging.merge, place / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr("llmconvert.infer.run.merge", lambda *a: (out.write_text("mine"), whole(*a))[1])
        with pytest.raises(Usage, match="appeared while"):
            echo(place)
    assert out.read_text() == "mine"
    out.unlink()
    echo(place, resume=True)
    assert out.read_bytes() == expected_bytes(place) and clean(place)


def test_data_and_model_that_change_meanwhile_end_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, data = merging.merge, (place / "data.jsonl").read_bytes()
    changes: list[tuple[str, Callable[[], Any], str]] = [
        ("grown", lambda: (place / "data.jsonl").write_bytes(data + b'{"prompt": "w6"}\n'), "the data"),
        ("other", lambda: (place / "data.jsonl").write_bytes(data.replace(b'"id": 30', b'"id": 99')), "the data"),
        ("model", lambda: (place / "model/config.json").write_text("{ }"), "the model changed"),
    ]
    for number, (name, change, message) in enumerate(changes):
        with monkeypatch.context() as patched:
            patched.setattr("llmconvert.infer.run.merge", lambda *a, change=change: (change(), whole(*a))[1])
            with pytest.raises((BadInput, InputOutput), match=f"{message}|no longer in the logs"):
                echo(place, f"out{number}.jsonl")
        assert not (place / f"out{number}.jsonl").exists(), name
        (place / "data.jsonl").write_bytes(data)


# -- damage ---------------------------------------------------------------------------------------


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


_DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "not json": lambda rows: [*rows[:7], b"nonsense\n", *rows[8:]],
    "an empty line": lambda rows: [*rows[:7], b"\n", *rows[8:]],
    "a list": lambda rows: [*rows[:7], b"[1, 2]\n", *rows[8:]],
    "a number": lambda rows: [*rows[:7], b"7\n", *rows[8:]],
    "no utf-8": lambda rows: [*rows[:7], rows[7].replace(b'"output": "', b'"output": "\xff'), *rows[8:]],
    "deep": lambda rows: [*rows[:7], b"[" * 200_000 + b"\n", *rows[8:]],
    "row as text": lambda rows: [*rows[:7], line(row="7", output="x", error=None, tokens=1, check="0"), *rows[8:]],
    "row true": lambda rows: [*rows[:7], line(row=True, output="x", error=None, tokens=1, check="0"), *rows[8:]],
    "a sound answer to no row": lambda rows: [*rows[:7], to_log_line(Answer(10**12, "x")), *rows[8:]],
    "without a check": lambda rows: [*rows[:7], line(row=7, output="x", error=None, tokens=1), *rows[8:]],
    "another field": lambda rows: [*rows[:7], rows[7].replace(b'"tokens"', b'"tokenz"'), *rows[8:]],
    "a flipped letter": lambda rows: [*rows[:7], rows[7].replace(b"w", b"v", 1), *rows[8:]],
    "another row's number": lambda rows: [*rows[:7], re.sub(rb'"row": \d+', b'"row": 3', rows[7]), *rows[8:]],
    "cut at its end": lambda rows: [*rows[:-1], rows[-1][:-1]],
    "cut in the middle": lambda rows: [*rows[:-1], rows[-1][:30]],
    "two lines run together": lambda rows: [*rows[:7], rows[7][:-1] + rows[8], *rows[9:]],
    "twice": lambda rows: [*rows, *rows[5:9], *rows],
    "holes": lambda rows: [*rows[:7], bytes(len(rows[7]) - 1) + b"\n", *rows[8:]],
}


@pytest.mark.parametrize("damage", list(_DAMAGE))
def test_a_damaged_log_loses_and_doubles_no_row(damage: str, place: Path, unfinished: Path) -> None:
    rows = unfinished.read_bytes().splitlines(keepends=True)
    damaged = _DAMAGE[damage](rows)
    unfinished.write_bytes(b"".join(damaged))
    sound = {answer.row for one in damaged if one.endswith(b"\n") and (answer := of_log_line(one)) and answer.row < 60}
    before = len(traced(place))
    summary = echo(place, resume=True)
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place) and clean(place)
    assert sorted(traced(place)[before:]) == sorted(set(range(60)) - sound)
    assert summary.resumed == len(sound) and summary.rows == 60 and summary.errors == 0


def test_no_random_damage_makes_another_answer() -> None:
    chosen = random.Random(7)
    answers = [Answer(row, f"text é {row} \U0001f600", tokens=row) for row in range(20)] + [Answer(20, error="why")]
    for _ in range(4000):
        answer = chosen.choice(answers)
        data = bytearray(to_log_line(answer))
        for _ in range(chosen.randrange(1, 4)):
            kind, spot = chosen.randrange(3), chosen.randrange(len(data))
            if kind == 0:
                data[spot] ^= 1 << chosen.randrange(8)
            elif kind == 1:
                del data[spot]
            else:
                data.insert(spot, chosen.randrange(256))
        assert of_log_line(bytes(data)) in (None, answer)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b"5", b"\xff\xfe\xfd", b"{" * 100_000, None])
def test_a_damaged_fingerprint_is_bad_input(content: bytes | None, place: Path, unfinished: Path) -> None:
    fingerprint = unfinished.with_name("fingerprint.json")
    fingerprint.unlink()
    if content is not None:
        fingerprint.write_bytes(content)
    with pytest.raises(BadInput, match="cannot be read") as caught:
        echo(place, resume=True)
    assert "--overwrite" in str(caught.value.hint)
    assert echo(place, overwrite=True).rows == 60 and clean(place)


def test_a_run_of_another_release_is_not_taken_up(place: Path, unfinished: Path) -> None:
    fingerprint = unfinished.with_name("fingerprint.json")
    fingerprint.write_text(json.dumps({**json.loads(fingerprint.read_text()), "format": 1}))
    with pytest.raises(Usage, match="differs in format"):
        echo(place, resume=True)


def test_a_log_that_is_changed_under_way_is_noticed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = merging.merge

    def spoilt(rows: Any, store: Store, fields: Any) -> Any:
        log = store.path / store.logs()[0]
        log.write_bytes(log.read_bytes().replace(b"w", b"v", 1))
        return whole(rows, store, fields)

    with monkeypatch.context() as patched:
        patched.setattr("llmconvert.infer.run.merge", spoilt)
        with pytest.raises(InputOutput, match="no longer in the logs"):
            echo(place, workers=1)
    assert echo(place, resume=True).resumed == 59
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place)


# -- what is planted ------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(place: Path) -> Iterator[Path]:
    """A directory that must stay as it is."""
    other = place / "elsewhere"
    other.mkdir()
    (other / "answers-000000.jsonl").write_text("a letter\n")
    (other / "fingerprint.json").write_text("a diary")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in other.iterdir()}
    yield other
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in other.iterdir()} == before
    assert stat.S_IMODE(other.stat().st_mode) != 0o700


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("kind", ["directory", "lock", "lock of nothing", "file", "fifo"])
def test_a_planted_work_directory_or_lock_is_refused(
    kind: str, options: dict[str, Any], place: Path, elsewhere: Path
) -> None:
    work = work_directory(place / "out.jsonl")
    lock = place / ".out.jsonl.llmconvert-lock"
    if kind == "directory":
        work.symlink_to(elsewhere)
    elif kind == "lock":
        lock.symlink_to(elsewhere / "fingerprint.json")
    elif kind == "lock of nothing":
        lock.symlink_to(place / "nothing")
    elif kind == "file":
        work.write_text("mine")
    else:
        os.mkfifo(lock)
    with pytest.raises(Usage) as caught:
        echo(place, **options)
    assert str(caught.value.where) in (str(work), str(lock)) and "rm" in str(caught.value.hint)
    assert not (place / "nothing").exists() and not (place / "out.jsonl").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser gives files away")
def test_another_users_work_directory_is_refused(place: Path) -> None:
    work = work_directory(place / "out.jsonl")
    work.mkdir()
    os.chown(work, 12345, 12345)
    with pytest.raises(Usage, match="belongs to another user"):
        echo(place)


def test_links_in_the_work_directory_are_not_followed(place: Path, elsewhere: Path, unfinished: Path) -> None:
    work = unfinished.parent
    for name in ("answers-000001.jsonl", "answers-000002.stderr", "merged", "record", "fingerprint.json.draft", "scratch"):
        (work / name).unlink() if (work / name).is_file() else None
        if (work / name).is_dir():
            (work / name).rmdir()
        (work / name).symlink_to(elsewhere if name == "scratch" else elsewhere / "fingerprint.json")
    (work / "answers-000003.jsonl").symlink_to(place / "nothing")
    os.mkfifo(work / "answers-000004.jsonl")
    os.link(elsewhere / "answers-000000.jsonl", work / "answers-000005.jsonl")
    (work / "notes").mkdir()
    (work / "notes/a").write_text("a")
    rows = unfinished.read_bytes().splitlines(keepends=True)
    unfinished.write_bytes(b"".join(rows[:30]))
    assert echo(place, resume=True).resumed == 30
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place) and clean(place)


def test_a_link_for_the_output_is_replaced_and_not_what_it_leads_to(place: Path, elsewhere: Path) -> None:
    (place / "out.jsonl").symlink_to(elsewhere / "fingerprint.json")
    with pytest.raises(Usage, match="the output exists"):
        echo(place)
    echo(place, overwrite=True)
    assert not (place / "out.jsonl").is_symlink() and (place / "out.jsonl").read_bytes() == expected_bytes(place)


def test_nobody_else_can_look_into_a_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    whole = merging.merge

    def looking(*arguments: Any) -> Any:
        for path in place.iterdir():
            if path.name.startswith(".out"):
                seen[path.name] = stat.S_IMODE(path.stat().st_mode)
        return whole(*arguments)

    monkeypatch.setattr("llmconvert.infer.run.merge", looking)
    before = os.umask(0o022)
    try:
        echo(place)
    finally:
        os.umask(before)
    assert seen == {".out.jsonl.llmconvert-infer": 0o700, ".out.jsonl.llmconvert-lock": 0o600}
    assert stat.S_IMODE((place / "out.jsonl").stat().st_mode) == 0o644 and (place / "out.jsonl").stat().st_nlink == 1


# -- a disk that refuses --------------------------------------------------------------------------

_CALLS = ("open", "write", "mkdir", "link", "rename", "fsync", "unlink", "listdir", "rmdir", "stat")


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("state", ["nothing", "unfinished", "finished"])
def test_whatever_call_fails_the_run_says_so_and_can_be_repeated(
    state: str, call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every single call of a kind fails in its turn; rows without prompts, so that no worker is needed."""
    rows = [{"id": seed} for seed in range(9)]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    write_rows(tmp_path / "data.jsonl", rows)
    expected = b"".join(
        json.dumps({**row, "output": None, "error": "the row has no field `prompt` or `messages`"}).encode() + b"\n" for row in rows
    )
    real, left, failed = getattr(os, call), 0, 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    for turn in range(1, 200):
        for path in (tmp_path / "out.jsonl", record_file(tmp_path / "out.jsonl")):
            path.unlink(missing_ok=True)
        if state == "unfinished":
            with monkeypatch.context() as patched:
                patched.setattr("llmconvert.infer.run.merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    echo(tmp_path)
        elif state == "finished":
            echo(tmp_path)
        left = turn
        monkeypatch.setattr(os, call, failing)
        try:
            echo(tmp_path, resume=state != "nothing")
        except InputOutput:
            failed += 1
        except Usage as error:  # the one answer to "is it there?" that is not an error of the disk's
            assert call == "stat" and number == errno.EACCES, error
        finally:
            monkeypatch.setattr(os, call, real)
        never = left > 0
        summary = echo(tmp_path, resume=True)
        assert summary.rows == summary.errors == 9 and (tmp_path / "out.jsonl").read_bytes() == expected, turn
        assert clean(tmp_path), (turn, list(tmp_path.iterdir()))
        if never:
            break
    else:
        pytest.fail("it never ended")
    if state == "finished" and call in ("write", "mkdir", "link", "rename", "fsync"):
        assert failed == 0, "nothing is written"
    elif state == "nothing" and call not in ("unlink", "rmdir"):
        assert failed > 0


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with (tmp_path / "log").open("ab") as file:
        log = Log(file.fileno(), tmp_path / "log")
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
        log.append([Answer(0, "ü" * 50), Answer(1, error="x")])
        monkeypatch.undo()
    assert [of_log_line(one) for one in (tmp_path / "log").read_bytes().splitlines()] == [
        Answer(0, "ü" * 50), Answer(1, error="x"),
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [1, 700, 3000])
def test_files_that_may_not_grow_end_in_exit_code_6(limit: int, place: Path) -> None:
    """Of the system itself: no file may be longer than so many bytes, in the run and its workers (EFBIG)."""
    code = f"import resource, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))\n"
    code += "from llmconvert.cli.app import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "infer", *(str(place / n) for n in ("model", "data.jsonl", "out.jsonl"))]
    options = ["--engine", ECHO, "--devices", "cpu", "--batch-size", "4", "--num-workers", "2", "-q"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 6 and "Traceback" not in done.stderr and done.stderr.count("error:") == 1, done.stderr
    assert "File too large" in done.stderr
    echo(place, resume=True)
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place) and clean(place)


def test_a_worker_without_descriptors_is_not_a_bug(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for name in ("socket.socketpair", "subprocess.Popen", "os.pipe"):
        with monkeypatch.context() as patched:
            patched.setattr(name, none)
            with pytest.raises(InputOutput, match="Too many open files"):
                echo(place)
    assert clean(place)


# -- signals --------------------------------------------------------------------------------------


def test_a_run_in_the_background_of_a_shell_is_not_interrupted_but_can_be_ended(place: Path) -> None:
    """A shell starts what it runs in the background with SIGINT ignored: Ctrl-C is not for it."""
    orders(place, sleep=0.02)
    run = subprocess.Popen(
        start_command(place, "--num-workers", "2"), stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    until(lambda: logged(place))
    run.send_signal(signal.SIGINT)
    until(lambda: len(logged(place)) > 10)
    assert run.poll() is None
    run.terminate()
    run.communicate(timeout=20)
    assert run.returncode == -signal.SIGTERM and not (place / "out.jsonl").exists()
    orders(place)
    assert echo(place, resume=True).resumed > 10
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place) and max(Counter(traced(place)).values()) <= 2
