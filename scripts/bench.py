#!/usr/bin/env python3
"""Time and memory of llmconvert against `cp`, on synthetic checkpoints with the shapes of real ones.

    python scripts/bench.py                                   1 GB, all layouts
    python scripts/bench.py --sizes 3 6 --layouts baichuan    two sizes: peak memory must not grow
    python scripts/bench.py --peers                           transformers' load and save as well
    python scripts/bench.py --plan-v3                         planning over DeepSeek-V3's 91,991 tensors
    python scripts/bench.py --startup                         how quickly the command line answers
    python scripts/bench.py --megatron --sizes 3 6            split to TP 2, PP 2, and merge back, against `cp`
    python scripts/bench.py --logits --sizes 1 3              verify by layers: memory against the largest block

What is compared takes turns within each repeat, so that a slow minute of the machine hits all alike; a ratio
is the median over repeats of (this / `cp` in the same repeat). The source is in the page cache where it fits.
`convert` has the disk confirm its output unless told otherwise (`--convert-args=--no-sync`); bare `cp` does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOOL = [sys.executable, "-m", "llmconvert"]
ITEMSIZE = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
BLOCK = 16 << 20
VOCABULARY, HIDDEN, HEAD_DIM = 32_000, 4096, 128

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name to safetensors dtype and shape."""

PEER = """
import sys, torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""


# -- synthetic checkpoints ----------------------------------------------------------------------


def _layers(count: int, layer: dict[str, tuple[int, ...]]) -> Tensors:
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (VOCABULARY, HIDDEN))}
    for i in range(count):
        tensors |= {f"model.layers.{i}.{name}": ("BF16", shape) for name, shape in layer.items()}
    return tensors | {
        "model.norm.weight": ("BF16", (HIDDEN,)),
        "lm_head.weight": ("BF16", (VOCABULARY, HIDDEN)),
    }


def _common(layer: dict[str, tuple[int, ...]], intermediate: int) -> dict[str, tuple[int, ...]]:
    return layer | {
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, intermediate),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }


MISTRAL_LAYER = _common(
    {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (1024, HIDDEN),
        "self_attn.v_proj.weight": (1024, HIDDEN),
        "mlp.gate_proj.weight": (14336, HIDDEN),
        "mlp.up_proj.weight": (14336, HIDDEN),
    },
    14336,
)
BAICHUAN_LAYER = _common(
    {
        "self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (11008, HIDDEN),
        "mlp.up_proj.weight": (11008, HIDDEN),
    },
    11008,
)
GLM_LAYER = _common(
    {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.k_proj.weight": (2 * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.bias": (2 * HEAD_DIM,),
        "self_attn.v_proj.weight": (2 * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.bias": (2 * HEAD_DIM,),
        "mlp.gate_up_proj.weight": (2 * 13696, HIDDEN),
    },
    13696,
)

COMMON_CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 32,
    "vocab_size": VOCABULARY,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}


@dataclass(frozen=True)
class Layout:
    """One architecture's layer and config; what each stands for is a way of moving bytes."""

    about: str
    layer: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    known_to_transformers: bool = True


