"""Rows of data, read lazily: JSONL, Parquet, or a Hugging Face dataset; and what of a row is the prompt."""

from __future__ import annotations

import base64
import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmconvert.errors import BadInput, InputOutput, Usage

Message = dict[str, Any]
Prompt = str | list[Message]
"""A text, or the messages of a chat."""


class BadRow(Exception):
    """A row that cannot be answered; the message is recorded in its place."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: its place in the data, from 0: what a run knows it by.
        fields: what it holds.
        fault: why it could not be read.
    """

    number: int
    fields: dict[str, Any]
    fault: str | None = None


class Source(Protocol):
    """Data to read from the start, any number of times."""

    files: list[Path]
    """What the rows are read from."""

    def count(self) -> int:
        """How many rows there are."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """The rows in order."""
        ...


class JsonLines:
    """A file with a JSON object a line; empty lines are no rows."""

    def __init__(self, path: Path) -> None:
        """Name the file."""
        self.files = [path]

    def count(self) -> int:
        """How many lines are not empty."""
        return sum(1 for _ in self._lines())

    def __iter__(self) -> Iterator[Row]:
        """The rows in order; a line that is no JSON object is a row with a fault, kept under `raw`."""
        for number, (place, line) in enumerate(self._lines()):
            yield _parsed(number, place, line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are not empty, with their numbers from 1."""
        try:
            with self.files[0].open("rb") as file:
                for place, line in enumerate(file, 1):
                    if line.strip():
                        yield place, line
        except OSError as error:
            raise InputOutput(f"the data cannot be read: {error.strerror}", where=str(self.files[0])) from None


