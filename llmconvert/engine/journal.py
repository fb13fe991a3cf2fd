"""The work directory beside a destination: one run at a time, and a record of what is done, for resuming.

`.NAME.llmconvert-partial/` is private (see `held`) and holds

    output/             the files as they grow; renamed to NAME when they are proved, and nothing but them
    run.json            what makes two runs the same run, whether it is to replace NAME, and which directory `output` is
    journal-T-R.jsonl   of process R of the run with token T: a line per finished region with its checksum
    replaced/           what NAME was, for a moment, where the filesystem cannot exchange two directories
    discarded/          what NAME was, looked at and to be removed

Nothing of a checkpoint's own is ever taken for one of these. A line of a journal that cannot be read is a region not
done, and a region is done only if the bytes written still have the checksum of its line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmconvert.engine.held import Held, planted
from llmconvert.engine.rename import move
from llmconvert.engine.replaceable import foreign_file
from llmconvert.engine.tree import Identity, Tree, identity_of, write_all, writing
from llmconvert.errors import InputOutput, LlmconvertError, Usage

SUFFIX = "llmconvert-partial"
OUTPUT, REPLACED, DISCARDED = "output", "replaced", "discarded"
_RUN, _DRAFT = "run.json", "run.json.new"
_JOURNAL = re.compile(r"journal-[0-9a-f]+-\d+\.jsonl")

_COMMON_SECONDS = 60
"""Network filesystems show a new directory to other machines within their time of caching names."""


def work_directory(destination: Path) -> Path:
    """What belongs to a run that writes `destination`, until it is done."""
    return destination.parent / f".{destination.name}.{SUFFIX}"


def tidy(destination: Path) -> None:
    """Put right what a run that was killed while publishing has left: NAME is the old or the new, the rest goes.

    Raises:
        Usage: a file nobody knows lies in what is to be removed.
        InputOutput: the disk refuses.
    """
    if not os.path.lexists(work_directory(destination)):
        return
    try:
        held = Held(destination, SUFFIX)
    except Usage:  # it is in use, or planted: who goes on to write here is told
        return
    try:
        _settle(held)
    finally:
        held.close()


def _settle(held: Held) -> dict[str, Any] | None:
    """As `tidy`; what is recorded of an unfinished run, or None where there is none."""
    tree, name = held.tree, held.output.name
    if tree is None:
        return None
    with writing(held.path):
        record, there = _recorded(tree), held.parent.stat(name)
        if there is None and tree.stat(REPLACED) is not None:
            move(tree, REPLACED, held.parent, name)
            there = held.parent.stat(name)
        if record is None:
            if REPLACED not in tree.names() and not _unknown(tree):
                held.remove()  # a run that was killed before it had recorded itself, or while it cleared up
            return None
        # The name leads to what was `output`: published. What has its place now is what NAME was.
        swapped = there is not None and identity_of(there) == (tree.identity[0], record["output"])
        if not swapped and tree.stat(OUTPUT) is not None:
            return record
        _discard_former(tree, OUTPUT, REPLACED)
        held.remove()
    return None


def _discard_former(tree: Tree, *names: str) -> None:
    """Look at what a destination was, and rename it: it is not looked at again when half of it is gone.

    Raises:
        Usage: a file nobody knows lies in it.
        OSError: the system refuses.
    """
    for name in names:
        if tree.stat(name) is not None:
            with tree.folder(name) as former:
                _require_known(former)
            tree.remove(DISCARDED)
            tree.rename(name, DISCARDED)


def _unknown(tree: Tree) -> list[str]:
    """What no run of this version makes in a work directory."""
    known = (OUTPUT, REPLACED, DISCARDED, _RUN, _DRAFT)
    return [name for name in tree.names() if name not in known and not _JOURNAL.fullmatch(name)]


def _require_known(former: Tree) -> None:
    alien = foreign_file(former)
    if alien is not None:
        raise Usage(
            f"the former destination was replaced, and it holds `{alien}`, which is not a checkpoint's",
            where=str(former.path), hint=f"move it away, then `rm -r {former.path.parent}`",
        )  # fmt: skip


def _recorded(tree: Tree) -> dict[str, Any] | None:
    try:
        record = json.loads(tree.read(_RUN))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"identity": str, "token": str, "replaces": bool, "output": int}
    if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return None
    return record


class Workspace:
    """A work directory, held by the first process of a run; the others find it there.

    Attributes:
        work: the private directory.
        path: the output in it.
        tree: the output, open.
        identity: what makes two runs the same run.
        token: tells this run's directory from all others; the other processes ask for it.
        done: checksums of the regions finished by earlier runs, by region key.
        occupied: something is at the destination that this run may not replace, but perhaps is its result already.
        replaces: what is at the destination may be replaced.
        before: what was at the destination when the run began: None, or its identity and whether it was empty.
        names: of every file of the output, once it is whole.
        published: the output has the destination's name.
    """

    def __init__(
        self, destination: Path, identity: str, *, resume: bool, restart: bool, rank: int = 0, token: str = ""
    ) -> None:
        """Create or take up the work directory of `destination`; other processes than the first find it there.

        Args:
            destination: the directory to be published.
            identity: what makes two runs the same run.
            resume: take up an unfinished run as it was begun.
            restart: throw an unfinished run away, and replace the destination.
            rank: the process's number.
            token: the first process's.

        Raises:
            Usage: another run holds it, an unfinished run is in the way, or it was another conversion; the destination
                exists.
            InputOutput: the directory cannot be made, or is not the first process's.
        """
        self.destination, self.work = destination, work_directory(destination)
        self.path, self.identity = self.work / OUTPUT, identity
        self.done: dict[str, str] = {}
        self.token, self.replaces, self.occupied = token, restart, False
        self.before: tuple[Identity, bool] | None = None
        self.names: frozenset[str] = frozenset()
        self.published = False
        self._mutex = threading.Lock()
        self._journal: int | None = None
        self._held: Held | None = None
        self._work: Tree | None = None
        self._output: Tree | None = None
        self._rank = rank
        self._foreign = False
        try:
            if rank:
                self._join()
            else:
                self._held = Held(destination, SUFFIX)
                self._take_up(resume=resume, restart=restart)
            if not self.occupied:
                self._open_journal()
        except BaseException:
            self.close()
            raise

    @property
    def held(self) -> Held:
        """The lock and the private directory, of the first process."""
        assert self._held is not None
        return self._held

    @property
    def tree(self) -> Tree:
        """The output, open."""
        assert self._output is not None
        return self._output

    def _take_up(self, *, resume: bool, restart: bool) -> None:
        record = _settle(self.held)
        same = record is not None and record["identity"] == self.identity
        if record is not None and resume and same:
            self.replaces |= record["replaces"]
        self.occupied = self._is_occupied(resume=resume)
        if self.occupied:
            self._foreign = record is not None and not same
            return
        if record is not None and not resume and not restart:
            raise Usage(
                "an unfinished conversion to this destination is there",
                where=str(self.work),
                hint=f"add `--resume` to go on with it, or `--overwrite` to start anew; `rm -r {self.work}` gives it up",
            )
        if record is not None and resume and not same:
            raise Usage(
                "the unfinished run was another conversion (other source, options or version), so it cannot be resumed",
                where=str(self.work),
                hint="repeat its exact command, or use `--overwrite` to start anew",
            )
        with writing(self.work):
            if not (resume and same):
                self._clear(restart)
            self._work = self.held.make()
            try:
                self._output = self._work.folder(OUTPUT, make=True)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                instead = "start anew with `--overwrite`, which removes it and not what it leads to"
                raise planted("it is a link or no directory", self.path, "rm", instead) from None
            self._record()
            if resume and same:
                self.done = self._read_journals()

    def _is_occupied(self, *, resume: bool) -> bool:
        """What is at the destination, now that nobody else can publish there."""
        with writing(self.destination):
            found = self.held.parent.stat(self.destination.name)
            if found is None:
                return False
            if not stat.S_ISDIR(found.st_mode):
                raise Usage("the destination exists and is not a directory", where=str(self.destination))
            with self.held.parent.folder(self.destination.name) as there:
                self.before = there.identity, not there.names()
        if self.before[1] or self.replaces:
            return False
        if not resume:
            raise Usage(
                "the destination exists and is not empty", where=str(self.destination),
                hint="name another, or add `--overwrite`",
            )  # fmt: skip
        return True

    def _clear(self, restart: bool) -> None:
        """Empty the work directory of what no run can go on with."""
        tree = self.held.tree
        if tree is None:
            return
        odd = [name for name in tree.names() if name == REPLACED] or _unknown(tree)
        if odd and not restart:
            raise Usage(
                f"the work directory holds `{odd[0]}`, which no run of this version left there",
                where=str(self.work), hint=f"look at it, then `rm -r {self.work}`, or add `--overwrite`",
            )  # fmt: skip
        self.held.remove()

    def _record(self) -> None:
        assert self._work is not None
        self.token = secrets.token_hex(16)
        record = {
            "identity": self.identity, "token": self.token, "replaces": self.replaces, "output": self.tree.identity[1],
        }  # fmt: skip
        self._work.write(_DRAFT, json.dumps(record).encode())
        self._work.rename(_DRAFT, _RUN)

    def _join(self) -> None:
        """Open the directory the first process made, and make sure that it is that one."""
        until = time.monotonic() + _COMMON_SECONDS
        while True:
            try:
                with Tree.at(self.destination.parent) as parent:
                    self._work = parent.folder(self.work.name)
                found = _recorded(self._work)
                if found is not None and found["token"] == self.token:
                    self._output = self._work.folder(OUTPUT)
                    break
                self._work.close()
            except FileNotFoundError:
                pass
            except OSError as error:
                raise InputOutput(f"cannot open the work directory: {error.strerror}", where=str(self.work)) from None
            if time.monotonic() > until:
                raise InputOutput(
                    f"process {self._rank} does not find the first process's work directory", where=str(self.work),
                    hint="all processes must see one common filesystem under this path",
                )  # fmt: skip
            time.sleep(0.2)
        self.done = self._read_journals()

    def _open_journal(self) -> None:
        """A new file: nobody appends to a line cut off by a kill, nor to what was put in a journal's place."""
        assert self._work is not None
        with writing(self.work):
            self._journal = self._work.create(f"journal-{self.token}-{self._rank}.jsonl", 0o600)

    def _read_journals(self) -> dict[str, str]:
        assert self._work is not None
        done: dict[str, str] = {}
        for name in self._work.names():
            if not _JOURNAL.fullmatch(name):
                continue
            try:
                lines = self._work.read(name).split(b"\n")
            except OSError:  # what it says is done is done again
                continue
            for line in lines[:-1]:  # a line cut off by a kill is a region not done
                with suppress(ValueError, RecursionError):
                    entry = json.loads(line)
                    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
                        done[entry[0]] = entry[1]
        return done

    def record(self, key: str, checksum: str) -> None:
        """Note a finished region.

        Raises:
            OSError: the disk refuses.
        """
        assert self._journal is not None
        line = json.dumps([key, checksum]) + "\n"
        with self._mutex:
            write_all(self._journal, line.encode())

    def forget(self) -> None:
        """Note that no region is done, whatever was written: what came of a proof that failed is not to be kept.

        Raises:
            OSError: the disk refuses.
        """
        assert self._work is not None
        self.done = {}
        for name in self._work.names():
            if _JOURNAL.fullmatch(name):
                self._work.remove(name)

    def require(self) -> None:
        """Make sure that what is at the paths is what was written, all of it and nothing else.

        Raises:
            InputOutput: another program removed, replaced or added something.
        """
        self.held.require()
        with writing(self.path):
            found = self.held.make().stat(OUTPUT)
            if found is None or identity_of(found) != self.tree.identity:
                raise InputOutput("another program replaced the output while it was proved", where=str(self.path))
            odd = sorted(self.names ^ {name for name, _ in self.tree.files()})
            if odd:
                what = "removed" if odd[0] in self.names else "added"
                raise InputOutput(f"another program {what} `{odd[0]}` while this run worked", where=str(self.path))

    def clear_up(self) -> None:
        """Remove what is left beside a destination that is this run's result already, as far as that is safe.

        An unfinished run of another kind stays, and so does a former destination with a file nobody knows.
        """
        tree = self.held.tree
        if tree is None or self._foreign:
            return
        with suppress(OSError, LlmconvertError):
            _discard_former(tree, REPLACED)
            if not _unknown(tree):
                self.held.remove()

    def sync(self) -> None:
        """Have the disk confirm the output, and the record of which directory it is.

        Raises:
            OSError: the system refuses.
        """
        self.tree.sync()
        assert self._work is not None
        descriptor = self._work.open(_RUN, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.fsync(self._work.descriptor)

    def discard(self) -> None:
        """Remove the whole work directory, as far as the disk lets it."""
        if self._held is not None:
            with suppress(OSError, LlmconvertError):
                self._held.remove()

    def close(self) -> None:
        """Release the lock."""
        if self._journal is not None:
            with suppress(OSError):
                os.close(self._journal)
            self._journal = None
        if self._output is not None:
            self._output.close()
        if self._held is not None:
            self._held.close()
        elif self._work is not None:
            self._work.close()
