"""Broken variants of the command line: each does one thing a judge must not let pass.

They break what lies around the code under attack (a system call, the order of things, what is said), not the code itself,
so that they go on being what they are when it changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from faults.runs import Program, command_line

DST = Path("place/dst")


def loses_a_write(arguments: list[str]) -> None:
    """A region of a weight file is not written, and the disk says it was."""
    real, calls = os.pwrite, [0]

    def losing(descriptor: int, data: Any, position: int) -> int:
        calls[0] += 1
        return len(data) if calls[0] == 5 else real(descriptor, data, position)

    os.pwrite = losing
    command_line(arguments)


def removes_the_old_first(arguments: list[str]) -> None:
    """With --overwrite, there is a time when neither the old nor the new output is there."""
    if "--overwrite" in arguments:
        shutil.rmtree(DST, ignore_errors=True)
    command_line(arguments)


def publishes_piece_by_piece(arguments: list[str]) -> None:
    """The output grows under its own name."""
    if "--resume" not in arguments and not DST.exists():
        DST.mkdir()
        (DST / "config.json").write_text("{}")
        arguments = [*arguments, "--overwrite"]
    command_line(arguments)


def replaces_what_is_there(arguments: list[str]) -> None:
    """An output somebody else made is no reason to refuse."""
    try:
        command_line(arguments)
    except SystemExit as end:
        if end.code != 2 or not os.path.lexists(DST):
            raise
        DST.unlink() if DST.is_symlink() or DST.is_file() else shutil.rmtree(DST)
        sys.stderr.seek(0)
        os.ftruncate(2, 0)
        command_line(arguments)


def knows_no_locks(arguments: list[str]) -> None:
    """Every lock is granted."""
    fcntl.flock = fcntl.lockf = lambda *_: None
    command_line(arguments)


def forgets_short_writes(arguments: list[str]) -> None:
    """A write that fell short is taken for a whole one."""
    real = os.pwrite
    os.pwrite = lambda descriptor, data, position: real(descriptor, data, position) and len(data)
    command_line(arguments)


def follows_links(arguments: list[str]) -> None:
    """What is found at the work directory's name is taken for it, wherever it leads, and emptied first."""
    work = next(iter(sorted(Path("place").glob(".dst.llmconvert-*"))), None)
    if work is not None and work.is_dir():
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    command_line(arguments)


def keeps_foreign_files(arguments: list[str]) -> None:
    """What lay in the work directory, whosever it is, is published with what is resumed, whosever that was."""
    if "--resume" not in arguments:
        command_line(arguments)
        return
    found = sorted(path for path in Path("place").glob(".dst.llmconvert-*/**/*") if path.is_file() and not path.is_symlink())
    kept = {path.name: path.read_bytes() for path in found if not path.name.endswith(".jsonl")}
    try:
        command_line(arguments)
    except SystemExit as end:
        if end.code == 2:
            os.ftruncate(2, 0)
            with contextlib.suppress(SystemExit):
                command_line([*(word for word in arguments if word != "--resume"), "--overwrite"])
    finally:
        there = {path.name for path in DST.rglob("*")}
        for name in kept.keys() - there if DST.is_dir() else ():
            (DST / name).write_bytes(kept[name])
    sys.exit(0)


def trusts_checksums(arguments: list[str]) -> None:
    """`inspect --check` finds nothing, ever."""
    if "--check" in arguments:
        print('{"intact": true}' if "--json" in arguments else "intact")
        sys.exit(0)
    command_line(arguments)


def runs_pickles(arguments: list[str]) -> None:
    """Pickles are loaded as Python loads them."""
    for path in Path("source").glob("*.bin"):
        try:
            with zipfile.ZipFile(path) as archive:
                pickle.Unpickler(io.BytesIO(archive.read("archive/data.pkl"))).load()
        except Exception:
            pass
    command_line(arguments)


def touches_the_source(arguments: list[str]) -> None:
    """A source's file gets another time."""
    os.utime("source/config.json")
    command_line(arguments)


def reads_what_is_not_its_own(arguments: list[str]) -> None:
    """A file beside the trial is read."""
    Path("outside/secret.txt").read_bytes()
    command_line(arguments)


def takes_a_neighbour_away(arguments: list[str]) -> None:
    """A file beside the destination is removed."""
    Path("place/notes.txt").unlink(missing_ok=True)
    command_line(arguments)


def leaves_a_file(arguments: list[str]) -> None:
    """A file is left beside the destination."""
    Path("place/dst.tmp").write_text("x")
    command_line(arguments)


