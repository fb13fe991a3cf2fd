"""The command `infer`."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmconvert.cli.options import Overwrite, Resume
from llmconvert.cli.output import Output, say
from llmconvert.errors import BadInput, Usage

if TYPE_CHECKING:
    from llmconvert.infer.run import Summary


def infer(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="checkpoint directory, or a hub id")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="JSONL or Parquet file, or a Hugging Face dataset's directory or id")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="file to make: a line a row, in the data's order")],
    num_workers: Annotated[
        int | None, typer.Option(help="copies of the model, such as 8, 4, 2 or 1; one a device if absent")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="0,1,2,3 or cpu, shared out among the copies; all CUDA devices if absent")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, vllm, hf, ray (ray:hf, ray:vllm), or module:Class")] = "auto",
    prompt_field: Annotated[
        str | None, typer.Option(help="field with the text, or with messages; `prompt` where a row has it")
    ] = None,
    messages_field: Annotated[
        str | None, typer.Option(help="field with a chat's messages; `messages` where a row has no prompt")
    ] = None,
    output_field: Annotated[str, typer.Option(help="field for the answer")] = "output",
    error_field: Annotated[str, typer.Option(help="field for why a row has no answer")] = "error",
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 keeps all tokens")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="an answer ends before this text; may be repeated", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of sampling; each row has random numbers of its own")] = 0,
    batch_size: Annotated[str, typer.Option(help="most rows of a batch, or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16, float64")] = "auto",
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", show_default=False,
            help="option of the engine's own, such as max_model_len=4096; VALUE is JSON, or else text; may be repeated",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="split of a Hugging Face dataset")] = "train",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="nothing but errors")] = False,
) -> None:
    """Answer a file of prompts with many copies of a model; rows that cannot be answered are recorded with their error.

    Exit code 0 if OUT was written, whatever errors are in it; 4 if no row at all has an answer.
    """
    from llmconvert.infer.progress import Progress
    from llmconvert.infer.run import Infer

    if batch_size != "auto" and not (batch_size.isascii() and batch_size.isdigit()):
        raise Usage(f"--batch-size is {batch_size!r}", hint="a number of rows, or auto")
    run = Infer(
        model, data, out, num_workers,
        devices=None if devices is None else [name.strip() for name in devices.split(",") if name.strip()],
        engine=engine, prompt_field=prompt_field, messages_field=messages_field, output_field=output_field,
        error_field=error_field, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        stop=stop or (), seed=seed, batch_size=None if batch_size == "auto" else int(batch_size), dtype=dtype,
        engine_args=_engine_args(engine_arg or ()), split=split, resume=resume, overwrite=overwrite,
        progress=Progress(enabled=not json and not quiet),
    )  # fmt: skip
    try:
        summary = run.run()
    except KeyboardInterrupt:
        typer.echo("interrupted\nhint: answers are kept; repeat the command with `--resume`", err=True)
        raise typer.Exit(130) from None
    Output(json_mode=json, quiet=quiet).result(summary.to_dict(), _table(summary))
    if summary.rows and summary.errors == summary.rows:
        if not json and not quiet:
            say(f"error: no row has an answer; {summary.first_error}")
        raise typer.Exit(BadInput.exit_code)


def _engine_args(given: Sequence[str]) -> dict[str, Any]:
    """Options of the engine by name.

    Raises:
        Usage: one has no name, or is named twice.
    """
    found: dict[str, Any] = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not equals or not name.isidentifier():
            raise Usage(f"--engine-arg is {one!r}", hint="NAME=VALUE, such as max_model_len=4096")
        if name in found:
            raise Usage(f"--engine-arg names `{name}` twice", hint="leave one out")
        try:
            found[name] = json_module.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found


def _table(summary: Summary) -> Any:
    from rich.table import Table

    from llmconvert.infer.progress import rate_of

    table = Table(title=summary.output, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("what")
    table.add_column("value")
    new = summary.rows - summary.resumed
    resumed = f", {summary.resumed} of them by earlier runs" if summary.resumed else ""
    errors = f"{summary.errors}; the first: {summary.first_error}" if summary.errors else "0"
    for name, value in (
        ("rows", f"{summary.rows}{resumed}"),
        ("errors", errors),
        ("tokens generated", f"{summary.tokens}"),
        ("seconds", f"{summary.seconds:.1f}"),
        ("rows/s", f"{new / summary.seconds:.1f}"),
        ("tokens/s", f"{summary.new_tokens / summary.seconds:.1f}"),
        ("engine", f"{summary.engine} ({summary.reason}), {len(summary.workers)} copies, dtype {summary.dtype}"),
    ):
        table.add_row(name, value)
    if summary.already_finished:
        return table
    for number, (tally, own) in enumerate(zip(summary.workers, summary.devices, strict=True)):
        restarts = f", restarted {tally.starts - 1} times" if tally.starts > 1 else ""
        table.add_row(
            f"worker {number}", f"{tally.rows} rows, {rate_of(tally):.1f} tokens/s on {', '.join(own)}{restarts}"
        )
    table.add_row("promised", summary.guarantee)
    return table
