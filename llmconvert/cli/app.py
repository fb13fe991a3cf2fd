"""The commands. Each parses, calls the library and shows what it returns; nothing heavy is imported here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import llmconvert
from llmconvert.cli import channel_loss, debug
from llmconvert.cli.infer import infer
from llmconvert.cli.options import Overwrite, Resume
from llmconvert.cli.output import Output, say, show_error
from llmconvert.errors import InputOutput, LlmconvertError, Refused, Usage
from llmconvert.spec.registry import Registry, registry

if TYPE_CHECKING:
    from llmconvert.spec.language import Spec

app = typer.Typer(
    help="Convert, shard and prove LLM checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(debug.app, name="debug")
app.add_typer(channel_loss.app, name="channel-loss")

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="checkpoint directory, or a hub id such as Qwen/Qwen2.5-7B[@revision]")
]
Destination = Annotated[
    Path, typer.Argument(metavar="DST", help="directory to make; it appears only when whole and proved")
]
From = Annotated[
    str | None,
    typer.Option("--from", metavar="NAME", help="architecture of SRC (see `specs`); told from its config.json if absent"),
]
SpecFile = Annotated[Path | None, typer.Option("--spec", metavar="FILE.py", help="a spec from outside the package")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or fp8-block128; each tensor's own if absent, FP8 to bfloat16"),
]
FloatDtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; each tensor's own if absent, FP8 to bfloat16")
]
KeepFp8 = Annotated[
    bool, typer.Option("--keep-fp8", help="move FP8 weights and their scales as they are, byte for byte")
]
ShardSize = Annotated[str, typer.Option(help="largest weight file, such as 5GB or 500MB")]
Verify = Annotated[str, typer.Option(help="none; weights (ledger and round trip); logits (run both models as well)")]
Workers = Annotated[int | None, typer.Option(help="threads; as many as processors, at most 8, if absent")]
Device = Annotated[str, typer.Option(help="where logits are computed: auto (CUDA where there is one), cpu, cuda:1")]
Load = Annotated[str, typer.Option(help="models for logits: whole, by layers (one block in memory at a time), or auto")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show the plan and write nothing")]
Sync = Annotated[bool, typer.Option("--sync/--no-sync", help="have the disk confirm every byte before DST appears")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="nothing but errors")]

Accept = Callable[[Registry, "Spec"], None]


def _conversion(to: str | None, accept: Accept) -> Callable[..., None]:
    """A converting command: to a fixed target, from sources that `accept` lets through; or, with `to` None, to `--to`."""

    def run(to: str, source_name: str | None, source: str, destination: Path, options: dict[str, Any]) -> None:
        from llmconvert.cli import render
        from llmconvert.converters.huggingface import convert

        output = Output(json_mode=options.pop("json"), quiet=options.pop("quiet"))
        with output.progress() as progress:
            found = convert(
                source, destination, to=to, source_name=source_name, accept=accept, progress=progress, **options
            )
        output.result(found.to_dict(), render.report(found, dry_run=options["dry_run"]))

    if to is None:

        def any_command(
            source: Source,
            destination: Destination,
            to: Annotated[str, typer.Option(help="target architecture or family, such as llama (see `specs`)")],
            source_name: From = None,
            spec_file: SpecFile = None,
            dtype: Dtype = None,
            max_shard_size: ShardSize = "5GB",
            keep_fp8: KeepFp8 = False,
            verify: Verify = "logits",
            device: Device = "auto",
            load: Load = "auto",
            workers: Workers = None,
            overwrite: Overwrite = False,
            resume: Resume = False,
            dry_run: DryRun = False,
            sync: Sync = True,
            json: Json = False,
            quiet: Quiet = False,
        ) -> None:
            options = {k: v for k, v in locals().items() if k in _OPTIONS}
            run(to, source_name, source, destination, options)

        return any_command

    def command(
        source: Source,
        destination: Destination,
        source_name: From = None,
        spec_file: SpecFile = None,
        dtype: Dtype = None,
        max_shard_size: ShardSize = "5GB",
        keep_fp8: KeepFp8 = False,
        verify: Verify = "logits",
        device: Device = "auto",
        load: Load = "auto",
        workers: Workers = None,
        overwrite: Overwrite = False,
        resume: Resume = False,
        dry_run: DryRun = False,
        sync: Sync = True,
        json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        options = {k: v for k, v in locals().items() if k in _OPTIONS}
        run(to, source_name, source, destination, options)

    return command


_OPTIONS = frozenset(
    {"spec_file", "dtype", "max_shard_size", "keep_fp8", "verify", "device", "load", "workers", "overwrite", "resume", "dry_run", "sync",
     "json", "quiet"}
)  # fmt: skip


def _only(family: str) -> Accept:
    def accept(known: Registry, spec: Spec) -> None:
        members = known.families[family]
        if spec.family != family and not any(spec.name in member.aka for member in members):
            raise Refused(
                f"this checkpoint is {spec.name} ({spec.title}), not of the {family} family",
                hint=f"use `llmconvert {spec.family}-to-llama`, or `llmconvert convert --to llama`, which detects it"
                if spec.family != "llama"
                else "it is in Llama's form already: `llmconvert convert SRC DST --to TARGET` takes it elsewhere",
            )

    return accept


@app.command()
def specs(
    name: Annotated[str | None, typer.Argument(help="one architecture, in full")] = None,
    spec_file: SpecFile = None,
    json: Json = False,
) -> None:
    """List architectures, and which converts to which."""
    from dataclasses import asdict

    from llmconvert.cli import render
    from llmconvert.converters.matrix import matrix

    known = registry(spec_file)
    reaches = matrix(known)
    output = Output(json_mode=json)
    if name is not None:
        spec = known.get(name)
        own = [r for r in reaches if r.source == name or r.target == name]
        value = {"name": spec.name, "title": spec.title, "family": spec.family, "reach": [asdict(r) for r in own]}
        output.result(value, render.spec_page(spec, str(known.files[name]), reaches))
        return
    value = {"specs": [{"name": s.name, "title": s.title, "family": s.family} for s in known.specs.values()]}
    output.result({**value, "reach": [asdict(r) for r in reaches]}, render.matrix(reaches))


@app.command()
def inspect(
    source: Source,
    check: Annotated[
        bool, typer.Option("--check", help="re-verify every checksum of a directory llmconvert wrote")
    ] = False,
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    first: First = None,
    last: Last = None,
    embedding_counts: EmbeddingCounts = False,
    loss_counts: LossCounts = False,
    layout: Layout = None,
    ep: Ep = 1,
    etp: Etp = None,
    divisible_by: Divisible = 128,
    dp: Annotated[
        int | None, typer.Option("--dp", help="data-parallel ranks; as few as expert ranks need, if absent")
    ] = None,
    zero: Annotated[
        int, typer.Option("--zero", help="ZeRO: share out optimizer states (1), gradients too (2), weights too (3)")
    ] = 0,
    gradients: Annotated[
        str, typer.Option(help="dtype gradients are kept in: bfloat16 (2 bytes a parameter) or float32 (4)")
    ] = "bfloat16",
    source_name: From = None,
    spec_file: SpecFile = None,
    json: Json = False,
) -> None:
    """Describe a checkpoint from its headers: architecture, sizes, dtypes, traits, memory, where it can go.

    With ranks (--tp, --pp, --ep, --dp) or --zero, the memory of each rank too.
    """
    from llmconvert.cli import render
    from llmconvert.converters.inspection import inspect as describe

    output = Output(json_mode=json)
    if check:
        from llmconvert.engine.manifest import check as check_manifest

        done = check_manifest(Path(source))
        output.result(
            {"path": source, "intact": True, "files": done.files, "tensors": done.tensors, "bytes": done.nbytes},
            f"intact: {done.files} files, {done.tensors} tensors, {render.size(done.nbytes)}, as written",
        )
        return
    from llmconvert.converters.megatron.grid import Grid
    from llmconvert.converters.memory import Parallelism

    grid = Grid(tp, pp, vpp, first, last, embedding_counts, loss_counts, layout, ep, etp)
    asked = Parallelism(grid, dp, zero, gradients, divisible_by)
    found = describe(
        source, source_name=source_name, spec_file=spec_file, parallelism=None if asked == Parallelism() else asked
    )
    output.result(found, render.inspection(found))


@app.command("verify")
def verify_command(
    left: Annotated[Path, typer.Argument(metavar="A", help="a checkpoint directory")],
    right: Annotated[Path, typer.Argument(metavar="B", help="another, of any architecture")],
    device: Annotated[
        str, typer.Option(help="auto (CUDA where there is one), cpu, cuda:1; or one for A and one for B: cpu,cuda")
    ] = "auto",
    compute_dtype: Annotated[
        str, typer.Option(help="float32; bfloat16 or float16 (what inference will see); float64 (a tight bound)")
    ] = "float32",
    load: Load = "auto",
    attn_implementation: Annotated[
        str, typer.Option(help="transformers' attention: eager or sdpa; or one for A and one for B")
    ] = "eager",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="prompts, one a line: text, or JSON with `text` or `input_ids`")
    ] = None,
    greedy_tokens: Annotated[
        int | None, typer.Option(min=0, help="tokens to continue greedily; 16 if absent and both models fit")
    ] = None,
    rounded_to: Annotated[
        str | None, typer.Option(help="B's weights were rounded to this dtype on purpose: bfloat16 or float16")
    ] = None,
    max_abs: Annotated[
        float | None, typer.Option(help="largest difference of logits allowed, in place of the derived verdict")
    ] = None,
    reader: Annotated[
        str | None, typer.Option(help="let an engine you have read B, and compare log-probabilities: vllm or llama.cpp")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="compare the weights too, in Llama's form")
    ] = True,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="write a page: plot, worst tokens, norms of tensors")
    ] = None,
    spec_file: SpecFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Are two checkpoints the same model? Run both side by side; where they part, say at which layer and tensor.

    The verdict is derived: unless logits are bit-equal both models are run in float64 as well, where equal functions
    agree to 1e-12 and the rest was rounding. Exit code 5 if they differ.
    """
    from llmconvert.cli import render
    from llmconvert.converters.equality import compare_weights
    from llmconvert.errors import ProofFailed
    from llmconvert.verify.apart import compare_tokenizers_apart
    from llmconvert.verify.logits import compare_logits
    from llmconvert.verify.page import render_page

    output = Output(json_mode=json, quiet=quiet)
    if report is not None and not report.parent.is_dir():
        raise Usage("the report's directory does not exist", where=str(report.parent))
    tokenizer = compare_tokenizers_apart(left, right).to_dict()
    with output.progress("layers") as progress:
        found = compare_logits(
            left, right, dtype=compute_dtype, device=device, load=load, attention=attn_implementation,
            prompts=prompts, greedy_tokens=greedy_tokens, rounded=rounded_to, max_abs=max_abs,
            progress=lambda done, total: progress("logits", done, total),
        )  # fmt: skip
    equality = compare_weights(left, right, spec_file=spec_file).to_dict() if weights else None
    engine = None
    if reader is not None:
        from llmconvert.verify.readers import compare_with_model

        engine = compare_with_model(reader, left, right, device=device, load=load, prompts=prompts).to_dict()
    value = {**found.to_dict(), "weights": equality, "tokenizer": tokenizer, "reader": engine}
    output.result(value, render.comparison(value, str(left), str(right)))
    if report is not None:
        report.write_text(render_page(value, str(left), str(right), equality), encoding="utf-8")
    if not found.verdict or tokenizer["verdict"] is False or (engine is not None and not engine["verdict"]):
        if report is None and not json and not quiet:
            say("hint: add `--report FILE.html` for the differences of every layer")
        raise typer.Exit(ProofFailed.exit_code)


