"""The work directory beside the output: logs of answers, what run they belong to, and one run at a time.

`.NAME.llmconvert-infer/` holds a log for each process that ever wrote (so nobody appends to a line cut off by a kill)
and the run's fingerprint. A row is done when a whole line of some log says so; the first such line counts. Once the output
is there the directory goes, and `.NAME.llmconvert-infer.json` says what run made it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from llmconvert.engine.held import Held
from llmconvert.engine.rename import move
from llmconvert.engine.tree import Tree, disk_full, write_all, writing
from llmconvert.errors import BadInput, InputOutput, Usage

_SUFFIX = "llmconvert-infer"
_FINGERPRINT, _MERGED, _RECORD = "fingerprint.json", "merged", "record"
_OVERWRITE = "overwrite"
_LOG, _OURS, _NOISE = (
    re.compile(r"answers-(\d{6,9})\.jsonl"), re.compile(r"answers-\d{6,9}\.(jsonl|stderr)"), ".stderr"
)  # fmt: skip
_LARGEST = 1 << 24
"""Bytes of JSON that a file of ours may have, but for logs."""
_CHUNK = 1 << 22
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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

    def fault(self) -> str | None:
        """What is wrong with it, in types or numbers; None for nothing."""
        if type(self.row) is not int or self.row < 0:
            return f"its row is {self.row!r}"
        if type(self.tokens) is not int or self.tokens < 0:
            return f"its number of tokens is {self.tokens!r}"
        texts = [text for text in (self.output, self.error) if text is not None]
        if len(texts) != 1 or not isinstance(texts[0], str):
            return "it must be a text or an error, and is neither or both"
        return None


@dataclass(frozen=True)
class Merged:
    """What an output holds.

    Attributes:
        rows: how many.
        errors: those of them without an answer.
        tokens: generated.
        first_error: one of the errors.
        bytes: length of the file.
        digest: hash of the file.
    """

    rows: int
    errors: int
    tokens: int
    first_error: str | None
    bytes: int
    digest: str


def work_directory(output: Path) -> Path:
    """Where the answers of `output` are gathered."""
    return output.parent / f".{output.name}.{_SUFFIX}"


def record_file(output: Path) -> Path:
    """What says which run made `output`."""
    return output.parent / f".{output.name}.{_SUFFIX}.json"


def _check(fields: list[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields).encode())


def to_log_line(answer: Answer) -> bytes:
    """An answer as a line of a log, with a hash by which damage shows."""
    fields = asdict(answer)
    return json.dumps(fields | {"check": _check(list(fields.values()))}).encode() + b"\n"


def of_log_line(line: bytes) -> Answer | None:
    """The answer in a line of a log; None if the line is not as it was written."""
    try:
        fields = json.loads(line)
        check = fields.pop("check")
        answer = Answer(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if answer.fault() is not None or check != _check([answer.row, answer.output, answer.error, answer.tokens]):
        return None
    return answer


def read_log(directory: Tree, name: str) -> Iterator[tuple[int, Answer | None]]:
    """The answers of a log with the offsets of their lines; None for a damaged line. A line cut off by a kill is none.

    Raises:
        OSError: the file cannot be read, or is none.
    """
    with os.fdopen(directory.open(name, os.O_RDONLY), "rb") as file:
        offset = 0
        for line in file:
            start, offset = offset, offset + len(line)
            if not line.endswith(b"\n"):
                return
            yield start, of_log_line(line)


class Log:
    """A file of answers that is only ever appended to, by one process."""

    def __init__(self, descriptor: int, path: Path) -> None:
        """Take a file that is open for appending; `path` is what messages call it."""
        self.descriptor, self.path = descriptor, path

    def append(self, answers: list[Answer]) -> None:
        """Write answers in one go, so that a kill hardly ever parts a batch.

        Raises:
            InputOutput: the disk refuses.
        """
        with writing(self.path):
            write_all(self.descriptor, b"".join(map(to_log_line, answers)))

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class Store:
    """A work directory, locked by the process that runs.

    Attributes:
        path: the directory.
        finished: what the output holds, where `resume` finds the very run finished; there is then no directory.
        damaged: lines of logs that were not as they had been written, whose rows are answered again.
    """

    def __init__(
        self, output: Path, fingerprint: dict[str, Any], rows: int, *, resume: bool, overwrite: bool
    ) -> None:
        """Make or take up the work directory of `output`.

        Args:
            output: the file to make.
            fingerprint: what makes this run the run it is.
            rows: of the data.
            resume: go on with an unfinished run, or find it finished.
            overwrite: discard an unfinished run, and replace the output.

        Raises:
            Usage: another run holds it, an unfinished run or the output is in the way, or it was another run.
            BadInput: what the unfinished run was cannot be read.
            InputOutput: the system refuses.
        """
        self.output, self.path = output, work_directory(output)
        self.finished: Merged | None = None
        self.damaged = 0
        self._fingerprint, self._replace = fingerprint, overwrite
        self._done = bytearray(rows)
        self._held = Held(output, _SUFFIX)
        try:
            self._take_up(resume=resume)
        except OSError as error:
            self.close()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(error, self.path) from None
            raise InputOutput(
                f"the work directory cannot be used: {error.strerror}", where=str(error.filename or self.path)
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def _tree(self) -> Tree:
        assert self._held.tree is not None
        return self._held.tree

    def _take_up(self, *, resume: bool) -> None:
        tree, parent = self._held.tree, self._held.parent
        if tree is not None:
            # What is not a file of ours, a link for one, is not read.
            tree.keep(frozenset(name for name in tree.names() if name == _FINGERPRINT or _OURS.fullmatch(name)))
        begun = self.begun()
        if resume:
            self.finished = self._find_finished(unfinished=begun)
            if self.finished is not None:
                self._held.remove()
                return
        going_on = begun and not self._replace
        if going_on and not resume:
            raise Usage(
                "an unfinished run to this output is there",
                where=str(self.path),
                hint="add `--resume` to go on with it, or `--overwrite` to start anew",
            )
        if going_on:
            self._go_on()
        whole = going_on and self.count() == len(self._done)  # it may have been killed right after it made the output
        if not self._replace and not whole and parent.stat(self.output.name) is not None:
            raise Usage("the output exists", where=str(self.output), hint="name another file, or add `--overwrite`")
        if not going_on:
            self._start_anew()

    def _find_finished(self, *, unfinished: bool) -> Merged | None:
        """What the output holds, if this run made it and nobody has changed it since."""
        record, parent = record_file(self.output), self._held.parent
        if parent.stat(self.output.name) is None or parent.stat(record.name) is None:
            return None
        try:
            found = _read_json(parent, record.name)
            made, differences = Merged(**found["output"]), self._differences(found["run"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if any(type(number) is not int for number in (made.rows, made.errors, made.tokens, made.bytes)):
            return None
        if not differences:
            return made if self._is_output(made) else None
        if unfinished:
            return None  # what is there may be an older output, which the unfinished run is to replace
        raise Usage(
            f"the output exists, and another run made it: it differs in {', '.join(differences)}",
            where=str(self.output),
            hint="name another file, or add `--overwrite`",
        )

    def _is_output(self, made: Merged) -> bool:
        """Whether the output is what was merged."""
        found = self._held.parent.stat(self.output.name)
        if found is None or found.st_size != made.bytes:
            return False
        digest = xxhash.xxh3_128()
        with os.fdopen(self._held.parent.open(self.output.name, os.O_RDONLY), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest() == made.digest

    def _differences(self, before: dict[str, Any]) -> list[str]:
        now = self._fingerprint
        return sorted(key for key in (before.keys() | now.keys()) - {_OVERWRITE} if before.get(key) != now.get(key))

    def _go_on(self) -> None:
        try:
            before = _read_json(self._tree, _FINGERPRINT)
        except (FileNotFoundError, ValueError, RecursionError):
            raise BadInput(
                "what the unfinished run was cannot be read",
                where=str(self.path / _FINGERPRINT),
                hint="`--overwrite` starts anew",
            ) from None
        other = self._differences(before)
        if other:
            raise Usage(
                f"the unfinished run was another: it differs in {', '.join(other)}",
                where=str(self.path),
                hint="repeat its command as it was, or use `--overwrite` to start anew",
            )
        self._replace = before.get(_OVERWRITE) is True
        for log in self.logs():
            for _, answer in self.read(log):
                if answer is None:
                    self.damaged += 1
                else:
                    self.mark(answer.row)

    def _start_anew(self) -> None:
        tree = self._held.make()
        tree.keep(frozenset())
        tree.write(f"{_FINGERPRINT}.draft", json.dumps(self._fingerprint | {_OVERWRITE: self._replace}, indent=2).encode())
        tree.rename(f"{_FINGERPRINT}.draft", _FINGERPRINT)

    def logs(self) -> list[str]:
        """The names of all logs, in the order they were made."""
        return sorted((name for name in self._tree.names() if _LOG.fullmatch(name)), key=_number)

    def read(self, log: str) -> Iterator[tuple[int, Answer | None]]:
        """What `read_log` reads, of rows there are.

        Raises:
            InputOutput: it cannot be read.
        """
        try:
            for offset, answer in read_log(self._tree, log):
                yield offset, answer if answer is not None and answer.row < len(self._done) else None
        except OSError as error:
            raise InputOutput(f"a log cannot be read: {error.strerror}", where=str(self.path / log)) from None

    def open_to_read(self, name: str) -> int:
        """A descriptor of a file in the directory.

        Raises:
            OSError: it cannot be opened.
        """
        return self._tree.open(name, os.O_RDONLY)

    def new_log(self) -> Log:
        """One more log.

        Raises:
            InputOutput: it cannot be made.
        """
        logs = self.logs()
        name = f"answers-{_number(logs[-1]) + 1 if logs else 0:06}.jsonl"
        with writing(self.path / name):
            return Log(self._tree.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL), self.path / name)

    def new_noise(self, log: Log) -> tuple[int, Path]:
        """A file for what the process that writes a log says besides: its descriptor and its path.

        Raises:
            InputOutput: it cannot be made.
        """
        path = log.path.with_suffix(_NOISE)
        with writing(path):
            return self._tree.create(path.name), path

    def scratch(self) -> int:
        """An empty directory for workers to be in; its descriptor.

        Raises:
            InputOutput: it cannot be made.
        """
        with writing(self.path / "scratch"), self._tree.folder("scratch", make=True, mode=0o700) as folder:
            return os.dup(folder.descriptor)

    def mark(self, row: int) -> bool:
        """Note that a row is done; False if it was already."""
        new = not self._done[row]
        self._done[row] = 1
        return new

    def count(self) -> int:
        """How many rows are done."""
        return sum(self._done)

    def is_done(self, row: int) -> bool:
        """Whether a row is done."""
        return bool(self._done[row])

    def draft(self) -> int:
        """A new file for the output, open for writing; `publish` gives it its name.

        Raises:
            OSError: it cannot be made.
        """
        return self._tree.create(_MERGED)

    def publish(self, merged: Merged) -> None:
        """Give the draft the output's name, record what run made it, and remove the directory.

        Raises:
            Usage: something else has the name, and is not to be replaced.
            InputOutput: the system refuses.
        """
        self._held.require()
        parent, name = self._held.parent, self.output.name
        record = {"output": asdict(merged), "run": self._fingerprint}
        with writing(self.output):
            self._tree.write(_RECORD, json.dumps(record, indent=2).encode())
            if self._replace:
                os.rename(_MERGED, name, src_dir_fd=self._tree.descriptor, dst_dir_fd=parent.descriptor)
            elif not self._give_name(merged):
                raise Usage(
                    "the output appeared while its rows were answered", where=str(self.output),
                    hint="move it away and repeat with `--resume`: the answers are kept",
                )  # fmt: skip
            os.rename(
                _RECORD, record_file(self.output).name, src_dir_fd=self._tree.descriptor, dst_dir_fd=parent.descriptor
            )
            os.fsync(parent.descriptor)
        self.discard()

    def _give_name(self, merged: Merged) -> bool:
        """Name the draft as the output unless something else has the name; its very bytes are not something else."""
        parent, name = self._held.parent, self.output.name
        try:
            # Unlike a rename it replaces nothing.
            os.link(_MERGED, name, src_dir_fd=self._tree.descriptor, dst_dir_fd=parent.descriptor)
        except FileExistsError:
            return self._is_output(merged)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                move(self._tree, _MERGED, parent, name)
            except FileExistsError:
                return self._is_output(merged)
        return True

    def begun(self) -> bool:
        """Whether there is an answer in the directory; a run that got nowhere is in nobody's way."""
        tree = self._held.tree
        return tree is not None and any(next(read_log(tree, log), None) is not None for log in self.logs())

    def discard_if_empty(self) -> None:
        """Remove a work directory without an answer."""
        with contextlib.suppress(OSError):
            if not self.begun():
                self._held.remove()

    def discard(self) -> None:
        """Remove the work directory; what the system does not let go stays."""
        with contextlib.suppress(OSError):
            self._held.remove()

    def close(self) -> None:
        """Release the lock."""
        self._held.close()


def _number(log: str) -> int:
    found = _LOG.fullmatch(log)
    assert found
    return int(found[1])


def _read_json(directory: Tree, name: str) -> dict[str, Any]:
    """A small file's object.

    Raises:
        ValueError: it is not JSON, or not an object, or not small.
        OSError: it cannot be read.
    """
    found = directory.stat(name)
    if found is not None and found.st_size > _LARGEST:
        raise ValueError("too large")
    value = json.loads(directory.read(name))
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
