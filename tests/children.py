"""Child processes of tests."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def popen_interruptible(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program that Ctrl-C (SIGINT) ends, whatever it does to the tests.

    A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
    """
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def vllm_python() -> str:
    """The interpreter of an environment with the real vLLM, for processors; made the first time, which takes minutes.

    LLMCONVERT_VLLM_PYTHON names one that is there. The test is skipped where there is none and none can be made.
    """
    named = os.environ.get("LLMCONVERT_VLLM_PYTHON")
    if named:
        return named
    made = subprocess.run([ROOT / "scripts/venv-vllm"], capture_output=True, text=True)
    if made.returncode:
        said = made.stderr.strip().splitlines()[-1:]
        pytest.skip(f"scripts/venv-vllm cannot make an environment here: {' '.join(said)}")
    return made.stdout.split()[-1]
