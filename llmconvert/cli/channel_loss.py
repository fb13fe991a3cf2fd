"""`llmconvert channel-loss`: give rows a channel, show the curves a run logged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmconvert.cli.output import Output
from llmconvert.errors import Usage
from llmconvert.terminal import printable

app = typer.Typer(help="The loss of each data source.", no_args_is_help=True, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="nothing but errors")]


@app.command()
def assign(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="a .jsonl or .parquet file, or a directory of such files")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="file or directory to write")],
    channels: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="draw one of these for each row, for a trial")
    ] = None,
    field: Annotated[
        str | None, typer.Option(metavar="NAME", help="take the row's value of a field, such as source or meta.source")
    ] = None,
    by_file: Annotated[bool, typer.Option("--by-file", help="take the name of the row's file")] = False,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    column: Annotated[str, typer.Option(help="the field to add")] = "channel",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give every row of a data set a channel; all other fields stay as they are."""
    from dataclasses import asdict

    from llmconvert.training.channels import Rule
    from llmconvert.training.channels import assign as assign_channels

    names = tuple(name.strip() for name in channels.split(",")) if channels is not None else ()
    rule = Rule(names, field, by_file, seed)
    sink = Output(json_mode=json, quiet=quiet)
    with sink.progress() as progress:
        found = assign_channels(data, output, rule, column=column, overwrite=overwrite, progress=progress)
    total = sum(found.rows.values())
    lines = [f"  {count:>10,}  {count / total:6.1%}  {printable(name)}" for name, count in found.rows.items()]
    sink.result(asdict(found), "\n".join([f"{found.output}: {total:,} rows", *lines]))


@app.command()
def plot(
    log: Annotated[
        Path, typer.Argument(metavar="LOGDIR", help="a run's directory, an event file or a trainer_state.json")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.png", help="draw the curves; a table alone if absent")
    ] = None,
    smooth: Annotated[
        float, typer.Option(help="weight of what came before in the smoothed curve, from 0 to below 1")
    ] = 0.9,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a curve for each channel, raw and smoothed, and a table."""
    from llmconvert.training import curves

    if not 0 <= smooth < 1:
        raise Usage("a weight is from 0 to below 1", where=f"--smooth {smooth}")
    found = curves.read_curves(log)
    if output is not None:
        curves.plot(found, output, smooth)
    rows = curves.summary(found, smooth)
    value = {"log": str(log), "plot": None if output is None else str(output), "smooth": smooth, "curves": rows}
    Output(json_mode=json, quiet=quiet).result(value, _table(rows))


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("channel", "", "smoothed loss", box=None, header_style=None)
    for name in ("first", "last", "points", "tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        first, last = ("–" if row[key] is None else f"{row[key]:.4f}" for key in ("first", "last"))
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,.0f}"
        table.add_row(row["channel"], row["split"], row["sparkline"], first, last, str(len(row["steps"])), tokens)
    return table