LAYOUTS = {
    "mistral": Layout(
        "names and bytes as they are",
        MISTRAL_LAYER,
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
    ),
    "baichuan": Layout(
        "row ranges: W_pack is cut in three",
        BAICHUAN_LAYER,
        {
            "architectures": ["BaiChuanForCausalLM"],
            "model_type": "baichuan",
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
        },
        known_to_transformers=False,
    ),
    "glm": Layout(
        "row ranges, and head-wise permutation of q and k",
        GLM_LAYER,
        {
            "architectures": ["GlmForCausalLM"],
            "model_type": "glm",
            "intermediate_size": 13696,
            "num_key_value_heads": 2,
            "head_dim": HEAD_DIM,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1.5625e-7,
            "rope_theta": 10000.0,
            "pad_token_id": 0,
        },
    ),
}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor on disk."""
    return ITEMSIZE[dtype] * int(np.prod(shape, dtype=np.int64))


def shards(tensors: Tensors, count: int) -> list[Tensors]:
    """Cut the tensors, in order, into `count` runs of about equal bytes."""
    total, done = sum(nbytes(*t) for t in tensors.values()), 0
    runs: list[Tensors] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        runs[min(count - 1, done * count // total)][name] = tensor
        done += nbytes(*tensor)
    return [run for run in runs if run]


def random_bf16(size: int, random: np.random.Generator) -> Iterator[bytes]:
    """Finite bf16 numbers of about 0.01, incompressible enough, `size` bytes in blocks."""
    for start in range(0, size, BLOCK):
        bits = np.frombuffer(random.bytes(min(BLOCK, size - start)), dtype=np.uint16)
        yield ((bits & 0x81FF) | 0x3C00).tobytes()


def write_checkpoint(directory: Path, tensors: Tensors, config: dict[str, Any], count: int, *, sparse: bool) -> int:
    """Write config, index and shards, the data only unless `sparse`. Returns the bytes of data."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    random, weight_map, total = np.random.default_rng(0), {}, 0
    runs = shards(tensors, count)
    for number, run in enumerate(runs, 1):
        file = f"model-{number:05}-of-{len(runs):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in run.items():
            end = offset + nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            if sparse:
                out.truncate(8 + len(text) + offset)
            else:
                out.writelines(random_bf16(offset, random))
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def make(layout: Layout, gigabytes: float, directory: Path) -> int:
    """Write a checkpoint of about that size; at least one layer."""
    per_layer = sum(nbytes("BF16", shape) for shape in layout.layer.values())
    around = 2 * nbytes("BF16", (VOCABULARY, HIDDEN))
    count = max(1, round((gigabytes * 1e9 - around) / per_layer))
    config = COMMON_CONFIG | layout.config | {"num_hidden_layers": count}
    return write_checkpoint(directory, _layers(count, layout.layer), config, max(2, round(gigabytes)), sparse=False)


# -- measuring ----------------------------------------------------------------------------------


@dataclass
class Measured:
    """One run of a command."""

    seconds: float
    code: int
    peak: int
    output: str
    anonymous: int = 0


def measure(command: list[str], *, expect: int = 0) -> Measured:
    """Run a command; its peak memory is VmHWM (ru_maxrss would count the process that started it)."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        peak, anonymous, over = [0], [0], threading.Event()

        def watch() -> None:
            while not over.is_set():
                try:
                    with open(f"/proc/{process.pid}/status") as status:
                        fields = dict(line.split(":", 1) for line in status)
                except OSError:
                    return
                for key, most in (("VmHWM", peak), ("RssAnon", anonymous)):
                    if key in fields:
                        most[0] = max(most[0], int(fields[key].split()[0]) * 1024)
                over.wait(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        over.set()
        watcher.join()
        out.seek(0)
        text = out.read().decode(errors="replace")
    if process.returncode != expect:
        raise SystemExit(f"exit code {process.returncode}, not {expect}: {' '.join(command)}\n{text[-2000:]}")
    if not peak[0]:  # no /proc: ru_maxrss is in bytes on macOS
        peak[0] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(seconds, process.returncode, peak[0], text, anonymous[0])


@dataclass
class Row:
    """What one contender took, over the repeats."""

    runs: list[Measured] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median wall time."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak(self) -> int:
        """Highest peak memory."""
        return max(run.peak for run in self.runs)

    def ratio(self, base: Row) -> float:
        """Median over repeats of this time over `base`'s in the same repeat."""
        pairs = zip(self.runs, base.runs, strict=True)
        return statistics.median(mine.seconds / theirs.seconds for mine, theirs in pairs)


def interleave(contenders: dict[str, Callable[[Path], list[str]]], scratch: Path, repeats: int) -> dict[str, Row]:
    """Run all contenders in turn, `repeats` times, after one `cp` that warms the cache and is not counted."""
    rows = {name: Row() for name in contenders}
    for repeat in range(-1, repeats):
        for number, (name, command) in enumerate(contenders.items()):
            if repeat < 0 and number > 0:
                break
            destination = scratch / "out"
            os.sync()
            run = measure(command(destination))
            if repeat >= 0:
                rows[name].runs.append(run)
            shutil.rmtree(destination)
    os.sync()
    return rows


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    for row in [headings, *rows]:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  " + "  ".join(cells).rstrip(), flush=True)


def megabytes(size: int) -> str:
    """Bytes as MB, rounded."""
    return f"{size / 1e6:.0f} MB"


# -- modes --------------------------------------------------------------------------------------


