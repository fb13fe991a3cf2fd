"""Every failure a user can meet, with the exit code it ends in.

A message says what is wrong, where, and what to do next, in that order.
"""

from __future__ import annotations


class LlmconvertError(Exception):
    """Base of all expected failures; the command line turns it into a message and an exit code.

    Args:
        what: the fault in one sentence, without a trailing full stop where it ends in a name.
        where: the file, tensor or key concerned.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what if where is None else f"{what} ({where})")


class Usage(LlmconvertError):
    """The command line or the call is off: exit code 2."""

    exit_code = 2


class Refused(LlmconvertError):
    """The input is sound, but the conversion is not representable, not supported or unsafe: exit code 3."""

    exit_code = 3


class BadInput(LlmconvertError):
    """The input is corrupt, incomplete or contradicts itself: exit code 4."""

    exit_code = 4


class ProofFailed(LlmconvertError):
    """The output was written but is not what it should be, so it was not published: exit code 5."""

    exit_code = 5


class InputOutput(LlmconvertError):
    """The disk or the filesystem said no: exit code 6."""

    exit_code = 6
