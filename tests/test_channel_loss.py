"""Channel losses: the meter, transformers' Trainer, several processes and Megatron, each against token-by-token sums."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import channel_ranks as ranks
import megatron_oracle
import torch
from channel_oracle import NAMES, by_token, of_rows, pad, rows, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.training.channel_loss import NO_CHANNEL, ChannelLossMeter

pytestmark = pytest.mark.xdist_group("channel loss")  # processes are started once


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Channels and counts equal, losses to a relative tolerance."""
    assert {name: tuple(one)[1] for name, one in found.items()} == {name: one[1] for name, one in expected.items()}
    for name, (loss, _) in expected.items():
        assert found[name][0] == pytest.approx(loss, rel=tolerance, abs=tolerance)


# -- the meter ------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    count, tokens = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    per_token = draw(st.booleans())
    return {
        "labels": torch.where(
            torch.rand(count, tokens, generator=random) < draw(st.sampled_from([0.0, 0.4, 1.0])),
            -100,
            torch.randint(5, (count, tokens), generator=random),
        ),
        "logits": torch.randn(count, tokens, 5, generator=random).mul(3).to(
            draw(st.sampled_from([torch.float32, torch.bfloat16]))
        ),
        "ids": torch.randint(-1, 4, (count, tokens) if per_token else (count,), generator=random),
        "form": draw(st.sampled_from(["logits", "flat logits", "losses", "short losses", "flat losses", "shifted"])),
        "named": not per_token and draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(batches(), min_size=1, max_size=4))
def test_the_meter_equals_a_loop_over_tokens(window: list[dict[str, Any]]) -> None:
    meter, seen = ChannelLossMeter(NAMES), []
    for batch in window:
        logits, labels, ids = batch["logits"], batch["labels"], batch["ids"]
        names = [[NAMES[i] if 0 <= i < 3 else NO_CHANNEL for i in row] for row in ids.reshape(len(ids), -1).tolist()]
        for row in range(labels.shape[0]):
            for place in range(labels.shape[1] - 1):
                label = int(labels[row, place + 1])
                if label != -100:
                    name = names[row][place + 1] if len(names[row]) > 1 else names[row][0]
                    seen.append((name, -float(logits[row, place].double().log_softmax(0)[label])))
        short = functional.cross_entropy(
            logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
        short = short.view(labels.shape[0], -1)
        long = functional.pad(short, (0, 1), value=math.nan)
        channels = [None if name == NO_CHANNEL else name for (name,) in names] if batch["named"] else ids
        form = batch["form"]
        if form == "logits":
            meter.update(logits, labels, channels)
        elif form == "flat logits":
            meter.update(logits.flatten(0, 1), labels, channels)
        elif form == "short losses":
            meter.update(short, labels, channels)
        elif form == "flat losses":
            meter.update(short.flatten(), labels, channels)
        elif form == "losses":
            meter.update(long, labels, channels, shift=True)
        else:  # labels and channels shifted by the caller
            ids = ids[:, 1:] if ids.ndim > 1 else ids
            meter.update(logits[:, :-1], labels[:, 1:], channels if batch["named"] else ids, shift=False)
    close(meter.compute(), by_token(seen), 1e-5)


def test_a_mean_loss_of_one_channel_counts_its_tokens() -> None:
    meter = ChannelLossMeter()
    labels = torch.tensor([[1, 2, -100, 3], [-100, -100, 4, 0]])
    meter.update(torch.tensor(2.0), labels, "web")
    meter.update(torch.tensor(5.0), labels[:1, :2], ["web"])
    assert meter.compute() == {"web": (pytest.approx((2 * 4 + 5) / 5), 5)}
    with pytest.raises(Usage, match="several channels"):
        meter.update(torch.tensor(2.0), labels, ["web", "code"])


def test_it_leaves_gradients_alone_and_waits_for_no_value() -> None:
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "local_scalar_dense" not in str(func) and "nonzero" not in str(func)
            return func(*args, **(kwargs or {}))

    meter, logits = ChannelLossMeter(NAMES), torch.randn(2, 5, 7, requires_grad=True)
    with Watch():
        meter.update(logits, torch.randint(7, (2, 5)), torch.tensor([[0, 1, 2, -1, 9], [1] * 5]))
        meter.update(logits, torch.randint(7, (2, 5)), ["web", "code"])
    assert meter._table is not None and not meter._table.requires_grad and logits.grad is None


def test_long_windows_lose_nothing() -> None:
    meter, losses = ChannelLossMeter(["a"]), torch.full((1 << 16,), 0.1)
    for _ in range(600):
        meter.add(losses, torch.ones_like(losses), "a")
    (found,) = meter.compute().values()
    assert found.tokens == 600 << 16 and found.loss == pytest.approx(float(losses[0]), rel=1e-12)


def test_resetting_keeps_names_and_empties_counts() -> None:
    meter = ChannelLossMeter()
    meter.update(torch.tensor([[1.0, 3.0]]), torch.tensor([[1, 1]]), ["a"])
    assert meter.compute(reset=True) == {"a": (2.0, 2)}
    assert meter.compute() == {} and meter.channels == ["a"]
    meter.update(torch.tensor([[1.0, 3.0]]), torch.tensor([[1, -100]]), [7])
    assert meter.compute() == {"7": (1.0, 1)}


def test_weights_other_than_a_mask() -> None:
    meter = ChannelLossMeter(["a"])
    meter.add(torch.tensor([1.0, 3.0, math.nan]), torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0, 0, 0]))
    assert meter.compute() == {"a": (pytest.approx(3.5 / 1.5), 1.5)}


