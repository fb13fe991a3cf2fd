"""Engines for tests of batch inference: one that needs no model and dies on command, one that keeps a trace.

What they do is written beside the model's directory, where every worker sees it:

    trace        a line "pid row" for each row computed
    orders.json  {"sleep": seconds a row, "die": {row: times}, "raise": {row: times},
                  "broken": never load, "gather": wait for so many workers,
                  "forget": {row: times}, "wrong": what `Wrong` does}
    flight       a line "pid rows" for each step of `Stream`: how many rows it was at work on
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmconvert.infer.engines import Copy
from llmconvert.infer.engines.hf import HuggingFace
from llmconvert.infer.store import Answer


def _trace(place: Path, rows: Sequence[int]) -> None:
    with (place / "trace").open("a") as file:
        file.write("".join(f"{os.getpid()} {row}\n" for row in rows))


def _gather(place: Path, workers: int) -> None:
    (place / f"ready-{os.getpid()}").touch()
    while len(list(place.glob("ready-*"))) < workers:
        time.sleep(0.02)


def reversed_json(prompt: Any) -> str:
    return json.dumps(prompt)[::-1]


class Echo:
    """Answers with the prompt backwards."""

    def __init__(self, copy: Copy) -> None:
        self.place = Path(copy.model).parent
        orders = self.place / "orders.json"
        self.orders: dict[str, Any] = json.loads(orders.read_text()) if orders.exists() else {}
        if self.orders.get("broken"):
            raise RuntimeError("no such kernel")
        _gather(self.place, self.orders.get("gather", 0))

    def _due(self, kind: str, row: int) -> bool:
        """Whether the order still stands: each time leaves a mark, so that it is carried out so often only."""
        for time_ in range(self.orders.get(kind, {}).get(str(row), 0)):
            try:
                (self.place / f"{kind}-{row}-{time_}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def answer(self, items: Sequence[tuple[int, Any]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows, two at a time."""
        left = [item for item in items if item[0] not in done]
        for start in range(0, len(left), 2):
            group = left[start : start + 2]
            for row, _ in group:
                if self._due("die", row):
                    os.kill(os.getpid(), signal.SIGKILL)
                if self._due("raise", row):
                    raise ValueError(f"row {row} is cursed")
                time.sleep(self.orders.get("sleep", 0))
            _trace(self.place, [row for row, _ in group])
            yield [Answer(row, reversed_json(prompt), tokens=1) for row, prompt in group]


class Stream(Echo):
    """Takes rows up while it is at work on others, and answers the longest a step at a time."""

    ahead = 10

    def __init__(self, copy: Copy) -> None:
        super().__init__(copy)
        self.flight: list[tuple[int, Any]] = []

    @property
    def busy(self) -> bool:
        return bool(self.flight)

    def add(self, items: Sequence[tuple[int, Any]]) -> list[Answer]:
        bad = [item for item in items if item[1] == "refuse me"]
        self.flight += [item for item in items if item not in bad]
        return [Answer(row, error="no") for row, _ in bad]

    def step(self) -> list[Answer]:
        with (self.place / "flight").open("a") as file:
            file.write(f"{os.getpid()} {len(self.flight)}\n")
        time.sleep(self.orders.get("sleep", 0))
        row, prompt = self.flight.pop(0)
        if self._due("die", row):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._due("forget", row):
            return []
        _trace(self.place, [row])
        return [Answer(row, reversed_json(prompt), tokens=1)]


class Wrong(Echo):
    """Answers what was not asked for, twice, not at all, or not with text."""

    def answer(self, items: Sequence[tuple[int, Any]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows wrongly."""
        right = [Answer(row, reversed_json(prompt), tokens=1) for row, prompt in items]
        how = self.orders["wrong"]
        if how == "own numbers":
            yield [Answer(number + 1000, answer.output) for number, answer in enumerate(right)]
        elif how == "no text":
            yield [Answer(answer.row, 5) for answer in right]  # type: ignore[arg-type]
        elif how == "nothing":
            yield [Answer(answer.row) for answer in right]
        elif how == "tuples":
            yield [(answer.row, answer.output) for answer in right]  # type: ignore[misc]
        elif how == "twice":
            yield right
            yield [Answer(answer.row, "another") for answer in right]
        elif how == "not all":
            yield [answer for answer in right if not self._due("forget", answer.row)]


class Spawner(Echo):
    """Starts interpreters of its own, as engines do."""

    def __init__(self, copy: Copy) -> None:
        super().__init__(copy)
        for start in (["-c", "import json, torch"], ["-m", "json.tool", "--help"]):
            subprocess.run([sys.executable, *start], check=True, capture_output=True)
        child = multiprocessing.get_context("spawn").Process(target=json.dumps, args=(1,))
        child.start()
        child.join()
        assert child.exitcode == 0


class Traced(HuggingFace):
    """transformers, with a trace of every row."""

    def __init__(self, copy: Copy) -> None:
        super().__init__(copy)
        self.place = Path(copy.model).parent
        _gather(self.place, json.loads((self.place / "orders.json").read_text())["gather"])

    def answer(self, items: Sequence[tuple[int, Any]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows."""
        for answers in super().answer(items, done):
            _trace(self.place, [answer.row for answer in answers])
            yield answers
