"""Run a plan and its proofs, and publish what holds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmconvert.converters.proofs import LOGITS, NONE, Proving, require_logits, write_record
from llmconvert.engine import manifest
from llmconvert.engine.execute import Executor, Interrupted, check_space
from llmconvert.engine.journal import Workspace
from llmconvert.engine.plan import Plan
from llmconvert.engine.processes import leave, rank, size, together
from llmconvert.engine.publish import publish
from llmconvert.errors import InputOutput, ProofFailed
from llmconvert.verify.loading import prove_loads, prove_plan
from llmconvert.verify.roundtrip import Pair, RoundTrip, compare

_LONG = 1 << 30
"""Above so many bytes, what can be proved beforehand is proved then too: nobody waits an hour to hear of it."""

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, its bytes done so far and its bytes in all."""


@dataclass(frozen=True)
class Report:
    """What a conversion did; `to_dict` is the machine-readable form."""

    source: str
    destination: str
    source_architecture: str
    target_architecture: str
    tensors_read: int
    tensors_written: int
    bytes_written: int
    steps: list[dict[str, str]]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    not_carried: dict[str, str]
    dtype: dict[str, int]
    ledger: dict[str, Any]
    disk_needed: int = 0
    published: bool = False
    roundtrip: dict[str, Any] | None = None
    loading: str | None = None
    logits: dict[str, Any] | None = None
    failure: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def run(
    plan: Plan, source: Path, destination: Path, report: Report, proving: Proving, workers: int | None, overwrite: bool,
    resume: bool, sync: bool, progress: Progress, *, pairs: Callable[[Path], list[Pair]],
    prove: Callable[[Path, Callable[[int, int], None]], dict[str, Any]],
) -> Report:  # fmt: skip
    """Write a plan beside its destination, prove it, and give it its name.

    Args:
        plan: what to write.
        source: what it is made from, for messages.
        destination: the directory to make.
        report: what is known of the conversion so far.
        proving: which proofs to run.
        workers: threads; the number of processors, at most 8, if None.
        overwrite: replace a destination that exists.
        resume: go on with an unfinished run.
        sync: have the disk confirm every byte.
        progress: called as bytes are done.
        pairs: what the round trip compares, given the directory written.
        prove: compares logits, given the directory written and a progress function.

    Raises:
        ProofFailed: a proof does not hold; what was written stays in the work directory, with the record.
        InputOutput: the disk refuses.
    """
    workers = workers or min(os.cpu_count() or 1, 8)
    total = sum(output.expression.nbytes for output in plan.tensors)
    spaces: list[Workspace] = []

    def begin() -> None:
        if rank() == 0:
            if proving.verify != NONE and total > _LONG and "config.json" in plan.texts:
                prove_plan(plan)
            spaces.append(Workspace(destination, plan.identity, resume=resume, restart=overwrite))
            _check_space(plan, spaces[0])
            Executor(plan, spaces[0], workers, lambda count: None).prepare()

    def write() -> dict[str, str]:
        if rank():
            spaces.append(Workspace(destination, plan.identity, resume=resume, restart=False, rank=rank()))
        return Executor(plan, spaces[0], workers, _stage(progress, "write", total // size())).run(rank(), size())

    try:
        together(begin)
        parts = together(write)
        checksums = {key: checksum for part in parts for key, checksum in part.items()}

        def prove_and_publish() -> Report | None:
            if rank():
                return None
            written = Executor(plan, spaces[0], workers, lambda count: None).finish(checksums)
            return _prove(plan, source, destination, report, proving, workers, sync, progress, spaces[0], written,
                          pairs, prove)  # fmt: skip

        done = together(prove_and_publish)[0]
        assert done is not None
        return done
    except KeyboardInterrupt:
        # Wherever it strikes: between two regions, or between writing and proving.
        raise Interrupted(
            "stopped; what is written is kept",
            where=str(spaces[0].path) if spaces else str(destination),
            hint="repeat the command with `--resume` to go on",
        ) from None
    finally:
        for space in spaces:
            space.close()
        leave()


def _check_space(plan: Plan, space: Workspace) -> None:
    written = sum(path.stat().st_blocks * 512 for path in space.path.rglob("*"))
    try:
        check_space(plan, space.path, written)
    except InputOutput:
        if not space.done:
            space.discard()
        raise


def _prove(
    plan: Plan, source: Path, destination: Path, report: Report, proving: Proving, workers: int, sync: bool,
    progress: Progress, space: Workspace, checksums: dict[str, str], pairs: Callable[[Path], list[Pair]],
    prove: Callable[[Path, Callable[[int, int], None]], dict[str, Any]],
) -> Report:  # fmt: skip
    """Prove what was written, and publish it."""
    total = sum(output.expression.nbytes for output in plan.tensors)
    found: RoundTrip | None = None
    if proving.verify != NONE:
        compared = pairs(space.path)
        amount = sum(pair.source.nbytes for pair in compared)
        try:
            found = compare(compared, workers, _stage(progress, "verify", amount))
        except ProofFailed as error:
            write_record(space.path, replace(report, failure=error.what).to_dict())
            raise
        _check_written(checksums, plan)
        if "config.json" in plan.texts:
            try:
                report = replace(report, loading=prove_loads(space.path))
            except ProofFailed as error:
                write_record(space.path, replace(report, failure=error.what).to_dict())
                raise
    (space.path / manifest.MANIFEST).write_bytes(manifest.build(plan, checksums, found.source_digests if found else {}))
    trip = None if found is None else {k: v for k, v in asdict(found).items() if k != "source_digests"}
    report = replace(report, roundtrip=trip)
    if proving.verify == LOGITS:
        shown = lambda done, layers: progress("logits", done * total // layers, total)  # noqa: E731
        logits = prove(space.path, shown)
        report = replace(report, logits=logits, failure=None if logits["verdict"] else logits["reason"])
        write_record(space.path, report.to_dict())
        require_logits(logits, source, space.path)
    report = replace(report, published=True)
    write_record(space.path, report.to_dict())
    space.finish()
    publish(space.path, destination, sync=sync)
    return report


def _stage(progress: Progress, name: str, total: int) -> Callable[[int], None]:
    lock, done = threading.Lock(), 0

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            now = done
        progress(name, now, total)

    return add


def _check_written(checksums: Mapping[str, str], plan: Plan) -> None:
    missing = [region.key for region in plan.regions() if region.key not in checksums]
    assert not missing, missing
