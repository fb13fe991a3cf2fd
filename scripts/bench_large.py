#!/usr/bin/env python3
"""Measure large models: FP8, mixtures of experts, many tensors, several processes.

    python scripts/bench_large.py --fp8 --size 3              FP8 to bfloat16, against `cp` of what it writes
    python scripts/bench_large.py --experts --size 3          split over TP 2 EP 2 PP 2 and merge, against `cp -r`
    python scripts/bench_large.py --count --size 2            the same bytes in 1e3, 1e4 and 1e5 tensors
    python scripts/bench_large.py --plan                      the plan of DeepSeek-V3 over TP 8 PP 16 EP 8
    python scripts/bench_large.py --cluster --size 10         4 torchrun processes; one is killed, all are started again

Ratios are medians over repeats of (this / `cp` in the same repeat); see bench.py for how turns are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench import (
    BLOCK,
    ROOT,
    TOOL,
    V3_CONFIG,
    Tensors,
    deepseek_v3,
    measure,
    megabytes,
    table,
    write_checkpoint,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4", "-m", "llmconvert"]


def data(dtype: str, size: int, random: np.random.Generator) -> Iterator[bytes]:
    """Finite numbers, `size` bytes in blocks."""
    keep = {"BF16": (0x81FF81FF, 0x3C003C00), "F8_E4M3": (0xF7F7F7F7, 0), "F32": (0x007FFFFF, 0x3C000000)}[dtype]
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        bits = np.frombuffer(random.bytes(-(-count // 4) * 4), dtype=np.uint32)
        yield ((bits & keep[0]) | keep[1]).tobytes()[:count]


def write(directory: Path, tensors: Tensors, config: dict[str, Any], files: int) -> int:
    """Write a checkpoint with data. Returns its bytes."""
    total = write_checkpoint(directory, tensors, config, files, sparse=True)
    random = np.random.default_rng(0)
    for path in directory.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    file.seek(8 + length + start)
                    file.writelines(data(entry["dtype"], end - start, random))
    return total


def fp8_checkpoint(directory: Path, gigabytes: float) -> int:
    """DeepSeek-V3's layers with as many experts as make `gigabytes` of bfloat16 in one dense and one sparse layer."""
    hidden, intermediate, vocabulary = 7168, 2048, 4096
    experts = max(8, round((gigabytes * 1e9 / 2 - 8e8) / (3 * hidden * intermediate)))
    experts -= experts % 8
    tensors: Tensors = {}
    for name, (dtype, shape) in deepseek_v3().items():
        parts = name.split(".")
        if parts[1] == "layers" and parts[2] not in ("2", "3"):
            continue
        if ".experts." in name and int(parts[5]) >= experts:
            continue
        short = shape if "vocab" not in name else shape
        if parts[1] == "layers":
            parts[2] = {"2": "0", "3": "1"}[parts[2]]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            short = (vocabulary, hidden)
        if name.endswith("mlp.gate.weight"):
            short = (experts, hidden)
        if name.endswith("correction_bias"):
            short = (experts,)
        tensors[".".join(parts)] = (dtype, short)
    config = {**V3_CONFIG, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": experts,
              "vocab_size": vocabulary, "num_nextn_predict_layers": 0}  # fmt: skip
    return write(directory, tensors, config, 4)


def moe_checkpoint(
    directory: Path, gigabytes: float, experts: int = 32, layers: int = 8, intermediate: int | None = None
) -> int:
    """A Qwen3-MoE of about that size."""
    hidden, heads, kv, head_dim, vocabulary = 2048, 16, 4, 128, 32_000
    width = intermediate or max(64, round((gigabytes * 1e9 / 2 / layers - 1.2e7) / (3 * hidden * experts) / 64) * 64)
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads * head_dim, hidden), "self_attn.k_proj.weight": (kv * head_dim, hidden),
        "self_attn.v_proj.weight": (kv * head_dim, hidden), "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,), "mlp.gate.weight": (experts, hidden),
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
    }  # fmt: skip
    for j in range(experts):
        layer |= {f"mlp.experts.{j}.{part}_proj.weight": (width, hidden) for part in ("gate", "up")}
        layer[f"mlp.experts.{j}.down_proj.weight"] = (hidden, width)
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (vocabulary, hidden))}
    tensors |= {f"model.layers.{i}.{name}": ("BF16", shape) for i in range(layers) for name, shape in layer.items()}
    tensors |= {"model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": ("BF16", (vocabulary, hidden))}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden, "head_dim": head_dim,
        "intermediate_size": 4 * hidden, "moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": 8,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    return write(directory, tensors, config, max(2, round(gigabytes)))


