"""Destinations: what may be written where, and the rename that makes an output exist."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmconvert.engine.execute import disk_full
from llmconvert.errors import InputOutput, Usage


def _is_checkpoint(directory: Path) -> bool:
    return (directory / "config.json").is_file() or (directory / "llmconvert.json").is_file()


def check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that would harm the source or anything else.

    Raises:
        Usage: it is the source, inside it or around it, or exists and is not empty (with `overwrite`: and is not a
            checkpoint).
        InputOutput: its parent cannot be written.
    """
    real_source, real_destination = source.resolve(), destination.resolve()
    where = str(destination)
    if real_source == real_destination:
        raise Usage("the destination is the source", where=where, hint="name another directory")
    if real_destination.is_relative_to(real_source):
        raise Usage("the destination is inside the source", where=where, hint="name a directory outside it")
    if real_source.is_relative_to(real_destination):
        raise Usage("the destination contains the source", where=where, hint="name another directory")
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise Usage("the destination exists and is not a directory", where=where)
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise Usage("the destination exists and is not empty", where=where, hint="name another, or add `--overwrite`")
    if destination.is_dir() and overwrite and any(destination.iterdir()) and not _is_checkpoint(destination):
        raise Usage(
            "the destination is not a checkpoint, so `--overwrite` does not replace it",
            where=where,
            hint="remove it yourself if you are sure, or name another",
        )
    parent = destination.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputOutput("no permission to write here", where=str(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(work: Path, destination: Path, *, sync: bool = True) -> None:
    """Make a finished work directory the destination, in one rename.

    Args:
        work: the directory, on the destination's filesystem.
        destination: its new name; an existing one is replaced.
        sync: have the disk confirm every byte first, so that not even a power failure leaves less.

    Raises:
        InputOutput: the disk refuses.
    """
    try:
        if sync:
            for path in work.rglob("*"):
                _sync(path)
            _sync(work)
        aside = destination.parent / f".{destination.name}.llmconvert-replaced"
        replaced = destination.is_dir() and any(destination.iterdir())
        if replaced:
            shutil.rmtree(aside, ignore_errors=True)
            destination.rename(aside)
        work.rename(destination)
        if sync:
            _sync(destination.parent)
        if replaced:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise disk_full(error, destination) from None
