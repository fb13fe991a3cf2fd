"""Start commands and drive them through what a trial has in store for them.

A run is a fork of this process, which has the command line loaded: as a new interpreter would run it, without the time
that takes. It has the folder of the trial as its working directory, limits on memory and time, and, if asked for, stops
at each call that touches a file of the trial, for a `Director` to decide.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import syscalls
from faults.syscalls import PROCEED, Answer, Note

HANG_SECONDS = 60.0
IDLE_SECONDS = 15.0
"""A run that has done nothing for so long, and waits for nobody here, hangs."""
CPU_SECONDS = 20
GRACE_SECONDS = 15.0
"""For processes of a run to end after it."""
MEMORY_LIMIT = 4 << 30
"""Address space of a run; a run that comes near it has long exceeded what the oracle allows."""

Program = Callable[[list[str]], None]


def command_line(arguments: list[str]) -> None:
    """The program under attack, where torch and transformers are not installed: they start threads, and runs are forks.

    What they load of a result, the oracle has them load. `infer` starts processes of its own for them.
    """
    from llmconvert.cli.app import main

    hidden = set() if arguments[:1] == ["infer"] else {"torch", "transformers"}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        main(arguments)
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def warm(source: Path, folder: Path) -> None:
    """Load the command line and all that conversions load, once; forks find it loaded, and its parser built.

    Args:
        source: a small checkpoint.
        folder: made; conversions go there.
    """
    import typer.main

    build, built = typer.main.get_command, []

    def once(app: Any) -> Any:
        built.append(None if built else build(app))
        return built[0]

    typer.main.get_command = once
    folder.mkdir()
    quiet = ("--workers", "1", "--quiet", "--verify", "weights")
    for arguments in (
        ["convert", str(source), str(folder / "llama"), "--to", "llama", *quiet],
        ["split", str(source), str(folder / "ranks"), *quiet],
        ["split", str(source), str(folder / "dist"), "--format", "torch_dist", *quiet],
        ["merge", str(folder / "ranks"), str(folder / "merged"), *quiet],
        ["reshard", str(folder / "dist"), str(folder / "again"), *quiet],
        ["inspect", str(source)],
        ["inspect", "--check", str(folder / "llama")],
        ["infer", str(source), str(folder / "none.jsonl"), str(folder / "out.jsonl")],
    ):
        with (
            contextlib.suppress(SystemExit), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):  # fmt: skip
            command_line(arguments)
    assert (folder / "again").is_dir(), "a plain conversion fails"
    assert "torch" not in sys.modules and threading.active_count() == 1, "runs are forks: no threads can be here"


@dataclass
class Result:
    """How a run ended.

    Attributes:
        code: its exit code; negative for the signal that ended it.
        out, err: what it printed.
        seconds: it took, and of the processor.
        peak: bytes of memory.
        hung: it was ended because it did not end.
        left: processes of its own were there after it.
    """

    code: int
    out: str
    err: str
    seconds: float
    processor: float
    peak: int
    hung: bool = False
    left: bool = False


@dataclass
class Run:
    """A command under way.

    Attributes:
        arguments: of the command line.
        pid: its process.
        result: how it ended, or None.
        sent: the signals it was sent.
        met: the faults it met, in words.
        calls: those it made in the trial's folder, each with what became of it.
    """

    arguments: list[str]
    folder: Path
    logs: Path
    number: int
    pid: int = 0
    listener: int | None = None
    ending: int = -1
    began: float = 0.0
    result: Result | None = None
    sent: list[int] = field(default_factory=list)
    met: list[str] = field(default_factory=list)
    calls: list[tuple[Note, str]] = field(default_factory=list)
    hung: bool = False
    used: int = -1
    since: float = 0.0

    def signal(self, number: int, process: int | None = None) -> None:
        """Send a signal to it, or to a process of its own."""
        self.sent.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process or self.pid, number)

    def idle(self, now: float) -> float:
        """Seconds for which neither it nor a process it has started used the processor or waited for the disk."""
        parents: dict[int, int] = {}
        used: dict[int, int] = {}
        for process in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                state, parent, *fields = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()
                parents[int(process)] = int(parent)
                used[int(process)] = int(fields[9]) + int(fields[10]) + int(now if state == "D" else 0)
        own = {self.pid}
        while more := {process for process, parent in parents.items() if parent in own} - own:
            own |= more
        total = sum(used.get(process, 0) for process in own)
        if total != self.used:
            self.used, self.since = total, now
        return now - self.since

    @property
    def done(self) -> Result:
        """How it ended."""
        assert self.result is not None
        return self.result


def start(
    arguments: Sequence[str], folder: Path, logs: Path, *, number: int = 0, stops: frozenset[str] = frozenset(),
    program: Program = command_line, environment: dict[str, str] | None = None, delay: float = 0.0, inside: str = ".",
    limited: bool = True,
) -> Run:  # fmt: skip
    """Start a command.

    Args:
        arguments: of the command line.
        folder: the trial's.
        logs: where its output goes, outside of `folder`.
        number: of the run in its trial.
        stops: the kinds of calls to stop it at, for `drive`.
        program: what to run.
        environment: variables to set.
        delay: seconds it waits first.
        inside: its working directory, in `folder`.
        limited: in memory and time of the processor.
    """
    run = Run(list(arguments), folder, logs, number)
    ours, theirs = socket.socketpair()
    run.began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    run.pid = os.fork()
    if not run.pid:
        try:
            _prepare(run, environment or {}, inside, limited)
            time.sleep(delay)
            if stops:
                syscalls.filter_calls(stops, theirs)
            os.closerange(3, 512)
            _perform(program, run.arguments)
        finally:
            os._exit(125)
    theirs.close()
    run.ending = os.pidfd_open(run.pid)
    with ours:
        if stops:
            run.listener = syscalls.receive_listener(ours)
            assert run.listener is not None, (logs / f"{number}.err").read_text()
    return run


def _prepare(run: Run, environment: dict[str, str], inside: str, limited: bool) -> None:
    os.setsid()
    os.chdir(run.folder / inside)
    os.umask(0o022)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, run.logs / f"{run.number}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, run.logs / f"{run.number}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for name in ("RANK", "WORLD_SIZE", "PYTHONFAULTHANDLER"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))


def _perform(program: Program, arguments: list[str]) -> None:
    """Run the program and end as an interpreter does: threads are waited for, an exception is shown."""
    code = 0
    try:
        program(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 120
    os._exit(code)


class Director:
    """Decides what becomes of the calls that wait; this one lets all happen."""

    patience = 1.0
    """Seconds to wait for a call before `decide` is asked again."""

    def decide(self, waiting: list[tuple[Run, Note]], alive: list[Run]) -> list[tuple[Run, Note, Answer]]:
        """Which calls to answer, and how; others go on waiting.

        Args:
            waiting: the calls that wait, as they came.
            alive: the runs that have not ended.
        """
        return [(run, note, PROCEED) for run, note in waiting]


def drive(runs: Sequence[Run], director: Director | None = None, limit: float = HANG_SECONDS) -> None:
    """See runs through to their end.

    Calls outside of the trial's folder happen; those inside are the director's to decide.
    """
    director = director or Director()
    deadline = time.monotonic() + limit
    waiting: list[tuple[Run, Note]] = []
    grace: dict[int, float] = {}
    while True:
        poll = select.poll()
        sources: dict[int, Run] = {}
        for run in runs:
            for descriptor in (run.listener, run.ending if run.result is None else None):
                if descriptor is not None:
                    poll.register(descriptor, select.POLLIN)
                    sources[descriptor] = run
        if not sources:
            return
        events = poll.poll(int(director.patience * 1000))
        for descriptor, event in events:
            run = sources[descriptor]
            if descriptor == run.ending:
                _ended(run)
                waiting = [(other, note) for other, note in waiting if other is not run]
                grace[run.number] = time.monotonic() + GRACE_SECONDS
            elif event & select.POLLIN and run.listener is not None:
                note = syscalls.receive(run.listener)
                if note is None:
                    continue
                if run.result is None and _inside(run, note):
                    waiting.append((run, note))
                else:
                    syscalls.answer(run.listener, note, PROCEED)
            elif run.result is not None:
                _close(run)
        alive = [run for run in runs if run.result is None]
        for run, note, verdict in director.decide(waiting, alive):
            waiting = [(other, kept) for other, kept in waiting if kept.ident != note.ident or other is not run]
            run.calls.append((note, _words(verdict)))
            if run.listener is not None:
                syscalls.answer(run.listener, note, verdict)
        now = time.monotonic()
        held = {run.number for run, _ in waiting}
        for run in () if events else alive:
            if run.idle(now) > IDLE_SECONDS and run.number not in held:
                run.hung = True
                os.killpg(run.pid, signal.SIGKILL)
        for run in runs:
            if run.result is not None and run.listener is not None and now > grace[run.number]:
                run.result.left = True
                _close(run)
        if now > deadline:
            for run in alive:
                run.hung = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)


def _words(verdict: Answer) -> str:
    if verdict.error:
        return os.strerror(verdict.error)
    return "" if verdict.value is None else f"= {verdict.value}"


def _inside(run: Run, note: Note) -> bool:
    return any(file == str(run.folder) or file.startswith(f"{run.folder}/") for file in note.files)


def _close(run: Run) -> None:
    if run.listener is not None:
        os.close(run.listener)
        run.listener = None


def _ended(run: Run) -> None:
    _, status, used = os.wait4(run.pid, 0)
    os.close(run.ending)
    code = os.waitstatus_to_exitcode(status)
    processor = used.ru_utime + used.ru_stime
    run.result = Result(
        code, *((run.logs / f"{run.number}.{name}").read_text(errors="replace") for name in ("out", "err")),
        time.monotonic() - run.began, processor, used.ru_maxrss * 1024,
        hung=run.hung or code == -signal.SIGXCPU or (code == -signal.SIGKILL and processor >= CPU_SECONDS),
    )  # fmt: skip