WRITER = """
import json, shutil, subprocess, sys, time
from pathlib import Path
source, output, copy, job, turns = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), int(sys.argv[5])
kind, options = job.pop("kind"), job
started = time.perf_counter()
if kind == "convert":
    from llmconvert.converters.planning import plan_conversion
    plan = plan_conversion(source, **options).plan
elif kind == "split":
    from llmconvert.converters.megatron.grid import Grid
    from llmconvert.converters.megatron.split import plan_split
    plan = plan_split(source, Grid(**options.pop("grid", {})), **options).plan
elif kind == "merge":
    from llmconvert.converters.megatron.merge import open_model, plan_merge
    plan = plan_merge(open_model(source)).plan
from llmconvert.engine.execute import Executor
from llmconvert.engine.journal import Workspace
from llmconvert.tensors.expressions import computes
if any(computes(tensor.expression) for tensor in plan.tensors):
    import torch
begun = time.perf_counter() - started
pairs = []
for turn in range(turns + 1):
    copied = str(output) + "-copied"
    mark = time.perf_counter()
    subprocess.run(["cp", "-r", copy, copied], check=True)
    copying = time.perf_counter() - mark
    shutil.rmtree(copied)
    space = Workspace(output, plan.identity, resume=False, restart=True)
    executor = Executor(plan, space, 2, lambda count: None)
    mark = time.perf_counter()
    executor.prepare()
    executor.finish(executor.run(0, 1))
    pairs.append((copying, time.perf_counter() - mark))
    space.discard()
    space.close()
print(json.dumps([begun, pairs[1:]]))
"""
"""Write one output again and again by the executor, each time after a timed `cp`: in one process, since this kind of
virtual machine gives freed memory back to its host within seconds, and getting it again costs several times a copy."""

Job = tuple[Path, dict[str, Any]]


def writing(jobs: dict[str, Job], copy: Path, scratch: Path, repeats: int, total: int) -> None:
    """Time each job beside `cp` of `copy`, and print medians, ratios and memory."""
    cells = []
    for name, (source, job) in jobs.items():
        command = [
            sys.executable,
            "-c",
            WRITER,
            str(source),
            str(scratch / "out"),
            str(copy),
            json.dumps(job),
            str(repeats),
        ]
        run = measure(command)
        begun, pairs = json.loads(run.output.strip().splitlines()[-1])
        copying, mine = (statistics.median(pair[k] for pair in pairs) for k in (0, 1))
        ratio = statistics.median(b / a for a, b in pairs)
        cells.append((name, f"{mine:.2f} s", f"{total / mine / 1e9:.2f} GB/s", f"{copying:.2f} s", f"{ratio:.2f}",
                      f"{1 / ratio:.0%}", megabytes(run.peak), megabytes(run.anonymous), f"{begun:.1f} s"))  # fmt: skip
        os.sync()
    table(
        ("", "median", "speed", "cp -r", "x cp", "of cp's speed", "peak RSS", "peak anonymous", "start and plan"), cells
    )


def fp8(options: argparse.Namespace, scratch: Path) -> None:
    """FP8 to bfloat16, beside `cp` of what comes out."""
    source, made = scratch / "fp8", scratch / "bf16"
    total = fp8_checkpoint(source, options.size)
    measure(
        [*TOOL, "convert", str(source), str(made), "--to", "deepseek_v3", "--verify", "none", "--no-sync", "--quiet"]
    )
    written = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    convert = {"kind": "convert", "to": "deepseek_v3"}
    jobs: dict[str, Job] = {
        "FP8 to bfloat16": (source, convert),
        "FP8 kept": (source, {**convert, "keep_fp8": True}), "bfloat16 to FP8": (made, {**convert, "dtype": "fp8-block128"}),
    }  # fmt: skip
    print(f"\nFP8 {total / 1e9:.2f} GB, bfloat16 {written / 1e9:.2f} GB", flush=True)
    writing(jobs, made, scratch, options.repeats, written)


def experts(options: argparse.Namespace, scratch: Path) -> None:
    """Split a mixture of experts and merge it."""
    source, ranks = scratch / "moe", scratch / "ranks"
    total = moe_checkpoint(source, options.size)
    grid = {"tp": 2, "ep": 2, "pp": 2}
    flags = [text for key, value in grid.items() for text in (f"--{key}", str(value))]
    measure([*TOOL, "split", str(source), str(ranks), *flags, "--verify", "none", "--no-sync", "--quiet"])
    jobs: dict[str, Job] = {
        "split": (source, {"kind": "split", "grid": grid}),
        "split, ETP 1": (source, {"kind": "split", "grid": {**grid, "etp": 1}}),
        "split, torch_dist": (source, {"kind": "split", "fmt": "torch_dist"}), "merge": (ranks, {"kind": "merge"}),
    }  # fmt: skip
    written = sum(path.stat().st_size for path in ranks.rglob("*.pt"))
    print(f"\nmixture of experts, {total / 1e9:.2f} GB; its ranks {written / 1e9:.2f} GB", flush=True)
    writing(jobs, source, scratch, options.repeats, total)


