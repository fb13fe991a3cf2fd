"""Hugging Face to Megatron: lift, lower to what megatron-core holds, cut over the ranks."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llmconvert
from llmconvert.canonical.lowerings import lower
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel
from llmconvert.canonical.step import Step
from llmconvert.checkpoint.directory import Checkpoint, open_checkpoint
from llmconvert.checkpoint.dtypes import FROM_NAME, TO_NAME
from llmconvert.checkpoint.megatron import LATEST, open_megatron
from llmconvert.converters.companions import Companions, companions
from llmconvert.converters.megatron import arguments
from llmconvert.converters.megatron.grid import Grid, padded_vocabulary
from llmconvert.converters.megatron.layout import cut_for, lay_out, tracked
from llmconvert.converters.megatron.opening import CONFIG, HF_FOLDER
from llmconvert.converters.megatron.parts import IMPLEMENTATIONS, Cut, check_cut
from llmconvert.converters.megatron.shards import assembled, join, split
from llmconvert.converters.planning import Lowered, check_data, checked_away, elsewhere, json_text, lowered_in
from llmconvert.converters.proofs import LOGITS, Proving, prove_written, refuse_unprovable
from llmconvert.converters.returning import canonical_pairs, unlowered
from llmconvert.converters.running import Progress, Report, run
from llmconvert.engine.plan import Plan, WeightFile
from llmconvert.engine.publish import check_destination
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.spec.dialect import Lifted, lift, read_config
from llmconvert.spec.disagreements import refuse_disagreements
from llmconvert.spec.fused import unfused
from llmconvert.spec.language import Spec
from llmconvert.spec.quantised import FP8
from llmconvert.spec.registry import Registry, registry
from llmconvert.verify.ledger import Ledger, account
from llmconvert.verify.roundtrip import ONE_WAY, Pair, failing

ARGS_SCRIPT = "megatron-args.sh"


@dataclass(frozen=True)
class _Prepared:
    """All of a split but where its bytes go."""

    known: Registry
    checkpoint: Checkpoint
    spec: Spec
    lifted: Lifted
    model: CanonicalModel
    steps: list[tuple[Step, CanonicalConfig]]
    cut: Cut
    args: dict[str, Any]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class SplitConversion(_Prepared):
    """A planned split.

    Attributes:
        known: all specs.
        checkpoint, spec, lifted: what is read.
        model: lowered to what megatron-core holds; `steps` the rewrites, each with the config before.
        cut: how it is cut.
        args: the arguments written.
        remarks: what readers of the source disagree in.
        plan: what will be written.
        ledger: the account of the plan.
        notes: what a user should know.
        not_carried: files of the source that are left behind, and why.
    """

    plan: Plan
    ledger: Ledger
    notes: tuple[str, ...]
    not_carried: dict[str, str]


def lower_to_megatron(lifted: CanonicalModel, checkpoint: Checkpoint) -> Lowered:
    """Rewrite a model until megatron-core can hold it.

    Raises:
        Refused: it has a trait megatron-core's GPT model does not.
    """
    try:
        model, steps = lower(
            lifted, "megatron", arguments.holds(lifted.config), frozenset(), arguments.coupled(lifted.config)
        )
        arguments.check_holds(model.config)
    except Refused as error:
        raise Refused(error.what, where=str(checkpoint.path), hint=error.hint or elsewhere(checkpoint)) from None
    return model, steps


def _prepared(
    source: str | os.PathLike[str], grid: Grid, fmt: str, transformer_impl: str, grouped: bool, divisible_by: int,
    dtype: str | None, spec_file: Path | None, source_name: str | None,
) -> _Prepared:  # fmt: skip
    if transformer_impl not in IMPLEMENTATIONS:
        raise Usage(
            f"`{transformer_impl}` is not a transformer implementation", hint=f"choose {' or '.join(IMPLEMENTATIONS)}"
        )
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise Usage(f"`{dtype}` is not a dtype to write", hint="choose float32, bfloat16 or float16")
    if divisible_by < 1:
        raise Usage("`--make-vocab-size-divisible-by` must be at least 1")
    known = registry(spec_file)
    checkpoint = unfused(open_checkpoint(source))
    spec = known.identify(checkpoint, source_name)
    config = read_config(spec, checkpoint.config, checkpoint.tensors)
    code = FROM_NAME[dtype] if dtype else None
    lifted = lift(spec, checkpoint, config, dtype=code or "BF16")
    try:
        remarks = refuse_disagreements(spec, config, lifted.model.tensors, checkpoint.config)
    except Refused as error:
        raise Refused(error.what, where=str(checkpoint.path), hint=error.hint) from None
    model, steps = lowered_in(code, lifted.model, lambda lifted: lower_to_megatron(lifted, checkpoint))
    if grouped and not model.config.num_experts:
        raise Usage("`--moe-grouped-gemm` is for mixtures of experts, and this model is dense", hint="leave it out")
    check_cut(model.config, grid, fmt, transformer_impl)
    padded = padded_vocabulary(model.config.vocab_size, grid.tp, divisible_by)
    cut = cut_for(model.config, grid, fmt, padded, transformer_impl, grouped)
    main = Counter(e.dtype for e in model.tensors.values()).most_common(1)[0][0]
    args = arguments.to_arguments(model.config, grid, padded, divisible_by, TO_NAME[main])
    args |= {"transformer_impl": transformer_impl, "ckpt_format": fmt}
    args |= {"moe_grouped_gemm": grouped} if model.config.num_experts else {}
    return _Prepared(known, checkpoint, spec, lifted, model, steps, cut, args, remarks)


def arguments_for(
    source: str | os.PathLike[str], grid: Grid, *, fmt: str = "torch", transformer_impl: str = "transformer_engine",
    grouped: bool = False, divisible_by: int = 128, dtype: str | None = None, spec_file: Path | None = None,
    source_name: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments a split would write; see `plan_split`."""
    return _prepared(source, grid, fmt, transformer_impl, grouped, divisible_by, dtype, spec_file, source_name).args


