"""The work directory beside the output: logs of answers, what run they belong to, and one run at a time.

`.NAME.llmconvert-infer/` holds a log for each process that ever wrote (so nobody appends to a line cut off by a kill)
and the run's fingerprint. A row is done when a whole line of some log says so; the first such line counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmconvert.errors import BadInput, InputOutput, Usage

_LOCK, _FINGERPRINT = "lock", "fingerprint.json"


@dataclass(frozen=True)
class Answer:
    """What became of a row.

    Attributes:
        row: its number.
        output: the text generated; None where there is none.
        error: why there is none.
        tokens: how many were generated, the one that ended the answer included.
    """

    row: int
    output: str | None = None
    error: str | None = None
    tokens: int = 0


def work_directory(output: Path) -> Path:
    """Where the answers of `output` are gathered."""
    return output.parent / f".{output.name}.llmconvert-infer"


class Log:
    """A file of answers that is only ever appended to, by one process."""

    def __init__(self, path: Path) -> None:
        """Make the file."""
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)

    def append(self, answers: list[Answer]) -> None:
        """Write answers in one go, so that a kill hardly ever parts a batch.

        Raises:
            InputOutput: the disk refuses.
        """
        data = b"".join(json.dumps(asdict(answer)).encode() + b"\n" for answer in answers)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise InputOutput(f"an answer cannot be written: {error.strerror}", where=str(self.path)) from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_log(path: Path) -> Iterator[tuple[int, Answer]]:
    """The answers of a log with the offsets of their lines; what is not a whole line is left out."""
    with path.open("rb") as file:
        offset = 0
        for line in file:
            start, offset = offset, offset + len(line)
            if not line.endswith(b"\n"):
                return  # cut off by a kill
            with contextlib.suppress(ValueError, TypeError):  # or by a power failure: the row is not done
                yield start, Answer(**json.loads(line))


class Store:
    """A work directory, locked by the process that runs.

    Attributes:
        path: the directory.
        resumed: whether an unfinished run was taken up.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make or take up the work directory of `output`.

        Raises:
            Usage: another run holds it, an unfinished run is in the way, or it was another run.
            InputOutput: it cannot be made.
        """
        self.path = work_directory(output)
        self._done = bytearray()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise InputOutput(f"cannot create the work directory: {error.strerror}", where=str(self.path)) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise Usage("another run is writing this output", where=str(output)) from None
        try:
            self.resumed = self._take_up(fingerprint, resume=resume, overwrite=overwrite)
        except OSError as error:
            self.close()
            raise InputOutput(f"the work directory cannot be used: {error.strerror}", where=str(self.path)) from None
        except BaseException:
            self.close()
            raise

    def _take_up(self, fingerprint: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
        recorded = self.path / _FINGERPRINT
        begun = any(next(read_log(log), None) is not None for log in self.logs())
        if recorded.exists() and begun and not overwrite:  # a run that got nowhere is in nobody's way
            if not resume:
                raise Usage(
                    "an unfinished run to this output is there",
                    where=str(self.path),
                    hint="add `--resume` to go on with it, or `--overwrite` to start anew",
                )
            try:
                before = json.loads(recorded.read_text(encoding="utf-8"))
            except ValueError:
                raise BadInput(
                    "what the unfinished run was cannot be read", where=str(recorded), hint="`--overwrite` starts anew"
                ) from None
            other = sorted(key for key in before.keys() | fingerprint.keys() if before.get(key) != fingerprint.get(key))
            if other:
                raise Usage(
                    f"the unfinished run was another: it differs in {', '.join(other)}",
                    where=str(self.path),
                    hint="repeat its command as it was, or use `--overwrite` to start anew",
                )
            for log in self.logs():
                for _, answer in read_log(log):
                    self.mark(answer.row)
            return True
        for entry in self.path.iterdir():
            if entry.name != _LOCK:
                entry.unlink()
        draft = recorded.with_suffix(".draft")
        draft.write_text(json.dumps(fingerprint, indent=2), encoding="utf-8")
        draft.rename(recorded)
        return False

    def logs(self) -> list[Path]:
        """All logs, in the order they were made."""
        return sorted(self.path.glob("answers-*.jsonl"))

    def new_log(self) -> Path:
        """A name for one more log; the file is there."""
        logs = self.logs()
        number = int(logs[-1].stem.rpartition("-")[2]) + 1 if logs else 0
        path = self.path / f"answers-{number:06}.jsonl"
        path.touch(exist_ok=False)
        return path

    def mark(self, row: int) -> bool:
        """Note that a row is done; False if it was already."""
        if row >= len(self._done):
            self._done.extend(bytes(row + 1 + (row >> 1) - len(self._done)))
        new = not self._done[row]
        self._done[row] = 1
        return new

    def count(self) -> int:
        """How many rows are done."""
        return sum(self._done)

    def is_done(self, row: int) -> bool:
        """Whether a row is done."""
        return row < len(self._done) and bool(self._done[row])

    def discard(self) -> None:
        """Remove the work directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Release the lock."""
        with contextlib.suppress(OSError):
            os.close(self._lock)