def conversions(options: argparse.Namespace, scratch: Path) -> None:
    """Convert each layout at each size, beside `cp`."""
    peaks: dict[str, list[tuple[float, int]]] = {}
    for name in options.layouts:
        layout = LAYOUTS[name]
        for size in options.sizes:
            source = scratch / "source"
            total = make(layout, size, source)
            print(f"\n{name}, {total / 1e9:.2f} GB: {layout.about}", flush=True)
            rows = interleave(_contenders(source, layout, options), scratch, options.repeats)
            cells = []
            for contender, row in rows.items():
                speed = f"{total / row.seconds / 1e9:.2f} GB/s"
                ratio = f"{row.ratio(rows['cp -r']):.2f}"
                synced = f"{row.ratio(rows['cp -r, then sync']):.2f}"
                cells.append((contender, f"{row.seconds:.2f} s", speed, ratio, synced, megabytes(row.peak)))
                peaks.setdefault(f"{name}, {contender}", []).append((total / 1e9, row.peak))
            table(("", "median", "speed", "× cp", "× cp+sync", "peak RSS"), cells)
            shutil.rmtree(source)
    if len(options.sizes) > 1:
        print("\npeak RSS by size")
        cells = [
            (
                name,
                *(f"{size:.1f} GB: {megabytes(peak)}" for size, peak in seen),
                f"{seen[-1][1] / seen[0][1]:.2f} ×",
            )
            for name, seen in peaks.items()
            if "cp -r" not in name
        ]
        table(("", *([""] * len(options.sizes)), "last / first"), cells)


def _contenders(source: Path, layout: Layout, options: argparse.Namespace) -> dict[str, Callable[[Path], list[str]]]:
    def tool(verify: str) -> Callable[[Path], list[str]]:
        fixed = ["--to", "llama", "--verify", verify, "--workers", str(options.workers), "--quiet"]
        return lambda out: [*TOOL, "convert", str(source), str(out), *fixed, *options.convert_args.split()]

    contenders: dict[str, Callable[[Path], list[str]]] = {
        "cp -r": lambda out: ["cp", "-r", str(source), str(out)],
        "cp -r, then sync": lambda out: ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(out)],
        "convert --verify none": tool("none"),
        "convert --verify weights": tool("weights"),
    }
    if options.peers and layout.known_to_transformers:
        contenders["transformers load + save"] = lambda out: [
            sys.executable,
            "-c",
            PEER,
            str(source),
            str(out),
        ]
    return contenders


