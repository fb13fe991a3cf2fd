"""Megatron to Megatron: the same model on another grid."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llmconvert
from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.checkpoint.megatron import LATEST, open_megatron
from llmconvert.converters.megatron import arguments
from llmconvert.converters.megatron.grid import Grid, padded_vocabulary
from llmconvert.converters.megatron.layout import cut_for, lay_out, tracked
from llmconvert.converters.megatron.merge import shape_of, shard_pairs
from llmconvert.converters.megatron.opening import Opened, beside_home, open_model
from llmconvert.converters.megatron.parts import IMPLEMENTATIONS, Cut, check_cut
from llmconvert.converters.megatron.replicas import refuse_differing
from llmconvert.converters.megatron.shards import assembled, join, split
from llmconvert.converters.megatron.split import ARGS_SCRIPT, in_home
from llmconvert.converters.proofs import LOGITS, Proving, prove_written, refuse_unprovable
from llmconvert.converters.running import Progress, Report, run
from llmconvert.engine import manifest
from llmconvert.engine.plan import Plan
from llmconvert.engine.publish import check_destination
from llmconvert.errors import Usage
from llmconvert.verify.ledger import Ledger, account
from llmconvert.verify.roundtrip import Pair

_GRID_ARGUMENTS = (
    "padded_vocab_size", "make_vocab_size_divisible_by", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "pipeline_model_parallel_layout",
    "ckpt_format", "iteration", "expert_model_parallel_size", "expert_tensor_parallel_size",
)  # fmt: skip


def _plan(
    opened: Opened, grid: Grid, fmt: str, implementation: str, grouped: bool, divisible_by: int
) -> tuple[Plan, Ledger, Cut, dict[str, str]]:
    config, source = opened.config, opened.checkpoint
    check_cut(config, grid, fmt, implementation)
    padded = padded_vocabulary(config.vocab_size, grid.tp, divisible_by)
    cut = cut_for(config, grid, fmt, padded, implementation, grouped)
    shards = split(opened.joined.tensors, config, cut)
    main = TO_NAME[Counter(e.dtype for e in opened.joined.tensors.values()).most_common(1)[0][0]]
    described = arguments.to_arguments(config, grid, padded, divisible_by, main)
    own = {key: value for key, value in source.args.items() if value is not None}
    args = {**described, **own, **{key: described[key] for key in _GRID_ARGUMENTS}, "transformer_impl": implementation}
    args["ckpt_format"] = fmt
    args |= {"moe_grouped_gemm": grouped} if config.num_experts else {}
    folder, tracker = tracked(None)
    outputs, files, texts = lay_out(shards, args, grid, cut, folder)
    texts |= {LATEST: tracker.encode(), ARGS_SCRIPT: arguments.script({**described, **args}, "DIR").encode()}
    extra = beside_home(opened)
    copies, beside = in_home(extra, opened.origin.config if opened.origin else None)
    texts |= beside
    recorded = (manifest.read(source.path) or {}).get("source") or {
        "path": source.path.resolve().name,
        "args": source.args,
    }
    summary: dict[str, Any] = {
        "source": recorded | (asdict(opened.origin) if opened.origin else {}),
        "target": {"megatron": asdict(grid), "format": fmt, "transformer_impl": implementation},
        "steps": [], "dropped": opened.dropped,
    }  # fmt: skip
    everything = source.stored
    stats = sorted({(str(t.path), t.path.stat().st_size, t.path.stat().st_mtime_ns) for t in everything.values()})
    identity = [llmconvert.__version__, stats, [(f.name, f.size, f.digest) for f in files], summary]
    plan = Plan(source.path, outputs, files, texts, copies, (), json.dumps(identity, default=str) + "\n", summary)
    return plan, account(plan, everything, opened.dropped, opened.rows_used), cut, extra.left


def _pairs(opened: Opened, cut: Cut, written: Path) -> list[Pair]:
    return shard_pairs(opened, join(assembled(open_megatron(written)), opened.config, cut).tensors)


def reshard_checkpoint(
    source: Path,
    destination: Path,
    grid: Grid,
    *,
    fmt: str = "torch",
    transformer_impl: str | None = None,
    grouped: bool | None = None,
    divisible_by: int = 128,
    iteration: int | None = None,
    vocab_size: int | None = None,
    config: Path | None = None,
    trust_pickle: bool = False,
    replica: str | None = None,
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
    """Write a Megatron checkpoint's model on another grid, in either format; see `split_checkpoint`, `open_model`.

    Optimizer state is left out.

    Raises:
        LlmconvertError: of the kind that fits; the source is untouched and `destination` is not made.
    """
    proving = Proving(verify, device, load)
    if workers is not None and workers < 1:
        raise Usage("`--workers` must be at least 1")
    if not dry_run:
        for path in (source, *([config] if config else [])):
            check_destination(path, destination, overwrite=overwrite, resume=resume)
    opened = open_model(
        source, iteration=iteration, vocab_size=vocab_size, config=config, trust_pickle=trust_pickle, replica=replica
    )
    implementation = transformer_impl or opened.transformer_impl
    if implementation not in IMPLEMENTATIONS:
        raise Usage(
            f"`{implementation}` is not a transformer implementation", hint=f"choose {' or '.join(IMPLEMENTATIONS)}"
        )
    grouped = opened.cut.grouped if grouped is None else grouped
    plan, ledger, cut, left = _plan(opened, grid, fmt, implementation, grouped, divisible_by)
    old, notes = opened.checkpoint, opened.notes
    if old.left_out:
        notes += (f"{old.left_out / 1e9:.2f} GB of optimizer and random state are left out",)
    report = Report(
        source=str(source),
        destination=str(destination),
        source_architecture=shape_of(opened),
        target_architecture=f"Megatron (TP {grid.tp}, PP {grid.pp}, VPP {grid.vpp}, EP {grid.ep}, torch, {implementation} names)"
        if fmt == "torch"
        else "Megatron (torch_dist, loads on any grid)",
        tensors_read=len(old.stored),
        tensors_written=len(plan.tensors),
        bytes_written=plan.nbytes,
        steps=[],
        dropped=ledger.dropped,
        notes=notes,
        not_carried=left,
        dtype=dict(Counter(TO_NAME[output.expression.dtype] for output in plan.tensors)),
        ledger=asdict(ledger),
        disk_needed=plan.nbytes,
    )
    if dry_run:
        return report
    refuse_unprovable(proving, [("source", source)])
    if proving.verify == LOGITS:
        refuse_differing(opened.joined)
    return run(
        plan, source, destination, report, proving, workers, overwrite, resume, sync, progress,
        pairs=lambda written: _pairs(opened, cut, written),
        prove=lambda written, shown: prove_written(source, written, plan, proving, shown),
    )  # fmt: skip
