"""Fill the regions of a plan: byte moves through one small buffer a worker, everything else by evaluated blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmconvert.engine import manifest
from llmconvert.engine.journal import Workspace
from llmconvert.engine.plan import Plan, Region
from llmconvert.engine.regions import Interrupted, Progress, Regions, plain
from llmconvert.engine.tree import write_all, writing
from llmconvert.errors import InputOutput
from llmconvert.tensors.evaluate import MOVE_BYTES

__all__ = ["Executor", "Interrupted", "check_space"]


def check_space(plan: Plan, directory: Path, already: int = 0) -> None:
    """Check that the output fits on the disk.

    Raises:
        InputOutput: it does not.
    """
    with writing(directory):
        free = shutil.disk_usage(directory).free
    needed = plan.nbytes - already
    if needed > free:
        raise InputOutput(
            f"the output needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free", where=str(directory)
        )


class Executor:
    """Runs a plan in a workspace.

    Args:
        plan: what to write.
        workspace: where.
        workers: threads.
        progress: called with the bytes of each step done, from any thread.
    """

    def __init__(self, plan: Plan, workspace: Workspace, workers: int, progress: Progress) -> None:
        """See the class."""
        self.plan, self.workspace, self.progress = plan, workspace, progress
        self.regions = Regions(plan, workers)
        self._outputs: dict[str, int] = {}

    def prepare(self) -> manifest.Files:
        """Write the small files, and the weight files with all but their tensors; what else is there goes.

        Returns:
            Every small file's entry in the manifest.

        Raises:
            InputOutput: a write failed, or a file to copy cannot be read.
            BadInput: a file to copy changed, or is none.
        """
        tree, entries = self.workspace.tree, {}
        own = (manifest.MANIFEST, manifest.REPORT)
        self.workspace.names = frozenset((*self.plan.texts, *self.plan.copies, *(f.name for f in self.plan.files), *own))
        with writing(self.workspace.path):
            tree.keep(frozenset(file.name for file in self.plan.files))
            for name, text in self.plan.texts.items():
                tree.write(name, text)
                entries[name] = manifest.entry_of((text,))
            for name in self.plan.copied():
                descriptor = tree.create(name)
                try:
                    entries[name] = manifest.entry_of(_written(self.plan.reading(name), descriptor))
                finally:
                    os.close(descriptor)
            for file in self.plan.files:
                descriptor = tree.open(file.name, os.O_CREAT | os.O_RDWR)
                try:
                    os.ftruncate(descriptor, file.size)
                    for offset, data in file.pieces:
                        write_all(descriptor, data, offset)
                finally:
                    os.close(descriptor)
        return entries

    def run(self, rank: int = 0, size: int = 1) -> dict[str, str]:
        """Write every region whose turn it is, of all those `size` processes share.

        Args:
            rank: this process's number.
            size: how many there are; `prepare` has been called in one of them.

        Returns:
            For each region written its checksum, by region key, for `finish`.

        Raises:
            InputOutput: a write failed.
            Interrupted: the run was stopped.
        """
        with self._opened():
            return self.regions.each(self._region, rank, size)

    def finish(self, checksums: dict[str, str]) -> tuple[dict[str, str], manifest.Files]:
        """Give tensors their CRCs, once all regions are written.

        Args:
            checksums: of every region, from every process's `run`.

        Returns:
            The checksum (xxh3-128, hexadecimal) of every region, by region key, and every weight file's entry in the
            manifest.

        Raises:
            InputOutput: a write failed.
        """
        crcs = self.regions.crcs(checksums)
        with self._opened():
            for file, places in crcs.items():
                for place, crc in places.items():
                    write_all(self._outputs[file], crc, place)
        return plain(checksums), manifest.weight_entries(self.plan, crcs)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        try:
            with writing(self.workspace.path), self.regions:
                for file in self.plan.files:
                    self._outputs[file.name] = self.workspace.tree.open(file.name, os.O_RDWR)
                yield
        finally:
            for descriptor in self._outputs.values():
                os.close(descriptor)
            self._outputs = {}

    def _region(self, region: Region) -> str:
        recorded = self.workspace.done.get(region.key)
        if recorded is not None and recorded == self._checksum_written(region):
            self.progress(region.nbytes)
            return recorded
        hasher, descriptor, position = self.regions.hasher(region), self._outputs[region.tensor.file], region.offset
        for view in self.regions.views(region):
            hasher.update(view)
            position += write_all(descriptor, view, position)
            self.progress(len(view))
        checksum = hasher.hexdigest()
        self.workspace.record(region.key, checksum)
        return checksum

    def _checksum_written(self, region: Region) -> str | None:
        """The checksum of what is in a region; None where it is not all there, or cannot be read."""
        hasher, buffer, offset = self.regions.hasher(region), self.regions.buffer(), 0
        while offset < region.nbytes:
            view = buffer[: min(MOVE_BYTES, region.nbytes - offset)]
            try:
                count = os.preadv(self._outputs[region.tensor.file], [view], region.offset + offset)
            except OSError:
                return None
            if count <= 0:
                return None
            hasher.update(view[:count])
            offset += count
        return hasher.hexdigest()


def _written(data: Iterator[bytes], descriptor: int) -> Iterator[bytes]:
    """The same bytes, each written on its way."""
    for block in data:
        write_all(descriptor, block)
        yield block
