"""Where words go: results on stdout, everything else on stderr, one JSON object on stdout under --json.

All of it passes through `llmconvert.terminal`, since names and texts of a checkpoint are in most of it.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from llmconvert.cli.render import size
from llmconvert.engine.processes import Elsewhere, rank
from llmconvert.errors import LlmconvertError
from llmconvert.terminal import console, json_text, printable, shortened


def say(text: str) -> None:
    """Write a line on stderr: a remark, a hint, progress."""
    print(printable(shortened(text)), file=sys.stderr, flush=True)


def show_json(value: Any, *, indent: int | None = None) -> None:
    """Write JSON on stdout, in characters that stdout has."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")
    print(json_text(value, indent=indent, ascii_only=not unicode))


class Output:
    """The sink of one command.

    Args:
        json_mode: print one JSON object on stdout and nothing human there.
        quiet: print nothing but errors.
    """

    def __init__(self, *, json_mode: bool = False, quiet: bool = False) -> None:
        """See the class."""
        # Under torchrun the first process speaks for all.
        other = rank() != 0
        self.json_mode, self.quiet = json_mode and not other, quiet or other

    def result(self, value: dict[str, Any] | list[Any], human: Any = None) -> None:
        """Show a command's result: `value` as JSON, or `human` (a string or a Rich renderable)."""
        if self.json_mode:
            show_json(value, indent=2)
        elif not self.quiet and human is not None:
            if isinstance(human, str):
                print(printable(human, lines=True))
                return
            console().print(human)

    def progress(self, unit: str = "bytes") -> Progress:
        """A progress display, silent where nobody would see it; what it counts are bytes, or `unit`."""
        return Progress(enabled=not self.json_mode and not self.quiet, unit=unit)


class Progress:
    """Bytes, rate and time left: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, enabled: bool, unit: str = "bytes") -> None:
        """See `Output.progress`."""
        self._enabled, self._unit = enabled, unit
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._said = time.monotonic()
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        """Start the display."""
        if self._enabled and sys.stderr.isatty():
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            amount = (DownloadColumn(), TransferSpeedColumn()) if self._unit == "bytes" else (MofNCompleteColumn(),)
            columns = (TextColumn("{task.description:>7}"), BarColumn(), *amount, TimeRemainingColumn())
            self._bar = Bar(*columns, console=console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the display down."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a stage are done."""
        if not self._enabled:
            return
        with self._lock:
            if self._bar is not None:
                if stage not in self._tasks:
                    self._tasks[stage] = self._bar.add_task(stage, total=total)
                self._bar.update(self._tasks[stage], completed=done)
            elif time.monotonic() - self._said > 10:
                self._said = time.monotonic()
                bytewise = self._unit == "bytes"
                amount = f"{size(done)} of {size(total)}" if bytewise else f"{done} of {total} {self._unit}"
                say(f"{stage}: {amount}")


def show_error(error: LlmconvertError, *, json_mode: bool) -> None:
    """Print an error: what, where, and what to do next."""
    if isinstance(error, Elsewhere):
        return
    if json_mode:
        kind = type(error).__name__
        body = {
            "kind": kind,
            "exit_code": error.exit_code,
            "what": error.what,
            "where": error.where,
            "hint": error.hint,
        }
        show_json({"error": body})
    say(f"error: {error.what}")
    if error.where:
        say(f"  in {error.where}")
    if error.hint:
        say(f"hint: {error.hint}")
