"""How far a run is: a live table on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from llmconvert.infer.pool import Tally

_PAUSE = 10.0


class Progress:
    """Rows, tokens a second of each worker and overall, and the time left; on stderr."""

    def __init__(self, *, enabled: bool) -> None:
        """Prepare; `enabled` false shows nothing."""
        self._enabled = enabled
        self._total = self._before = 0
        self._live: Any = None
        self._said = self._since = time.monotonic()
        self._loading = False

    def say(self, line: str) -> None:
        """A line worth knowing at once."""
        if self._enabled:
            print(line, file=sys.stderr, flush=True)

    def start(self, total: int, before: int) -> None:
        """Begin.

        Args:
            total: rows of the data.
            before: those done by earlier runs.
        """
        self._total, self._before = total, before
        self._since = self._said = time.monotonic()
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, tallies: Sequence[Tally], unreadable: int) -> None:
        """Show what is done.

        Args:
            tallies: of the workers.
            unreadable: rows that were errors before they reached a worker.
        """
        if not self._enabled:
            return
        ready = any(tally.loaded or tally.rows for tally in tallies)
        if self._loading and ready:  # rates count from here
            self._since = time.monotonic()
        loading = not ready and any(tally.starts for tally in tallies)
        if loading and not self._loading:
            self._said -= _PAUSE  # worth a line at once
        self._loading = loading
        if self._live is not None:
            self._live.update(self._table(tallies, unreadable))
        elif time.monotonic() - self._said >= _PAUSE:
            self._said = time.monotonic()
            self.say(self._line(tallies, unreadable))

    def stop(self) -> None:
        """Take the display down."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, tallies: Sequence[Tally], unreadable: int) -> str:
        loading = sum(tally.starts > 0 and not (tally.loaded or tally.rows) for tally in tallies)
        if self._loading:
            seconds = int(time.monotonic() - self._since)
            return f"loading: {loading} of {len(tallies)} copies, {seconds} s so far"
        new = sum(tally.rows for tally in tallies) + unreadable
        done = self._before + new
        elapsed = max(1e-9, time.monotonic() - self._since)
        tokens = sum(tally.tokens for tally in tallies) / elapsed
        left = (self._total - done) * elapsed / new if new else None
        eta = "-" if left is None else f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        rest = f", {loading} of {len(tallies)} copies still loading" if loading else ""
        return f"rows: {done} of {self._total}, {new / elapsed:.1f} rows/s, {tokens:.0f} tokens/s, {eta} left{rest}"

    def _table(self, tallies: Sequence[Tally], unreadable: int) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("worker", "rows", "errors", "tokens/s", "restarts"):
            table.add_column(name, justify="right")
        for number, tally in enumerate(tallies):
            waits = "-" if tally.loaded or not tally.starts else "loading"
            rate = f"{rate_of(tally):.0f}" if tally.rows else waits
            table.add_row(str(number), str(tally.rows), str(tally.errors), rate, str(max(0, tally.starts - 1)))
        done = self._before + sum(tally.rows for tally in tallies) + unreadable
        bar = ProgressBar(total=max(1, self._total), completed=done, width=60)
        below = Table.grid()
        below.add_row(bar)
        below.add_row(self._line(tallies, unreadable))
        return Group(table, below)


def rate_of(tally: Tally) -> float:
    """Tokens a second."""
    return tally.tokens / tally.seconds if tally.seconds > 0 else 0.0