def plan_split(
    source: str | os.PathLike[str],
    grid: Grid,
    *,
    fmt: str = "torch",
    transformer_impl: str = "transformer_engine",
    grouped: bool = False,
    divisible_by: int = 128,
    iteration: int | None = None,
    dtype: str | None = None,
    spec_file: Path | None = None,
    source_name: str | None = None,
) -> SplitConversion:
    """Plan a split from headers alone.

    Args:
        source: a Hugging Face checkpoint directory or a hub id.
        grid: how to cut.
        fmt: torch or torch_dist.
        transformer_impl: transformer_engine or local: how norms are named.
        grouped: moe_grouped_gemm: experts are named as Transformer Engine's grouped matrix product names them.
        divisible_by: make_vocab_size_divisible_by.
        iteration: which to write as; None for `release`.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        spec_file: a spec from outside the package.
        source_name: the source's spec; detected if None.

    Raises:
        LlmconvertError: of the kind that fits; nothing has been written.
    """
    made = _prepared(source, grid, fmt, transformer_impl, grouped, divisible_by, dtype, spec_file, source_name)
    checkpoint, spec, lifted, model, args = made.checkpoint, made.spec, made.lifted, made.model, made.args
    shards = split(model.tensors, model.config, made.cut)
    folder, tracker = tracked(iteration)
    args["iteration"] = iteration or 1
    outputs, files, own = lay_out(shards, args, grid, made.cut, folder)
    extra = companions(checkpoint)
    copies, texts = in_home(extra, checkpoint.config)
    texts |= own | {LATEST: tracker.encode(), ARGS_SCRIPT: arguments.script(args, "DIR").encode()}
    summary = {
        "source": {
            "path": checkpoint.path.resolve().name, "spec": spec.name,
            "spec_sha256": hashlib.sha256(made.known.files[spec.name].read_bytes()).hexdigest(),
            "architectures": checkpoint.config.get("architectures"), "config": checkpoint.config,
        },
        "target": {"megatron": asdict(grid), "format": fmt, "transformer_impl": transformer_impl},
        "dtype": dtype,
        "steps": [{"name": step.name, "exactness": step.exactness, "why": step.why} for step, _ in made.steps],
        "dropped": lifted.dropped,
    }  # fmt: skip
    plan = Plan(
        checkpoint.path, outputs, files, texts, copies, model.checks, _identity(checkpoint, files, summary), summary
    )
    ledger = account(plan, checkpoint.tensors, lifted.dropped | checked_away(model))
    notes = lifted.notes + made.remarks + extra.notes + arguments.remarks(model.config)
    eight = sum(tensor.dtype == FP8 for tensor in checkpoint.tensors.values())
    if eight:
        notes += (f"{eight} FP8 tensors are dequantised in float32 and rounded once",)
    padding = made.cut.padded_vocab_size - model.config.vocab_size
    if padding:
        padded, rows = made.cut.padded_vocab_size, f"{padding} rows of zeros"
        notes += (f"the vocabulary of {model.config.vocab_size} is padded to {padded} with {rows}",)
    return SplitConversion(**vars(made), plan=plan, ledger=ledger, notes=notes, not_carried=extra.left)


def in_home(extra: Companions, config: Mapping[str, Any] | None) -> tuple[dict[str, Path], dict[str, bytes]]:
    """What lies in the `hf` folder of a Megatron checkpoint, for the way back: files to copy, and files by their bytes."""
    copies = {f"{HF_FOLDER}/{name}": path for name, path in extra.copies.items()}
    texts = {f"{HF_FOLDER}/{name}": text for name, text in extra.texts.items()}
    return copies, texts | ({f"{HF_FOLDER}/{CONFIG}": json_text(config)} if config is not None else {})


