"""A process with one copy of the model: takes batches, appends answers to its log, says which rows are done.

It ends with the process that started it, however that ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llmconvert.errors import LlmconvertError
from llmconvert.infer.batches import Batch
from llmconvert.infer.engines import Copy, build
from llmconvert.infer.store import Log


@dataclass(frozen=True)
class Ready:
    """The copy is loaded."""


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
    """The batch is finished; the worker waits for another."""


@dataclass(frozen=True)
class Failed:
    """The worker ends.

    Attributes:
        what: one line.
        trace: where it happened.
        error: where the model cannot be loaded, the error for the user.
        loading: whether it happened before the first batch.
    """

    what: str
    trace: str
    loading: bool
    error: LlmconvertError | None = None


def work(connection: Any, copy: Copy, log: Path) -> None:
    """Serve batches until None comes."""
    loading = True
    try:
        engine = build(copy)
        answers_log = Log(log)
        connection.send(Ready())
        loading = False
        while True:
            batch: Batch | None = connection.recv()
            if batch is None:
                return
            for answers in engine.answer(batch.items, batch.done):
                answers_log.append(answers)
                errors = sum(answer.error is not None for answer in answers)
                connection.send(Done([a.row for a in answers], errors, sum(a.tokens for a in answers)))
            connection.send(Finished())
    except EOFError:
        return
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        known = error if isinstance(error, LlmconvertError) else None
        connection.send(Failed(what, traceback.format_exc(), loading, known))


def _end_with(lifeline: int) -> None:
    """Wait until nobody holds the other end, then end this process and what it has started."""
    os.read(lifeline, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(connection: int, lifeline: int) -> None:
    """Run a worker.

    Args:
        connection: file descriptor of a socket: a `Copy` and a log's path come first, then batches.
        lifeline: file descriptor of a pipe whose other end only the starting process holds.
    """
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    sys.stdout = sys.stderr  # stdout is for results
    with Connection(connection) as pipe:
        copy, log = pipe.recv()
        work(pipe, copy, Path(log))
    # Not through the interpreter's end: engines' threads are known to hang there, and all is written.
    sys.stderr.flush()
    os._exit(0)
