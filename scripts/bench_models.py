"""Load the canonical class by `from_pretrained`, and by building it and copying a state dict in: time and peak memory.

Each in a process of its own, in turns, on a checkpoint this script makes. Run: python scripts/bench_models.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("from_pretrained", "build, then load_state_dict")


def make(directory: Path, layers: int, hidden: int) -> None:
    """A checkpoint of random bfloat16 weights in the canonical layout."""
    import torch

    from llmconvert.models import CanonicalForCausalLM, CanonicalModelConfig

    config = CanonicalModelConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, qk_norm=True, dtype="bfloat16",
    )  # fmt: skip
    CanonicalForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def peak() -> int:
    """The most resident memory so far, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def load(directory: Path, way: str) -> None:
    """Load once, touch every byte, and print seconds and the growth of peak memory."""
    import torch
    from safetensors.torch import load_file

    from llmconvert.models import CanonicalForCausalLM, CanonicalModelConfig

    config = CanonicalModelConfig.from_pretrained(directory)
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before = peak()
    started = time.perf_counter()
    if way == WAYS[0]:
        model = CanonicalForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    else:
        model = CanonicalForCausalLM(config).to(torch.bfloat16)
        for path in sorted(directory.glob("*.safetensors")):
            model.load_state_dict(load_file(path), strict=False)
    seconds = time.perf_counter() - started
    touched = float(sum(p.detach().flatten()[::1024].float().sum() for p in model.parameters()))  # a number a page
    size = sum(p.nbytes for p in model.parameters())
    print(json.dumps({"seconds": seconds, "peak": peak() - before, "weights": size, "touched": touched}))


def main() -> None:
    """Measure both ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", nargs=2, metavar=("DIR", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(Path(options.load[0]), options.load[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.layers, options.hidden)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--load", folder, way]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[way].append(json.loads(out.splitlines()[-1]))
    for way, runs in found.items():
        best = min(runs, key=lambda run: run["seconds"])
        taken = ", ".join(f"{run['seconds']:.2f}" for run in runs)
        print(
            f"{way:30} {best['seconds']:7.2f} s (of {taken})   "
            f"peak memory {best['peak'] / best['weights']:.2f} × the weights' {best['weights'] / 1e9:.2f} GB"
        )
    ours, naive = (min(run["seconds"] for run in found[way]) for way in WAYS)
    print(f"ratio {naive / ours:.0f} : 1")


if __name__ == "__main__":
    main()
