"""Renames of directories that replace nothing, or that exchange two in one step.

Linux has `renameat2` (RENAME_NOREPLACE, RENAME_EXCHANGE; rename(2)), macOS `renameatx_np` (RENAME_EXCL, RENAME_SWAP).
Some filesystems, NFS among them, know neither flag.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import cache

from llmconvert.engine.tree import Tree

_NO_REPLACE, _EXCHANGE = (4, 2) if sys.platform == "darwin" else (1, 2)
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
"""What kernels, filesystems and sandboxes that do not know a flag answer; a true EPERM shows in the plain rename."""


class Unsupported(Exception):
    """The filesystem cannot rename so."""


@cache
def _function() -> Callable[..., int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    return getattr(library, "renameatx_np" if sys.platform == "darwin" else "renameat2", None)


def rename_with(flags: int, source: Tree, name: str, target: Tree, new: str) -> None:
    """Rename with flags of the system's own.

    Raises:
        Unsupported: it does not know them.
        OSError: it refuses.
    """
    function = _function()
    if function is None:
        raise Unsupported
    if function(source.descriptor, os.fsencode(name), target.descriptor, os.fsencode(new), ctypes.c_uint(flags)):
        number = ctypes.get_errno()
        if number in _UNKNOWN:
            raise Unsupported
        raise OSError(number, os.strerror(number), str(target.path / new))


def move(source: Tree, name: str, target: Tree, new: str) -> None:
    """Give a directory a new name, which nothing may have.

    Raises:
        FileExistsError: something has it. (Where the filesystem cannot refuse by itself, an empty directory that appears
            in the very moment is replaced; nothing else ever is.)
        OSError: the system refuses.
    """
    try:
        rename_with(_NO_REPLACE, source, name, target, new)
    except Unsupported:
        if target.stat(new) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target.path / new)) from None
        move_onto_empty(source, name, target, new)


def move_onto_empty(source: Tree, name: str, target: Tree, new: str) -> None:
    """Give a directory a new name, which an empty directory may have: rename(2) replaces those and no others.

    Raises:
        FileExistsError: something else has it.
        OSError: the system refuses.
    """
    try:
        os.rename(name, new, src_dir_fd=source.descriptor, dst_dir_fd=target.descriptor)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target.path / new)) from None
        raise


def exchange(source: Tree, name: str, target: Tree, new: str) -> None:
    """Let two names change places, in one step.

    Raises:
        Unsupported: the filesystem cannot.
        OSError: one is not there, or the system refuses.
    """
    rename_with(_EXCHANGE, source, name, target, new)
