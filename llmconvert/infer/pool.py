"""Workers, one process a copy of the model, who pull batches from a queue until there are none.

A worker that dies is started again, and what it had not finished goes back to the front of the queue. A batch that
kills workers is cut into single rows; a row that does is recorded as an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from llmconvert.engine.interpreters import environment
from llmconvert.errors import InputOutput, Refused
from llmconvert.infer.batches import Batch
from llmconvert.infer.children import start_worker
from llmconvert.infer.engines import Copy
from llmconvert.infer.store import Answer, Log, Store
from llmconvert.infer.worker import Done, Failed, Finished, Ready

_STARTS = 4
"""How often a worker is started without getting anything done."""
_CHECK_S = 600


@dataclass
class Tally:
    """What a worker has done.

    Attributes:
        rows: answered in this run.
        errors: those of them that are errors.
        tokens: generated.
        seconds: since its model was first loaded, until its last answer.
        starts: how often it was started.
        loaded: whether its model is.
    """

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0
    starts: int = 0
    loaded: bool = False


@dataclass
class _Worker:
    copy: Copy
    tally: Tally = field(default_factory=Tally)
    process: subprocess.Popen[bytes] | None = None
    pipe: Any = None
    log: Path = Path()
    noise: Path = Path()
    batches: dict[int, Batch] = field(default_factory=dict)
    ahead: int = 0
    vain: int = 0
    since: float | None = None
    fault: Failed | None = None

    def open_rows(self) -> int:
        """Rows it was given and has not answered."""
        return sum(len(batch.left()) for batch in self.batches.values())

    def takes(self, share: int) -> bool:
        """Whether it is to be given another batch.

        Args:
            share: rows that are its part of all that have no answer yet.
        """
        if not self.tally.loaded or not self.batches:
            return self.tally.loaded
        if any(batch.deaths for batch in self.batches.values()):
            return False  # what failed once is tried alone, so that nobody else is blamed
        return self.open_rows() < min(self.ahead, share)


class Lifeline:
    """A pipe whose one end only this process holds: its children notice its end, however it comes."""

    def __enter__(self) -> int:
        """The end that children hold."""
        self._ends = os.pipe()
        return self._ends[0]

    def __exit__(self, *_: object) -> None:
        """Close both."""
        for end in self._ends:
            os.close(end)


class Pool:
    """The workers of a run."""

    def __init__(
        self, copies: list[Copy], store: Store, rows: int, threads: int, report: Callable[[list[Tally]], None]
    ) -> None:
        """Prepare; nothing is started.

        Args:
            copies: what each worker is.
            store: where answers go.
            rows: how many are to be answered.
            threads: of each worker on the processor.
            report: told what was done, whenever something was, and once a second.
        """
        self._workers = [_Worker(copy) for copy in copies]
        self._store, self._report = store, report
        self._environment = environment({"TOKENIZERS_PARALLELISM": "false"}, {"OMP_NUM_THREADS": str(threads)})
        self._again: deque[Batch] = deque()
        self._rows, self._number = rows, 0
        self._exhausted = False
        self._own: Log | None = None

    def run(self, queue: Iterator[Batch], *, check: bool = False) -> list[Tally]:
        """Work until the queue is empty.

        Args:
            queue: what is to be answered.
            check: find out first, in one process, what keeps all from loading the model.

        Returns:
            What each worker did.

        Raises:
            LlmconvertError: the model cannot be loaded, or workers die whatever is tried.
        """
        first = next(queue, None)
        if first is None:
            return [worker.tally for worker in self._workers]
        if check:
            check_copy(self._workers[0].copy, self._environment)
        self._again.append(first)
        self._rows -= len(first.left())
        with Lifeline() as self._lifeline:
            self._scratch = self._store.scratch()
            try:
                for worker in self._workers:
                    self._start(worker)
                self._report([worker.tally for worker in self._workers])
                while self._give(queue):
                    self._hear()
            finally:
                for worker in self._workers:
                    self._end(worker)
                os.close(self._scratch)
                if self._own is not None:
                    self._own.close()
        return [worker.tally for worker in self._workers]

    def _start(self, worker: _Worker) -> None:
        log = self._store.new_log()
        worker.log, worker.fault = log.path, None
        worker.tally.starts += 1
        worker.tally.loaded = False
        try:
            noise, worker.noise = self._store.new_noise(log)
            try:
                worker.process, worker.pipe = start(
                    self._lifeline, self._scratch, noise, self._environment, (worker.copy, log.descriptor, str(log.path))
                )
            finally:
                os.close(noise)
        finally:
            log.close()  # it is the worker's

    def _give(self, queue: Iterator[Batch]) -> bool:
        """Hand batches to workers that take some, one each in turn; False once everything is done."""
        given = True
        while given and not self._nothing_left():
            given = False
            rows = self._rows + sum(worker.open_rows() for worker in self._workers)
            for worker in self._workers:
                if not worker.takes(-(-rows // len(self._workers))):
                    continue
                batch = self._next_for(worker, queue)
                if batch is None:
                    continue
                self._number += 1
                worker.batches[self._number] = batch
                given = True
                with contextlib.suppress(OSError):  # it died: we shall hear of it
                    worker.pipe.send((self._number, batch))
        return not self._nothing_left() or any(worker.batches for worker in self._workers)

    def _nothing_left(self) -> bool:
        return self._exhausted and not self._again

    def _next_for(self, worker: _Worker, queue: Iterator[Batch]) -> Batch | None:
        if self._again:
            if self._again[0].deaths and worker.batches:
                return None  # to be tried alone
            return self._again.popleft()
        batch = next(queue, None)
        if batch is None:
            self._exhausted = True
        else:
            self._rows -= len(batch.left())
        return batch

    def _hear(self) -> None:
        """Take what workers say, waiting a while for it."""
        pipes: dict[Any, _Worker] = {worker.pipe: worker for worker in self._workers if worker.pipe is not None}
        for pipe in wait(list(pipes), timeout=1.0):
            worker = pipes[pipe]
            try:
                self._take(worker, worker.pipe.recv())
            except (EOFError, OSError):
                self._bury(worker)
        self._report([worker.tally for worker in self._workers])

    def _take(self, worker: _Worker, message: object) -> None:
        now = time.monotonic()
        if isinstance(message, Ready):
            worker.ahead, worker.tally.loaded, worker.since = message.ahead, True, worker.since or now
        elif isinstance(message, Done):
            self._count(worker, message.rows, message.errors, message.tokens)
            worker.tally.seconds = now - (worker.since or now)
        elif isinstance(message, Finished):
            batch = worker.batches.pop(message.batch)
            if batch.left():  # the engine forgot some
                self._retry(batch, worker, "no answer came")
        elif isinstance(message, Failed):
            worker.fault = message
            if message.final and message.error is not None:
                if isinstance(message.error, InputOutput):
                    message.error.hint = "make room and repeat with `--resume`: what is done is kept"
                elif isinstance(message.error, Refused):
                    hint = f"{message.error.hint}; " if message.error.hint else ""
                    message.error.hint = f"{hint}the worker's last words are in {worker.noise}"
                raise message.error

    def _count(self, worker: _Worker, rows: list[int], errors: int, tokens: int) -> None:
        worker.vain = 0
        for row in rows:
            self._store.mark(row)
            for batch in worker.batches.values():
                if row in batch.rows:
                    batch.done.add(row)
        worker.tally.rows += len(rows)
        worker.tally.errors += errors
        worker.tally.tokens += tokens

    def _bury(self, worker: _Worker) -> None:
        """Take a dead worker's batches back, and start it again."""
        self._end(worker)
        # It may have died between writing an answer and saying so.
        for _, answer in self._store.read(worker.log.name):
            if answer is not None and not self._store.is_done(answer.row):
                self._count(worker, [answer.row], int(answer.error is not None), answer.tokens)
        batches, worker.batches = worker.batches, {}
        for batch in reversed(batches.values()):
            if batch.left():
                self._retry(batch, worker, worker.fault.what if worker.fault else "without a word (killed, or crashed)")
        worker.vain += 1
        if worker.vain >= _STARTS:
            code = worker.process.returncode if worker.process else "?"
            what = worker.fault.what if worker.fault else f"exit code {code}"
            raise Refused(
                f"a worker died {_STARTS} times without getting anything done: {what}",
                where=str(worker.noise),
                hint="its last words are there; what is done is kept: repeat with `--resume` once the cause is gone",
            )
        self._start(worker)

    def _retry(self, batch: Batch, worker: _Worker, cause: str) -> None:
        again = batch.retry()
        self._again.extendleft(reversed(again))
        if not again:
            row = batch.items[0][0]
            if self._own is None:
                self._own = self._store.new_log()
            self._own.append([Answer(row, error=f"the worker died of it {batch.deaths} times: {cause}")])
            self._count(worker, [row], 1, 0)

    def _end(self, worker: _Worker) -> None:
        """End a worker, and whatever it has started."""
        if worker.process is not None:
            end(worker.process, worker.pipe, patience=5 if worker.tally.loaded and not worker.batches else 0.2)
        worker.pipe = None


