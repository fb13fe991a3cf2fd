"""What may reach a terminal: names and texts of a checkpoint are shown, never obeyed.

A tensor's name may hold escape sequences, line breaks or marks that turn the direction of writing; on a terminal they
would move the cursor, forge lines or hide what is there. They are written as Python writes them in a string.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

_LONGEST = 20_000
"""Characters of one message: a name may have millions."""


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text that shows itself and does nothing else: what is not printable is written as `\x1b`, `\n`, `\u202e`.

    Not printable is what `str.isprintable` says, but for blanks of other widths.

    Args:
        text: any text, lone surrogates included.
        lines: let line breaks be.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or (lines and char == "\n") or unicodedata.category(char) == "Zs" else _escaped(char)
        for char in text
    )


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def shortened(text: str) -> str:
    """A message of bearable length."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


_PAIRS = re.compile(r"[^\x20-\x7e\n]")


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    r"""JSON whose strings hold nothing that a terminal obeys: such characters are written as `\u001b`.

    Args:
        value: to be written; what JSON has no form of, as `str` gives it.
        indent: of each level; one line if None.
        ascii_only: write all that is not ASCII so.
    """
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent, default=str)

    def written(match: re.Match[str]) -> str:
        char = match[0]
        return char if printable(char) == char else json.dumps(char)[1:-1]

    # A line break can only be one of the layout: json.dumps has escaped those of strings.
    return text if ascii_only else _PAIRS.sub(written, text)


def console(*, stderr: bool = False) -> Any:
    """A Rich console that takes text as it is: no markup, no emoji codes, nothing a terminal obeys but Rich's own colours."""
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text, lines=True), **options)

        def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                safe = segment.control or segment.text.isprintable()
                yield segment if safe else Segment(printable(segment.text, lines=True), segment.style)

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 120
    return Plain(width=width, stderr=stderr, highlight=False, markup=False, emoji=False)
