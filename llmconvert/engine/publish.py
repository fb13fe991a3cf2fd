"""Destinations: what may be written where, and the rename that makes an output exist.

What is published is what was proved: the directory the run holds open, renamed under its lock. A name that something
has by then is not taken (`rename` says where that is the system's own promise), and what `--overwrite` replaces changes
places with the output in one step; a kill leaves the old or the new. Where the filesystem cannot exchange directories
(NFS), the old one stands aside in the work directory for a moment, and whoever looks at the destination next puts it
back.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llmconvert.engine.journal import DISCARDED, OUTPUT, REPLACED, Workspace, tidy, work_directory
from llmconvert.engine.manifest import MANIFEST
from llmconvert.engine.processes import rank
from llmconvert.engine.rename import Unsupported, exchange, move, move_onto_empty
from llmconvert.engine.replaceable import foreign_file, is_checkpoint
from llmconvert.engine.tree import Tree, identity_of, writing
from llmconvert.errors import InputOutput, Usage


def check_destination(source: Path, destination: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse a destination that would harm the source or anything else.

    Args:
        source: what is read.
        destination: the directory to make.
        overwrite: it may be replaced, if every file in it is one that llmconvert or transformers writes.
        resume: it may be the result already, or be replaced by the run to be resumed, which is seen to later.

    Raises:
        Usage: it is the source, inside it or around it, or exists and is not empty (with `overwrite`: and is not a
            checkpoint, or not only that).
        InputOutput: its parent cannot be written.
    """
    where = str(destination)
    if destination.name in ("", ".."):
        raise Usage("the destination has no name of its own", where=where, hint="name the directory to make")
    try:
        os.path.abspath(destination).encode()
    except UnicodeEncodeError:
        raise Usage(
            "the destination's path is not UTF-8, and safetensors opens no other", where=where, hint="name another"
        ) from None
    real_source, real_destination = (Path(os.path.realpath(path)) for path in (source, destination))
    if real_source == real_destination:
        raise Usage("the destination is the source", where=where, hint="name another directory")
    if real_destination.is_relative_to(real_source):
        raise Usage("the destination is inside the source", where=where, hint="name a directory outside it")
    if real_source.is_relative_to(real_destination):
        raise Usage("the destination contains the source", where=where, hint="name another directory")
    with writing(destination):
        if rank() == 0 and not resume:
            tidy(destination)
        if os.path.lexists(destination):
            _check_existing(destination, overwrite=overwrite, resume=resume)
        parent = destination.parent
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputOutput("no permission to write here", where=str(parent))


def _check_existing(destination: Path, *, overwrite: bool, resume: bool) -> None:
    where = str(destination)
    if destination.is_symlink() or not destination.is_dir():
        raise Usage("the destination exists and is not a directory", where=where)
    with Tree.at(destination) as tree:
        if not tree.names():
            return
        if overwrite:
            require_replaceable(tree)
        elif not resume or (tree.stat(MANIFEST) is None and not os.path.lexists(work_directory(destination))):
            raise Usage(
                "the destination exists and is not empty", where=where, hint="name another, or add `--overwrite`"
            )


def require_replaceable(tree: Tree) -> None:
    """Refuse to replace what neither llmconvert nor transformers could have written.

    Raises:
        Usage: there is such a file, or no checkpoint at all.
        OSError: the system refuses.
    """
    if not is_checkpoint(tree):
        raise Usage(
            "the destination is not a checkpoint, so `--overwrite` does not replace it",
            where=str(tree.path),
            hint="remove it yourself if you are sure, or name another",
        )
    alien = foreign_file(tree)
    if alien is not None:
        raise Usage(
            f"the destination holds `{alien}`, which neither llmconvert nor transformers wrote, "
            "so `--overwrite` does not replace it",
            where=str(tree.path), hint="move it elsewhere, or name another destination",
        )  # fmt: skip


def publish(space: Workspace, *, sync: bool = True) -> None:
    """Make the output of a finished run the destination, in one rename, and clear the work directory away.

    Args:
        space: the run's.
        sync: have the disk confirm every byte first, so that not even a power failure leaves less.

    Raises:
        Usage: something appeared at the destination while the run worked, or it may not be replaced.
        InputOutput: the disk refuses.
    """
    with writing(space.destination):
        if sync:
            space.sync()
        space.require()
        work, parent, name = space.held.make(), space.held.parent, space.destination.name
        if space.before is not None and not space.before[1]:
            _replace(space, work, parent, name)
        else:
            _appear(space, work, parent, name)
        found = parent.stat(name)
        if found is None or identity_of(found) != space.tree.identity:
            raise InputOutput("another program replaced the destination as it was published", where=str(parent.path))
        if sync:
            for directory in (work, parent):
                os.fsync(directory.descriptor)
    space.published = True
    with suppress(OSError):
        space.held.remove()


def _appear(space: Workspace, work: Tree, parent: Tree, name: str) -> None:
    """Take a name that nothing has, or that an empty directory had when the run began."""
    found = parent.stat(name)
    try:
        if space.before is not None and found is not None and identity_of(found) == space.before[0]:
            move_onto_empty(work, OUTPUT, parent, name)
        else:
            move(work, OUTPUT, parent, name)
    except FileExistsError:
        raise _appeared(space) from None


def _replace(space: Workspace, work: Tree, parent: Tree, name: str) -> None:
    """Take the name of the directory that had it when the run began, and has it still."""
    assert space.before is not None
    found = parent.stat(name)
    if found is None:
        _appear(space, work, parent, name)
        return
    if identity_of(found) != space.before[0]:
        raise _appeared(space)
    with parent.folder(name) as former:
        require_replaceable(former)
    aside, back = OUTPUT, exchange
    try:
        exchange(work, OUTPUT, parent, name)
    except Unsupported:
        os.rename(name, REPLACED, src_dir_fd=parent.descriptor, dst_dir_fd=work.descriptor)
        aside, back = REPLACED, move
    # Nobody else sees it now, so that this look at it is the one that counts.
    try:
        with work.folder(aside) as former:
            former.path = space.destination  # where it will be again if it is refused
            if former.identity != space.before[0]:
                raise _appeared(space)
            require_replaceable(former)
        if aside == REPLACED:
            _appear(space, work, parent, name)
    except BaseException:
        with suppress(FileExistsError):  # an interrupt just after the last rename: the name is the output's
            back(work, aside, parent, name)
        raise
    with suppress(OSError):  # all is published: what cannot be cleared away now is named
        work.remove(DISCARDED)
        work.rename(aside, DISCARDED)  # so that it need not be looked at again when half of it is gone


def _appeared(space: Workspace) -> Usage:
    return Usage(
        "something else appeared at the destination while this run worked", where=str(space.destination),
        hint=f"it is untouched, and the result waits in {space.work}: move the one away and repeat with `--resume`",
    )  # fmt: skip
