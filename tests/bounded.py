"""Run a reader on hostile input in a child with little memory and little time, and see how it ends."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmconvert.errors import BadInput, InputOutput, LlmconvertError, Refused, Usage

MEMORY = 512 << 20
"""Bytes a reader may take for a tiny input, beyond what the process has."""
SECONDS = 10
EXPECTED = (BadInput, Refused, InputOutput, Usage)
"""How a reader may refuse; anything else is a fault of ours."""


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run(function: Callable[[], Any]) -> tuple[str, str]:
    """What a function does in a child: ("returned", ""), or the name of the error and its message.

    Raises:
        AssertionError: it takes too long, or ends in an error that is not one of `EXPECTED`.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            signal.alarm(SECONDS)
            if sys.platform == "linux":
                limit = _mapped() + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                function()
                found = ("returned", "")
            except LlmconvertError as error:
                kind = type(error).__name__ if isinstance(error, EXPECTED) else f"unexpected {type(error).__name__}"
                found = (kind, str(error))
            except BaseException as error:
                found = (f"unexpected {type(error).__name__}", traceback.format_exc()[-2000:])
            os.write(writer, pickle.dumps((found[0], found[1][:3000])))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert answer, f"no answer within {SECONDS} s and {MEMORY >> 20} MiB (status {status})"
    found = pickle.loads(answer)
    assert not found[0].startswith("unexpected"), "\n".join(found)
    return found