@app.command("to-reward")
def to_reward_command(
    source: Source,
    destination: Destination,
    to: Annotated[str, typer.Option(help="the body's architecture: llama, canonical, qwen2, …")] = "llama",
    head: Annotated[
        str, typer.Option(help="score (transformers' sequence classification) or v_head (TRL's value head)")
    ] = "score",
    lm_head_from: Annotated[
        str | None, typer.Option(metavar="DIR", help="for v_head: the causal model, where SRC is a sequence classifier")
    ] = None,
    drop_bias: Annotated[bool, typer.Option("--drop-bias", help="leave out a value head's bias")] = False,
    pad_token_id: Annotated[int | None, typer.Option(min=0, help="where config.json has none")] = None,
    source_name: From = None,
    spec_file: SpecFile = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; each tensor's own if absent")] = None,
    max_shard_size: ShardSize = "5GB",
    verify: Annotated[
        str, typer.Option(help="none; weights; logits (both are run in float64, the result whole in memory)")
    ] = "weights",
    device: Device = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    sync: Sync = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a reward model: a new scalar head, or TRL's value head to transformers' `score` and back."""
    from llmconvert.cli import render
    from llmconvert.converters.reward import to_reward

    output = Output(json_mode=json, quiet=quiet)
    with output.progress() as progress:
        found = to_reward(
            source, destination, to=to, head=head, lm_head_from=lm_head_from, drop_bias=drop_bias,
            pad_token_id=pad_token_id, source_name=source_name, spec_file=spec_file, dtype=dtype,
            max_shard_size=max_shard_size, verify=verify, device=device, workers=workers, overwrite=overwrite,
            resume=resume, dry_run=dry_run, sync=sync, progress=progress,
        )  # fmt: skip
    output.result(found.to_dict(), render.report(found, dry_run=dry_run))


@app.command()
def roundtrip(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="a checkpoint directory")],
    to: Annotated[str, typer.Option(help="architecture or family to go through")] = "llama",
    verify: Verify = "logits",
    device: Device = "auto",
    load: Load = "auto",
    work_dir: Annotated[
        Path | None, typer.Option(help="where to put two copies of the checkpoint for the time being")
    ] = None,
    source_name: From = None,
    spec_file: SpecFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert there and back in a temporary place, with all proofs; nothing is kept. For CI."""
    from llmconvert.cli import render
    from llmconvert.converters.roundtrip import round_trip
    from llmconvert.errors import ProofFailed

    output = Output(json_mode=json, quiet=quiet)
    with output.progress() as progress:
        found = round_trip(
            source, to, work_dir=work_dir, progress=progress, verify=verify, device=device, load=load,
            source_name=source_name, spec_file=spec_file,
        )  # fmt: skip
    output.result(found.to_dict(), render.there_and_back(found))
    if not found.verdict:
        raise typer.Exit(ProofFailed.exit_code)


Tp = Annotated[int, typer.Option("--tp", "--tensor-model-parallel-size", help="tensor ranks")]
Pp = Annotated[int, typer.Option("--pp", "--pipeline-model-parallel-size", help="pipeline ranks")]
Vpp = Annotated[int, typer.Option("--vpp", help="virtual chunks a pipeline rank")]
Ep = Annotated[int, typer.Option("--ep", "--expert-model-parallel-size", help="expert ranks")]
Etp = Annotated[
    int | None,
    typer.Option("--etp", "--expert-tensor-parallel-size", help="tensor ranks of an expert; as many as --tp if absent"),
]
First = Annotated[int | None, typer.Option("--num-layers-in-first-pipeline-stage", help="layers of the first rank")]
Last = Annotated[int | None, typer.Option("--num-layers-in-last-pipeline-stage", help="layers of the last rank")]
EmbeddingCounts = Annotated[
    bool, typer.Option("--account-for-embedding-in-pipeline-split", help="the embedding counts as a layer")
]
LossCounts = Annotated[bool, typer.Option("--account-for-loss-in-pipeline-split", help="the loss counts as a layer")]
Layout = Annotated[
    str | None, typer.Option("--pipeline-model-parallel-layout", help="stages in full, such as `Et*3|(tt|)*2tL`")
]
Divisible = Annotated[
    int, typer.Option("--make-vocab-size-divisible-by", help="the vocabulary is padded to a multiple of this times TP")
]
Iteration = Annotated[int | None, typer.Option(help="which iteration of SRC; the latest if absent")]
VocabSize = Annotated[
    int | None, typer.Option(help="tokens of the vocabulary, where SRC's args have only the padded size")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="a Hugging Face directory, or its config.json: for what SRC's args lack, and for the tokenizer and other "
        "files beside it; SRC's `hf` folder if absent",
    ),
]
Replica = Annotated[
    str | None,
    typer.Option(
        help="what stands for a tensor whose copies on several ranks differ: first or mean; refused if absent"
    ),
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="read past unknown names in SRC's pickles; nothing is run all the same")
]
MegatronSource = Annotated[Path, typer.Argument(metavar="SRC", help="a Megatron checkpoint directory")]


