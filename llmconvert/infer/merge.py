"""Answers put into the order of the data, beside the fields of their rows, and the file that makes them exist."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from llmconvert.errors import InputOutput, LlmconvertError
from llmconvert.infer.rows import Fields, Row, to_line
from llmconvert.infer.store import Answer, read_log

OWN_ERROR = "llmconvert_error"
"""Where an error goes in a row whose own fields have the name for errors."""


@dataclass
class Merged:
    """What an output holds: rows, those of them that are errors, tokens generated, and one of the errors."""

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    first_error: str | None = None


class Answers:
    """The answers in some logs by row; of each only its place is in memory (10 bytes a row)."""

    def __init__(self, logs: list[Path]) -> None:
        """Find every row's first answer."""
        self._logs = logs
        self._log, self._offset = array("H"), array("q")
        for number, log in enumerate(logs):
            for offset, answer in read_log(log):
                missing = answer.row + 1 - len(self._offset)
                if missing > 0:
                    self._log.extend([0] * missing)
                    self._offset.extend([-1] * missing)
                if self._offset[answer.row] < 0:
                    self._log[answer.row], self._offset[answer.row] = number, offset
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(log.open("rb")) for log in logs]

    def of(self, row: int) -> Answer:
        """A row's answer.

        Raises:
            LlmconvertError: there is none, which no course of events should lead to.
        """
        if row >= len(self._offset) or self._offset[row] < 0:
            raise LlmconvertError(f"row {row} has no answer", hint="repeat with `--resume`")
        file = self._files[self._log[row]]
        file.seek(self._offset[row])
        return Answer(**json.loads(file.readline()))

    def close(self) -> None:
        """Close the logs."""
        self._stack.close()


def merge(rows: Iterable[Row], logs: list[Path], fields: Fields, draft: Path, output: Path) -> Merged:
    """Write the output: a line a row, in the data's order, under its name in one rename.

    Args:
        rows: the data, once more.
        logs: the answers.
        fields: where answers and errors go.
        draft: the file to write, on the output's filesystem.
        output: its name when whole; what is there is replaced.

    Raises:
        InputOutput: the disk refuses.
        LlmconvertError: a row has no answer.
    """
    answers, found = Answers(logs), Merged()
    try:
        with draft.open("wb") as file:
            for row in rows:
                answer = answers.of(row.number)
                result = {fields.output: answer.output}
                found.rows += 1
                found.tokens += answer.tokens
                if answer.error is not None:
                    found.errors += 1
                    found.first_error = found.first_error or f"row {row.number}: {answer.error}"
                    result[fields.error if fields.error not in row.fields else OWN_ERROR] = answer.error
                # A field of the row's own stays: such a row is an error that says so.
                file.write(to_line({**row.fields, **{k: v for k, v in result.items() if k not in row.fields}}))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(output)
    except OSError as error:
        raise InputOutput(f"the output cannot be written: {error.strerror}", where=str(output)) from None
    finally:
        answers.close()
    return found
