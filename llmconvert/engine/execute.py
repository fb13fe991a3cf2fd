"""Fill the regions of a plan: byte moves through one small buffer a worker, everything else by evaluated blocks."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import xxhash

from llmconvert.checkpoint.torch_zip import combine_crc
from llmconvert.engine.journal import Workspace
from llmconvert.engine.plan import Plan, Region
from llmconvert.errors import InputOutput, LlmconvertError
from llmconvert.tensors.evaluate import MOVE_BYTES, Reader, as_bytes, blocks, pieces
from llmconvert.tensors.expressions import Stored, computes

Progress = Callable[[int], None]


class Interrupted(LlmconvertError):
    """The user stopped the run: exit code 130."""

    exit_code = 130


def disk_full(error: OSError, where: Path) -> InputOutput:
    """The message for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputOutput(
            "the disk is full", where=str(where), hint="free some space, then repeat the command with `--resume`"
        )
    return InputOutput(f"cannot write: {error.strerror}", where=str(error.filename or where))


def check_space(plan: Plan, directory: Path, already: int = 0) -> None:
    """Check that the output fits on the disk.

    Raises:
        InputOutput: it does not.
    """
    free = shutil.disk_usage(directory).free
    needed = plan.nbytes - already
    if needed > free:
        raise InputOutput(
            f"the output needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free", where=str(directory)
        )


_CRC = " crc32 "


class _Hasher:
    """The checksum of a region; with the CRC-32 beside it where the format wants one."""

    def __init__(self, *, wants_crc: bool) -> None:
        self._hasher, self._crc = xxhash.xxh3_128(), 0 if wants_crc else None

    def update(self, view: memoryview) -> None:
        self._hasher.update(view)
        if self._crc is not None:
            self._crc = zlib.crc32(view, self._crc)

    def hexdigest(self) -> str:
        return self._hasher.hexdigest() + (f"{_CRC}{self._crc:08x}" if self._crc is not None else "")


_BATCH_BYTES = 16 * 1024 * 1024


def _batches(regions: Iterable[Region]) -> Iterator[list[Region]]:
    """Consecutive regions of about `_BATCH_BYTES` together: a hundred thousand small tensors are not as many jobs."""
    batch: list[Region] = []
    size = 0
    for region in regions:
        batch.append(region)
        size += region.nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
        self.plan, self.workspace, self.workers, self.progress = plan, workspace, workers, progress
        self.stop = threading.Event()
        self._reader = Reader()
        self._outputs: dict[str, int] = {}
        self._buffers = threading.local()
        self._crc_places = {name: places for file in plan.files for name, places in file.crc_places.items()}

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
            return self._fill(rank, size)

    def prepare(self) -> None:
        """Write the small files, and the weight files with all but their tensors.

        Raises:
            InputOutput: a write failed.
        """
        directory = self.workspace.path
        try:
            for name, text in self.plan.texts.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_bytes(text)
            for name, path in self.plan.copies.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, directory / name)
            for file in self.plan.files:
                (directory / file.name).parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(directory / file.name, os.O_CREAT | os.O_RDWR, 0o666)
                try:
                    os.ftruncate(descriptor, file.size)
                    for offset, data in file.pieces:
                        os.pwrite(descriptor, data, offset)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise disk_full(error, directory) from None

    def finish(self, checksums: dict[str, str]) -> dict[str, str]:
        """Give tensors their CRCs, once all regions are written.

        Args:
            checksums: of every region, from every process's `run`.

        Returns:
            The checksum (xxh3-128, hexadecimal) of every region, by region key.

        Raises:
            InputOutput: a write failed.
        """
        with self._opened():
            self._write_crcs(checksums)
        return {key: checksum.partition(_CRC)[0] for key, checksum in checksums.items()}

    @contextmanager
    def _opened(self) -> Iterator[None]:
        directory = self.workspace.path
        self._reader = Reader()
        try:
            self._outputs = {f.name: os.open(directory / f.name, os.O_RDWR) for f in self.plan.files}
            yield
        except OSError as error:
            raise disk_full(error, directory) from None
        finally:
            self._reader.close()
            for descriptor in self._outputs.values():
                os.close(descriptor)
            self._outputs = {}

    def _fill(self, rank: int, size: int) -> dict[str, str]:
        if any(computes(tensor.expression) for tensor in self.plan.tensors):
            import torch

            torch.set_num_threads(1)
        checksums: dict[str, str] = {}
        with ThreadPoolExecutor(self.workers) as pool:
            share = islice(self.plan.regions(), rank, None, size)
            futures = [pool.submit(self._batch, batch) for batch in _batches(share)]
            try:
                for future in as_completed(futures):
                    checksums |= future.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return checksums

    def _write_crcs(self, checksums: dict[str, str]) -> None:
        """Give each tensor that wants one its CRC-32, combined from its regions'."""
        crcs: dict[str, int] = {}
        for region in self.plan.regions():
            name = region.tensor.name
            if name in self._crc_places:
                crc = int(checksums[region.key].partition(_CRC)[2], 16)
                crcs[name] = combine_crc(crcs.get(name, 0), crc, region.nbytes)
        for tensor in self.plan.tensors:
            for place in self._crc_places.get(tensor.name, ()):
                os.pwrite(self._outputs[tensor.file], crcs.get(tensor.name, 0).to_bytes(4, "little"), place)

    def _buffer(self) -> bytearray:
        if not hasattr(self._buffers, "data"):
            self._buffers.data = bytearray(MOVE_BYTES)
        data: bytearray = self._buffers.data
        return data

    def _batch(self, batch: list[Region]) -> dict[str, str]:
        return {region.key: self._region(region) for region in batch}

    def _region(self, region: Region) -> str:
        recorded = self.workspace.done.get(region.key)
        if recorded is not None and recorded == self._checksum_written(region):
            self.progress(region.nbytes)
            return recorded
        hasher = _Hasher(wants_crc=region.tensor.name in self._crc_places)
        descriptor, position = self._outputs[region.tensor.file], region.offset
        for expression, start, stop in pieces(region.tensor.expression, region.start, region.stop):
            if isinstance(expression, Stored):
                position = self._move(expression, start, stop, descriptor, position, hasher)
                continue
            for block in blocks(expression, start, stop, self._reader):
                view = as_bytes(block)
                position = self._write(descriptor, view, position, hasher)
        checksum = hasher.hexdigest()
        self.workspace.record(region.key, checksum)
        return checksum

    def _move(self, source: Stored, start: int, stop: int, descriptor: int, position: int, hasher: _Hasher) -> int:
        buffer = memoryview(self._buffer())
        begin, end = start * source.row_bytes, stop * source.row_bytes
        for offset in range(begin, end, MOVE_BYTES):
            view = buffer[: min(MOVE_BYTES, end - offset)]
            self._reader.read_into(source.tensor, view, offset)
            position = self._write(descriptor, view, position, hasher)
        return position

    def _write(self, descriptor: int, view: memoryview, position: int, hasher: _Hasher) -> int:
        if self.stop.is_set():
            raise Interrupted("stopped")
        hasher.update(view)
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], position + done)
        self.progress(done)
        return position + done

    def _checksum_written(self, region: Region) -> str:
        hasher = _Hasher(wants_crc=region.tensor.name in self._crc_places)
        buffer = memoryview(self._buffer())
        for offset in range(0, region.nbytes, MOVE_BYTES):
            view = buffer[: min(MOVE_BYTES, region.nbytes - offset)]
            count = os.preadv(self._outputs[region.tensor.file], [view], region.offset + offset)
            hasher.update(view[:count])
        return hasher.hexdigest()
