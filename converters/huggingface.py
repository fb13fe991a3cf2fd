"""Convert one Hugging Face checkpoint into another: plan, write, prove, publish."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.converters.planning import Conversion, check_data, elsewhere, plan_conversion
from llmconvert.converters.proofs import Proving, prove_written, refuse_unprovable
from llmconvert.converters.returning import return_pairs
from llmconvert.converters.running import Progress, Report, run
from llmconvert.engine.publish import check_destination
from llmconvert.errors import Usage
from llmconvert.spec.language import Spec
from llmconvert.spec.registry import Registry


def _report(conversion: Conversion, destination: str) -> Report:
    plan = conversion.plan
    dtypes = Counter(TO_NAME.get(output.expression.dtype, output.expression.dtype) for output in plan.tensors)
    steps = [{"name": step.name, "exactness": step.exactness, "why": step.why} for step, _ in conversion.steps]
    return Report(
        source=str(conversion.checkpoint.path),
        destination=destination,
        source_architecture=conversion.source_spec.name,
        target_architecture=conversion.target.name,
        tensors_read=len(conversion.checkpoint.tensors),
        tensors_written=len(plan.tensors),
        bytes_written=plan.nbytes,
        steps=steps,
        dropped=conversion.ledger.dropped,
        notes=conversion.notes,
        not_carried=conversion.not_carried,
        dtype=dict(dtypes),
        ledger=asdict(conversion.ledger),
        disk_needed=plan.nbytes,
        config=json.loads(plan.texts["config.json"]),
    )


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "llama",
    source_name: str | None = None,
    spec_file: Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    keep_fp8: bool = False,
    verify: str = "logits",
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    sync: bool = True,
    device: str = "auto",
    load: str = "auto",
    accept: Callable[[Registry, Spec], None] = lambda known, spec: None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Convert a checkpoint directory into another dialect, prove it, and publish it under `destination`.

    Args:
        source: a directory or a hub id.
        destination: the directory to make; it exists only once it is whole and proved.
        to: target spec or family, such as `llama`.
        source_name: the source's spec; detected if None.
        spec_file: a spec file from outside the package.
        dtype: float32, bfloat16, float16 or fp8-block128; see `plan_conversion`.
        max_shard_size: such as `5GB`.
        keep_fp8: move FP8 weights and their scales as they are.
        verify: `none`, `weights` (ledger and round trip) or `logits` (both models run as well).
        workers: threads; the number of processors, at most 8, if None.
        overwrite: replace a destination that exists, and discard an unfinished run.
        resume: go on with an unfinished run; one that is finished, with the same inputs, is left as it is.
        dry_run: plan, check the data the plan relies on, and write nothing.
        sync: have the disk confirm every byte before publishing.
        device: where logits are computed: auto, cpu, cuda, cuda:1.
        load: how models are loaded for that: whole, by layers, or auto.
        accept: called with the registry and the detected spec, to refuse it.
        progress: called as bytes are done.

    Raises:
        LlmconvertError: of the kind that fits; the source is untouched and `destination` is not made.
    """
    proving = Proving(verify, device, load)
    if workers is not None and workers < 1:
        raise Usage("`--workers` must be at least 1")
    target_dir = Path(destination)
    if Path(source).exists() and not dry_run:
        check_destination(Path(source), target_dir, overwrite=overwrite, resume=resume)
    conversion = plan_conversion(
        source,
        to,
        source_name=source_name,
        spec_file=spec_file,
        dtype=dtype,
        max_shard_size=max_shard_size,
        keep_fp8=keep_fp8,
        accept=accept,
    )
    checks = conversion.lifted.model.checks, conversion.plan.checks
    check_data(conversion.checkpoint, *checks, hint=elsewhere(conversion.checkpoint))
    report = _report(conversion, str(destination))
    if dry_run:
        return report
    check_destination(conversion.checkpoint.path, target_dir, overwrite=overwrite, resume=resume)
    refuse_unprovable(proving, [("source", conversion.checkpoint.path)], told=conversion.source_spec.told)
    return run(
        conversion.plan, conversion.checkpoint.path, target_dir, report, proving, workers, overwrite, resume, sync,
        progress,
        pairs=lambda written: return_pairs(conversion, open_checkpoint(written)),
        prove=lambda written, shown: prove_written(
            conversion.checkpoint.path, written, conversion.plan, proving, shown,
            told=(conversion.source_spec.told, conversion.target.told),
        ),
        ready=lambda written: refuse_unprovable(
            proving, [("result", written)], where=conversion.checkpoint.path, told=conversion.target.told
        ),
        tokenizer=conversion.checkpoint.path,
    )  # fmt: skip
