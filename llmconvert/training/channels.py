"""Gives every row of a data set a channel: at random for a trial, by a field, or by the file it is in.

Rows go from a file to a file, a line or a row group at a time; all other fields are kept as they are, JSON lines to the
byte. What is written appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.errors import BadInput, InputOutput, Refused, Usage

Progress = Callable[[str, int, int], None]
_JSON, _PARQUET = (".jsonl", ".json", ".ndjson"), (".parquet",)


@dataclass(frozen=True)
class Rule:
    """How a row comes by its channel; exactly one of the first three is given.

    Attributes:
        channels: draw one of these for each row, all equally likely.
        field: take the row's value of this field; `meta.source` looks into the object `meta`.
        by_file: take the name of the row's file, without its ending and with the folders it is in.
        seed: of the draws. The same seed, files and channels give the same draws.
    """

    channels: tuple[str, ...] = ()
    field: str | None = None
    by_file: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse none, and more than one."""
        if bool(self.channels) + (self.field is not None) + self.by_file != 1:
            raise Usage("how channels are assigned is not clear", hint="give one of --channels, --field and --by-file")
        if any(not name for name in self.channels) or len(set(self.channels)) < len(self.channels):
            raise Usage("a channel has no name, or two have the same", where=",".join(self.channels))


@dataclass(frozen=True)
class Assigned:
    """What was written.

    Attributes:
        output: the file or directory.
        files: how many data files.
        rows: in each channel, most first.
    """

    output: str
    files: int
    rows: dict[str, int]


def assign(
    source: Path,
    output: Path,
    rule: Rule,
    *,
    column: str = "channel",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Assigned:
    """Copy a data file, or a directory of them, with a channel for every row.

    Args:
        source: a .jsonl or .parquet file, or a directory that has such files at any depth; other files are left out.
        output: a file of the same format, or a directory of files named as they are.
        rule: what channel a row gets.
        column: the field to add.
        overwrite: replace what is there.
        progress: called with a stage, bytes done and bytes in all.

    Raises:
        BadInput: there are no data, they cannot be read, a row lacks the field or has the column already.
        Usage: `output` is there, or is of another format.
        Refused: Parquet without pyarrow.
        InputOutput: the disk or its permissions.
    """
    files = _files(source)
    _check_output(source, output)
    if output.exists() and not overwrite:
        raise Usage("the output is there already", where=str(output), hint="name another, or add --overwrite")
    if source.is_file() and _format(output) != _format(source):
        raise Usage("the output must be of the input's format", where=str(output), hint=f"end it in {source.suffix}")
    if not column:
        raise Usage("the column has no name", hint="such as `--column channel`")
    draw, counts, done = random.Random(rule.seed), Counter[str](), 0
    total = sum(path.stat().st_size for path in files)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            part = Path(folder) / output.name
            for path in files:
                inner = path.relative_to(source) if source.is_dir() else Path()
                name = (inner.with_suffix("") if source.is_dir() else Path(path.stem)).as_posix()

                def choose(row: dict[str, Any], where: str, name: str = name) -> str:
                    channel = _channel(rule, row, where, name, draw)
                    counts[channel] += 1
                    return channel

                target = part / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                (_parquet if _format(path) == _PARQUET else _lines)(path, target, column, rule, choose)
                done += path.stat().st_size
                if progress is not None:
                    progress("assign", done, total)
            _put(part, output)
    except OSError as error:
        raise InputOutput(f"cannot write: {error.strerror}", where=str(error.filename or output)) from error
    return Assigned(str(output), len(files), dict(counts.most_common()))


def _check_output(source: Path, output: Path) -> None:
    """Refuse an output whose replacement would take anything with it but an earlier output."""
    here, there = source.resolve(), output.resolve()
    within = here.is_relative_to(there) or (source.is_dir() and there.is_relative_to(here))
    if within or output.is_symlink():
        raise Usage(
            "the output is a link" if output.is_symlink() else "the output and the data lie in one another",
            where=str(output), hint="name a path of its own",
        )  # fmt: skip
    if output.is_dir():
        foreign = next((path for path in output.rglob("*") if not path.is_dir() and not _format(path)), None)
        if foreign is not None or source.is_file():
            raise Usage("the output is a directory with other things in it", where=str(foreign or output),
                        hint="name a path of its own")  # fmt: skip


def _files(source: Path) -> list[Path]:
    if source.is_file() and not _format(source):
        raise Usage("neither JSON lines nor Parquet", where=str(source), hint="give a .jsonl or a .parquet file")
    if not source.exists():
        raise BadInput("no such file or directory", where=str(source))
    found = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file() and _format(p))
    if not found:
        raise BadInput("the directory has neither JSON lines nor Parquet files", where=str(source))
    return found


