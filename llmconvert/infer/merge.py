"""Answers put into the order of the data, beside the fields of their rows."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from typing import BinaryIO

import xxhash

from llmconvert.engine.tree import writing
from llmconvert.errors import InputOutput
from llmconvert.infer.rows import Fields, Row, to_line
from llmconvert.infer.store import Answer, Merged, Store, of_log_line

OWN_ERROR = "llmconvert_error"
"""Where an error goes in a row whose own fields have the name for errors."""


class Answers:
    """The answers in a store's logs by row; of each only its place is in memory (12 bytes a row)."""

    def __init__(self, store: Store) -> None:
        """Find every row's first answer.

        Raises:
            InputOutput: a log cannot be read.
        """
        self._store, self._names = store, store.logs()
        self._log, self._offset = array("i"), array("q")
        for number, log in enumerate(self._names):
            for offset, answer in store.read(log):
                if answer is None:
                    continue
                missing = answer.row + 1 - len(self._offset)
                if missing > 0:
                    self._log.extend([0] * missing)
                    self._offset.extend([-1] * missing)
                if self._offset[answer.row] < 0:
                    self._log[answer.row], self._offset[answer.row] = number, offset
        self._stack = ExitStack()
        self._files: dict[int, BinaryIO] = {}

    def of(self, row: int) -> Answer:
        """A row's answer.

        Raises:
            InputOutput: there is none: somebody has changed the logs.
        """
        if row < len(self._offset) and self._offset[row] >= 0:
            number = self._log[row]
            if number not in self._files:
                descriptor = self._store.open_to_read(self._names[number])
                self._files[number] = self._stack.enter_context(os.fdopen(descriptor, "rb"))
            file = self._files[number]
            file.seek(self._offset[row])
            answer = of_log_line(file.readline())
            if answer is not None and answer.row == row:
                return answer
        raise InputOutput(
            f"the answer to row {row} is no longer in the logs", where=str(self._store.path), hint="repeat with `--resume`"
        )

    def close(self) -> None:
        """Close the logs."""
        self._stack.close()


def merge(rows: Iterable[Row], store: Store, fields: Fields) -> Merged:
    """Write the output's draft: a line a row, in the data's order.

    Args:
        rows: the data, once more.
        store: where the answers are, and where the draft goes.
        fields: where answers and errors go.

    Returns:
        What the draft holds.

    Raises:
        InputOutput: the disk refuses, or a row has no answer.
    """
    answers = Answers(store)
    count = errors = tokens = length = 0
    first_error, digest = None, xxhash.xxh3_128()
    try:
        with writing(store.path), os.fdopen(store.draft(), "wb") as file:
            for row in rows:
                answer = answers.of(row.number)
                result = {fields.output: answer.output}
                if answer.error is not None:
                    errors += 1
                    first_error = first_error or f"row {row.number}: {answer.error}"
                    result[fields.error if fields.error not in row.fields else OWN_ERROR] = answer.error
                # A field of the row's own stays: such a row is an error that says so.
                line = to_line({**row.fields, **{k: v for k, v in result.items() if k not in row.fields}})
                file.write(line)
                digest.update(line)
                count, tokens, length = count + 1, tokens + answer.tokens, length + len(line)
            file.flush()
            os.fsync(file.fileno())
    finally:
        answers.close()
    return Merged(count, errors, tokens, first_error, length, digest.hexdigest())
