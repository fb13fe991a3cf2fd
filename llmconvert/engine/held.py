"""A private directory beside an output, held by one run from before its first look at it until it is cleared away.

`.NAME.llmconvert-lock` beside NAME is locked while a run lasts; `.NAME.SUFFIX/` is the run's directory: its user's own,
open to nobody else, never reached through a link. The lock lies outside of the directory, so that it holds through
emptying, renaming and removing what it guards, and its file goes when the run does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmconvert.engine.tree import Identity, Tree, identity_of, open_regular, writing
from llmconvert.errors import InputOutput, Usage

_TRIES = 100
_MADE_JUST_NOW = 60
"""Seconds; a directory so young may not be locked yet."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def lock_file(output: Path) -> Path:
    """The lock of whoever writes `output`."""
    return output.parent / f".{output.name}.llmconvert-lock"


class Held:
    """The lock on an output, and the private directory beside it.

    Attributes:
        path: the directory, which need not be there.
        parent: the directory that holds both, open.
        tree: the directory, open; None where it is not there.
    """

    def __init__(self, output: Path, suffix: str) -> None:
        """Take the lock, and open the directory if there is one.

        Args:
            output: what the run will write; folders on the way to it are made.
            suffix: of the directory's name.

        Raises:
            Usage: another run holds the lock, or what has the name of the lock or the directory is not this user's.
            InputOutput: the system refuses, or has no locks.
        """
        self.output, self.path = output, output.parent / f".{output.name}.{suffix}"
        self.tree: Tree | None = None
        self._lock: int | None = None
        with writing(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
            self.parent = Tree.at(output.parent)
        try:
            with writing(lock_file(output)):
                self._lock = self._take()
        except BaseException:
            self.parent.close()
            raise
        try:
            with writing(self.path):
                self.tree = self._open()
        except BaseException:
            self.close()
            raise

    def _take(self) -> int:
        """The lock, on the file that has its name: one that was unlinked meanwhile guards nothing."""
        path = lock_file(self.output)
        for _ in range(_TRIES):
            try:
                descriptor = open_regular(
                    path.name, os.O_RDWR | os.O_CREAT, directory=self.parent.descriptor, mode=0o600
                )
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO):
                    raise planted("the lock is a link or no file", path, "rm") from None
                raise
            try:
                self._require_own(os.fstat(descriptor), path, "rm")
                _flock(descriptor, self.output)
                if self._names(path.name, identity_of(os.fstat(descriptor))):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise Usage("another llmconvert run is writing this destination", where=str(self.output))

    def _holds(self) -> bool:
        return self._lock is not None and self._names(lock_file(self.output).name, identity_of(os.fstat(self._lock)))

    def _names(self, name: str, identity: Identity) -> bool:
        found = self.parent.stat(name)
        return found is not None and identity_of(found) == identity

    def _require_own(self, found: os.stat_result, path: Path, command: str) -> None:
        """Refuse what another user planted. Some servers give all files to one user: what we make shows to whom."""
        if found.st_uid != os.geteuid() and found.st_uid != self._owner_of_new_files():
            raise planted(f"it belongs to another user (number {found.st_uid})", path, command)

    def _owner_of_new_files(self) -> int:
        name = f".{os.urandom(12).hex()}.llmconvert-lock"
        descriptor = open_regular(
            name, os.O_RDWR | os.O_CREAT | os.O_EXCL, directory=self.parent.descriptor, mode=0o600
        )
        try:
            return os.fstat(descriptor).st_uid
        finally:
            os.close(descriptor)
            os.unlink(name, dir_fd=self.parent.descriptor)

    def _open(self) -> Tree | None:
        if self.parent.stat(self.path.name) is None:
            return None
        try:
            tree = self.parent.folder(self.path.name)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise planted("the work directory is a link or no directory", self.path, "rm") from None
        try:
            self._require_own(os.fstat(tree.descriptor), self.path, "rm -r")
            self._require_closed(tree)
            # The lock's file may have been removed by hand; its directory tells of the run all the same. Network
            # filesystems lock no directories.
            _flock(tree.descriptor, self.output, optional=True)
        except BaseException:
            tree.close()
            raise
        return tree

    def _require_closed(self, tree: Tree) -> None:
        """Refuse a directory in which others could write; where modes mean nothing (some mounts), there is no telling."""
        mode = stat.S_IMODE(os.fstat(tree.descriptor).st_mode)
        if mode & 0o077:
            with suppress(OSError):
                os.fchmod(tree.descriptor, 0o700)
            if mode & 0o022 and not stat.S_IMODE(os.fstat(tree.descriptor).st_mode) & 0o022:
                os.fchmod(tree.descriptor, mode)
                raise planted("other users can write in the work directory", self.path, "rm -r")

    def make(self) -> Tree:
        """The directory, made if it is not there.

        Raises:
            InputOutput: the system refuses.
        """
        if self.tree is None:
            with writing(self.path):
                os.mkdir(self.path.name, 0o700, dir_fd=self.parent.descriptor)
                self.tree = self.parent.folder(self.path.name)
                _flock(self.tree.descriptor, self.output, optional=True)
        return self.tree

    def require(self) -> None:
        """Make sure that the lock and the directory still are what they were.

        Raises:
            InputOutput: another program removed or replaced one of them.
        """
        with writing(self.path):
            if not self._holds() or (self.tree is not None and not self._names(self.path.name, self.tree.identity)):
                raise InputOutput(
                    "another program removed or replaced the work directory or its lock while this run used them",
                    where=str(self.path), hint="repeat the command when nothing else touches them",
                )  # fmt: skip

    def remove(self) -> None:
        """Remove the directory with all in it.

        Raises:
            OSError: the system refuses.
        """
        if self.tree is not None:
            if self._names(self.path.name, self.tree.identity):
                self.parent.remove(self.path.name)
            self.tree.close()
            self.tree = None

    def close(self) -> None:
        """Release the lock and remove its file."""
        if self._lock is None:
            return
        with suppress(OSError):
            if self._holds():
                os.unlink(lock_file(self.output).name, dir_fd=self.parent.descriptor)
        with suppress(OSError):
            os.close(self._lock)
        self._lock = None
        self.parent.close()
        if self.tree is not None:
            self.tree.close()
            self.tree = None


