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
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from llmconvert.errors import InputOutput, LlmconvertError
from llmconvert.infer.batches import Batch
from llmconvert.infer.engines import Copy
from llmconvert.infer.store import Answer, Log, Store, read_log
from llmconvert.infer.worker import Done, Failed, Finished, Ready

_STARTS = 4
"""How often a worker is started without getting anything done."""
_BOOT = "import sys; from llmconvert.infer.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"


@dataclass
class Tally:
    """What a worker has done.

    Attributes:
        rows: answered in this run.
        errors: those of them that are errors.
        tokens: generated.
        seconds: since its model was first loaded, until its last answer.
        starts: how often it was started.
    """

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0
    starts: int = 0


@dataclass
class _Worker:
    copy: Copy
    tally: Tally = field(default_factory=Tally)
    process: subprocess.Popen[bytes] | None = None
    pipe: Any = None
    log: Path = Path()
    batch: Batch | None = None
    idle: bool = False
    vain: int = 0
    since: float | None = None
    fault: Failed | None = None


class Pool:
    """The workers of a run."""

    def __init__(self, copies: list[Copy], store: Store, threads: int, report: Callable[[list[Tally]], None]) -> None:
        """Prepare; nothing is started.

        Args:
            copies: what each worker is.
            store: where answers go.
            threads: of each worker on the processor.
            report: told what was done, whenever something was.
        """
        self._workers = [_Worker(copy) for copy in copies]
        self._store, self._threads, self._report = store, threads, report
        self._again: deque[Batch] = deque()
        self._exhausted = False
        self._own: Log | None = None

    def run(self, queue: Iterator[Batch]) -> list[Tally]:
        """Work until the queue is empty.

        Returns:
            What each worker did.

        Raises:
            LlmconvertError: the model cannot be loaded, or workers die whatever is tried.
        """
        read_end, write_end = os.pipe()
        self._lifeline = read_end
        try:
            first = next(queue, None)
            if first is None:
                return [worker.tally for worker in self._workers]
            self._again.append(first)
            for worker in self._workers:
                self._start(worker)
            while self._give(queue):
                self._hear()
        finally:
            for worker in self._workers:
                self._end(worker)
            os.close(read_end)
            os.close(write_end)
            if self._own is not None:
                self._own.close()
        return [worker.tally for worker in self._workers]

    def _start(self, worker: _Worker) -> None:
        ours, theirs = socket.socketpair()
        worker.log, worker.idle, worker.fault = self._store.new_log(), False, None
        worker.tally.starts += 1
        # What can be imported here can be there.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        with theirs, worker.log.with_suffix(".stderr").open("wb") as noise:
            worker.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(self._lifeline)],
                stdin=subprocess.DEVNULL, stdout=noise, stderr=noise, env=environment,
                pass_fds=(theirs.fileno(), self._lifeline), start_new_session=True,
            )  # fmt: skip
        worker.pipe = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it died already: we shall hear of it
            worker.pipe.send((worker.copy, str(worker.log)))

    def _give(self, queue: Iterator[Batch]) -> bool:
        """Hand batches to idle workers; False once everything is done."""
        for worker in self._workers:
            if worker.idle:
                batch = self._again.popleft() if self._again else next(queue, None)
                if batch is None:
                    self._exhausted = True
                    break
                worker.batch, worker.idle = batch, False
                with contextlib.suppress(OSError):
                    worker.pipe.send(batch)
        return not self._exhausted or bool(self._again) or any(worker.batch is not None for worker in self._workers)

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
            worker.idle, worker.since = True, worker.since or now
        elif isinstance(message, Done):
            self._count(worker, message.rows, message.errors, message.tokens)
            worker.tally.seconds = now - (worker.since or now)
        elif isinstance(message, Finished):
            worker.batch, worker.idle = None, True
        elif isinstance(message, Failed):
            worker.fault = message
            disk = isinstance(message.error, InputOutput)
            if disk and message.error is not None:
                message.error.hint = "make room and repeat with `--resume`: what is done is kept"
            if message.error is not None and (message.loading or disk):
                raise message.error

    def _count(self, worker: _Worker, rows: list[int], errors: int, tokens: int) -> None:
        worker.vain = 0
        for row in rows:
            self._store.mark(row)
            if worker.batch is not None:
                worker.batch.done.add(row)
        worker.tally.rows += len(rows)
        worker.tally.errors += errors
        worker.tally.tokens += tokens

    def _bury(self, worker: _Worker) -> None:
        """Take a dead worker's batch back, and start it again."""
        self._end(worker)
        batch, worker.batch = worker.batch, None
        if batch is not None:
            # It may have died between writing an answer and saying so.
            for _, answer in read_log(worker.log):
                if not self._store.is_done(answer.row):
                    self._count(worker, [answer.row], int(answer.error is not None), answer.tokens)
                    batch.done.add(answer.row)
            if batch.left():
                self._retry(batch, worker)
        worker.vain += 1
        if worker.vain >= _STARTS:
            what = (
                worker.fault.what
                if worker.fault
                else f"exit code {worker.process.returncode if worker.process else '?'}"
            )
            raise LlmconvertError(
                f"a worker died {_STARTS} times without getting anything done: {what}",
                where=str(worker.log.with_suffix(".stderr")),
                hint="its last words are there; what is done is kept: repeat with `--resume` once the cause is gone",
            )
        self._start(worker)

    def _retry(self, batch: Batch, worker: _Worker) -> None:
        again = batch.retry()
        self._again.extendleft(reversed(again))
        if not again:
            row = batch.items[0][0]
            cause = worker.fault.what if worker.fault else "without a word (killed, or crashed)"
            if self._own is None:
                self._own = Log(self._store.new_log())
            self._own.append([Answer(row, error=f"the worker died of it {batch.deaths} times: {cause}")])
            self._count(worker, [row], 1, 0)

    def _end(self, worker: _Worker) -> None:
        """End a worker, and whatever it has started."""
        if worker.pipe is not None:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
            worker.pipe.close()
            worker.pipe = None
        if worker.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=5 if worker.idle else 0.2)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
