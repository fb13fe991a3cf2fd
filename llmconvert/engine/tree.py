"""A directory used through its descriptor: no name in it leads out of it, and no write is left half done.

Names may be nested (`hf/tokenizer.json`). Every step to them is taken without following links, so whoever plants one,
before or while a run works, gets an error and not a file written, read or emptied elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmconvert.errors import InputOutput

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # opening a FIFO does not wait for its other end

_CHUNK = 1024 * 1024

Identity = tuple[int, int]
"""Device and inode: what a name stands for, whatever it is called."""


def disk_full(error: OSError, where: Path) -> InputOutput:
    """The message for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputOutput(
            "the disk is full", where=str(where), hint="free some space, then repeat the command with `--resume`"
        )
    return InputOutput(f"cannot write: {error.strerror or error}", where=str(error.filename or where))


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Tell what the system refuses as one message about `where`.

    Raises:
        InputOutput: it refused.
    """
    try:
        yield
    except OSError as error:
        raise disk_full(error, where) from None


def write_all(descriptor: int, data: bytes | memoryview, offset: int | None = None) -> int:
    """Write all of `data`, however little each call takes: at `offset`, or where the file is.

    Returns:
        Bytes written, which is all there are.

    Raises:
        OSError: the system refuses, or takes nothing.
    """
    view, done = memoryview(data), 0
    while done < len(view):
        rest = view[done:]
        count = os.write(descriptor, rest) if offset is None else os.pwrite(descriptor, rest, offset + done)
        if count <= 0:
            raise OSError(errno.EIO, "nothing was written")
        done += count
    return done


def open_regular(path: Path | str, flags: int, *, directory: int | None = None, mode: int = 0o666) -> int:
    """Open a file that is one: not a link, FIFO, device or directory, none of which is waited for.

    Raises:
        OSError: it is not, or the system refuses.
    """
    descriptor = os.open(path, flags | _FILE, mode, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def identity_of(found: os.stat_result) -> Identity:
    """What a stat result is about."""
    return found.st_dev, found.st_ino


class Tree:
    """An open directory.

    Args:
        descriptor: of the directory; closed by `close`.
        path: what it is called in messages.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        """See the class."""
        self.descriptor, self.path = descriptor, path

    @classmethod
    def at(cls, path: Path) -> Tree:
        """A directory the user named: links on the way to it are the user's own and followed.

        Raises:
            OSError: it is not there, or no directory.
        """
        return cls(os.open(path, (_DIRECTORY & ~os.O_NOFOLLOW)), path)

    @property
    def identity(self) -> Identity:
        """Of the directory."""
        return identity_of(os.fstat(self.descriptor))

    def close(self) -> None:
        """Close the descriptor."""
        with suppress(OSError):
            os.close(self.descriptor)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Everything in it, sorted."""
        return sorted(os.listdir(self.descriptor))

    def stat(self, name: str) -> os.stat_result | None:
        """What `name`, a single one, is; a link is a link. None where there is nothing."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def folder(self, name: str, *, make: bool = False, mode: int = 0o777) -> Tree:
        """A directory in it, no step to which is a link.

        Args:
            name: may be nested.
            make: make what is missing.
            mode: of what is made, before the umask.

        Raises:
            OSError: a step is missing, a link or no directory.
        """
        descriptor = os.dup(self.descriptor)
        try:
            for part in Path(name).parts:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, mode, dir_fd=descriptor)
                inner = os.open(part, _DIRECTORY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                error.filename = str(self.path / name)
            raise
        return Tree(descriptor, self.path / name)

    @contextmanager
    def _parent(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        folder, _, last = name.rpartition("/")
        if not folder:
            yield self.descriptor, last
            return
        with self.folder(folder, make=make) as tree:
            yield tree.descriptor, last

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open a regular file in it; folders on the way are made where `flags` has O_CREAT.

        Raises:
            OSError: a step or the file itself is a link, or it is no regular file.
        """
        with self._parent(name, make=bool(flags & os.O_CREAT)) as (directory, last):
            try:
                return open_regular(last, flags, directory=directory, mode=mode)
            except OSError as error:
                error.filename = str(self.path / name)
                raise

    def create(self, name: str, mode: int = 0o666) -> int:
        """Open a new file for writing; what had its name is removed.

        Raises:
            OSError: the system refuses.
        """
        self.remove(name)
        return self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def write(self, name: str, data: bytes) -> None:
        """Write a new file in place of whatever had its name.

        Raises:
            OSError: the system refuses.
        """
        descriptor = self.create(name)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        """All of a regular file.

        Raises:
            OSError: it is not there, or no regular file, or the system refuses.
        """
        descriptor = self.open(name, os.O_RDONLY)
        try:
            found = bytearray()
            while chunk := os.read(descriptor, _CHUNK):
                found += chunk
            return bytes(found)
        finally:
            os.close(descriptor)

    def rename(self, name: str, new: str) -> None:
        """Rename within the directory; a file that has the new name is replaced.

        Raises:
            OSError: the system refuses.
        """
        os.rename(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, a link or a folder with all in it; what is not there needs no removing.

        Raises:
            OSError: the system refuses.
        """
        try:
            with self._parent(name) as (directory, last):
                _remove(directory, last)
        except FileNotFoundError:
            return

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Everything in it and in its folders that is not a folder, by nested name, with what it is.

        Raises:
            OSError: the system refuses.
        """
        for name in self.names():
            found = self.stat(name)
            if found is None:
                continue
            if not stat.S_ISDIR(found.st_mode):
                yield name, found
                continue
            with self.folder(name) as inner:
                for nested, what in inner.files():
                    yield f"{name}/{nested}", what

    def keep(self, wanted: frozenset[str]) -> None:
        """Remove everything but the regular files named; of these too what has a second name elsewhere.

        Raises:
            OSError: the system refuses.
        """
        folders = {name.partition("/")[0] for name in wanted if "/" in name}
        for name in self.names():
            found = self.stat(name)
            if found is None:
                continue
            if stat.S_ISDIR(found.st_mode) and name in folders:
                with self.folder(name) as inner:
                    inner.keep(frozenset(n.partition("/")[2] for n in wanted if n.startswith(f"{name}/")))
            elif not (name in wanted and stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
                self.remove(name)

    def sync(self) -> None:
        """Have the disk confirm every file, then every folder, innermost first.

        Raises:
            OSError: the system refuses.
        """
        for name in self.names():
            found = self.stat(name)
            if found is not None and stat.S_ISDIR(found.st_mode):
                with self.folder(name) as inner:
                    inner.sync()
            elif found is not None:
                descriptor = self.open(name, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        os.fsync(self.descriptor)


def _remove(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
        return
    except (IsADirectoryError, PermissionError):  # a folder: Linux says the one, macOS the other
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            raise
    descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        for inner in os.listdir(descriptor):
            with suppress(FileNotFoundError):
                _remove(descriptor, inner)
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=directory)