@pytest.mark.parametrize(
    ("error", "given_"),
    [
        (Usage, lambda: ChannelLossMeter(["a", "a"])),
        (Usage, lambda: ChannelLossMeter([NO_CHANNEL])),
        (Usage, lambda: ChannelLossMeter().update(torch.ones(2, 3), torch.ones(2, 3).long(), torch.tensor([0, 1]))),
        (BadInput, lambda: ChannelLossMeter(["a"]).update(torch.ones(2, 3), torch.ones(2, 3).long(), ["a", "b"])),
        (BadInput, lambda: ChannelLossMeter(["a"]).update(torch.ones(2, 3), torch.ones(2, 3).long(), ["a"])),
        (BadInput, lambda: ChannelLossMeter(["a"]).update(torch.ones(2, 5), torch.ones(2, 3).long(), "a")),
        (BadInput, lambda: ChannelLossMeter(["a"]).update(torch.ones(2, 5, 7), torch.ones(2, 3).long(), "a")),
        (BadInput, lambda: ChannelLossMeter(["a"]).add(torch.ones(2, 5), torch.ones(2, 3), "a")),
    ],
)
def test_what_does_not_go_together_is_said(error: Any, given_: Any) -> None:
    with pytest.raises(error):
        given_()


# -- several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks found in every case of `channel_ranks`."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
        "WITH_MEGATRON": "1" if megatron_oracle.AVAILABLE else "",
    }  # fmt: skip
    command = [sys.executable, ranks.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    failures = [one["failed"] for one in results if "failed" in one]
    assert done.returncode == 0 and len(results) == 4, "\n".join([*failures, done.stderr[-2000:]])
    return results


def one_process(batches_: list[list[dict[str, Any]]]) -> dict[str, tuple[float, int]]:
    seen = []
    for batch in batches_:
        padded = pad(batch)
        losses = ranks.losses_of(padded)
        for row, place in (padded["labels"] != -100).nonzero().tolist():
            seen.append((batch[row]["channel"], float(losses[row, place])))
    return by_token(seen)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["two_named", "four_named", "two_unnamed", "four_unnamed", "duplicates", "parts"])
def test_several_processes_find_what_one_finds(found: list[dict[str, Any]], case: str) -> None:
    expected = one_process(ranks.microbatches())
    assert set(expected) == set(NAMES)
    for rank in range(2 if case.startswith("two") else 4):
        close(found[rank][case], expected, 1e-12)


@pytest.mark.parametrize("names", ["named", "unnamed"])
def test_a_rank_without_tokens_takes_part(found: list[dict[str, Any]], names: str) -> None:
    for rank in range(4):
        close(found[rank][f"lonely_{names}"], one_process(ranks.microbatches()[:1]), 1e-12)


def test_channels_come_and_go_between_steps(found: list[dict[str, Any]]) -> None:
    expected = [one_process(ranks.microbatches()[4 * step : 4 * step + 4]) for step in range(ranks.BATCHES)]
    assert len({tuple(sorted(step)) for step in expected}) > 1
    for rank in range(4):
        for step, one in enumerate(expected):
            close(found[rank]["steps"][step], one, 1e-12)