def count(options: argparse.Namespace, scratch: Path) -> None:
    """The same bytes in more and more tensors."""
    for layers, number in ((4, 80), (16, 208), (48, 694)):
        source = scratch / f"count-{number}"
        width = max(1, round((options.size * 1e9 / 2 / layers - 1.2e7) / (3 * 2048 * number)))
        total = moe_checkpoint(source, options.size, number, layers, width)
        tensors = len(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])
        print(f"\n{tensors:,} tensors, {total / 1e9:.2f} GB", flush=True)
        jobs: dict[str, Job] = {
            "convert": (source, {"kind": "convert", "to": "qwen3_moe"}),
        }
        writing(jobs, source, scratch, options.repeats, total)
        shutil.rmtree(source)


def plan(options: argparse.Namespace, scratch: Path) -> None:
    """Plans over DeepSeek-V3's headers."""
    source = scratch / "v3"
    total = write_checkpoint(source, deepseek_v3(), V3_CONFIG, 163, sparse=True)
    grid = ["--tp", "8", "--pp", "16", "--ep", "8", "--num-layers-in-last-pipeline-stage", "1"]
    fixed = ["--verify", "weights", "--dry-run", "--json"]
    split = [*TOOL, "split", str(source), str(scratch / "out"), *fixed]
    commands = {
        "split TP 8 PP 16 EP 8": [*split, *grid], "split TP 8 PP 16 EP 8 ETP 1": [*split, *grid, "--etp", "1"],
        "split torch_dist": [*split, "--format", "torch_dist"],
        "convert to bfloat16": [*TOOL, "convert", str(source), str(scratch / "out"), "--to", "deepseek_v3", *fixed],
    }  # fmt: skip
    cells = []
    for name, command in commands.items():
        runs = [measure(command) for _ in range(options.repeats)]
        found = json.loads(runs[0].output[runs[0].output.index("{") :])
        seconds = sorted(run.seconds for run in runs)[len(runs) // 2]
        cells.append((name, f"{found['tensors_written']:,}", f"{found['bytes_written'] / 1e12:.2f} TB", f"{seconds:.1f} s",
                      megabytes(max(run.peak for run in runs))))  # fmt: skip
    print(f"\nDeepSeek-V3, {total / 1e9:.0f} GB of FP8, headers only")
    table(("", "tensors written", "size", "median", "peak RSS"), cells)


def _watched(command: list[str], stop_after: float | None) -> tuple[float, dict[int, int], int]:
    """Run a launcher; optionally kill one of its workers. Seconds, peak anonymous memory a worker, and the exit code."""
    started, peaks = time.perf_counter(), dict[int, int]()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})  # fmt: skip
    killed = False
    while process.poll() is None:
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for pid in map(int, listed):
            try:
                fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                peaks[pid] = max(peaks.get(pid, 0), int(fields["RssAnon"].split()[0]) * 1024)
            except (OSError, KeyError, ValueError):
                continue
        if stop_after is not None and not killed and len(listed) == 4 and time.perf_counter() - started > stop_after:
            os.kill(int(listed[2]), signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    return time.perf_counter() - started, peaks, process.returncode


def cluster(options: argparse.Namespace, scratch: Path) -> None:
    """Four processes share a split; a second one is cut short and resumed."""
    source = scratch / "moe"
    total = moe_checkpoint(source, options.size)
    grid = ["--tp", "2", "--ep", "4", "--pp", "2", "--verify", "none", "--no-sync", "--quiet", "--workers", "1"]
    whole, resumed = scratch / "whole", scratch / "resumed"
    seconds, peaks, code = _watched([*TORCHRUN, "split", str(source), str(whole), *grid], None)
    assert code == 0, code
    print(f"\n{total / 1e9:.2f} GB over 4 processes: {seconds:.1f} s, a process at most "
          f"{', '.join(megabytes(peak) for peak in sorted(peaks.values()))} anonymous")  # fmt: skip
    sums = _sums(whole)
    shutil.rmtree(whole)
    first, _, code = _watched([*TORCHRUN, "split", str(source), str(resumed), *grid], seconds * 0.6)
    print(f"one killed: exit code {code} after {first:.1f} s, destination there: {resumed.exists()}")
    second, peaks, code = _watched([*TORCHRUN, "split", str(source), str(resumed), *grid, "--resume"], None)
    print(f"started again with --resume: exit code {code} after {second:.1f} s, {megabytes(max(peaks.values()))} at most; "
          f"the same bytes: {_sums(resumed) == sums}")  # fmt: skip


def _sums(directory: Path) -> str:
    listing = "find . -name '*.pt' -type f | sort | xargs md5sum | md5sum"
    return subprocess.run(["sh", "-c", listing], cwd=directory, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Run one mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {"fp8": fp8, "experts": experts, "count": count, "plan": plan, "cluster": cluster}
    group = parser.add_mutually_exclusive_group(required=True)
    for name in modes:
        group.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--size", type=float, default=2.0, metavar="GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to make the scratch folder; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmconvert-bench-", dir=options.dir) as scratch:
        next(mode for name, mode in modes.items() if getattr(options, name))(options, Path(scratch).resolve())


if __name__ == "__main__":
    main()
