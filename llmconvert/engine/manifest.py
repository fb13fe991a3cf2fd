"""`llmconvert.json`: what made an output, from what, and a checksum of all of it, to be checked at any time."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

import llmconvert
from llmconvert.checkpoint.directory import open_checkpoint, read_json, require_directory, stays_inside
from llmconvert.checkpoint.megatron import is_megatron, open_megatron
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.engine.plan import Plan
from llmconvert.engine.recorded import check_manifest
from llmconvert.engine.tree import Tree, open_regular
from llmconvert.errors import BadInput, InputOutput, LlmconvertError, ProofFailed, Usage
from llmconvert.tensors.evaluate import MOVE_BYTES, Reader

MANIFEST = "llmconvert.json"
REPORT = "llmconvert-report.json"
"""What was proved of an output."""

_HALF = re.compile("[\ud800-\udfff]")
_DIGEST, _OUTSIDE = "xxh3_128", "outside_tensors_xxh3_128"
_UNREAD = re.compile(r"[^/]*\.md|\.git(attributes|ignore)|\.DS_Store|\.(git|cache)/.*")
"""What may be added to an output without making it another: repositories and downloads leave it, no loader reads it."""

Entry = dict[str, Any]
Files = dict[str, Entry]
"""What is recorded of each file: its size, and a digest of all of it, or of what lies outside of its tensors."""

Span = tuple[int, int]


def source_digests(plan: Plan, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and digest of every weight file read; digests are there when a proof has read all bytes."""
    from llmconvert.tensors.expressions import sources

    files = {tensor.path for output in plan.tensors for tensor in sources(output.expression)}
    found = {}
    for path in sorted(files):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputOutput(f"cannot read the file: {error.strerror}", where=str(path)) from None
        digest = {"tensors_xxh3_128": digests[path.name]} if path.name in digests else {}
        found[path.name] = {"size": size, **digest}
    return found


def entry_of(data: Iterable[bytes]) -> Entry:
    """The entry of a small file of these bytes."""
    hasher, size = xxhash.xxh3_128(), 0
    for block in data:
        hasher.update(block)
        size += len(block)
    return {"size": size, _DIGEST: hasher.hexdigest()}


def weight_entries(plan: Plan, crcs: Mapping[str, Mapping[int, bytes]]) -> Files:
    """The entries of a plan's weight files.

    Args:
        plan: whose.
        crcs: what is written over the pieces of each file at which offset.
    """
    return {
        file.name: {"size": file.size, _OUTSIDE: entry_of(file.outside(crcs[file.name]))[_DIGEST]}
        for file in plan.files
    }


def tensor_entries(plan: Plan, checksums: Mapping[str, str]) -> dict[str, Entry]:
    """The entries of a plan's tensors.

    Args:
        plan: whose.
        checksums: by region key.
    """
    return {
        output.name: {
            "file": output.file,
            "dtype": output.expression.dtype,
            "shape": list(output.expression.shape),
            "rows_per_checksum": output.region_rows,
            "checksums": [
                checksums[f"{output.name}:{start}"] for start in range(0, output.expression.rows, output.region_rows)
            ],
        }
        for output in plan.tensors
    }