def _parsed(number: int, place: int, line: bytes) -> Row:
    raw = {"raw": line.decode("utf-8", "backslashreplace").rstrip("\r\n")}
    try:
        fields = json.loads(line.decode("utf-8-sig" if place == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Row(number, raw, f"line {place} is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Row(number, raw, f"line {place} is not JSON: {error}")
    if not isinstance(fields, dict):
        return Row(number, raw, f"line {place} is not a JSON object")
    return Row(number, fields)


class Parquet:
    """One or more Parquet files."""

    def __init__(self, files: list[Path]) -> None:
        """Name the files, in their order.

        Raises:
            Usage: pyarrow is not installed.
        """
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise Usage("reading Parquet needs pyarrow", hint="pip install pyarrow") from None
        self._open: Any = parquet.ParquetFile
        self.files = files

    def count(self) -> int:
        """How many rows the files' footers say."""
        return sum(self._file(path).metadata.num_rows for path in self.files)

    def _file(self, path: Path) -> Any:
        try:
            return self._open(path)
        except (OSError, ValueError) as error:
            raise BadInput(f"not a readable Parquet file: {error}", where=str(path)) from None

    def __iter__(self) -> Iterator[Row]:
        """The rows in order."""
        number = 0
        for path in self.files:
            for fields in self._rows(path):
                yield Row(number, fields)
                number += 1

    def _rows(self, path: Path) -> Iterator[dict[str, Any]]:
        batches = self._file(path).iter_batches(batch_size=1024)
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except (OSError, ValueError) as error:
                raise BadInput(f"not a readable Parquet file: {error}", where=str(path)) from None
            if batch is None:
                return
            yield from rows


class Dataset:
    """A Hugging Face dataset: a directory made by `save_to_disk`, or whatever `load_dataset` takes."""

    def __init__(self, path: str, split: str) -> None:
        """Load it, memory-mapped.

        Args:
            path: a directory or a hub id.
            split: which split.

        Raises:
            Usage: `datasets` is not installed, or there is no such split.
            BadInput: it cannot be loaded.
        """
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise Usage("reading a Hugging Face dataset needs `datasets`", hint="pip install datasets") from None
        datasets.disable_progress_bars()
        folder = Path(path)
        saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
        try:
            found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
        except Exception as error:  # of many libraries: what it says is all there is
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise BadInput(f"the dataset cannot be loaded: {first}", where=path) from None
        if isinstance(found, dict):
            if split not in found:
                raise Usage(f"there is no split `{split}`", where=path, hint=f"--split {' or '.join(found)}")
            found = found[split]
        self._rows: Any = found
        self.files = [Path(entry["filename"]) for entry in found.cache_files]

    def count(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows in order."""
        for number, fields in enumerate(self._rows):
            yield Row(number, dict(fields))


def open_source(path: str, split: str = "train") -> Source:
    """Find out what kind of data a path is, and open it.

    Args:
        path: a JSONL or Parquet file, a directory of Parquet files, a dataset's directory or hub id.
        split: of a dataset.

    Raises:
        Usage: there is no such thing, or a library is missing.
        BadInput: it is of a kind that is not read, or damaged.
        InputOutput: it cannot be opened.
    """
    place = Path(path)
    if place.is_file():
        try:
            place.open("rb").close()
        except OSError as error:
            raise InputOutput(f"the data cannot be opened: {error.strerror}", where=path) from None
        if place.suffix == ".parquet":
            return Parquet([place])
        if place.suffix in (".jsonl", ".json", ".ndjson", ".txt", ""):
            return JsonLines(place)
        raise Usage(f"`{place.suffix}` is not a kind of data that is read", where=path, hint="use .jsonl or .parquet")
    if place.is_dir():
        parts = sorted(place.glob("*.parquet"))
        return Parquet(parts) if parts else Dataset(path, split)
    if place.suffix in (".jsonl", ".json", ".parquet") or path.startswith(("/", ".")) or path.count("/") > 1:
        raise Usage("there is no such data", where=path)
    return Dataset(path, split)


@dataclass(frozen=True)
class Fields:
    """The names of fields.

    Attributes:
        prompt: holds a text, or messages; None for `prompt` where a row has it.
        messages: holds the messages of a chat; None for `messages` in a row without a prompt.
        output: where the answer goes.
        error: where it goes why there is none.
    """

    prompt: str | None = None
    messages: str | None = None
    output: str = "output"
    error: str = "error"

    def prompt_of(self, row: Row) -> Prompt:
        """What a row asks.

        Raises:
            BadRow: nothing that can be answered.
        """
        if row.fault is not None:
            raise BadRow(row.fault)
        for own in (self.output, self.error):
            if own in row.fields:
                raise BadRow(f"the row has a field `{own}` of its own, where the result should go")
        default = self.prompt is None and self.messages is None
        names: tuple[str | None, ...] = ("prompt", "messages") if default else (self.prompt, self.messages)
        present = [name for name in names if name is not None and name in row.fields]
        # In columns a field that a row lacks is null.
        for name in [name for name in present if row.fields[name] is not None] or present:
            return _asked(name, row.fields[name])
        wanted = " or ".join(f"`{name}`" for name in names if name is not None)
        raise BadRow(f"the row has no field {wanted}")


def _asked(name: str, value: Any) -> Prompt:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(f"`{name}` is not text: it holds half of a surrogate pair") from None
        if not value:
            raise BadRow(f"`{name}` is empty")
        return value
    if isinstance(value, list) and value:
        for message in value:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise BadRow(f"`{name}` is not a list of messages with `role` and `content`")
        return value
    kind = "empty" if isinstance(value, list) else "null" if value is None else f"of type {type(value).__name__}"
    raise BadRow(f"`{name}` is {kind}: neither text nor messages")


def size(prompt: Prompt) -> int:
    """Bytes of text in a prompt, by which prompts are put together: close to proportional to tokens."""
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8"))
    return sum(len(str(message.get("content")).encode("utf-8", "replace")) for message in prompt)


def _plain(value: Any) -> Any:
    """What JSON has no word for: bytes as base64, dates as ISO 8601, all else as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def to_line(fields: dict[str, Any]) -> bytes:
    """One line of JSONL."""
    try:
        text = json.dumps(fields, ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(fields), ensure_ascii=False, default=_plain)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only say escaped
        return json.dumps(_finite(fields), default=_plain).encode() + b"\n"


def _finite(value: Any) -> Any:
    """A value whose numbers JSON has words for: `NaN` and `Infinity` become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
