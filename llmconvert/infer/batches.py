"""Rows put into batches: by length within a window, the same whatever the number of workers.

That the batches depend on nothing but the data is what makes a run's bytes independent of the number of workers and of
being killed, even where a sum of floats depends on the shape of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from llmconvert.infer.rows import Prompt, size

WINDOW = 32
"""Batches in a window: rows that lie so near in the data are sorted by length."""


@dataclass
class Batch:
    """Rows to be answered together.

    Attributes:
        items: rows' numbers and prompts, the longest first.
        done: rows of it answered already; they are computed with the others only where shapes matter.
        deaths: how often it failed, or a worker died of it.
    """

    items: list[tuple[int, Prompt]]
    done: set[int] = field(default_factory=set)
    deaths: int = 0

    @cached_property
    def rows(self) -> frozenset[int]:
        """The numbers of all its rows."""
        return frozenset(row for row, _ in self.items)

    def left(self) -> list[int]:
        """Rows not answered yet."""
        return [row for row, _ in self.items if row not in self.done]

    def retry(self) -> list[Batch]:
        """What to try after it failed: once more as it is, then row by row; nothing for a row that failed alone twice."""
        self.deaths += 1
        if self.deaths < 2:
            return [self]
        left = set(self.left())
        return [Batch([item]) for item in self.items if item[0] in left] if len(self.items) > 1 else []


def batches(
    prompts: Iterable[tuple[int, Prompt]], rows: int, is_done: Callable[[int], bool] = lambda row: False
) -> Iterator[Batch]:
    """Put prompts into batches.

    Args:
        prompts: rows' numbers and prompts, done or not: what is done must not change the batches of the rest.
        rows: most rows of a batch.
        is_done: whether a row is answered already.

    Yields:
        Batches in which something is left to do.
    """
    window: list[tuple[int, Prompt]] = []
    for item in prompts:
        window.append(item)
        if len(window) == WINDOW * rows:
            yield from _cut(window, rows, is_done)
            window = []
    yield from _cut(window, rows, is_done)


def _cut(window: list[tuple[int, Prompt]], rows: int, is_done: Callable[[int], bool]) -> Iterator[Batch]:
    window = sorted(window, key=lambda item: (-size(item[1]), item[0]))
    for start in range(0, len(window), rows):
        items = window[start : start + rows]
        done = {row for row, _ in items if is_done(row)}
        if len(done) < len(items):
            yield Batch(items, done)
