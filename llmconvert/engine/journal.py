"""The work directory beside a destination: one run at a time, and a record of what is done, for resuming.

`.NAME.llmconvert-partial/` holds the files as they grow, the journal (a line per finished region with its checksum)
and the identity of the conversion. It is locked while a run uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

from llmconvert.errors import InputOutput, Usage

_JOURNAL, _IDENTITY, _LOCK = "llmconvert-journal.jsonl", "llmconvert-identity.json", "llmconvert-lock"
PRIVATE = frozenset({_JOURNAL, _IDENTITY, _LOCK})
"""Files of a work directory that are not part of the output; further processes have journals of their own."""


def _journal_of(rank: int) -> str:
    return _JOURNAL if rank == 0 else f"llmconvert-journal-{rank}.jsonl"


def work_directory(destination: Path) -> Path:
    """Where the output of `destination` grows."""
    return destination.parent / f".{destination.name}.llmconvert-partial"


class Workspace:
    """A work directory, locked by the first process of a run.

    Attributes:
        path: the directory.
        done: checksums of the regions finished by earlier runs, by region key.
    """

    def __init__(self, destination: Path, identity: str, *, resume: bool, restart: bool, rank: int = 0) -> None:
        """Create or take up the work directory of `destination`; other processes than the first find it there.

        Args:
            destination: the directory to be published.
            identity: what makes two runs the same run.
            resume: take up an unfinished run.
            restart: throw an unfinished run away.
            rank: the process's number.

        Raises:
            Usage: another run holds it, an unfinished run is in the way, or it was another conversion.
            InputOutput: the directory cannot be made.
        """
        self.path = work_directory(destination)
        self.done: dict[str, str] = {}
        self._mutex = threading.Lock()
        self._journal: int | None = None
        self._lock: int | None = None
        if rank:
            self.done = self._read_journals()
            self._open_journal(rank)
            return
        existed = self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise InputOutput(f"cannot create the work directory: {error.strerror}", where=str(self.path)) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise Usage("another llmconvert run is writing this destination", where=str(destination)) from None
        try:
            self._take_up(identity, existed, resume=resume, restart=restart)
        except BaseException:
            self.close()
            raise

    def _take_up(self, identity: str, existed: bool, *, resume: bool, restart: bool) -> None:
        recorded = self.path / _IDENTITY
        unfinished = existed and recorded.exists()
        if unfinished and not resume and not restart:
            raise Usage(
                "an unfinished conversion to this destination is there",
                where=str(self.path),
                hint="add `--resume` to go on with it, or `--overwrite` to start anew",
            )
        if unfinished and resume:
            if recorded.read_text() != identity:
                raise Usage(
                    "the unfinished run was another conversion (other source, options or version), so it cannot be resumed",
                    where=str(self.path),
                    hint="repeat its exact command, or use `--overwrite` to start anew",
                )
            self.done = self._read_journals()
        else:
            for entry in self.path.iterdir():
                if entry.name != _LOCK:
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            recorded.write_text(identity)
        self._open_journal(0)

    def _open_journal(self, rank: int) -> None:
        self._journal = os.open(self.path / _journal_of(rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def _read_journals(self) -> dict[str, str]:
        done: dict[str, str] = {}
        for journal in sorted(self.path.glob("llmconvert-journal*.jsonl")):
            with contextlib.suppress(FileNotFoundError), open(journal, encoding="utf-8") as file:
                for line in file:
                    if line.endswith("\n"):  # a line cut off by a kill is a region not done
                        key, checksum = json.loads(line)
                        done[key] = checksum
        return done

    def record(self, key: str, checksum: str) -> None:
        """Note a finished region."""
        assert self._journal is not None
        line = json.dumps([key, checksum]) + "\n"
        with self._mutex:
            os.write(self._journal, line.encode())

    def finish(self) -> None:
        """Remove the private files, ready to publish."""
        for path in (*(self.path / name for name in PRIVATE), *self.path.glob("llmconvert-journal-*.jsonl")):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the whole work directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Release the lock."""
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._journal = None
