"""The proofs on a GPU: every architecture tiny, and one model of about a billion parameters made on the spot.

Run as a program it prints a table: `scripts/gpu_check.sh`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import tiny
import torch

from llmconvert.converters.huggingface import convert
from llmconvert.errors import Refused
from llmconvert.verify.logits import LogitsReport, compare_logits

BILLION = {
    "vocab_size": 65537, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 19,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison: an architecture with itself or with the Llama made of it, and how it is computed."""

    name: str
    arch: str
    dtype: str = "float32"
    devices: str = "cuda"
    load: str = "whole"
    to_llama: bool = True
    overrides: tuple[tuple[str, int], ...] = ()


def cases() -> Iterator[Case]:
    """All of them."""
    for arch in tiny.ARCHITECTURES:
        for dtype in ("float32", "bfloat16"):
            yield Case(f"{arch}, {dtype}", arch, dtype)
        yield Case(f"{arch}, CPU against GPU", arch, devices="cpu,cuda", to_llama=False)
    large = tuple(BILLION.items())
    for dtype in ("float32", "bfloat16"):
        for load in ("whole", "layers"):
            yield Case(f"1.1B qwen2, {dtype}, {load}", "qwen2", dtype, load=load, overrides=large)
    yield Case("1.1B qwen2, CPU against GPU", "qwen2", devices="cpu,cuda", to_llama=False, overrides=large)


def prove(case: Case, folder: Path) -> LogitsReport | None:
    """Make the checkpoint, convert it and compare; None where Llama cannot hold it."""
    source = folder / "source"
    if case.overrides:
        dtype = getattr(torch, case.dtype)
        checkpoints.make(case.arch, source, dtype=dtype, shards=1, **dict(case.overrides))
    else:
        tiny.make(case.arch, source)
    other = source
    if case.to_llama:
        try:
            convert(source, folder / "llama", to="llama", verify="weights")
            other = folder / "llama"
        except Refused:
            return None
    return compare_logits(
        source, other, dtype=case.dtype, device=case.devices, load=case.load,
        rounded="float32" if case.arch in ("gemma", "granite", "baichuan2") else None,
    )  # fmt: skip


def main() -> int:
    """Print the table; 1 if a proof fails."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--device", help="in place of cuda, to try the script without a GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.device:
        print("no CUDA device here: nothing is checked", file=sys.stderr)
        return 0
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(title=f"{card}, torch {torch.__version__}", title_justify="left")
    for column in ("case", "verdict", "difference", "rounding explains", "in float64", "peak GiB", "s"):
        table.add_column(column)
    failed = 0
    for case in cases():
        if options.match not in case.name:
            continue
        if options.device:
            case = Case(**{**case.__dict__, "devices": case.devices.replace("cuda", options.device)})
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = prove(case, Path(folder))
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if torch.cuda.is_available() else "–"
        if found is None:
            continue
        failed += not found.verdict
        exact = "–" if found.exact_relative is None else f"{found.exact_relative:.1e}"
        floor = "–" if found.floor is None else f"{found.floor:.1e}"
        seconds = f"{time.monotonic() - started:.1f}"
        table.add_row(case.name, found.kind, f"{found.relative:.1e}", floor, exact, peak, seconds)
    Console(width=130).print(table)
    print(f"{failed} of {table.row_count} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