@contextmanager
def temporary(folder: Path | None, prefix: str) -> Iterator[tuple[Path, list[Path]]]:
    """A private directory of a run that has no output, removed in the end.

    Args:
        folder: where to make it; the system's folder for such if None.
        prefix: of its name.

    Yields:
        The directory, and those of this user that runs killed earlier have left.

    Raises:
        InputOutput: the system refuses.
    """
    base = Path(tempfile.gettempdir()) if folder is None else folder
    with writing(base):
        left = [path for path in sorted(base.glob(f"{prefix}*")) if _abandoned(path)]
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    try:
        with Tree.at(place) as tree:
            with suppress(OSError):
                fcntl.flock(tree.descriptor, fcntl.LOCK_EX)
            yield place, left
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _abandoned(path: Path) -> bool:
    """Whether a directory is this user's and no run holds it; there is no telling where directories have no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        return found.st_uid == os.geteuid() and time.time() - found.st_mtime > _MADE_JUST_NOW
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _flock(descriptor: int, output: Path, *, optional: bool = False) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise Usage(
                "another llmconvert run is writing this destination",
                where=str(output),
                hint="wait for it to end, or name another",
            ) from None
        if optional:
            return
        if error.errno in _UNSUPPORTED:
            raise InputOutput(
                f"this filesystem has no file locks ({error.strerror}), without which two runs could spoil each other",
                where=str(output.parent), hint="mount it with locks (Lustre: `-o flock`), or write elsewhere",
            ) from None  # fmt: skip
        raise


def planted(what: str, path: Path, command: str, instead: str = "name another destination") -> Usage:
    """The refusal of something that has a name of llmconvert's own, the command that removes it, and another way out."""
    return Usage(
        f"what has the name of llmconvert's own file is not its own: {what}", where=str(path),
        hint=f"look at it, then `{command} {path}`, or {instead}",
    )  # fmt: skip
