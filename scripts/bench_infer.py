#!/usr/bin/env python3
"""Rows a second of batch inference on processors: workers against each other, and against a naive loop.

    python scripts/bench_infer.py                      2 workers, 1 worker, and `generate` one row at a time
    python scripts/bench_infer.py --hidden 256         a larger model: the arithmetic weighs more, so batching gains less
    python scripts/bench_infer.py --batch-sizes 8 32 64

A small Llama with random weights, float32; prompts of mixed lengths, and one token in twenty ends an answer, so that
answers are of mixed lengths too. All take turns within a repeat, so that a slow minute of the machine hits all alike; a
ratio is the median over repeats of what was measured in the same repeat. Each worker and the naive loop have one thread;
`--all-threads` adds a naive loop with as many as processors. Loading the model is not counted, neither here nor there: a
rate is rows over the longest time from a model's being loaded to the last answer. `with loading` is the whole command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NAIVE = """
import json, sys, time, torch, transformers
model_path, data, out, tokens = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
began = time.monotonic()
with open(out, "w") as file:
    for line in open(data):
        inputs = tokenizer(json.loads(line)["prompt"], return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**inputs, do_sample=False, max_new_tokens=int(tokens), pad_token_id=0)
        text = tokenizer.decode(made[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        file.write(json.dumps(text) + "\\n")
print(time.monotonic() - began)
"""


def make_model(directory: Path, *, hidden: int, layers: int, vocabulary: int) -> None:
    """Write a small Llama with random weights, and a tokenizer with a word for each id."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 16, num_key_value_heads=hidden // 32, max_position_embeddings=2048,
        initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = list(range(vocabulary - vocabulary // 20, vocabulary))
    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(directory)


def make_data(path: Path, rows: int, vocabulary: int) -> None:
    """Write prompts of 4 to 400 tokens, most of them short."""
    chosen = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            length = min(400, max(4, int(chosen.lognormvariate(3.5, 0.9))))
            file.write(
                json.dumps({"prompt": " ".join(f"w{chosen.randrange(vocabulary)}" for _ in range(length))}) + "\n"
            )


def naive(model: Path, data: Path, out: Path, tokens: int, threads: int) -> tuple[float, list[str]]:
    """Rows a second of a loop over `generate`, and the answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", NAIVE, str(model), str(data), str(out), str(tokens)]
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    return len(answers) / float(ran.stdout), answers


def ours(
    model: Path, data: Path, out: Path, tokens: int, workers: int, batch_size: str
) -> tuple[float, float, list[str]]:
    """Rows a second of `llmconvert infer`, with loading left out and with it, and the answers."""
    command = [sys.executable, "-m", "llmconvert", "infer", str(model), str(data), str(out), "--devices", "cpu",
               "--num-workers", str(workers), "--max-new-tokens", str(tokens), "--dtype", "float32", "--batch-size", batch_size,
               "--engine", "hf", "--overwrite", "--json"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    summary = json.loads(ran.stdout)
    answers = [json.loads(line)["output"] for line in out.read_text().splitlines()]
    busy = max(worker["seconds"] for worker in summary["workers"])
    return len(answers) / busy, len(answers) / summary["seconds"], answers


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--times", type=int, default=5, help="workers answer so many times the rows of the naive loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", nargs="+", default=["auto"], metavar="N")
    parser.add_argument("--all-threads", action="store_true", help="the naive loop with all threads as well")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    vocabulary, tokens = 4096, options.max_new_tokens
    rates: dict[str, list[float]] = {}
    differing: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        model, data, out = Path(place, "model"), Path(place, "data.jsonl"), Path(place, "out.jsonl")
        make_model(model, hidden=options.hidden, layers=options.layers, vocabulary=vocabulary)
        make_data(data, options.rows * options.times, vocabulary)
        few = Path(place, "few.jsonl")  # the loop need not answer as many to be measured
        few.write_text("".join(data.read_text().splitlines(keepends=True)[: options.rows]))
        for _ in range(options.repeats):
            print("load before the repeat:", *(f"{one:.2f}" for one in os.getloadavg()), flush=True)
            rate, expected = naive(model, few, out, tokens, 1)
            rates.setdefault("naive, 1 thread", []).append(rate)
            if options.all_threads:
                rate, _ = naive(model, few, out, tokens, os.cpu_count() or 1)
                rates.setdefault("naive, all threads", []).append(rate)
            for size in options.batch_sizes:
                for workers in (1, 2):
                    name = f"{workers} worker{'s'[: workers - 1]}, batch {size}"
                    rate, with_loading, answers = ours(model, data, out, tokens, workers, size)
                    rates.setdefault(name, []).append(rate)
                    rates.setdefault(f"{name}, with loading", []).append(with_loading)
                    differing[name] = sum(a != b for a, b in zip(answers, expected, strict=False))
    print(
        "rows/s of each repeat:",
        json.dumps({name: [round(rate, 1) for rate in found] for name, found in rates.items()}),
    )
    print(f"{'':36} rows/s   x naive, 1 thread   x naive, all threads   x 1 worker   rows unlike naive")
    for name, found in rates.items():
        size = name.partition("batch ")[2].partition(",")[0]
        against = ["naive, 1 thread", "naive, all threads", f"1 worker, batch {size}"]
        if name.endswith("loading"):
            against[2] += ", with loading"
        ratios = [
            f"{statistics.median(a / b for a, b in zip(found, rates[other], strict=True)):.2f}"
            if other in rates
            else "-"
            for other in against
        ]
        print(f"{name:36} {statistics.median(found):6.1f}   {ratios[0]:>17}   {ratios[1]:>20}   {ratios[2]:>10}   "
              f"{differing.get(name, 0):>17}")  # fmt: skip


if __name__ == "__main__":
    main()
