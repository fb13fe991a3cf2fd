"""What a `llmconvert.json` may say: it lies in a directory that may come from anybody, so it is checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmconvert.checkpoint.config import BYTES, COUNT, OBJECT, SIZE, TEXT, TEXTS, Kind, check, check_config, faults
from llmconvert.checkpoint.files import shown
from llmconvert.errors import BadInput

_FILE = {"size": BYTES, **dict.fromkeys(("xxh3_128", "outside_tensors_xxh3_128", "tensors_xxh3_128"), TEXT)}
_FILES = Kind(
    "an object of sizes and digests",
    lambda value: (
        isinstance(value, dict) and all(OBJECT.fits(entry) and not faults(entry, _FILE) for entry in value.values())
    ),
)
_TOP = {
    "llmconvert": TEXT, "run": TEXT, "files": _FILES, "source_files": _FILES, "dtype": TEXT, "checksum": TEXT,
    **dict.fromkeys(("source", "target", "tensors", "dropped"), OBJECT),
    "steps": Kind("a list of objects", lambda value: isinstance(value, list) and all(map(OBJECT.fits, value))),
}  # fmt: skip
_SOURCE = {
    **dict.fromkeys(("path", "spec", "spec_sha256", "transformer_impl"), TEXT),
    "architectures": TEXTS,
    **dict.fromkeys(("config", "megatron", "args"), OBJECT),
}
_TENSOR = {
    "file": TEXT, "dtype": TEXT, "rows_per_checksum": SIZE, "checksums": TEXTS,
    "shape": Kind("a list of sizes", lambda value: isinstance(value, list) and all(map(COUNT.fits, value))),
}  # fmt: skip


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Check a manifest.

    Args:
        manifest: the JSON object.
        where: its file, for messages.

    Raises:
        BadInput: an entry is of another type than what llmconvert writes, or contradicts itself.
    """
    check(manifest, _TOP, where)
    source = manifest.get("source") or {}
    check(source, _SOURCE, f"{where}, `source`")
    check_config(source.get("config") or {}, f"{where}, the config of `source`")
    for name, entry in (manifest.get("tensors") or {}).items():
        place = f"{where}, tensor {shown(name)}"
        if not isinstance(entry, dict) or any(entry.get(key) is None for key in _TENSOR):
            raise BadInput(f"it does not say {', '.join(f'`{key}`' for key in _TENSOR)}", where=place)
        check(entry, _TENSOR, place)
        rows, run = (entry["shape"] or [1])[0], entry["rows_per_checksum"]
        if len(entry["checksums"]) != -(-rows // run):
            raise BadInput(
                f"{rows:,} rows in runs of {run:,} do not have {len(entry['checksums']):,} checksums", where=place
            )