def leaves_a_temporary_file(arguments: list[str]) -> None:
    """A file is left where temporary files go."""
    Path(os.environ["TMPDIR"], "x").write_text("x")
    command_line(arguments)


def leaves_a_process(arguments: list[str]) -> None:
    """A process goes on after the command."""
    subprocess.Popen(["sleep", "60"], start_new_session=True)
    command_line(arguments)


def fails(arguments: list[str]) -> None:
    """An exception reaches the top."""
    raise RuntimeError("a bug")


def ends_in_another_code(arguments: list[str]) -> None:
    """The exit code is not documented."""
    print("error: something", file=sys.stderr)
    sys.exit(7)


def says_nothing(arguments: list[str]) -> None:
    """A refusal without a word."""
    sys.exit(2)


def lies_about_success(arguments: list[str]) -> None:
    """Exit code 0, whatever happened."""
    try:
        command_line(arguments)
    except SystemExit:
        os.ftruncate(2, 0)
        sys.exit(0)


def prints_what_it_read(arguments: list[str]) -> None:
    """Escapes reach the terminal."""
    print("reading \x1b[2J", file=sys.stderr)
    command_line(arguments)


def sleeps(arguments: list[str]) -> None:
    """It never ends."""
    time.sleep(1000)


def spins(arguments: list[str]) -> None:
    """It never ends, and is busy."""
    while True:
        pass


def eats_memory(arguments: list[str]) -> None:
    """A small input takes more than a gigabyte."""
    block = bytearray(1100 << 20)
    block[:: 4096] = b"x" * len(block[:: 4096])
    command_line(arguments)


def imports_from_here(arguments: list[str]) -> None:
    """Modules are looked for in the working directory first."""
    sys.path.insert(0, "")
    sys.modules.pop("xxhash", None)
    import xxhash  # noqa: F401

    command_line(arguments)


def loses_a_row(arguments: list[str]) -> None:
    """An output of `infer` lacks its last line."""
    try:
        command_line(arguments)
    finally:
        out = Path("place/out.jsonl")
        if arguments[0] == "infer" and out.is_file():
            out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:-1]))


class Control(NamedTuple):
    """A broken variant.

    Attributes:
        program: it.
        kind: of the trials that are to find it out.
        says: whether a fault is what they are to say.
        seed: where to begin; what comes before shows nothing, or takes long.
    """

    program: Program
    kind: str
    says: Callable[[str], bool]
    seed: int = 0


def _says(*words: str) -> Callable[[str], bool]:
    return lambda fault: any(word in fault for word in words)


CONTROLS: list[Control] = [
    Control(loses_a_write, "short", _says("not what was to be made", "exit code 5")),
    Control(removes_the_old_first, "kill", _says("neither what it was", "what was there was replaced")),
    Control(publishes_piece_by_piece, "kill", _says("not whole")),
    Control(replaces_what_is_there, "stranger", _says("a stranger's")),
    Control(knows_no_locks, "race", _says("exit code", "not what was to be made")),
    Control(forgets_short_writes, "short", _says("not what was to be made", "exit code 5", "exit code 4")),
    Control(follows_links, "planted", _says("outside:", "place/other")),
    Control(keeps_foreign_files, "resume", _says("is new")),
    Control(trusts_checksums, "tamper", _says("exit code 0")),
    Control(runs_pickles, "pickle", _says("code of the checkpoint ran"), seed=8),
    Control(touches_the_source, "short", _says("source: `config.json` differs in changed")),
    Control(reads_what_is_not_its_own, "short", _says("outside/secret.txt was read")),
    Control(takes_a_neighbour_away, "short", _says("place/notes.txt")),
    Control(leaves_a_file, "kill", _says("`dst.tmp` is left")),
    Control(leaves_a_temporary_file, "short", _says("temporary files")),
    Control(leaves_a_process, "short", _says("left processes")),
    Control(fails, "config", _says("exit code 1", "Traceback")),
    Control(ends_in_another_code, "kill", _says("exit code 7")),
    Control(says_nothing, "kill", _says("0 errors")),
    Control(lies_about_success, "error", _says("not what was to be made")),
    Control(prints_what_it_read, "header", _says("control character")),
    Control(sleeps, "index", _says("hung")),
    Control(spins, "index", _says("hung")),
    Control(eats_memory, "index", _says("MB of memory")),
    Control(imports_from_here, "inside", _says("code of the checkpoint ran")),
    Control(loses_a_row, "infer", _says("not whole and right")),
]