V3_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def deepseek_v3() -> Tensors:
    """Every tensor of DeepSeek-V3 in FP8: 61 layers, and the layer for multi-token prediction."""
    hidden, vocabulary, tensors = 7168, 129280, Tensors()

    def plain(name: str, *shape: int, dtype: str = "BF16") -> None:
        tensors[name] = (dtype, shape)

    def quantised(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
        tensors[f"{name}.weight_scale_inv"] = ("F32", (-(-rows // 128), -(-columns // 128)))

    def mlp(prefix: str, intermediate: int) -> None:
        quantised(f"{prefix}.gate_proj", intermediate, hidden)
        quantised(f"{prefix}.up_proj", intermediate, hidden)
        quantised(f"{prefix}.down_proj", hidden, intermediate)

    plain("model.embed_tokens.weight", vocabulary, hidden)
    for i in range(62):
        layer = f"model.layers.{i}"
        if i == 61:
            plain(f"{layer}.embed_tokens.weight", vocabulary, hidden)
            plain(f"{layer}.enorm.weight", hidden)
            plain(f"{layer}.hnorm.weight", hidden)
            plain(f"{layer}.eh_proj.weight", hidden, 2 * hidden)
            plain(f"{layer}.shared_head.norm.weight", hidden)
            plain(f"{layer}.shared_head.head.weight", vocabulary, hidden)
        quantised(f"{layer}.self_attn.q_a_proj", 1536, hidden)
        plain(f"{layer}.self_attn.q_a_layernorm.weight", 1536)
        quantised(f"{layer}.self_attn.q_b_proj", 128 * (128 + 64), 1536)
        quantised(f"{layer}.self_attn.kv_a_proj_with_mqa", 512 + 64, hidden)
        plain(f"{layer}.self_attn.kv_a_layernorm.weight", 512)
        quantised(f"{layer}.self_attn.kv_b_proj", 128 * (128 + 128), 512)
        quantised(f"{layer}.self_attn.o_proj", hidden, 128 * 128)
        plain(f"{layer}.input_layernorm.weight", hidden)
        plain(f"{layer}.post_attention_layernorm.weight", hidden)
        if i < 3:
            mlp(f"{layer}.mlp", 18432)
            continue
        plain(f"{layer}.mlp.gate.weight", 256, hidden)
        plain(f"{layer}.mlp.gate.e_score_correction_bias", 256, dtype="F32")
        mlp(f"{layer}.mlp.shared_experts", 2048)
        for expert in range(256):
            mlp(f"{layer}.mlp.experts.{expert}", 2048)
    plain("model.norm.weight", hidden)
    plain("lm_head.weight", vocabulary, hidden)
    assert len(tensors) == 91_991, len(tensors)
    return tensors


def plan_v3(options: argparse.Namespace, scratch: Path) -> None:
    """Time what needs headers only, on the largest public checkpoint's headers."""
    source, tensors = scratch / "deepseek-v3", deepseek_v3()
    total = write_checkpoint(source, tensors, V3_CONFIG, 163, sparse=True)
    files = len(list(source.glob("*.safetensors")))
    print(f"\nDeepSeek-V3: {len(tensors):,} tensors, {files} shards, {total / 1e9:.0f} GB (sparse)", flush=True)
    refused = [*TOOL, "convert", str(source), str(scratch / "out"), "--to", "llama", "--dry-run"]
    commands = {"inspect": ([*TOOL, "inspect", str(source)], 0), "convert --to llama --dry-run": (refused, 3)}
    repeated(commands, options.repeats)


def startup(options: argparse.Namespace, scratch: Path) -> None:
    """Time what should be immediate."""
    commands = {
        "--help": ([*TOOL, "--help"], 0),
        "specs": ([*TOOL, "specs"], 0),
        "a usage error": ([*TOOL, "convert"], 2),
        "python -c pass": ([sys.executable, "-c", "pass"], 0),
    }
    print()
    repeated(commands, max(options.repeats, 5))


def megatron(options: argparse.Namespace, scratch: Path) -> None:
    """Time splitting to TP 2, PP 2 and merging back, without proofs, beside `cp -r`; and the plan of a 70B."""
    rows = []
    for size in options.sizes:
        source = scratch / f"megatron-{size}"
        layers = LAYOUTS["mistral"]
        total = make(layers, size, source)
        common = ["--verify", "none", "--no-sync", "--workers", str(options.workers), "--quiet"]
        ranks, merged, copied = scratch / "ranks", scratch / "merged", scratch / "copied"
        grid = (
            ["--tp", "2", "--pp", "2", "--account-for-embedding-in-pipeline-split"]
            if _odd(source)
            else ["--tp", "2", "--pp", "2"]
        )
        commands = {
            "cp -r": (["cp", "-r", str(source), str(copied)], copied),
            "split": ([*TOOL, "split", str(source), str(ranks), *grid, *common], None),
            "merge": ([*TOOL, "merge", str(ranks), str(merged), *common], merged),
            "split, torch_dist": (
                [*TOOL, "split", str(source), str(merged), "--format", "torch_dist", *common],
                merged,
            ),
        }
        results = {name: Row() for name in commands}
        for _ in range(options.repeats):
            for name, (command, output) in commands.items():
                # A virtual machine's free memory may be its host's again: each turn finds the same amount at hand.
                measure(["cp", "-r", str(source), str(copied)])
                shutil.rmtree(copied)
                os.sync()  # or one turn's pages are written back in the next
                results[name].runs.append(measure(command))
                if output is not None:
                    shutil.rmtree(output)
            shutil.rmtree(ranks)
        for name, row in results.items():
            ratio = row.ratio(results["cp -r"])
            anonymous = max(run.anonymous for run in row.runs)
            rows.append((name, f"{total / 1e9:.2f} GB", f"{row.seconds:.2f} s", f"{ratio:.2f}", megabytes(anonymous)))
        shutil.rmtree(source)
    print()
    table(("", "size", "median", "x cp", "peak anonymous"), rows)
    seventy = scratch / "70b"
    layer = {
        "self_attn.q_proj.weight": (8192, 8192), "self_attn.k_proj.weight": (1024, 8192),
        "self_attn.v_proj.weight": (1024, 8192), "self_attn.o_proj.weight": (8192, 8192),
        "mlp.gate_proj.weight": (28672, 8192), "mlp.up_proj.weight": (28672, 8192),
        "mlp.down_proj.weight": (8192, 28672), "input_layernorm.weight": (8192,),
        "post_attention_layernorm.weight": (8192,),
    }  # fmt: skip
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (128_256, 8192)), "model.norm.weight": ("BF16", (8192,)),
                        "lm_head.weight": ("BF16", (128_256, 8192))}  # fmt: skip
    tensors |= {f"model.layers.{i}.{name}": ("BF16", shape) for i in range(80) for name, shape in layer.items()}
    config = COMMON_CONFIG | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    }  # fmt: skip
    total = write_checkpoint(seventy, tensors, config, 30, sparse=True)
    run = measure([*TOOL, "split", str(seventy), str(scratch / "out"), "--tp", "8", "--pp", "8", "--dry-run"])
    print(
        f"\nplan of a Llama of {total / 1e9:.0f} GB over TP 8, PP 8, from headers: {run.seconds:.1f} s, {megabytes(run.peak)}"
    )


def _odd(source: Path) -> bool:
    return bool(json.loads((source / "config.json").read_text())["num_hidden_layers"] % 2)


def logits(options: argparse.Namespace, scratch: Path) -> None:
    """Memory of `verify --load layers`, beyond what importing torch and transformers takes."""
    imports = measure([sys.executable, "-c", "import torch, transformers, accelerate.hooks"]).anonymous
    rows = []
    for name in options.layouts:
        layout = LAYOUTS[name]
        block = max(sum(nbytes("BF16", s) for s in layout.layer.values()), nbytes("BF16", (VOCABULARY, HIDDEN))) // 2
        for size in options.sizes:
            source, target = scratch / f"{name}-{size}", scratch / f"{name}-{size}-llama"
            total = make(layout, size, source)
            measure([*TOOL, "convert", str(source), str(target), "--to", "llama", "--verify", "none", "--no-sync"])
            command = [
                *TOOL,
                "verify",
                str(source),
                str(target),
                "--load",
                "layers",
                "--no-weights",
                "--device",
                "cpu",
                "--json",
            ]
            run = measure(command)
            found = json.loads(run.output[run.output.index("{") :])
            wide = block * (8 if found["exact_relative"] is not None else 4)
            used = run.anonymous - imports
            rows.append((name, f"{total / 1e9:.2f} GB", found["kind"], megabytes(run.anonymous), megabytes(wide),
                         f"{used / wide:.2f}", f"{run.seconds:.0f} s", str(found["num_tokens"])))  # fmt: skip
            shutil.rmtree(source)
            shutil.rmtree(target)
    print(f"\nimports alone: {megabytes(imports)} anonymous")
    heads = (
        "layout",
        "size",
        "verdict",
        "peak anonymous",
        "largest block",
        "(peak - imports) / block",
        "time",
        "tokens",
    )
    table(heads, rows)


def repeated(commands: dict[str, tuple[list[str], int]], repeats: int) -> None:
    """Run each command `repeats` times, in turn, and print medians."""
    rows = {name: Row() for name in commands}
    for _ in range(repeats):
        for name, (command, expected) in commands.items():
            rows[name].runs.append(measure(command, expect=expected))
    cells = [(n, f"{r.seconds:.2f} s", megabytes(r.peak), str(r.runs[0].code)) for n, r in rows.items()]
    table(("", "median", "peak RSS", "exit code"), cells)


def main() -> None:
    """Parse, measure in a scratch folder, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--plan-v3", action="store_true", help="headers of DeepSeek-V3: inspect, and a refused dry run")
    mode.add_argument("--startup", action="store_true", help="--help, specs, a usage error")
    mode.add_argument("--megatron", action="store_true", help="split and merge")
    mode.add_argument("--logits", action="store_true", help="memory of verify by layers")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0], metavar="GB", help="default: 1; try 3 6")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--convert-args", default="", metavar="ARGS", help="more, for convert")
    parser.add_argument("--peers", action="store_true", help="transformers, where it knows the layout")
    parser.add_argument("--dir", type=Path, help="where to make the scratch folder; default: the temporary folder")
    options = parser.parse_args()
    modes = {"plan_v3": plan_v3, "startup": startup, "logits": logits, "megatron": megatron}
    run = next((mode for name, mode in modes.items() if getattr(options, name)), conversions)
    with tempfile.TemporaryDirectory(prefix="llmconvert-bench-", dir=options.dir) as scratch:
        run(options, Path(scratch).resolve())


if __name__ == "__main__":
    main()
