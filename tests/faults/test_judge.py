"""The judge is judged: calls are stopped where they are made, and broken variants are found out for what they are."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import syscalls
from faults.controls import CONTROLS
from faults.directors import Fault
from faults.runs import Run, drive, start
from faults.syscalls import CHANGES, KINDS

ROOT = Path(__file__).resolve().parents[2]
WHY = syscalls.unavailable()
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))


@pytest.fixture(scope="module")
def controls() -> dict[str, str]:
    command = [sys.executable, str(ROOT / "scripts" / "fault_campaign"), "--controls"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    found: dict[str, str] = json.loads(done.stdout or "{}")
    assert found, done.stderr
    return found


@pytest.mark.xdist_group("faults-judge")
@pytest.mark.slow
@pytest.mark.parametrize("name", [control.program.__name__ for control in CONTROLS])
def test_a_broken_variant_is_found_out(name: str, controls: dict[str, str]) -> None:
    assert controls[name] == ""


def _attack(folder: Path, program: Callable[[list[str]], None], fault: Fault) -> Run:
    for name in ("root", "logs"):
        (folder / name).mkdir(exist_ok=True)
    run = start([], folder / "root", folder / "logs", stops=KINDS, program=program, limited=False)
    drive([run], fault)
    return run


def _rename(one: str, two: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, one.encode(), -100, two.encode(), 1):
        raise OSError(ctypes.get_errno(), "renameat2")


WAYS: list[tuple[str, str, Callable[[], object]]] = [
    ("create", "ENOSPC", lambda: Path("a").write_text("x")),
    ("create", "EDQUOT", lambda: open("a", "w")),  # noqa: SIM115
    ("write", "EFBIG", lambda: os.write(os.open("a", os.O_CREAT | os.O_WRONLY), b"x")),
    ("write", "ENOSPC", lambda: shutil.copyfile(__file__, "a")),
    ("sync", "EIO", lambda: os.fsync(os.open("a", os.O_CREAT | os.O_WRONLY))),
    ("make", "EROFS", lambda: Path("a/b").mkdir(parents=True)),
    ("rename", "ENOSPC", lambda: (Path("a").touch(), _rename("a", "b"))),
    ("remove", "EACCES", lambda: (Path("a").touch(), Path("a").unlink())),
    ("size", "EFBIG", lambda: os.ftruncate(os.open("a", os.O_CREAT | os.O_WRONLY), 10)),
    ("list", "EIO", lambda: os.listdir(".")),
    ("read", "EIO", lambda: (Path("a").write_text("x"), Path("a").read_text())),
    ("look", "EACCES", lambda: (Path("a").touch(), os.stat("a"))),
    ("mode", "EPERM", lambda: (Path("a").touch(), os.chmod("a", 0o600))),
]


@pytest.mark.parametrize(("kind", "error", "way"), WAYS)
def test_a_call_fails_whoever_makes_it(kind: str, error: str, way: Callable[[], object], tmp_path: Path) -> None:
    def program(_: list[str]) -> None:
        try:
            way()
        except OSError as found:
            sys.exit(10 if found.errno == getattr(errno, error) else 11)
        sys.exit(12)

    run = _attack(tmp_path, program, Fault(0, error, frozenset({kind})))
    assert run.done.code == 10 and len(run.met) == 1, (run.done, run.calls)


def test_writes_and_reads_fall_short_and_happen(tmp_path: Path) -> None:
    def program(_: list[str]) -> None:
        descriptor = os.open("a", os.O_CREAT | os.O_RDWR)
        done = [os.write(descriptor, b"0123456789"), os.pwrite(descriptor, b"abcdefgh", 20), os.lseek(descriptor, 0, 1)]
        os.pwrite(descriptor, b"0123456789", 0)
        buffer = bytearray(8)
        done += [os.preadv(descriptor, [buffer], 2), len(os.pread(descriptor, 6, 0))]
        print(done, bytes(buffer), os.pread(descriptor, 3, 21))

    fault = Fault(0, "short", frozenset({"write", "read"}), lasting=True, share=0.5)
    run = _attack(tmp_path, program, fault)
    # The second write is at 20: four bytes of it are done. The third does five of ten, so byte 5 and on are not written anew.
    assert run.done.out == "[5, 4, 5, 4, 3] b'234\\x00\\x00\\x00\\x00\\x00' b'b'\n", run.done
    assert (tmp_path / "root" / "a").read_bytes() == b"01234" + bytes(15) + b"abcd"


def test_a_kill_strikes_before_the_call_and_an_interrupt_is_heard(tmp_path: Path) -> None:
    def program(_: list[str]) -> None:
        for name in "abc":
            Path(name).mkdir()

    run = _attack(tmp_path, program, Fault(1, "SIGKILL", CHANGES))
    assert run.done.code == -signal.SIGKILL and sorted(os.listdir(tmp_path / "root")) == ["a"]
    (tmp_path / "root" / "a").rmdir()
    run = _attack(tmp_path, program, Fault(1, "SIGINT", CHANGES))
    assert run.done.code == 1 and "KeyboardInterrupt" in run.done.err
    assert sorted(os.listdir(tmp_path / "root")) == ["a", "b"]


def test_calls_outside_of_the_folder_and_of_other_kinds_are_let_be(tmp_path: Path) -> None:
    outside = tmp_path / "outside"

    def program(_: list[str]) -> None:
        outside.write_text("x")
        Path("inside").write_text("x")

    run = _attack(tmp_path, program, Fault(0, "EIO", frozenset({"rename"})))
    assert run.done.code == 0 and outside.read_text() == "x"
    assert {file for note, _ in run.calls for file in note.files} == {str(tmp_path / "root" / "inside")}
