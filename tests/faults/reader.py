"""Ask transformers and torch, in a process of their own, what they make of a file that was accepted.

The answers are those of code nobody here wrote: what llmconvert accepts, they must accept, and read alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_process: subprocess.Popen[str] | None = None


def available() -> bool:
    """Whether both are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def _ask(question: dict[str, str]) -> dict[str, Any]:
    global _process
    if _process is None or _process.poll() is not None:
        folder = Path(__file__).resolve().parent.parent
        _process = subprocess.Popen(
            [sys.executable, "-m", "faults.reader"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
        )  # fmt: skip
    assert _process.stdin is not None and _process.stdout is not None
    _process.stdin.write(json.dumps(question) + "\n")
    _process.stdin.flush()
    answer: dict[str, Any] = json.loads(_process.stdout.readline() or '{"error": "the reader died"}')
    return answer


def close() -> None:
    """End the process."""
    global _process
    if _process is not None:
        _process.kill()
        _process.communicate()
        _process = None


def loads(folder: Path) -> str | None:
    """Why transformers does not load a folder's config and generation config; None where it does."""
    error: str | None = _ask({"config": str(folder)}).get("error")
    return error


def digests(file: Path) -> dict[str, str] | str:
    """What torch reads of a file with `weights_only`: a digest of each tensor's bytes; or why it does not."""
    answer = _ask({"torch": str(file)})
    found: dict[str, str] | str = answer.get("digests", answer.get("error", "?"))
    return found


def _answer(question: dict[str, str]) -> dict[str, Any]:
    if "config" in question:
        import transformers

        transformers.AutoConfig.from_pretrained(question["config"])
        if os.path.exists(os.path.join(question["config"], "generation_config.json")):
            transformers.GenerationConfig.from_pretrained(question["config"])
        return {}
    import torch

    state = torch.load(question["torch"], weights_only=True)
    return {"digests": {name: _digest(tensor) for name, tensor in state.items()}}


def _digest(tensor: Any) -> str:
    import torch

    return hashlib.sha1(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def main() -> None:
    """Answer questions, a line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            found = _answer(json.loads(line))
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