def _identity(checkpoint: Checkpoint, files: tuple[WeightFile, ...], summary: Mapping[str, Any]) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    layout = [(f.name, f.size, f.digest) for f in files]
    value = [llmconvert.__version__, str(checkpoint.path.resolve()), stats, layout, summary]
    return json.dumps(value, sort_keys=True, default=str) + "\n"


def _pairs(conversion: SplitConversion, written: Path) -> list[Pair]:
    """Each source tensor, and the same put together from the ranks written."""
    opened = open_megatron(written)
    joined = join(assembled(opened), conversion.model.config, conversion.cut)
    faults = failing(joined.checks)
    if faults:
        raise BadInput("; ".join(faults[:3]), where=str(written))
    lifted, lowered = conversion.lifted.model, conversion.model
    back, lossy = unlowered(CanonicalModel(lowered.config, joined.tensors), lifted, conversion.steps)
    pairs = canonical_pairs(conversion.spec, conversion.checkpoint, lifted, lowered, back, lossy)
    pairs += [Pair(n, lowered.tensors[n], joined.tensors[n], ONE_WAY) for n in sorted(lossy & lowered.tensors.keys())]
    return pairs


def split_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    grid: Grid,
    *,
    fmt: str = "torch",
    transformer_impl: str = "transformer_engine",
    grouped: bool = False,
    divisible_by: int = 128,
    iteration: int | None = None,
    dtype: str | None = None,
    spec_file: Path | None = None,
    source_name: str | None = None,
    verify: str = "logits",
    device: str = "auto",
    load: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    sync: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Write a Hugging Face checkpoint as a Megatron one, cut over tensor and pipeline ranks; see `convert`.

    Raises:
        LlmconvertError: of the kind that fits; the source is untouched and `destination` is not made.
    """
    proving, target = Proving(verify, device, load), Path(destination)
    if workers is not None and workers < 1:
        raise Usage("`--workers` must be at least 1")
    if Path(source).exists() and not dry_run:
        check_destination(Path(source), target, overwrite=overwrite, resume=resume)
    conversion = plan_split(
        source,
        grid,
        fmt=fmt,
        transformer_impl=transformer_impl,
        grouped=grouped,
        divisible_by=divisible_by,
        iteration=iteration,
        dtype=dtype,
        spec_file=spec_file,
        source_name=source_name,
    )
    checks = conversion.lifted.model.checks, conversion.plan.checks
    biased = any(check.name.endswith("bias") for check in conversion.plan.checks)
    hint = (f"{arguments.BIASES}; " if biased else "") + elsewhere(conversion.checkpoint)
    check_data(conversion.checkpoint, *checks, hint=hint)
    report = _report(conversion, str(destination))
    if dry_run:
        return report
    check_destination(conversion.checkpoint.path, target, overwrite=overwrite, resume=resume)
    path, told = conversion.checkpoint.path, conversion.spec.told
    refuse_unprovable(proving, [("source", path)], told=told)
    if proving.verify == LOGITS:
        arguments.refuse_departures(conversion.model.config)
    return run(
        conversion.plan, conversion.checkpoint.path, target, report, proving, workers, overwrite, resume, sync, progress,
        pairs=lambda written: _pairs(conversion, written),
        prove=lambda written, shown: prove_written(path, written, conversion.plan, proving, shown, (told, {})),
    )  # fmt: skip


def _report(conversion: SplitConversion, destination: str) -> Report:
    plan = conversion.plan
    dtypes = Counter(TO_NAME[output.expression.dtype] for output in plan.tensors)
    grid = plan.summary["target"]["megatron"]
    shape = f"TP {grid['tp']}, PP {grid['pp']}" + (f", VPP {grid['vpp']}" if grid["vpp"] > 1 else "")
    shape += f", EP {grid['ep']}" if grid["ep"] > 1 else ""
    target = plan.summary["target"]
    names = (
        f"torch, {target['transformer_impl']} names" if target["format"] == "torch" else "torch_dist, loads on any grid"
    )
    return Report(
        source=str(conversion.checkpoint.path),
        destination=destination,
        source_architecture=conversion.spec.name,
        target_architecture=f"Megatron ({shape}, {names})",
        tensors_read=len(conversion.checkpoint.tensors),
        tensors_written=len(plan.tensors),
        bytes_written=plan.nbytes,
        steps=plan.summary["steps"],
        dropped=conversion.ledger.dropped,
        notes=conversion.notes,
        not_carried=conversion.not_carried,
        dtype=dict(dtypes),
        ledger=asdict(conversion.ledger),
        disk_needed=plan.nbytes,
        config=conversion.args,
    )
