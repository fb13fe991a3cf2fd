"""Text from tokens that come one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the beginning of a character to, and all else that is not UTF-8."""


class TextPieces:
    """The text of one row, in pieces of whole characters.

    Each step decodes the tokens of the last two pieces alone: a tokenizer may treat the first token of what it decodes
    in another way (SentencePiece drops its space), and what both decodings begin with does not matter.

    Args:
        tokenizer: to decode with.
        skip_special_tokens: leave special tokens out.
        stops: strings before the first of which the text ends, if `add` is told that one ended it; () for none.
        prompt: tokens before, in which a stop string may begin.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool, stops: Sequence[str], prompt: Sequence[int]
    ) -> None:
        self._tokenizer, self._skip, self._stops = tokenizer, skip_special_tokens, stops
        # Tokens of the piece before and of what follows it; how many those of the piece are; its text.
        self._window: list[int] = []
        self._read, self._known = 0, ""
        # Text given out last (or the prompt's), as far as a stop string may reach back; text that may belong to one; and
        # where in that a whole one begins, which may be before its start.
        self._reach = max(map(len, stops), default=1) - 1
        self._before = self._last(self._decode(prompt)) if stops else ""
        self._held = ""
        self._found: int | None = None

    def add(self, tokens: Sequence[int], *, last: bool = False, stopped: bool = False) -> str:
        """Text that some more tokens complete.

        Args:
            tokens: the next ones.
            last: there will be no more: nothing is held back any longer.
            stopped: a stop string ended the row.
        """
        piece = self._next(tokens, last)
        if not self._stops:
            return piece
        if piece:
            start = len(self._before) + len(self._held)
            self._held += piece
            self._found = self._find(start)
        joined = self._before + self._held
        if last:
            end = self._found if stopped and self._found is not None else len(self._held)
        elif self._found is not None:
            end = self._found
        else:
            end = len(self._held) - max(
                (k for stop in self._stops for k in range(1, len(stop)) if joined.endswith(stop[:k])), default=0
            )
        end = max(end, 0)
        given, self._held = self._held[:end], "" if last else self._held[end:]
        self._before = self._last(self._before + given)
        self._found = None if self._found is None else self._found - end
        return given

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )  # fmt: skip
        assert isinstance(text, str)
        return text

    def _next(self, tokens: Sequence[int], last: bool) -> str:
        """Text of whole characters that follows what is known."""
        self._window += tokens
        text = self._decode(self._window)
        if len(text) <= len(self._known) or (text.endswith(_INCOMPLETE) and not last):
            return ""
        piece = text[len(self._known) :]
        self._window = self._window[self._read :]
        self._read, self._known = len(self._window), self._decode(self._window)
        return piece

    def _find(self, start: int) -> int | None:
        """Where in the text held the first stop string begins that ends behind `start` of it and what is before."""
        joined = self._before + self._held
        places = [joined.find(stop, max(start - len(stop) + 1, 0)) for stop in self._stops]
        found = [place - len(self._before) for place in places if place >= 0]
        return min(found, default=None)

    def _last(self, text: str) -> str:
        return text[len(text) - self._reach :] if self._reach < len(text) else text
