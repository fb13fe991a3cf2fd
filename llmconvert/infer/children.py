"""How child processes are started: with the imports of this process, in a directory nobody else writes to.

Python puts the current directory first on the import path of `-c` and `-m`, and so do engines that start interpreters of
their own (vLLM, multiprocessing). Where somebody stands in a checkpoint's directory, its `torch.py` would run. So a
child is handed this process's import path, and its current directory, which its own children have too, is an empty one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

from llmconvert.engine.interpreters import import_path

# `os` and `sys` are loaded by the time this runs: nothing is looked for before the path is set.
_BOOT = """
import os, sys
connection, lifeline, directory = map(int, sys.argv[1:4])
os.fchdir(directory)
sys.path[:] = sys.argv[4:]
from llmconvert.infer.worker import main
main(connection, lifeline)
"""


def start_worker(
    connection: int, lifeline: int, directory: int, *, inherited: Sequence[int], noise: int, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start an interpreter that runs `llmconvert.infer.worker.main`, in a process group of its own.

    Args:
        connection: file descriptor of the socket its orders come from.
        lifeline: file descriptor of a pipe whose other end only this process holds.
        directory: file descriptor of its current directory.
        inherited: further file descriptors it needs.
        noise: file descriptor of where its stdout and stderr go.
        environment: its environment.

    Raises:
        OSError: it cannot be started.
    """
    isolated = ["-I"] if sys.flags.isolated else []
    return subprocess.Popen(
        [sys.executable, *isolated, "-c", _BOOT, *map(str, (connection, lifeline, directory)), *import_path()],
        stdin=subprocess.DEVNULL, stdout=noise, stderr=noise, env=dict(environment),
        pass_fds=(connection, lifeline, directory, *inherited), start_new_session=True,
    )  # fmt: skip
