"""A process with one copy of the model: takes batches, appends answers to its log, says which rows are done.

It ends with the process that started it, however that ends.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Container, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llmconvert.errors import InputOutput, LlmconvertError, Refused
from llmconvert.infer.batches import Batch
from llmconvert.infer.engines import Copy, Engine, build, check
from llmconvert.infer.store import Answer, Log

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Ready:
    """The copy is loaded, or could be.

    Attributes:
        ahead: most rows it may be given before others are answered; 0 for one batch at a time.
    """

    ahead: int


@dataclass(frozen=True)
class Done:
    """Rows are answered, and in the log.

    Attributes:
        rows: their numbers.
        errors: how many of them are errors.
        tokens: how many tokens were generated.
    """

    rows: list[int]
    errors: int
    tokens: int


@dataclass(frozen=True)
class Finished:
    """No more answers come to a batch.

    Attributes:
        batch: its number, as it was given.
    """

    batch: int


@dataclass(frozen=True)
class Failed:
    """The worker ends.

    Attributes:
        what: one line.
        trace: where it happened.
        error: the error for the user, where there is one.
        final: whether another try would end alike.
    """

    what: str
    trace: str
    final: bool
    error: LlmconvertError | None = None


class _Batchwise:
    """An engine that answers a batch at a time, as one that can be given more meanwhile."""

    ahead = 0

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._made: Iterator[list[Answer]] | None = None

    @property
    def busy(self) -> bool:
        return self._made is not None

    def add(self, batch: Batch) -> list[Answer]:
        self._made = iter(self._engine.answer(batch.items, batch.done))
        return []

    def step(self) -> list[Answer]:
        assert self._made is not None
        found = next(self._made, None)
        if found is None:
            self._made = None
        return found or []


class _Streaming:
    """An engine that can be given more rows while it answers others."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.ahead = engine, int(engine.ahead)

    @property
    def busy(self) -> bool:
        return bool(self._engine.busy)

    def add(self, batch: Batch) -> list[Answer]:
        left = set(batch.left())
        found: list[Answer] = self._engine.add([item for item in batch.items if item[0] in left])
        return found

    def step(self) -> list[Answer]:
        found: list[Answer] = self._engine.step()
        return found


class _Service:
    """What one engine is at work on."""

    def __init__(self, connection: Any, engine: Engine, log: Log) -> None:
        self._connection, self._log = connection, log
        self._engine = _Streaming(engine) if hasattr(engine, "step") else _Batchwise(engine)
        self._open: dict[int, set[int]] = {}  # rows of each batch that have no answer yet
        self._owner: dict[int, int] = {}  # the batch of each row it was given

    def run(self) -> None:
        """Serve batches until None comes."""
        self._connection.send(Ready(self._engine.ahead))
        while True:
            if not self._open or self._connection.poll():
                given: tuple[int, Batch] | None = self._connection.recv()
                if given is None:
                    return
                number, batch = given
                self._open[number] = set(batch.left())
                self._owner |= {row: number for row, _ in batch.items}
                self._record(self._engine.add(batch))
            else:
                self._record(self._engine.step())
            self._finish()

    def _record(self, answers: list[Answer]) -> None:
        fresh = []
        for answer in sound(answers, self._owner):
            left = self._open[self._owner[answer.row]]
            if answer.row in left:  # what was done before needs no second answer
                left.discard(answer.row)
                fresh.append(answer)
        if fresh:
            self._log.append(fresh)
            errors = sum(answer.error is not None for answer in fresh)
            self._connection.send(Done([a.row for a in fresh], errors, sum(a.tokens for a in fresh)))

    def _finish(self) -> None:
        """Say which batches are finished: those answered, or all once the engine is at work on nothing."""
        busy = self._engine.busy
        for number in [n for n, left in self._open.items() if not busy or (self._engine.ahead and not left)]:
            del self._open[number]
            self._owner = {row: owner for row, owner in self._owner.items() if owner != number}
            self._connection.send(Finished(number))


def sound(answers: list[Answer], asked: Container[int]) -> list[Answer]:
    """The answers of an engine, which may be anybody's, if they are what it was asked for.

    Raises:
        Refused: one is not an answer, or to a row that was not asked for.
    """
    for answer in answers:
        fault = answer.fault() if isinstance(answer, Answer) else "it is not an `Answer`"
        if fault is None and answer.row not in asked:
            fault = "it was not asked for"
        if fault is not None:
            to = f"row {answer.row}" if isinstance(answer, Answer) else "a row"
            raise Refused(f"the engine's answer to {to} cannot be used: {fault}")
    return answers


def work(connection: Any, copy: Copy, log: Log | None) -> None:
    """Serve batches until None comes; without a log only find out whether a copy could be loaded."""
    loading = True
    try:
        if log is None:
            check(copy)
            connection.send(Ready(0))
            return
        engine = build(copy)
        loading = False
        _Service(connection, engine, log).run()
    except EOFError:
        return
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        known = error if isinstance(error, LlmconvertError) else None
        if isinstance(error, OSError) and error.errno in _DISK:
            known = InputOutput(f"a worker cannot write: {error.strerror}", where=error.filename)
        final = known is not None and (loading or isinstance(known, InputOutput | Refused))
        connection.send(Failed(what, traceback.format_exc(), final, known))


def _end_with(lifeline: int) -> None:
    """Wait until nobody holds the other end, then end this process and what it has started."""
    os.read(lifeline, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(connection: int, lifeline: int) -> None:
    """Run a worker.

    Args:
        connection: file descriptor of a socket: a `Copy`, a log's descriptor and its path come first, then batches.
        lifeline: file descriptor of a pipe whose other end only the starting process holds.
    """
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    sys.stdout = sys.stderr  # stdout is for results
    with Connection(connection) as pipe:
        copy, descriptor, path = pipe.recv()
        work(pipe, copy, None if descriptor is None else Log(descriptor, Path(path)))
    # Not through the interpreter's end: engines' threads are known to hang there, and all is written.
    sys.stderr.flush()
    os._exit(0)