def _format(path: Path) -> tuple[str, ...]:
    return next((kind for kind in (_JSON, _PARQUET) if path.suffix in kind), ())


def _put(part: Path, output: Path) -> None:
    """Move what is whole to where it belongs; a directory that is there goes aside first, and then away."""
    aside = part.with_name(f"{part.name}.before")
    if output.is_dir():
        output.rename(aside)
    try:
        part.replace(output)
    except OSError:
        if aside.exists():
            aside.rename(output)
        raise


def _channel(rule: Rule, row: dict[str, Any], where: str, file: str, draw: random.Random) -> str:
    if rule.channels:
        return draw.choice(rule.channels)
    if rule.by_file:
        return file
    assert rule.field is not None
    value: Any = row.get(rule.field)
    if value is None:
        value = row
        for key in rule.field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str | int | float) or value == "":
        raise BadInput(
            f"the row has no text or number in the field `{rule.field}`",
            where=where,
            hint=f"its fields are {', '.join(row)}" if value is None else None,
        )
    return str(value)


def _lines(path: Path, target: Path, column: str, rule: Rule, choose: Callable[[dict[str, Any], str], str]) -> None:
    """Add the field to every line, behind the others; the rest of the line stays, byte for byte."""
    with path.open("rb") as lines, target.open("wb") as out:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            text, ending = line.strip(), line[len(line.rstrip(b"\r\n")) :]
            if not text:
                out.write(line)
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                hint = "one JSON object a line is expected"
                raise BadInput(f"not JSON: {error}", where=where, hint=hint) from error
            if not isinstance(row, dict):
                raise BadInput("a row is no JSON object", where=where)
            _free(row, column, where)
            channel = json.dumps(choose(row, where), ensure_ascii=False).encode("utf-8", "backslashreplace")
            field = json.dumps(column).encode() + b": " + channel
            out.write(text[:-1].rstrip() + (b", " if row else b"") + field + b"}" + ending)


def _parquet(path: Path, target: Path, column: str, rule: Rule, choose: Callable[[dict[str, Any], str], str]) -> None:
    """Add the column behind the others, row group by row group."""
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from pyarrow import parquet
    except ImportError as error:
        raise Refused(
            "Parquet cannot be read without pyarrow", where=str(path), hint="`pip install pyarrow`"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _free(names, column, str(path))
            read = [name for name in names if rule.field is not None and f"{rule.field}.".startswith(f"{name}.")]
            if rule.field is not None and not read:
                hint = f"its columns are {', '.join(names)}"
                raise BadInput(f"there is no column `{rule.field}`", where=str(path), hint=hint)
            schema = _with_column(file.schema_arrow, pyarrow.field(column, pyarrow.string()))
            with parquet.ParquetWriter(target, schema) as writer:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    rows = table.select(read).to_pylist() if read else ({} for _ in range(table.num_rows))
                    channels = [choose(row, str(path)) for row in rows]
                    added = table.append_column(column, pyarrow.array(channels, pyarrow.string()))
                    writer.write_table(added.cast(schema))
    except pyarrow.ArrowException as error:
        raise BadInput(f"not a sound Parquet file: {error}", where=str(path)) from error


def _with_column(schema: Any, field: Any) -> Any:
    """A schema with one column more, known to Hugging Face's own description of the columns too, where there is one."""
    metadata = dict(schema.metadata or {})
    # What is no such description is left as it is.
    with contextlib.suppress(KeyError, ValueError, TypeError, RecursionError):
        described = json.loads(metadata[b"huggingface"])
        described["info"]["features"][field.name] = {"dtype": "string", "_type": "Value"}
        metadata[b"huggingface"] = json.dumps(described).encode()
    return schema.append(field).with_metadata(metadata)


def _free(names: Any, column: str, where: str) -> None:
    if column in names:
        raise BadInput(
            f"a row has the field `{column}` already", where=where, hint="add --column NAME to use another name"
        )