def start(
    lifeline: int, directory: int, noise: int, environment: dict[str, str], orders: tuple[Copy, int | None, str]
) -> tuple[subprocess.Popen[bytes], Any]:
    """Start a worker.

    Args:
        lifeline: the children's end of the pipe.
        directory: descriptor of its current directory.
        noise: descriptor of where its output goes.
        environment: its environment.
        orders: what it is; a log's descriptor, or None for a mere check; the log's path.

    Raises:
        InputOutput: the system refuses.
    """
    try:
        ours, theirs = socket.socketpair()
        pipe = Connection(ours.detach())
        with theirs:
            process = start_worker(
                theirs.fileno(), lifeline, directory, inherited=[one for one in orders[1:2] if one is not None], noise=noise,
                environment=environment,
            )  # fmt: skip
    except OSError as error:
        raise InputOutput(f"a worker cannot be started: {error.strerror}") from None
    with contextlib.suppress(OSError):  # it died already: we shall hear of it
        pipe.send(orders)
    return process, pipe


def end(process: subprocess.Popen[bytes], pipe: Any, *, patience: float) -> None:
    """End a worker, and whatever it has started; one that does nothing ends by itself within `patience` seconds."""
    if pipe is not None:
        with contextlib.suppress(OSError):
            pipe.send(None)
        pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_copy(copy: Copy, environment: dict[str, str]) -> None:
    """Find out in a process of its own whether a copy could be loaded, before many try.

    Raises:
        LlmconvertError: it could not.
    """
    with tempfile.TemporaryDirectory(prefix="llmconvert-") as place, Lifeline() as lifeline:
        (Path(place) / "empty").mkdir()
        directory = os.open(Path(place, "empty"), os.O_RDONLY | os.O_DIRECTORY)
        noise = os.open(Path(place, "noise"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        process, pipe = start(lifeline, directory, noise, environment, (copy, None, ""))
        said = None
        try:
            if not pipe.poll(_CHECK_S):
                raise Refused(f"the engine did not get ready within {_CHECK_S} s", where=copy.model)
            with contextlib.suppress(EOFError, OSError):
                said = pipe.recv()
        finally:
            end(process, pipe, patience=5 if said is None else 0.2)
            os.close(noise)
            os.close(directory)
        if isinstance(said, Ready):
            return
        if isinstance(said, Failed) and said.error is not None:
            raise said.error
        words = Path(place, "noise").read_text(errors="replace").strip().splitlines()[-1:]
        what = said.what if isinstance(said, Failed) else " ".join(words) or f"exit code {process.returncode}"
        raise Refused(f"the engine cannot run the model: {what}", where=copy.model)
