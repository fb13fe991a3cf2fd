"""The bytes of a plan's regions, evaluated by threads in bounded memory, whatever is then done with them."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice

import xxhash

from llmconvert.checkpoint.torch_zip import combine_crc
from llmconvert.engine.plan import Plan, Region
from llmconvert.errors import LlmconvertError
from llmconvert.tensors.evaluate import MOVE_BYTES, Reader, as_bytes, blocks, pieces
from llmconvert.tensors.expressions import Expression, Stored, computes

Progress = Callable[[int], None]


class Interrupted(LlmconvertError):
    """The user stopped the run: exit code 130."""

    exit_code = 130


_CRC = " crc32 "


class Hasher:
    """The checksum of a region; with the CRC-32 beside it where the format wants one."""

    def __init__(self, *, wants_crc: bool) -> None:
        """See the class."""
        self._hasher, self._crc = xxhash.xxh3_128(), 0 if wants_crc else None

    def update(self, view: memoryview) -> None:
        """Take further bytes."""
        self._hasher.update(view)
        if self._crc is not None:
            self._crc = zlib.crc32(view, self._crc)

    def hexdigest(self) -> str:
        """What is journalled of the region."""
        return self._hasher.hexdigest() + (f"{_CRC}{self._crc:08x}" if self._crc is not None else "")


def plain(checksums: dict[str, str]) -> dict[str, str]:
    """Checksums (xxh3-128, hexadecimal) without the CRCs beside them."""
    return {key: checksum.partition(_CRC)[0] for key, checksum in checksums.items()}


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


class Regions:
    """The regions of a plan, shared out among threads; a context manager, for the files it reads.

    Args:
        plan: whose.
        workers: threads.
    """

    def __init__(self, plan: Plan, workers: int) -> None:
        """See the class."""
        self.plan, self.workers = plan, workers
        self.stop = threading.Event()
        self._reader = Reader()
        self._buffers = threading.local()
        self._crc_places = {name: places for file in plan.files for name, places in file.crc_places.items()}

    def __enter__(self) -> Regions:
        self._reader = Reader()
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def each(self, act: Callable[[Region], str], rank: int = 0, size: int = 1) -> dict[str, str]:
        """Do something with every region whose turn it is, of all those `size` processes share.

        Returns:
            What came of each, by region key.

        Raises:
            LlmconvertError: what `act` raised first; the others are stopped.
        """
        if any(computes(tensor.expression) for tensor in self.plan.tensors):
            import torch

            torch.set_num_threads(1)
        found: dict[str, str] = {}
        with ThreadPoolExecutor(self.workers) as pool:
            share = islice(self.plan.regions(), rank, None, size)
            futures = [pool.submit(self._batch, act, batch) for batch in _batches(share)]
            try:
                for future in as_completed(futures):
                    found |= future.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return found

    @staticmethod
    def _batch(act: Callable[[Region], str], batch: list[Region]) -> dict[str, str]:
        return {region.key: act(region) for region in batch}

    def hasher(self, region: Region) -> Hasher:
        """For a region's checksum."""
        return Hasher(wants_crc=region.tensor.name in self._crc_places)

    def buffer(self) -> memoryview:
        """This thread's own, of `MOVE_BYTES`."""
        if not hasattr(self._buffers, "data"):
            self._buffers.data = bytearray(MOVE_BYTES)
        return memoryview(self._buffers.data)

    def views(self, region: Region) -> Iterator[memoryview]:
        """A region's bytes in order; each view holds until the next is asked for.

        Raises:
            Interrupted: the run was stopped.
            LlmconvertError: the source cannot be read, or is not what it seemed.
        """
        for expression, start, stop in pieces(region.tensor.expression, region.start, region.stop):
            found = self._moved(expression, start, stop) if isinstance(expression, Stored) else self._evaluated(
                expression, start, stop
            )  # fmt: skip
            for view in found:
                if self.stop.is_set():
                    raise Interrupted("stopped")
                yield view

    def _moved(self, source: Stored, start: int, stop: int) -> Iterator[memoryview]:
        buffer = self.buffer()
        begin, end = start * source.row_bytes, stop * source.row_bytes
        for offset in range(begin, end, MOVE_BYTES):
            view = buffer[: min(MOVE_BYTES, end - offset)]
            self._reader.read_into(source.tensor, view, offset)
            yield view

    def _evaluated(self, expression: Expression, start: int, stop: int) -> Iterator[memoryview]:
        for block in blocks(expression, start, stop, self._reader):
            yield as_bytes(block)

    def crcs(self, checksums: dict[str, str]) -> dict[str, dict[int, bytes]]:
        """The CRC-32s of the tensors that want one, combined from their regions'.

        Returns:
            For each file what goes where in it.
        """
        combined: dict[str, int] = {}
        for region in self.plan.regions():
            name = region.tensor.name
            if name in self._crc_places:
                crc = int(checksums[region.key].partition(_CRC)[2], 16)
                combined[name] = combine_crc(combined.get(name, 0), crc, region.nbytes)
        found: dict[str, dict[int, bytes]] = {file.name: {} for file in self.plan.files}
        for tensor in self.plan.tensors:
            crc_bytes = combined.get(tensor.name, 0).to_bytes(4, "little")
            found[tensor.file] |= dict.fromkeys(self._crc_places.get(tensor.name, ()), crc_bytes)
        return found
