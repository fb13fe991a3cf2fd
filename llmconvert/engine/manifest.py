"""`llmconvert.json`: what made an output, from what, and a checksum of every run of rows, to be checked at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

import llmconvert
from llmconvert.checkpoint.directory import open_checkpoint, read_json
from llmconvert.checkpoint.megatron import is_megatron, open_megatron
from llmconvert.engine.plan import Plan
from llmconvert.engine.recorded import check_manifest
from llmconvert.errors import BadInput, Usage
from llmconvert.tensors.evaluate import MOVE_BYTES, Reader

MANIFEST = "llmconvert.json"
REPORT = "llmconvert-report.json"
"""What was proved of an output; not part of what the manifest covers."""


def source_digests(plan: Plan, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and digest of every weight file read; digests are there when a proof has read all bytes."""
    from llmconvert.tensors.expressions import sources

    files = {tensor.path for output in plan.tensors for tensor in sources(output.expression)}
    return {
        path.name: {
            "size": path.stat().st_size,
            **({"tensors_xxh3_128": digests[path.name]} if path.name in digests else {}),
        }
        for path in sorted(files)
    }


def build(plan: Plan, checksums: Mapping[str, str], digests: Mapping[str, str]) -> bytes:
    """The manifest's bytes.

    Args:
        plan: what was written.
        checksums: by region key, from the executor.
        digests: of source files, from the round trip; empty without one.
    """
    tensors = {
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
    manifest = {
        "llmconvert": llmconvert.__version__,
        **plan.summary,
        "source_files": source_digests(plan, digests),
        "checksum": "xxh3-128 of each run of `rows_per_checksum` rows",
        "tensors": tensors,
    }
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


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


def check(directory: Path) -> tuple[int, int]:
    """Compare a directory with its manifest, byte by byte.

    Returns:
        The number of tensors and of bytes checked.

    Raises:
        Usage: there is no manifest.
        BadInput: tensors are missing, added or changed; all are named.
    """
    manifest = read(directory)
    if manifest is None:
        raise Usage(f"there is no `{MANIFEST}` to check against", where=str(directory))
    tensors = (
        open_megatron(directory, trust_pickle=True).items
        if is_megatron(directory)
        else open_checkpoint(directory).tensors
    )
    expected = manifest.get("tensors")
    if not isinstance(expected, dict):
        raise BadInput(f"`{MANIFEST}` lists no tensors", where=str(directory))
    faults = [f"`{name}` is missing" for name in expected if name not in tensors]
    faults += [f"`{name}` was added" for name in tensors if name not in expected]
    total = 0
    buffer = memoryview(bytearray(MOVE_BYTES))
    with Reader() as reader:
        for name, entry in expected.items():
            tensor = tensors.get(name)
            if tensor is None:
                continue
            if tensor.dtype != entry["dtype"] or list(tensor.shape) != entry["shape"]:
                faults.append(f"`{name}` has another shape or dtype")
                continue
            rows = tensor.shape[0] if tensor.shape else 1
            run = entry["rows_per_checksum"] * (tensor.nbytes // max(rows, 1))
            for number, begin in enumerate(range(0, tensor.nbytes, max(run, 1))):
                hasher = xxhash.xxh3_128()
                end = min(begin + run, tensor.nbytes)
                for offset in range(begin, end, MOVE_BYTES):
                    view = buffer[: min(MOVE_BYTES, end - offset)]
                    reader.read_into(tensor, view, offset)
                    hasher.update(view)
                if hasher.hexdigest() != entry["checksums"][number]:
                    faults.append(f"`{name}` has changed (run {number})")
            total += tensor.nbytes
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise BadInput(f"the directory is not what llmconvert wrote: {shown}", where=str(directory))
    return len(expected), total
