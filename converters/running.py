"""Run a plan and its proofs, and publish what holds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmconvert.converters.proofs import LOGITS, NONE, WEIGHTS, Proving, prove_tokenizer, require_logits, write_record
from llmconvert.engine import manifest
from llmconvert.engine.execute import Executor, Interrupted, check_space
from llmconvert.engine.finished import difference
from llmconvert.engine.journal import Workspace
from llmconvert.engine.plan import Plan
from llmconvert.engine.processes import leave, rank, size, together
from llmconvert.engine.publish import publish
from llmconvert.engine.tree import writing
from llmconvert.errors import BadInput, LlmconvertError, ProofFailed, Refused, Usage
from llmconvert.verify.loading import prove_loads, prove_plan
from llmconvert.verify.roundtrip import Pair, RoundTrip, compare

_LONG = 1 << 30
"""Above so many bytes, what can be proved beforehand is proved then too: nobody waits an hour to hear of it."""

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, its bytes done so far and its bytes in all."""


@dataclass(frozen=True)
class Report:
    """What a conversion did; `to_dict` is the machine-readable form.

    With `unchanged` an earlier run had done all of it, and this one did nothing.
    """

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
    unchanged: bool = False
    roundtrip: dict[str, Any] | None = None
    loading: str | None = None
    logits: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    failure: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def run(
    plan: Plan, source: Path, destination: Path, report: Report, proving: Proving, workers: int | None, overwrite: bool,
    resume: bool, sync: bool, progress: Progress, *, pairs: Callable[[Path], list[Pair]],
    prove: Callable[[Path, Callable[[int, int], None]], dict[str, Any]],
    ready: Callable[[Path], None] = lambda written: None, tokenizer: Path | None = None,
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
        ready: called with the directory when its small files are written, to refuse what could not be proved.
        tokenizer: where the tokenizer is that the result's must be; None if it has none. It is compared before any
            weight is written.

    Raises:
        ProofFailed: a proof does not hold; what was written stays in the work directory, with the record.
        InputOutput: the disk refuses.
        LlmconvertError: the data are not what the plan takes them for; nothing stays.
    """
    workers = workers or min(os.cpu_count() or 1, 8)
    total = sum(output.expression.nbytes for output in plan.tensors)
    spaces: list[Workspace] = []
    small: manifest.Files = {}
    tokenizers: list[dict[str, Any]] = []

    def begin() -> tuple[str, Report | None]:
        if rank():
            return "", None
        space = Workspace(destination, plan.run_identity(), resume=resume, restart=overwrite)
        spaces.append(space)
        if space.occupied:
            earlier = _finished(plan, destination, report, proving, workers, progress)
            space.clear_up()
            return "", _with_rest(earlier, space)
        with _discarding(space, _ANY if not space.done else ()):
            if proving.verify != NONE and total > _LONG and "config.json" in plan.texts:
                prove_plan(plan)
            _check_space(plan, space)
            small.update(Executor(plan, space, workers, lambda count: None).prepare())
            ready(space.path)
            if tokenizer is not None and proving.verify != NONE:
                tokenizers.append(prove_tokenizer(tokenizer, space.path))
        return space.token, None

    def write() -> dict[str, str]:
        if rank():
            spaces.append(Workspace(destination, "", resume=resume, restart=False, rank=rank(), token=token))
        return Executor(plan, spaces[0], workers, _stage(progress, "write", total // size())).run(rank(), size())

    try:
        token, earlier = together(begin)[0]
        if earlier is not None:
            return earlier
        with _discarding(spaces[0] if spaces else None, _USELESS):
            parts = together(write)
        checksums = {key: checksum for part in parts for key, checksum in part.items()}

        def prove_and_publish() -> Report | None:
            if rank():
                return None
            space = spaces[0]
            proved = replace(report, tokenizer=tokenizers[0] if tokenizers else None)
            with _discarding(space, ()):
                written, files = Executor(plan, space, workers, lambda count: None).finish(checksums)
                proved = _prove(
                    plan, source, proved, proving, workers, progress, space, written, small | files, pairs, prove
                )
                publish(space, sync=sync)
            return _with_rest(proved, space)

        done = together(prove_and_publish)[0]
        assert done is not None
        return done
    except KeyboardInterrupt:
        # Wherever it strikes: between two regions, or between writing and proving.
        if spaces and spaces[0].published:
            raise Interrupted(
                "stopped while clearing up: the result is whole and in its place", where=str(destination),
                hint=f"`rm -r {spaces[0].work}` removes what is left",
            ) from None  # fmt: skip
        raise Interrupted(
            "stopped; what is written is kept",
            where=str(spaces[0].work) if spaces else str(destination),
            hint="repeat the command with `--resume` to go on",
        ) from None
    finally:
        for space in spaces:
            space.close()
        leave()


_USELESS = (Refused.exit_code, BadInput.exit_code)
"""Found while writing: the data never were what they seemed, and going on would end the same way."""
_ANY = range(256)


@contextmanager
def _discarding(space: Workspace | None, codes: Collection[int]) -> Iterator[None]:
    """Leave no work directory after errors of these exit codes, and say so where one stays after others."""
    try:
        yield
    except LlmconvertError as error:
        if space is not None and error.exit_code in codes:
            space.discard()
        elif space is not None:
            _tell(error, space)
        raise


def _tell(error: LlmconvertError, space: Workspace) -> None:
    if "--resume" not in (error.hint or ""):
        kept = f"what is written is kept: `--resume` goes on with it, `rm -r {space.work}` gives it up"
        error.hint = f"{error.hint}; {kept}" if error.hint else kept


def _with_rest(report: Report, space: Workspace) -> Report:
    """A report that names what stays beside the destination for no use."""
    if not os.path.lexists(space.work):
        return report
    return replace(report, notes=(*report.notes, f"no longer needed, and still there: `rm -r {space.work}`"))


def _finished(
    plan: Plan, destination: Path, report: Report, proving: Proving, workers: int, progress: Progress
) -> Report:
    """The report of the run that had done all this, if it did, and proved what is asked for.

    Raises:
        Usage: the destination is something else, or was proved less.
        BadInput: it has changed since it was made.
    """
    amount = sum(output.expression.nbytes for output in plan.tensors)
    fault = difference(destination, plan, workers, _stage(progress, "compare", amount))
    if fault is not None:
        raise Usage(
            f"the destination exists, and is not what this command makes: {fault}", where=str(destination),
            hint="name another, or add `--overwrite` in place of `--resume`",
        )  # fmt: skip
    try:
        # What the manifest says is what this command makes; whether the files still hold it, only their bytes tell.
        manifest.check(destination, alone=False)
    except BadInput as error:
        error.hint = "name another, or add `--overwrite` in place of `--resume`, which makes it anew"
        raise
    record = manifest.report(destination)
    proved = LOGITS if record.get("logits") else WEIGHTS if record.get("roundtrip") else NONE
    levels = (NONE, WEIGHTS, LOGITS)
    if levels.index(proved) < levels.index(proving.verify):
        raise Usage(
            f"the destination is finished, but was published with `--verify {proved}`", where=str(destination),
            hint="`llmconvert verify` compares it with its source; `--overwrite` makes it anew",
        )  # fmt: skip
    return replace(
        report, published=True, unchanged=True,
        roundtrip=record.get("roundtrip"), loading=record.get("loading"), logits=record.get("logits"),
        tokenizer=record.get("tokenizer"),
    )  # fmt: skip


def _check_space(plan: Plan, space: Workspace) -> None:
    with writing(space.path):
        written = sum(found.st_blocks * 512 for _, found in space.tree.files())
    check_space(plan, space.path, written)


def _prove(
    plan: Plan, source: Path, report: Report, proving: Proving, workers: int, progress: Progress, space: Workspace,
    checksums: dict[str, str], files: manifest.Files, pairs: Callable[[Path], list[Pair]],
    prove: Callable[[Path, Callable[[int, int], None]], dict[str, Any]],
) -> Report:  # fmt: skip
    """Prove what was written, and put the record and the manifest beside it."""
    total = sum(output.expression.nbytes for output in plan.tensors)
    found: RoundTrip | None = None
    if proving.verify != NONE:
        try:
            compared = _read_back(pairs, space)
            amount = sum(pair.source.nbytes for pair in compared)
            with _as_written(space):
                found = compare(compared, workers, _stage(progress, "verify", amount))
            _check_written(checksums, plan)
            if "config.json" in plan.texts:
                report = replace(report, loading=prove_loads(space.path))
        except ProofFailed as error:
            with writing(space.path):
                space.forget()  # or a fault of the moment would be taken up again by every `--resume`
                write_record(space.tree, replace(report, failure=error.what).to_dict())
            raise
    trip = None if found is None else {k: v for k, v in asdict(found).items() if k != "source_digests"}
    report = replace(report, roundtrip=trip)
    if proving.verify == LOGITS:
        shown = lambda done, layers: progress("logits", done * total // layers, total)  # noqa: E731
        logits = prove(space.path, shown)
        report = replace(report, logits=logits, failure=None if logits["verdict"] else logits["reason"])
        if not logits["verdict"]:
            with writing(space.path):
                write_record(space.tree, report.to_dict())
        require_logits(logits, source, space.path)
    report = replace(report, published=True)
    with writing(space.path):
        write_record(space.tree, report.to_dict())
        digests = found.source_digests if found else {}
        space.tree.write(manifest.MANIFEST, manifest.build(plan, checksums, digests, files, space.tree))
    return report


def _read_back(pairs: Callable[[Path], list[Pair]], space: Workspace) -> list[Pair]:
    """What the round trip compares; an output that cannot be read is a proof that fails, not bad input."""
    try:
        return pairs(space.path)
    except BadInput as error:
        raise _unread(error) from None


@contextmanager
def _as_written(space: Workspace) -> Iterator[None]:
    """Of what is wrong with files while they are compared, what is wrong with those written is a proof that fails."""
    try:
        yield
    except BadInput as error:
        if error.where is None or not Path(error.where).is_relative_to(space.path):
            raise
        raise _unread(error) from None


def _unread(error: BadInput) -> ProofFailed:
    return ProofFailed(f"what was written does not read back: {error.what}", where=error.where, hint=error.hint)


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