def build(
    plan: Plan, checksums: Mapping[str, str], digests: Mapping[str, str], written: Files, tree: Tree
) -> bytes:
    """The manifest's bytes, once everything else is written.

    Args:
        plan: what was written.
        checksums: by region key, from the executor.
        digests: of source files, from the round trip; empty without one.
        written: entries of files, as they were to be.
        tree: what was written.

    Raises:
        ProofFailed: a file is not what was written.
        OSError: it cannot be read back.
    """
    files = _files(plan, tree)
    for name, entry in written.items():
        if files.get(name) != entry:
            raise ProofFailed(f"`{name}` does not read back as it was written", where=str(tree.path))
    manifest = {
        "llmconvert": llmconvert.__version__,
        **plan.summary,
        "source_files": source_digests(plan, digests),
        "checksum": "xxh3-128 of each run of `rows_per_checksum` rows",
        "files": files,
        "tensors": tensor_entries(plan, checksums),
    }
    return encoded(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def encoded(text: str) -> bytes:
    """A JSON text's bytes, which any reader takes.

    Half of a surrogate pair stands in Python for a byte of a path that is not UTF-8. No JSON can hold it: what is written
    instead is its number, as text.
    """
    return _HALF.sub(lambda half: f"\\\\u{ord(half[0]):04x}", text).encode()


def _files(plan: Plan, tree: Tree) -> Files:
    """Size and digest of every file of an output; of a weight file the digest is of what its tensors leave."""
    spans: dict[str, list[Span]] = {file.name: [] for file in plan.files}
    for output in plan.tensors:
        spans[output.file].append((output.offset, output.offset + output.expression.nbytes))
    found: Files = {}
    for name, what in sorted(tree.files(), key=lambda pair: pair[0]):
        if name == MANIFEST:
            continue
        descriptor = tree.open(name, os.O_RDONLY)
        try:
            digest = _outside(descriptor, spans.get(name, ()), what.st_size)
        finally:
            os.close(descriptor)
        found[name] = {"size": what.st_size, _OUTSIDE if name in spans else _DIGEST: digest}
    return found


def _gaps(spans: Iterable[Span], size: int) -> Iterator[Span]:
    """What `spans` leave of a file, in order."""
    position = 0
    for start, stop in sorted(spans):
        if start > position:
            yield position, start
        position = max(position, stop)
    if position < size:
        yield position, size


def _outside(descriptor: int, spans: Iterable[Span], size: int) -> str:
    hasher = xxhash.xxh3_128()
    for start, stop in _gaps(spans, size):
        while start < stop:
            data = os.pread(descriptor, min(MOVE_BYTES, stop - start), start)
            if not data:
                break
            hasher.update(data)
            start += len(data)
    return hasher.hexdigest()


def read(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory llmconvert wrote, or None.

    Raises:
        BadInput: it is not JSON, or says what llmconvert does not write.
    """
    if not os.path.lexists(directory / MANIFEST):
        return None
    found = read_json(directory / MANIFEST)
    check_manifest(found, str(directory / MANIFEST))
    return found


def report(directory: Path) -> dict[str, Any]:
    """What was proved of a directory llmconvert wrote.

    Raises:
        BadInput: there is no such record, or it cannot be read.
    """
    return read_json(directory / REPORT)


def misfit(directory: Path, files: Mapping[str, Any]) -> str | None:
    """How a directory differs at first sight from the entries of its files; None where it does not."""
    faults = ((name, _misfit(directory, name, entry)) for name, entry in files.items())
    return next((f"`{name}` {fault}" for name, fault in faults if fault is not None), None)


def _misfit(directory: Path, name: str, entry: Any) -> str | None:
    """How a file differs from its entry at first sight."""
    path = directory / name
    try:
        os.fsencode(name)
    except ValueError:
        return "has no possible name"
    if name.startswith("/") or ".." in Path(name).parts or "\0" in name:
        return "lies outside of it"
    try:
        found = path.stat()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        raise InputOutput(f"cannot read the file: {error.strerror}", where=str(path)) from None
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if not stays_inside(directory, path):
        return "is a symlink that leaves the directory"
    return None if isinstance(entry, dict) and entry.get("size") == found.st_size else "has another size"


@dataclass(frozen=True)
class Checked:
    """What a check went over: numbers of files and tensors, and the tensors' bytes."""

    files: int
    tensors: int
    nbytes: int


def check(directory: Path, *, alone: bool = True) -> Checked:
    """Compare a directory with its manifest, byte by byte: every file, and every tensor by itself.

    Args:
        directory: to check.
        alone: a file that was added is a fault too.

    Raises:
        Usage: there is no manifest, or no such directory.
        BadInput: files or tensors are missing, added or changed; all are named.
        InputOutput: a file cannot be read.
    """
    manifest = read(require_directory(directory))
    if manifest is None:
        raise Usage(f"there is no `{MANIFEST}` to check against", where=str(directory))
    files, expected = manifest.get("files", {}), manifest.get("tensors")
    if not isinstance(expected, dict):
        raise BadInput(f"`{MANIFEST}` lists no tensors", where=str(directory))
    if not isinstance(files, dict):
        raise BadInput(f"`files` in `{MANIFEST}` is not an object", where=str(directory))
    faults = _changed_files(directory, files) + (_added_files(directory, files) if alone else [])
    total = 0
    try:
        tensors = (
            open_megatron(directory, trust_pickle=True).items
            if is_megatron(directory)
            else open_checkpoint(directory).tensors
        )
    except LlmconvertError:
        if not faults:
            raise
    else:
        faults += [f"`{name}` is missing" for name in expected if name not in tensors]
        faults += [f"`{name}` was added" for name in tensors if name not in expected]
        faults += _changed_rests(directory, files, tensors)
        with Reader() as reader:
            for name, entry in expected.items():
                tensor = tensors.get(name)
                if tensor is not None:
                    faults += _changed_runs(tensor, name, entry, directory, reader)
                    total += tensor.nbytes
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise BadInput(f"the directory is not what llmconvert wrote: {shown}", where=str(directory))
    return Checked(len(files), len(expected), total)


def _changed_files(directory: Path, files: Mapping[str, Any]) -> list[str]:
    """Files that are missing, and small files that are not what they were."""
    faults = []
    for name, entry in files.items():
        fault = _misfit(directory, name, entry)
        if fault is None and _DIGEST in entry:
            try:
                descriptor = open_regular(os.path.realpath(directory / name), os.O_RDONLY)
                try:
                    fault = None if _outside(descriptor, (), entry["size"]) == entry[_DIGEST] else "has changed"
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise InputOutput(f"cannot read the file: {error.strerror}", where=str(directory / name)) from None
        if fault is not None:
            faults.append(f"`{name}` {fault}")
    return faults


def _added_files(directory: Path, files: Mapping[str, Any]) -> list[str]:
    if not files:
        return []
    paths = (path for path in sorted(directory.rglob("*")) if path.is_symlink() or not path.is_dir())
    there = (path.relative_to(directory).as_posix() for path in paths)
    return [
        f"`{name}` was added" for name in there
        if name not in files and name != MANIFEST and not _UNREAD.fullmatch(name)
    ]  # fmt: skip


def _changed_rests(directory: Path, files: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Weight files of which something outside of all tensors has changed: headers, pickles, what lies between."""
    spans: dict[Path, list[Span]] = {}
    for tensor in tensors.values():
        spans.setdefault(tensor.path, []).append((tensor.offset, tensor.offset + tensor.nbytes))
    faults = []
    for name, entry in files.items():
        path = directory / name
        if isinstance(entry, dict) and _OUTSIDE in entry and path.is_file():
            with Reader() as reader:
                rest = _outside(reader.descriptor(path), spans.get(path, ()), path.stat().st_size)
            if rest != entry[_OUTSIDE]:
                faults.append(f"`{name}` has changed outside of its tensors")
    return faults


def _changed_runs(tensor: StoredTensor, name: str, entry: Any, directory: Path, reader: Reader) -> list[str]:
    """Runs of a tensor's rows that are not what they were."""
    checksums = entry.get("checksums") if isinstance(entry, dict) else None
    run_rows = entry.get("rows_per_checksum") if isinstance(entry, dict) else None
    rows = tensor.shape[0] if tensor.shape else 1
    if not isinstance(checksums, list) or not isinstance(run_rows, int) or run_rows < 1:
        return [f"`{MANIFEST}` has no checksums of `{name}`"]
    if not isinstance(entry.get("file"), str) or directory / entry["file"] != tensor.path:
        return [f"`{name}` is in another file"]
    if tensor.dtype != entry.get("dtype") or list(tensor.shape) != entry.get("shape"):
        return [f"`{name}` has another shape or dtype"]
    run = max(run_rows * (tensor.nbytes // max(rows, 1)), 1)
    begins = range(0, tensor.nbytes, run)
    if len(begins) > len(checksums):
        return [f"`{MANIFEST}` has too few checksums of `{name}`"]
    buffer, faults = memoryview(bytearray(MOVE_BYTES)), []
    for number, begin in enumerate(begins):
        hasher, end = xxhash.xxh3_128(), min(begin + run, tensor.nbytes)
        for offset in range(begin, end, MOVE_BYTES):
            view = buffer[: min(MOVE_BYTES, end - offset)]
            reader.read_into(tensor, view, offset)
            hasher.update(view)
        if hasher.hexdigest() != checksums[number]:
            faults.append(f"`{name}` has changed (run {number})")
    return faults
