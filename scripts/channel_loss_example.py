#!/usr/bin/env python3
"""Trains a tiny Llama on three synthetic channels and draws their losses; or measures what the measuring costs.

    python scripts/channel_loss_example.py            200 steps, a few seconds; writes docs/channel-loss.png
    python scripts/channel_loss_example.py --cost     time of a step with and without, on this machine's CPU

The channels differ in how much of the next token can be known: `counting` (each token follows from the last: 0 nats),
`grammar` (four tokens are equally likely to follow: ln 4 = 1.386), `noise` (any of 64: ln 64 = 4.159). The script fails
unless the curves end up in that order, well apart, and the channels' losses, weighted with their tokens, give the
Trainer's loss of every step to 1e-6.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from llmconvert.training import ChannelLossMeter, ChannelLossTrainer
from llmconvert.training.curves import plot, read_curves

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, SUCCESSORS = 64, 4
FLOORS = {"counting": 0.0, "grammar": math.log(SUCCESSORS), "noise": math.log(VOCABULARY)}


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of 8 to 40 tokens, of all three channels in turn."""
    draw, order = random.Random(seed), random.Random(0)
    follows = [order.sample(range(VOCABULARY), SUCCESSORS) for _ in range(VOCABULARY)]
    rows = []
    for number in range(count):
        channel = list(FLOORS)[number % len(FLOORS)]
        ids = [draw.randrange(VOCABULARY)]
        for _ in range(draw.randrange(7, 40)):
            if channel == "counting":
                ids.append((ids[-1] + 1) % VOCABULARY)
            else:
                ids.append(draw.choice(follows[ids[-1]]) if channel == "grammar" else draw.randrange(VOCABULARY))
        rows.append({"input_ids": ids, "labels": list(ids), "channel": channel})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest row."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def train(steps: int, folder: Path) -> list[dict[str, Any]]:
    """Train, leave folder/trainer_state.json, and give the Trainer's log."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16, gradient_accumulation_steps=2,
        learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=10, logging_steps=1, eval_strategy="steps",
        eval_steps=max(1, steps // 5), save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        log_level="error",
    )  # fmt: skip
    trainer = ChannelLossTrainer(
        LlamaForCausalLM(config), args, data_collator=collate, channels=list(FLOORS),
        train_dataset=make_rows(32 * steps, seed=1), eval_dataset=make_rows(90, seed=2),
    )  # fmt: skip
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_state()
    return list(trainer.state.log_history)


def largest_difference(log: list[dict[str, Any]]) -> float:
    """Between the Trainer's loss of a step and the mean of the channels' losses weighted with their tokens."""
    found = []
    for entry in (entry for entry in log if "loss" in entry):
        tokens = {name: entry[f"tokens/{name}"] for name in FLOORS if f"tokens/{name}" in entry}
        mean = sum(entry[f"loss/{name}"] * count for name, count in tokens.items()) / sum(tokens.values())
        found.append(abs(mean - entry["loss"]))
    return max(found)


def last_losses(log: list[dict[str, Any]], steps: int = 20) -> dict[str, float]:
    """Each channel's mean over the last steps."""
    entries = [entry for entry in log if "loss" in entry][-steps:]
    return {name: statistics.fmean(entry[f"loss/{name}"] for entry in entries) for name in FLOORS}


def cost(repeats: int) -> dict[str, float]:
    """Seconds of a training step of a Llama of 51 M parameters on 512 tokens, and of counting its channels."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(config.vocab_size, (2, 256))
    channels = torch.randint(3, ids.shape)
    meter, times = ChannelLossMeter(list(FLOORS)), {"step": [], "losses": [], "logits": [], "compute": []}

    def timed(name: str, work: Any) -> Any:
        started = time.perf_counter()
        result = work()
        times[name].append(time.perf_counter() - started)
        return result

    def step() -> Any:
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return output.logits.detach()

    for _ in range(repeats + 1):
        logits = timed("step", step)
        losses = torch.rand(ids.shape)
        timed("losses", lambda losses=losses: meter.update(losses, ids, channels, shift=True))
        timed("logits", lambda logits=logits: meter.update(logits, ids, channels))
        timed("compute", meter.compute)
    # The first of each warms up.
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "channel-loss.png")
    parser.add_argument("--cost", action="store_true", help="measure the cost instead")
    parser.add_argument("--repeats", type=int, default=9, help="of --cost; the median counts")
    given = parser.parse_args()
    if given.cost:
        seconds = cost(given.repeats)
        share = {f"{name}_share": seconds[name] / seconds["step"] for name in ("losses", "logits", "compute")}
        print(json.dumps({**seconds, **share, "threads": torch.get_num_threads()}, indent=2))
        return
    with tempfile.TemporaryDirectory() as name:
        log = train(given.steps, Path(name))
        plot(read_curves(Path(name)), given.output, weight=0.9)
    difference, last = largest_difference(log), last_losses(log)
    for channel, floor in FLOORS.items():
        print(f"{channel:10} {last[channel]:.4f} nats a token over the last 20 steps; at best {floor:.4f}")
    print(f"channels against the Trainer's loss: at most {difference:.1e} apart in {given.steps} steps")
    print(given.output)
    if difference > 1e-6:
        raise SystemExit("the channels do not add up to the loss")
    if not last["counting"] + 0.5 < last["grammar"] < last["noise"] - 0.5:
        raise SystemExit("the curves do not separate")


if __name__ == "__main__":
    main()