def _show(run: Callable[..., Any], json: bool, quiet: bool, dry_run: bool) -> None:
    """Run a writing command and show its report."""
    from llmconvert.cli import render

    output = Output(json_mode=json, quiet=quiet)
    with output.progress() as progress:
        found = run(dry_run=dry_run, progress=progress)
    output.result(found.to_dict(), render.report(found, dry_run=dry_run))


Grouped = Annotated[
    bool, typer.Option("--moe-grouped-gemm", help="name experts as Transformer Engine's grouped matrix product does")
]
Implementation = Annotated[str, typer.Option(help="whose parameter names to write: transformer_engine or local")]
Format = Annotated[
    str, typer.Option("--format", help="torch (a file a rank) or torch_dist (global tensors, for any grid)")
]


@app.command()
def split(
    source: Source,
    destination: Destination,
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    first: First = None,
    last: Last = None,
    embedding_counts: EmbeddingCounts = False,
    loss_counts: LossCounts = False,
    layout: Layout = None,
    ep: Ep = 1,
    etp: Etp = None,
    grouped: Grouped = False,
    divisible_by: Divisible = 128,
    transformer_impl: Implementation = "transformer_engine",
    format: Format = "torch",
    iteration: Annotated[int | None, typer.Option(help="write as this iteration; as `release` if absent")] = None,
    dtype: FloatDtype = None,
    source_name: From = None,
    spec_file: SpecFile = None,
    verify: Verify = "logits",
    device: Device = "auto",
    load: Load = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    sync: Sync = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hugging Face → Megatron: cut a checkpoint over tensor, pipeline and expert ranks."""
    from functools import partial

    from llmconvert.converters.megatron.grid import Grid
    from llmconvert.converters.megatron.split import split_checkpoint

    grid = Grid(tp, pp, vpp, first, last, embedding_counts, loss_counts, layout, ep, etp)
    run = partial(
        split_checkpoint, source, destination, grid, fmt=format, transformer_impl=transformer_impl,
        grouped=grouped, divisible_by=divisible_by, iteration=iteration,
        dtype=dtype, source_name=source_name, spec_file=spec_file, verify=verify, device=device, load=load,
        workers=workers, overwrite=overwrite, resume=resume, sync=sync,
    )  # fmt: skip
    _show(run, json, quiet, dry_run)


@app.command()
def merge(
    source: MegatronSource,
    destination: Destination,
    to: Annotated[
        str | None,
        typer.Option(help="target architecture; what SRC was split from, or what its args describe, if absent"),
    ] = None,
    iteration: Iteration = None,
    vocab_size: VocabSize = None,
    config: ConfigFile = None,
    trust_pickle: TrustPickle = False,
    replica: Replica = None,
    dtype: FloatDtype = None,
    max_shard_size: ShardSize = "5GB",
    spec_file: SpecFile = None,
    verify: Verify = "logits",
    device: Device = "auto",
    load: Load = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    sync: Sync = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Megatron → Hugging Face: put the ranks together."""
    from functools import partial

    from llmconvert.converters.megatron.merge import merge_checkpoint

    run = partial(
        merge_checkpoint, source, destination, to=to, iteration=iteration, vocab_size=vocab_size, config=config,
        trust_pickle=trust_pickle, replica=replica, dtype=dtype, max_shard_size=max_shard_size, spec_file=spec_file,
        verify=verify, device=device, load=load, workers=workers, overwrite=overwrite, resume=resume, sync=sync,
    )  # fmt: skip
    _show(run, json, quiet, dry_run)


@app.command()
def reshard(
    source: MegatronSource,
    destination: Destination,
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    first: First = None,
    last: Last = None,
    embedding_counts: EmbeddingCounts = False,
    loss_counts: LossCounts = False,
    layout: Layout = None,
    ep: Ep = 1,
    etp: Etp = None,
    grouped: Annotated[
        bool | None,
        typer.Option("--moe-grouped-gemm/--no-moe-grouped-gemm", help="how experts are named; as in SRC if absent"),
    ] = None,
    divisible_by: Divisible = 128,
    transformer_impl: Annotated[
        str | None, typer.Option(help="whose parameter names to write: transformer_engine or local; SRC's if absent")
    ] = None,
    format: Format = "torch",
    iteration: Iteration = None,
    vocab_size: VocabSize = None,
    config: ConfigFile = None,
    trust_pickle: TrustPickle = False,
    replica: Replica = None,
    verify: Verify = "logits",
    device: Device = "auto",
    load: Load = "auto",
    workers: Workers = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    sync: Sync = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Megatron → Megatron: the same model on another grid."""
    from functools import partial

    from llmconvert.converters.megatron.grid import Grid
    from llmconvert.converters.megatron.reshard import reshard_checkpoint

    grid = Grid(tp, pp, vpp, first, last, embedding_counts, loss_counts, layout, ep, etp)
    run = partial(
        reshard_checkpoint, source, destination, grid, fmt=format, transformer_impl=transformer_impl, grouped=grouped,
        divisible_by=divisible_by, iteration=iteration, vocab_size=vocab_size, config=config, trust_pickle=trust_pickle,
        replica=replica, verify=verify, device=device, load=load, workers=workers, overwrite=overwrite, resume=resume, sync=sync,
    )  # fmt: skip
    _show(run, json, quiet, dry_run)


@app.command("megatron-args")
def megatron_args(
    source: Source,
    tp: Tp = 1,
    pp: Pp = 1,
    vpp: Vpp = 1,
    first: First = None,
    last: Last = None,
    embedding_counts: EmbeddingCounts = False,
    loss_counts: LossCounts = False,
    layout: Layout = None,
    ep: Ep = 1,
    etp: Etp = None,
    grouped: Grouped = False,
    divisible_by: Divisible = 128,
    transformer_impl: Implementation = "transformer_engine",
    format: Format = "torch",
    dtype: FloatDtype = None,
    source_name: From = None,
    spec_file: SpecFile = None,
    json: Json = False,
) -> None:
    """Print Megatron-LM's options for a Hugging Face checkpoint, as `split` would write them."""
    from llmconvert.converters.megatron import arguments
    from llmconvert.converters.megatron.grid import Grid
    from llmconvert.converters.megatron.split import arguments_for

    grid = Grid(tp, pp, vpp, first, last, embedding_counts, loss_counts, layout, ep, etp)
    args = arguments_for(
        source, grid, fmt=format, transformer_impl=transformer_impl, grouped=grouped, divisible_by=divisible_by,
        dtype=dtype, source_name=source_name, spec_file=spec_file,
    )  # fmt: skip
    value = {"args": args, "flags": arguments.flags(args)}
    Output(json_mode=json).result(value, arguments.script(args, "DIR").rstrip())


@app.command("new-spec")
def new_spec(
    source: Source,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write; stdout if absent")] = None,
    json: Json = False,
) -> None:
    """Draft a spec for an architecture nobody has described yet, and check it against the checkpoint."""
    from dataclasses import asdict

    from llmconvert.spec.draft import draft

    if output is not None and os.path.lexists(output):
        raise Usage("the file exists", where=str(output), hint="name another")
    found = draft(source)
    if output is not None:
        with output.open("x", encoding="utf-8") as file:  # not through a link that leads nowhere
            file.write(found.text)
    Output(json_mode=json).result(
        {**asdict(found), "output": None if output is None else str(output)}, found.text.rstrip() if output is None else None
    )
    if not json:
        for line in found.remarks:
            say(line)


app.command()(infer)


def _register(known: Registry) -> None:
    app.command("convert", help="Convert a checkpoint to another architecture; the source's is detected.")(
        _conversion(None, lambda known, spec: None)
    )
    for family, members in known.families.items():
        titles = "; ".join(spec.title for spec in members)
        if family == "llama":
            continue
        if any(spec.source or spec.aka for spec in members):
            app.command(f"{family}-to-llama", help=f"{titles} → Llama.")(_conversion("llama", _only(family)))
        if any(spec.target and spec.default_target for spec in members):
            app.command(f"llama-to-{family}", help=f"Llama → {titles}.")(_conversion(family, _only("llama")))


def _version(value: bool) -> None:
    if value:
        print(f"llmconvert {llmconvert.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    json_mode, debug = "--json" in arguments, "--debug" in arguments
    if debug:
        arguments = [a for a in arguments if a != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        # What the terminal has no character for is written as a code; it is no reason to fail.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        _register(registry())
        code = typer.main.get_command(app).main(arguments, prog_name="llmconvert", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except LlmconvertError as error:
        if debug:
            raise
        show_error(error, json_mode=json_mode)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted\nhint: a conversion under way is kept; repeat its command with `--resume`", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if debug:
            raise
        refusal = InputOutput(f"the system refuses: {error.strerror or error}", where=_named(error))
        try:
            show_error(refusal, json_mode=json_mode)
        except OSError:  # it is stdout that failed
            show_error(refusal, json_mode=False)
        sys.exit(refusal.exit_code)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if debug or message is None:
            _bug(error, debug, json_mode)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message(), file=sys.stderr)
            sys.exit(Usage.exit_code)
        usage = Usage(message().rstrip("."), hint="`llmconvert COMMAND --help` lists the options")
        show_error(usage, json_mode=json_mode)
        sys.exit(usage.exit_code)


def _named(error: OSError) -> str | None:
    return None if error.filename is None else os.fsdecode(error.filename)


def _bug(error: Exception, debug: bool, json_mode: bool) -> NoReturn:
    if debug:
        raise error
    fault = LlmconvertError(
        f"llmconvert failed unexpectedly: {type(error).__name__}: {error}",
        hint="repeat with `--debug` and report the traceback",
    )
    show_error(fault, json_mode=json_mode)
    sys.exit(fault.exit_code)
