"""Hugging Face checkpoint to Hugging Face checkpoint: the plan, its inverse, and the run."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import llmconvert
from llmconvert.canonical.lowerings import EXACT, Step, lower
from llmconvert.canonical.lowerings import ONE_WAY as STEP_ONE_WAY
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel, traits
from llmconvert.checkpoint.directory import Checkpoint, open_checkpoint
from llmconvert.checkpoint.dtypes import FROM_NAME, ITEMSIZE, TO_NAME
from llmconvert.converters.companions import Companions, companions
from llmconvert.engine import manifest
from llmconvert.engine.execute import Executor, check_space
from llmconvert.engine.journal import Workspace
from llmconvert.engine.plan import INDEX, Plan, lay_out, parse_size
from llmconvert.engine.publish import check_destination, publish
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.spec.dialect import Lifted, emit, keys_read, lift, read_config, refuse_quantised, write_config
from llmconvert.spec.keys import carried
from llmconvert.spec.language import Spec
from llmconvert.spec.registry import Registry, registry
from llmconvert.tensors.expressions import Expression, Fill, cast, sources, walk
from llmconvert.verify.ledger import Ledger, account
from llmconvert.verify.roundtrip import BITWISE, ONE_WAY, ROUNDED, Pair, RoundTrip, compare, failing

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, its bytes done so far and its bytes in all."""


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: the plan and what is needed to prove it.

    Attributes:
        checkpoint, source_spec, lifted: what is read.
        target: the dialect written.
        model: the lowered model; `steps` the rewrites that led to it, each with the config before.
        dtype: the dtype code asked for, or None to keep each tensor's own.
        plan: what will be written.
        ledger: the account of the plan.
        notes: what a user should know.
        not_carried: files of the source that are left behind, and why.
    """

    checkpoint: Checkpoint
    source_spec: Spec
    lifted: Lifted
    target: Spec
    model: CanonicalModel
    steps: list[tuple[Step, CanonicalConfig]]
    dtype: str | None
    plan: Plan
    ledger: Ledger
    notes: tuple[str, ...]
    not_carried: dict[str, str]


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
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def target_for(known: Registry, name: str, checkpoint: Checkpoint) -> Spec:
    """The target called `name`: a spec, or a family, whose member is the one the checkpoint came from, else its default.

    Raises:
        Refused: there is none, or it is never written.
    """
    spec: Spec | None = known.specs.get(name)
    family = known.families.get(name, [])
    if family:
        origin = ((manifest.read(checkpoint.path) or {}).get("source") or {}).get("spec")
        members = [s for s in family if s.target]
        spec = next((s for s in members if s.name == origin), None) or next(
            (s for s in members if s.default_target), spec
        )
    spec = spec or known.get(name)
    if not spec.target:
        raise Refused(f"{spec.name} is read but not written: {spec.not_target}")
    return spec


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _dominant(tensors: Mapping[str, Expression]) -> str:
    weight: Counter[str] = Counter()
    for expression in tensors.values():
        weight[expression.dtype] += expression.nbytes
    return weight.most_common(1)[0][0]


def _input_dtype(model: CanonicalModel, dtype: str | None) -> CanonicalModel:
    """Widen before the arithmetic of lowerings, so that it is rounded once, to the type asked for."""
    if dtype is None:
        return model
    tensors = {n: cast(e, dtype) if ITEMSIZE[dtype] > ITEMSIZE[e.dtype] else e for n, e in model.tensors.items()}
    return CanonicalModel(model.config, tensors, model.checks)


def plan_conversion(
    source: str | os.PathLike[str],
    to: str,
    *,
    source_name: str | None = None,
    spec_file: Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    accept: Callable[[Registry, Spec], None] = lambda known, spec: None,
) -> Conversion:
    """Plan a conversion from headers alone.

    Args:
        source: a directory or a hub id.
        to: the target spec or family.
        source_name: the source's spec; detected from config.json if None.
        spec_file: a spec from outside the package.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        max_shard_size: such as `5GB`.
        accept: called with the detected spec, to refuse it.

    Raises:
        LlmconvertError: of the kind that fits; nothing has been written.
    """
    known = registry(spec_file)
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise Usage(f"`{dtype}` is not a dtype to write", hint="choose float32, bfloat16 or float16")
    code = FROM_NAME[dtype] if dtype else None
    checkpoint = open_checkpoint(source)
    refuse_quantised(checkpoint)
    spec = known.get(source_name) if source_name else known.detect(checkpoint.config)
    accept(known, spec)
    target = target_for(known, to, checkpoint)
    config = read_config(spec, checkpoint.config, checkpoint.tensors)
    _refuse_early(config, target, known)
    lifted = lift(spec, checkpoint, config)
    model, steps = _lower(_input_dtype(lifted.model, code), target, known, checkpoint)
    tensors = {name: cast(e, code or e.dtype) for name, e in emit(target, model).items()}
    written_dtype = code or _dominant(tensors)
    texts, notes = _texts(checkpoint, spec, target, model.config, written_dtype)
    outputs, files = lay_out(tensors, parse_size(max_shard_size))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(e.nbytes for e in tensors.values())},
            "weight_map": {output.name: output.file for output in outputs},
        }
        texts[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    extra: Companions = companions(checkpoint)
    own_file = known.files[spec.name]
    summary = {
        "source": {
            "path": checkpoint.path.resolve().name, "spec": spec.name, "spec_sha256": _digest(own_file),
            "architectures": checkpoint.config.get("architectures"), "config": checkpoint.config,
        },
        "target": {"spec": target.name, "spec_sha256": _digest(known.files[target.name])},
        "dtype": dtype,
        "steps": [{"name": step.name, "exactness": step.exactness, "why": step.why} for step, _ in steps],
        "dropped": lifted.dropped,
    }  # fmt: skip
    plan = Plan(
        checkpoint.path, outputs, files, {**texts, **extra.texts}, extra.copies, model.checks,
        _identity(checkpoint, files, summary), summary,
    )  # fmt: skip
    ledger = account(plan, checkpoint.tensors, lifted.dropped | _checked_away(model, tensors))
    all_notes = lifted.notes + notes + extra.notes + _dtype_notes(checkpoint, tensors, code)
    return Conversion(checkpoint, spec, lifted, target, model, steps, code, plan, ledger, all_notes, extra.left)


def _lower(
    model: CanonicalModel, target: Spec, known: Registry, checkpoint: Checkpoint
) -> tuple[CanonicalModel, list[tuple[Step, CanonicalConfig]]]:
    """Lower to the target; on the way back to where the checkpoint came from, without biases it did not have."""
    added = _biases_added(target, checkpoint) & traits(model.config)
    try:
        if added:
            lean, steps = lower(model, target.name, target.holds - added, target.always - added, (), known.holders)
            if not failing(lean.checks):
                return lean, steps
        return lower(model, target.name, target.holds, target.always, target.coupled, known.holders)
    except Refused as error:
        raise Refused(error.what, where=str(checkpoint.path), hint=error.hint) from None


def _origin(target: Spec, checkpoint: Checkpoint) -> CanonicalConfig | None:
    """The config this checkpoint was converted from, if that was in the target's dialect."""
    made = (manifest.read(checkpoint.path) or {}).get("source") or {}
    original = made.get("config")
    if made.get("spec") != target.name or not isinstance(original, dict):
        return None
    try:
        return read_config(target, original)
    except (BadInput, Refused):
        return None


