"""The one door through which the files of a checkpoint come in: regular files, links kept inside, sizes bounded.

A checkpoint comes from anywhere. A FIFO among its files would wait for ever, a device has no end, a link may lead to
what is not the checkpoint's, and a few bytes of JSON may stand for a number that takes an hour to print.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmconvert.errors import BadInput, InputOutput

MAX_JSON_BYTES = 128 << 20
"""Of a JSON file. The index of DeepSeek-V3 has 9 MB, tokenizers have up to 35 MB, a manifest of 700 GB about 30 MB."""

MAX_JSON_DEPTH = 64
MAX_DIGITS = 64
"""Of a whole number in JSON: tokenizers say 10^30 where they mean no limit; none says 10^4300."""

_SHOWN = 60
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
_HALF_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def stays_inside(directory: Path, path: Path) -> bool:
    """Whether a file of a checkpoint, its links followed, is still one of the checkpoint's own."""
    root, real = os.path.realpath(directory), os.path.realpath(path)
    allowed = [root]
    parent = os.path.dirname(root)
    if os.path.basename(parent) == "snapshots":
        # The hub cache keeps snapshots/REVISION/* as links into blobs/ of the same repository.
        allowed.append(os.path.join(os.path.dirname(parent), "blobs"))
    return any(os.path.commonpath((folder, real)) == folder for folder in allowed)


def check_inside(directory: Path, path: Path, *, hint: str = "copy the file in") -> None:
    """Refuse a file of a checkpoint that is a link to elsewhere.

    Args:
        directory: the checkpoint's.
        path: the file.
        hint: what to do about it.

    Raises:
        BadInput: it is.
    """
    if not stays_inside(directory, path):
        raise BadInput(
            f"`{path.name}` is a symlink that leaves the checkpoint ({os.path.realpath(path)})",
            where=str(directory),
            hint=hint,
        )


def open_descriptor(path: Path, *, inside: Path | None = None) -> int:
    """Open a regular file for reading; what is none is not opened at all.

    Args:
        path: the file.
        inside: the checkpoint's directory, which the file's links must not leave; None where a person named the file.

    Returns:
        A descriptor, to be closed by the caller.

    Raises:
        BadInput: there is no such file, it is no regular file, or it is a link out of the checkpoint.
        InputOutput: the system does not let it be read.
    """
    where = str(path)
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind == stat.S_IFREG:
            if inside is not None:
                check_inside(inside, path)
            # What became a FIFO since is opened without waiting, and told apart once it is open.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind == stat.S_IFREG:
                return descriptor
            os.close(descriptor)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno in _ABSENT:
            raise BadInput(f"`{path.name}` is missing", where=str(path.parent)) from None
        raise InputOutput(f"cannot read the file: {error.strerror}", where=where) from None
    raise _special(path, kind)


def check_directory(directory: Path) -> frozenset[str]:
    """Refuse a checkpoint's directory with something in it that waits, or has no end, when it is read.

    Libraries that are handed the directory open what they find there by name.

    Returns:
        The names of its entries.

    Raises:
        BadInput: naming the first such entry.
        InputOutput: the directory cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise InputOutput(f"cannot read the directory: {error.strerror}", where=str(directory)) from None
    for name in names:
        try:
            kind = stat.S_IFMT(os.stat(directory / name).st_mode)
        except OSError:
            continue  # a link to nowhere
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise _special(directory / name, kind)
    return frozenset(names)


def _special(path: Path, kind: int) -> BadInput:
    what = _KINDS.get(kind, "something else")
    return BadInput(f"`{path.name}` is {what} in place of a file", where=str(path), hint="copy the file in")


@contextmanager
def opened(path: Path, *, inside: Path | None = None) -> Iterator[BinaryIO]:
    """The file as `open_descriptor` opens it, closed afterwards; errors of reading it end in `InputOutput`."""
    with os.fdopen(open_descriptor(path, inside=inside), "rb") as file:
        try:
            yield file
        except OSError as error:
            raise InputOutput(f"cannot read the file: {error.strerror}", where=str(path)) from None


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of an open file from a place on, fewer only where the file ends: a system may give them in pieces."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def read_bytes(path: Path, limit: int, *, inside: Path | None = None) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        BadInput: as `open_descriptor`, or the file is longer.
        InputOutput: it cannot be read.
    """
    with opened(path, inside=inside) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(size + 1)
    if size > limit or len(data) > limit:
        raise BadInput(
            f"`{path.name}` is {max(size, len(data)):,} bytes long; such a file has at most {limit:,}", where=str(path)
        )
    return data


def read_json(path: Path, *, anywhere: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        anywhere: it may be a link to anywhere, as a person named it; else a link must stay in the file's directory.

    Raises:
        BadInput: the file is missing, is no regular file, is too long, is not JSON, or holds no object.
        InputOutput: it cannot be read.
    """
    raw = read_bytes(path, MAX_JSON_BYTES, inside=None if anywhere else path.parent)
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise BadInput(f"`{path.name}` is not valid JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise BadInput(f"`{path.name}` is not a JSON object", where=str(path))
    return value


def parse_json(raw: bytes) -> Any:
    """JSON as UTF-8, of bounded depth, with numbers of bounded length and text that can be written again.

    Raises:
        ValueError: it is not that; the message says what.
    """
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_int=whole_number)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep") from None
    halves = _HALF_SURROGATE.search(raw) is not None
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        following: list[Any] = []
        for item in level:
            if type(item) is dict:
                following += item.values()
                if halves:
                    following += item
            elif type(item) is list:
                following += item
            elif halves and type(item) is str:
                _check_text(item)
        if not following:
            return value
        level = following
    raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")


def whole_number(text: str) -> int:
    """A whole number of JSON.

    Raises:
        ValueError: it has more digits than any number with a meaning.
    """
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"half a surrogate pair in {shown(text)}") from None


def is_finite(value: Any) -> bool:
    """Whether every number in a JSON value is one: Python's reader takes `NaN`, `Infinity` and 1e999 too."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, float):
            if not math.isfinite(item):
                return False
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return True


def shown(value: Any) -> str:
    """A value as messages show it: cut to what a line can hold."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if isinstance(value, str):
        text = repr(value[: _SHOWN + 1])
    elif isinstance(value, list | dict) and len(value) > _SHOWN:
        text = f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    else:
        text = json.dumps(value, ensure_ascii=False, skipkeys=True, default=lambda other: type(other).__name__)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