def total_of(logs: dict[str, Any], prefix: str = "") -> float:
    """The mean of the channels' losses, weighted with their tokens."""
    tokens = {key.split("/")[1]: value for key, value in logs.items() if key.startswith(f"{prefix}tokens/")}
    return sum(logs[f"{prefix}loss/{name}"] * count for name, count in tokens.items()) / sum(tokens.values())


def test_the_trainer_over_four_processes(found: list[dict[str, Any]]) -> None:
    """With and without the mixin the weights are the same bits; channels add up; rows met twice count once."""
    for rank in range(4):
        watched, plain = found[rank]["training_True"], found[rank]["training_False"]
        assert watched["weights"] == plain["weights"] == found[0]["training_True"]["weights"]
        steps = [logs for logs in watched["logs"] if "loss" in logs]
        assert len(steps) == 3
        for logs, before in zip(steps, [logs for logs in plain["logs"] if "loss" in logs], strict=True):
            assert logs["loss"] == pytest.approx(before["loss"], abs=1e-6)
            assert total_of(logs) == pytest.approx(logs["loss"], abs=1e-6)
        (evaluated,) = (logs for logs in watched["logs"] if "eval_loss" in logs)
        names = watched["evaluated"]
        close({n: (evaluated[f"eval_loss/{n}"], evaluated[f"eval_tokens/{n}"]) for n in names}, names, 1e-5)


needs_megatron = pytest.mark.skipif(not megatron_oracle.AVAILABLE, reason="needs megatron-core")


@needs_megatron
@pytest.mark.parametrize("grid", ["2_1", "1_2"])
def test_megatron_on_two_tensor_or_pipeline_ranks(found: list[dict[str, Any]], grid: str) -> None:
    last = [one[f"megatron_{grid}_True"] for one in found if one[f"megatron_{grid}_True"]["last"]]
    assert len(last) == (4 if grid == "2_1" else 2)
    for one in last:
        assert set(one["expected"]) == set(NAMES)
        close(one["channels"], one["expected"], 1e-9)
        assert one["evaluation"] == {}
    for one in found:
        watched, plain = one[f"megatron_{grid}_True"], one[f"megatron_{grid}_False"]
        assert watched["gradients"] == plain["gradients"] and watched["reports"] == plain["reports"]
        if not watched["last"]:
            assert watched["channels"] == {}


@needs_megatron
def test_megatron_with_context_parallel_ranks(found: list[dict[str, Any]]) -> None:
    seen = []
    for seed in range(4):
        losses, mask, ids = ranks.context_batch(seed)
        seen += [(NAMES[int(ids[r, t])], float(losses[r, t])) for r, t in mask.nonzero().tolist()]
    for rank in range(4):
        close(found[rank]["context"], by_token(seen), 1e-12)


# -- transformers' Trainer ------------------------------------------------------------------------


def trainer_of(kind: str, folder: Path, **options: Any) -> Any:
    """A trainer of a tiny model: `mixin`, `callback` or `plain`."""
    from transformers import Trainer, TrainingArguments

    from llmconvert.training.trainer import ChannelLossCallback, ChannelLossTrainer

    channels = options.pop("channels", None)
    own = {
        name: options.pop(name) for name in list(options) if name in ("data_collator", "callbacks", "compute_loss_func")
    }
    data = {name: options.pop(name, default) for name, default in
            (("train_dataset", rows(40, seed=3)), ("eval_dataset", None))}  # fmt: skip
    settings_ = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 3, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01, "log_level": "error", **options,
    }  # fmt: skip
    given_ = {"model": tiny_llama(), "args": TrainingArguments(**settings_), "data_collator": pad, **own, **data}
    if kind == "mixin":
        return ChannelLossTrainer(**given_, channels=channels)
    trainer = Trainer(**given_)
    if kind == "callback":
        ChannelLossCallback(channels).attach(trainer)
    return trainer