def _biases_added(target: Spec, checkpoint: Checkpoint) -> frozenset[str]:
    origin = _origin(target, checkpoint)
    return frozenset({"qkv_bias", "o_bias", "mlp_bias"}) - traits(origin) if origin else frozenset()


def _refuse_early(config: CanonicalConfig, target: Spec, known: Registry) -> None:
    """Refuse by the config's traits before the tensors are matched: a better message than a list of odd names."""
    blank = CanonicalModel(config, {})
    from llmconvert.canonical.lowerings import check_representable

    check_representable(blank.config, target.name, target.holds | target.always, known.holders)


def _checked_away(model: CanonicalModel, tensors: Mapping[str, Expression]) -> dict[str, str]:
    """Stored tensors that a check allows to leave out whole (zero biases)."""
    used = {tensor.name for e in tensors.values() for tensor in sources(e)}
    gone = {tensor.name for check in model.checks for tensor in sources(check.left)} - used
    return dict.fromkeys(gone, "checked to be zero")


def _identity(checkpoint: Checkpoint, files: Any, summary: Mapping[str, Any]) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    layout = [(f.name, f.size, hashlib.sha256(f.prefix).hexdigest()) for f in files]
    value = [llmconvert.__version__, str(checkpoint.path.resolve()), stats, layout, summary]
    return json.dumps(value, sort_keys=True, default=str) + "\n"


