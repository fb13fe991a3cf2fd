"""Engines for tests of batch inference: one that needs no model and dies on command, one that keeps a trace.

What they do is written beside the model's directory, where every worker sees it:

    trace        a line "pid row" for each row computed
    orders.json  {"sleep": seconds a row, "die": {row: times}, "raise": {row: times},
                  "broken": never load, "gather": wait for so many workers}
"""

from __future__ import annotations

import json
import os
import signal
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


class Echo:
    """Answers with the prompt backwards."""

    def __init__(self, copy: Copy) -> None:
        self.place = Path(copy.model).parent
        orders = self.place / "orders.json"
        self.orders: dict[str, Any] = json.loads(orders.read_text()) if orders.exists() else {}
        if self.orders.get("broken"):
            raise RuntimeError("no such kernel")

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
            yield [Answer(row, json.dumps(prompt)[::-1], tokens=1) for row, prompt in group]


class Traced(HuggingFace):
    """transformers, with a trace of every row."""

    def __init__(self, copy: Copy) -> None:
        super().__init__(copy)
        self.place = Path(copy.model).parent
        gather = json.loads((self.place / "orders.json").read_text())["gather"]
        (self.place / f"ready-{os.getpid()}").touch()
        while len(list(self.place.glob("ready-*"))) < gather:
            time.sleep(0.02)

    def answer(self, items: Sequence[tuple[int, Any]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows."""
        for answers in super().answer(items, done):
            _trace(self.place, [answer.row for answer in answers])
            yield answers