def steps_of(trainer: Any) -> list[dict[str, Any]]:
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def weights_of(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same training, plain and with each way of watching it: accumulation, TensorBoard, evaluation, saving."""
    from datasets import Dataset
    from transformers import TrainerCallback

    class Listener(TrainerCallback):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.heard += list(logs)

    made = {}
    for kind in ("plain", "mixin", "callback"):
        folder, listener = tmp_path_factory.mktemp(kind), Listener()
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "runs")
        evaluated = rows(11, seed=4)
        trainer = trainer_of(
            kind, folder, gradient_accumulation_steps=2, report_to="tensorboard", eval_strategy="steps", eval_steps=4,
            per_device_eval_batch_size=4, callbacks=[listener], save_strategy="steps", save_steps=4,
            train_dataset=Dataset.from_list(rows(40, seed=3)), eval_dataset=Dataset.from_list(evaluated),
            remove_unused_columns=True,
        )  # fmt: skip
        before = of_rows(trainer.model, evaluated)
        first = trainer.evaluate()
        trainer.train()
        made[kind] = {
            "trainer": trainer, "heard": listener.heard, "folder": folder, "first": first, "before": before,
            "after": of_rows(trainer.model.eval(), evaluated),
        }  # fmt: skip
    os.environ.pop("TENSORBOARD_LOGGING_DIR")
    return made


@pytest.mark.parametrize("kind", ["mixin", "callback"])
class TestTrainer:
    def test_weights_are_those_of_a_run_without(self, runs: dict[str, Any], kind: str) -> None:
        assert torch.equal(weights_of(runs[kind]["trainer"]), weights_of(runs["plain"]["trainer"]))
        assert not torch.equal(
            weights_of(runs[kind]["trainer"]), torch.cat([p.flatten() for p in tiny_llama().parameters()])
        )

    def test_channels_add_up_to_the_loss_of_each_step(self, runs: dict[str, Any], kind: str) -> None:
        steps = steps_of(runs[kind]["trainer"])
        assert len(steps) == 4
        for logs, plain in zip(steps, steps_of(runs["plain"]["trainer"]), strict=True):
            assert logs["loss"] == pytest.approx(plain["loss"], abs=1e-6)
            assert total_of(logs) == pytest.approx(logs["loss"], abs=1e-6)

    def test_evaluations_equal_those_of_single_rows(self, runs: dict[str, Any], kind: str) -> None:
        last = [logs for logs in runs[kind]["trainer"].state.log_history if "eval_loss" in logs][-1]
        for logs, expected in ((runs[kind]["first"], runs[kind]["before"]), (last, runs[kind]["after"])):
            got = {name: (logs[f"eval_loss/{name}"], logs[f"eval_tokens/{name}"]) for name in expected}
            close(got, expected, 1e-5)

    def test_callbacks_registered_before_hear_of_channels(self, runs: dict[str, Any], kind: str) -> None:
        assert {"loss/web", "tokens/web", "eval_loss/math", "eval_tokens/code"} <= set(runs[kind]["heard"])
        assert not any("/" in key for key in runs["plain"]["heard"])

    def test_tensorboard_shows_them(self, runs: dict[str, Any], kind: str) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = (runs[kind]["folder"] / "runs").rglob("events.*")
        log = EventAccumulator(str(events)).Reload()
        logged = [logs["loss/web"] for logs in steps_of(runs[kind]["trainer"]) if "loss/web" in logs]
        assert [one.value for one in log.Scalars("train/loss/web")] == pytest.approx(logged)
        assert "eval/loss/web" in log.Tags()["scalars"]


def test_longer_windows_weigh_tokens(runs: dict[str, Any], tmp_path: Path) -> None:
    """Over two steps of two microbatches each a channel's loss is that of its tokens, not the mean of step means."""
    trainer = trainer_of("mixin", tmp_path, gradient_accumulation_steps=2, logging_steps=2)
    trainer.train()
    single = steps_of(runs["mixin"]["trainer"])
    for window, pair in zip(steps_of(trainer), [single[:2], single[2:]], strict=True):
        for name in NAMES:
            parts = [(one[f"loss/{name}"], one[f"tokens/{name}"]) for one in pair if f"loss/{name}" in one]
            count = sum(tokens for _, tokens in parts)
            assert window[f"tokens/{name}"] == count
            assert window[f"loss/{name}"] == pytest.approx(sum(a * b for a, b in parts) / count, rel=1e-6)


def test_packed_documents_keep_their_channels(tmp_path: Path) -> None:
    from transformers import DataCollatorWithFlattening

    documents = rows(3, seed=5)
    trainer = trainer_of(
        "mixin", tmp_path, data_collator=DataCollatorWithFlattening(), train_dataset=documents, eval_dataset=documents,
        channels=NAMES, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=3,
    )  # fmt: skip
    expected = of_rows(trainer.model, documents)
    trainer.train()
    (logs,) = steps_of(trainer)
    close({name: (logs[f"loss/{name}"], logs[f"tokens/{name}"]) for name in expected}, expected, 1e-5)
    logs = trainer.evaluate()
    close({name: (logs[f"eval_loss/{name}"], logs[f"eval_tokens/{name}"]) for name in expected}, expected, 1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_rows_packed_beforehand_have_a_channel_for_every_token(left: bool) -> None:
    from functools import partial
    from types import SimpleNamespace

    from llmconvert.training.trainer import ChannelCollator

    inner = partial(pad, left=left)
    inner.tokenizer = SimpleNamespace(padding_side="left" if left else "right")  # type: ignore[attr-defined]
    collate = ChannelCollator(inner, NAMES)
    packed = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "channel": ["web", "code", None]}
    batch = collate([packed, {"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7], "channel": "math"}])
    assert batch["channel"].tolist() == [[-1, 0, 1, -1] if left else [0, 1, -1, -1], [2, 2, 2, 2]]
    assert list(batch)[-1] == "channel" and packed["channel"] == ["web", "code", None]
    for row, error in (
        ({**packed, "channel": ["web"]}, BadInput),
        ({**packed, "channel": "blog"}, BadInput),
    ):
        with pytest.raises(error):
            collate([row])
    with pytest.raises(Usage, match="beforehand"):
        ChannelCollator(inner)([packed])


def test_label_smoothing_leaves_the_plain_cross_entropy(tmp_path: Path) -> None:
    plain = trainer_of("mixin", tmp_path, max_steps=1, learning_rate=0.0)
    smooth = trainer_of("mixin", tmp_path, max_steps=1, learning_rate=0.0, label_smoothing_factor=0.3)
    for trainer in (plain, smooth):
        trainer.train()
    (a,), (b,) = steps_of(plain), steps_of(smooth)
    assert b["loss"] != pytest.approx(a["loss"], rel=1e-3)
    assert total_of(b) == pytest.approx(total_of(a), rel=1e-6)


def test_bfloat16_training(tmp_path: Path) -> None:
    made = []
    for kind in ("plain", "mixin"):
        made.append(trainer_of(kind, tmp_path, bf16=True))
        made[-1].train()
    assert torch.equal(weights_of(made[0]), weights_of(made[1]))
    for logs in steps_of(made[1]):
        assert total_of(logs) == pytest.approx(logs["loss"], abs=1e-6)


class _Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(rows(40, seed=3))


@pytest.mark.parametrize("left", [True, False])
def test_channels_lie_where_the_mask_says_tokens_do(left: bool) -> None:
    """A collator without a tokenizer tells the side by its mask alone."""
    from llmconvert.training.trainer import ChannelCollator

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            place = slice(width - size, None) if left else slice(0, size)
            ids[number, place], mask[number, place] = torch.tensor(row["input_ids"]), 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}

    rows = [{"input_ids": [1] * n, "channel": ["web", "code"] * (n // 2)} for n in (2, 6)]
    found = ChannelCollator(collate, ["web", "code"])(rows)["channel"]
    assert found.tolist() == [[-1, -1, -1, -1, 0, 1] if left else [0, 1, -1, -1, -1, -1], [0, 1] * 3]


def test_streamed_rows_need_names(runs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Usage, match="streamed"):
        trainer_of("mixin", tmp_path, train_dataset=_Stream())
    trainer = trainer_of("mixin", tmp_path, train_dataset=_Stream(), channels=NAMES)
    trainer.train()
    assert all(total_of(logs) == pytest.approx(logs["loss"], abs=1e-6) for logs in steps_of(trainer))


def test_what_a_trainer_cannot_do_is_said(tmp_path: Path) -> None:
    from llmconvert.training.trainer import ChannelLossCallback

    bare = [{key: value for key, value in row.items() if key != "channel"} for row in rows(6, seed=1)]
    with pytest.raises(Usage, match="no `channel`"):
        trainer_of("mixin", tmp_path, train_dataset=bare).train()
    trainer = trainer_of("callback", tmp_path)
    with pytest.raises(Usage, match="already"):
        ChannelLossCallback().attach(trainer)
    loss = torch.zeros((), requires_grad=True)
    trainer.model.forward = lambda **_: {"loss": loss * 1}
    with pytest.raises(Refused, match="logits"):
        trainer.train()