def _texts(
    checkpoint: Checkpoint, spec: Spec, target: Spec, config: CanonicalConfig, dtype: str
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """config.json: as the checkpoint's origin had it where this is the way back, else written anew."""
    source = checkpoint.config
    written = write_config(target, config, carried(source, keys_read(spec)), dtype)
    notes: list[str] = []
    origin = ((manifest.read(checkpoint.path) or {}).get("source")) or {}
    original = origin.get("config")
    if origin.get("spec") == target.name and isinstance(original, dict) and spec.name != target.name:
        try:
            same = read_config(target, {**original, "torch_dtype": None, "dtype": None}) == read_config(
                target, {**written, "torch_dtype": None, "dtype": None}
            )
        except (BadInput, Refused):
            same = False
        if same:
            written = {**original, **({k: TO_NAME[dtype] for k in ("torch_dtype", "dtype") if k in original})}
            notes.append("config.json is the original one, as recorded when this checkpoint was converted")
            code = sorted(
                {str(v).split("--")[-1].split(".")[0] + ".py" for v in (original.get("auto_map") or {}).values()}
            )
            absent = [name for name in code if not (checkpoint.path / name).is_file()]
            if absent:
                notes.append(f"its `auto_map` needs {', '.join(absent)}: copy them from the original repository")
    text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {"config.json": text.encode()}, tuple(notes)


def _dtype_notes(checkpoint: Checkpoint, tensors: Mapping[str, Expression], dtype: str | None) -> tuple[str, ...]:
    notes = []
    stored = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    main = stored.most_common(1)[0][0]
    if isinstance(named, str) and FROM_NAME.get(named) not in stored:
        notes.append(f"config.json says {named}, the tensors are {TO_NAME.get(main, main)}: the tensors are believed")
    if dtype is not None:
        narrowed = sum(
            ITEMSIZE[t.dtype] > ITEMSIZE[dtype] or (t.dtype == "BF16" and dtype == "F16")
            for t in checkpoint.tensors.values()
        )
        if narrowed:
            notes.append(f"{narrowed} tensors are rounded to {TO_NAME[dtype]}")
    return tuple(notes)


def return_pairs(conversion: Conversion, output: Checkpoint) -> list[Pair]:
    """What the round trip compares: each source tensor, and the same read back out of the output.

    Args:
        conversion: the planned conversion.
        output: what was written, opened.
    """
    back = lift(conversion.target, output, read_config(conversion.target, output.config, output.tensors)).model
    lossy: set[str] = set()
    rounded: set[str] = set()
    for step, before in reversed(conversion.steps):
        if step.undo is None:
            back = CanonicalModel(before, {**conversion.lifted.model.tensors, **_known(back, step.lossy)})
            lossy |= {name for name in conversion.lifted.model.tensors if name.rpartition(".")[0] in step.lossy}
        else:
            back = step.undo(back, before)
    planned = {name: e for name, e in conversion.model.tensors.items()}
    for name, expression in planned.items():
        if any(type(node).__name__ in ("Scale", "Shift") for node in walk(expression)):
            rounded.add(name)
    return _pair(conversion, back, output, lossy, rounded)


def _known(model: CanonicalModel, lossy: tuple[str, ...]) -> dict[str, Expression]:
    return {name: e for name, e in model.tensors.items() if name.rpartition(".")[0] not in lossy}


def _pair(
    conversion: Conversion, back: CanonicalModel, output: Checkpoint, lossy: set[str], rounded: set[str]
) -> list[Pair]:
    from llmconvert.spec.expand import bind
    from llmconvert.tensors.expressions import stored

    config = conversion.lifted.model.config
    pairs = []
    for binding in bind(conversion.source_spec, config):
        if set(binding.parts) & lossy:
            continue
        source = stored(conversion.checkpoint.tensors[binding.stored])
        returned = binding.put_together(back.tensors, config)
        promise = ROUNDED if set(binding.parts) & rounded else BITWISE
        if returned.dtype != source.dtype:
            if ITEMSIZE[returned.dtype] > ITEMSIZE[source.dtype]:
                returned = cast(returned, source.dtype)
            else:
                source = cast(source, returned.dtype)
        pairs.append(Pair(binding.stored, source, returned, promise))
    for planned in conversion.plan.tensors:
        if planned.name.rpartition(".")[0] in {name.rpartition(".")[0] for name in lossy}:
            pairs.append(Pair(planned.name, planned.expression, stored(output.tensors[planned.name]), ONE_WAY))
    return pairs


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
    verify: str = "weights",
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    sync: bool = True,
    device: str = "auto",
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
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        max_shard_size: such as `5GB`.
        verify: `none`, `weights` (ledger and round trip) or `logits` (both models run as well).
        workers: threads; the number of processors, at most 8, if None.
        overwrite: replace a destination that exists, and discard an unfinished run.
        resume: go on with an unfinished run.
        dry_run: plan, check the data the plan relies on, and write nothing.
        sync: have the disk confirm every byte before publishing.
        device: where logits are computed.
        accept: called with the registry and the detected spec, to refuse it.
        progress: called as bytes are done.

    Raises:
        LlmconvertError: of the kind that fits; the source is untouched and `destination` is not made.
    """
    if verify not in ("none", "weights", "logits"):
        raise Usage(f"`{verify}` is not a way to verify", hint="choose none, weights or logits")
    if workers is not None and workers < 1:
        raise Usage("`--workers` must be at least 1")
    target_dir = Path(destination)
    if Path(source).exists() and not dry_run:
        check_destination(Path(source), target_dir, overwrite=overwrite)
    conversion = plan_conversion(
        source,
        to,
        source_name=source_name,
        spec_file=spec_file,
        dtype=dtype,
        max_shard_size=max_shard_size,
        accept=accept,
    )
    faults = failing(conversion.plan.checks)
    if faults:
        from llmconvert.checkpoint.directory import listing

        raise Refused(f"{len(faults)} tensors are not what the conversion relies on: {listing(faults)}".replace("``", "`"),
                      where=str(conversion.checkpoint.path))  # fmt: skip
    report = _report(conversion, str(destination))
    if dry_run:
        return report
    check_destination(conversion.checkpoint.path, target_dir, overwrite=overwrite)
    return _run(conversion, target_dir, report, verify, workers or min(os.cpu_count() or 1, 8), overwrite, resume, sync,
                device, progress)  # fmt: skip


def _run(
    conversion: Conversion, destination: Path, report: Report, verify: str, workers: int, overwrite: bool, resume: bool,
    sync: bool, device: str, progress: Progress,
) -> Report:  # fmt: skip
    from dataclasses import replace

    plan = conversion.plan
    space = Workspace(destination, plan.identity, resume=resume, restart=overwrite)
    try:
        written = sum(path.stat().st_blocks * 512 for path in space.path.iterdir())
        check_space(plan, space.path, written)
        total = sum(output.expression.nbytes for output in plan.tensors)
        checksums = Executor(plan, space, workers, _stage(progress, "write", total)).run()
        found: RoundTrip | None = None
        if verify != "none":
            pairs = return_pairs(conversion, open_checkpoint(space.path))
            amount = sum(pair.source.nbytes for pair in pairs)
            found = compare(pairs, workers, _stage(progress, "verify", amount))
            _check_written(checksums, plan)
        (space.path / manifest.MANIFEST).write_bytes(
            manifest.build(plan, checksums, found.source_digests if found else {})
        )
        if verify == "logits":
            _prove_logits(conversion, space.path, device)
        space.finish()
        publish(space.path, destination, sync=sync)
    finally:
        space.close()
    trip = None if found is None else {k: v for k, v in asdict(found).items() if k != "source_digests"}
    return replace(report, published=True, roundtrip=trip)


def _stage(progress: Progress, name: str, total: int) -> Callable[[int], None]:
    import threading

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


def _prove_logits(conversion: Conversion, output: Path, device: str) -> None:
    from llmconvert.errors import ProofFailed
    from llmconvert.verify.logits import compare_logits

    result = compare_logits(conversion.checkpoint.path, output, device=device)
    if not result.verdict:
        raise ProofFailed(f"the logits differ: {result.reason}", where=str(output))


__all__ = ["EXACT", "STEP_ONE_WAY", "Conversion", "Fill", "Report", "convert", "plan_conversion", "return_pairs"]
