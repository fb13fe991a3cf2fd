"""The canonical class and channel loss under the real TRL and PEFT, which `scripts/test-trl` installs and calls this with.

What the canonical class does is held against the class its checkpoint came from, under the same trainer.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl", reason="needs TRL: scripts/test-trl")
peft = pytest.importorskip("peft", reason="needs PEFT: scripts/test-trl")

from llmconvert.converters.huggingface import convert  # noqa: E402 - after what decides whether this file is run
from llmconvert.errors import Usage  # noqa: E402
from llmconvert.models import register  # noqa: E402
from llmconvert.training import ChannelLossCallback, ChannelLossMixin  # noqa: E402

pytestmark = pytest.mark.slow

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "one", "head", "normalises",
    "what", "another", "attends", "to",
]  # fmt: skip
CHANNELS = ("web", "code", "books")


def _pair(arch: str, folder: Path, **overrides: Any) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer, and the same in the canonical layout."""
    tiny.make(arch, folder / "source", tokenizer=True, **overrides)
    convert(folder / "source", folder / "canonical", to="canonical", verify="weights")
    return folder / "source", folder / "canonical"


def _text(draw: random.Random, low: int = 4, high: int = 20) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def _rows(count: int = 24) -> Any:
    draw = random.Random(0)
    return datasets.Dataset.from_dict({
        "text": [_text(draw) for _ in range(count)], "channel": [CHANNELS[i % 3] for i in range(count)],
    })  # fmt: skip


def _pairs(count: int = 12) -> Any:
    draw = random.Random(1)
    return datasets.Dataset.from_dict(
        {name: [_text(draw) for _ in range(count)] for name in ("prompt", "chosen", "rejected")}
    )


def _options(folder: Path, **more: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "bf16": False, "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
        "learning_rate": 1e-3,
    }  # fmt: skip
    return {**common, **more}


def _losses(trainer: Any, key: str = "loss") -> list[float]:
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _close(found: list[float], wanted: list[float], tolerance: float = 1e-4) -> bool:
    return (
        len(found) == len(wanted) > 0
        and max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)) < tolerance
    )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits
    return found


IDS = torch.randint(3, 131, (2, 13), generator=torch.Generator().manual_seed(7))


# SFT.


@pytest.mark.parametrize("arch", ["llama", "granite", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_follows_the_sources_loss(arch: str, packing: bool, tmp_path: Path) -> None:
    """Scaled and capped logits too, which TRL computes with a head of its own from what the config says."""
    checkpoints_ = _pair(arch, tmp_path) if arch != "gemma2" else _gemma2(tmp_path)
    found = []
    for directory in checkpoints_:
        settings = trl.SFTConfig(
            **_options(tmp_path / "out", max_length=40, packing=packing, trust_remote_code=True,
                       model_init_kwargs={"attn_implementation": "eager"})
        )  # fmt: skip
        found.append(_losses(trl.SFTTrainer(str(directory), args=settings, train_dataset=_rows())))
    assert _close(found[1], found[0])


def _gemma2(folder: Path) -> tuple[Path, Path]:
    checkpoints.make("gemma2", folder / "source")
    tiny._write_tokenizer(folder / "source")
    convert(folder / "source", folder / "canonical", to="canonical", verify="weights")
    return folder / "source", folder / "canonical"


def test_a_norm_head_is_refused_by_a_fused_one(tmp_path: Path) -> None:
    """TRL multiplies by the head's weight itself, which a NormHead's is not."""
    _, canonical = _pair("baichuan2", tmp_path)
    settings = trl.SFTConfig(**_options(tmp_path / "out", trust_remote_code=True))
    trainer = trl.SFTTrainer(str(canonical), args=settings, train_dataset=_rows())
    with pytest.raises(AttributeError, match="NormHead"):
        trainer.train()


# DPO and rewards.


@pytest.mark.parametrize("known", [False, True])
def test_dpo_makes_its_reference_model(known: bool, tmp_path: Path) -> None:
    """With `trust_remote_code` in DPOConfig, or with the class registered."""
    source, canonical = _pair("llama", tmp_path)
    settings = _options(tmp_path / "out", max_length=64)
    theirs = trl.DPOTrainer(str(source), args=trl.DPOConfig(**settings), train_dataset=_pairs())
    if known:
        register()
    else:
        settings["trust_remote_code"] = True
    mine = trl.DPOTrainer(str(canonical), args=trl.DPOConfig(**settings), train_dataset=_pairs())
    assert type(mine.ref_model).__name__ == "CanonicalForCausalLM" and mine.ref_model is not mine.model
    assert _close(_losses(mine), _losses(theirs))
    assert _close(
        [entry["rewards/margins"] for entry in mine.state.log_history if "rewards/margins" in entry][1:],
        [entry["rewards/margins"] for entry in theirs.state.log_history if "rewards/margins" in entry][1:], 2e-2,
    )  # fmt: skip


def test_rewards_are_trained_by_trl(tmp_path: Path) -> None:
    from llmconvert.converters.reward import to_reward

    source = tiny.make("llama", tmp_path / "source", tokenizer=True)
    found = []
    for to in ("llama", "canonical"):
        to_reward(source, tmp_path / to, to=to, pad_token_id=0)
        settings = trl.RewardConfig(**_options(tmp_path / "out", max_length=64, trust_remote_code=True))
        data = _pairs().remove_columns("prompt")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / to, trust_remote_code=True)
        # Ends of texts are no padding, to which Llama's class looks for the last token.
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / to, trust_remote_code=True, pad_token="<unk>")
        trainer = trl.RewardTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
        found.append(_losses(trainer))
    assert _close(found[1], found[0])


# LoRA.


@pytest.mark.parametrize("arch", ["llama", "gemma2", "deepseek_v3"])
def test_lora_on_all_linear_maps_trains_and_merges(arch: str, tmp_path: Path) -> None:
    checkpoints.make(arch, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "canonical", to="canonical", verify="weights")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "canonical", trust_remote_code=True)
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    before = _logits(model, IDS)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    adapted = peft.get_peft_model(model, settings)
    targets = {
        name.rsplit(".", 1)[-1]
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    wanted = {"llama": {"q_proj", "k_proj", "v_proj"}, "gemma2": {"q_proj"}, "deepseek_v3": {"q_a_proj", "kv_b_proj"}}
    assert wanted[arch] | {"o_proj", "gate_proj", "up_proj", "down_proj"} <= targets and "lm_head" not in targets
    assert "gate" not in targets, "a router is no linear map"
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(**_options(tmp_path / "out", max_steps=8, learning_rate=1e-2))
    losses = _losses(transformers.Trainer(adapted, arguments, train_dataset=data))
    assert losses[-1] < losses[0]
    trained = _logits(adapted, IDS)
    assert (trained - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    assert torch.allclose(_logits(merged, IDS), trained, atol=2e-4)
    # Home with what was learnt.
    merged.save_pretrained(tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "home", to=arch, verify="weights")
    home = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "home", attn_implementation="eager")
    assert torch.allclose(_logits(home, IDS), trained, atol=2e-4)


def test_lora_under_sft_and_dpo(tmp_path: Path) -> None:
    _, canonical = _pair("llama", tmp_path)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    sft = trl.SFTConfig(**_options(tmp_path / "out", max_length=40, trust_remote_code=True, max_steps=8))
    losses = _losses(trl.SFTTrainer(str(canonical), args=sft, train_dataset=_rows(), peft_config=adapter))
    assert losses[-1] < losses[0]
    dpo = trl.DPOConfig(**_options(tmp_path / "out", max_length=40, trust_remote_code=True))
    trainer = trl.DPOTrainer(str(canonical), args=dpo, train_dataset=_pairs(), peft_config=adapter)
    assert len(_losses(trainer)) == 4 and trainer.ref_model is None


# Channel loss.


class _Channels(ChannelLossMixin, trl.SFTTrainer):
    """As docs/channel-loss.md has it."""


def _trained(directory: Path, folder: Path, cls: Any = _Channels, **more: Any) -> Any:
    settings = trl.SFTConfig(**_options(folder, **{"max_length": 40, "trust_remote_code": True, **more}))
    trainer = cls(str(directory), args=settings, train_dataset=_rows())
    trainer.train()
    return trainer


def _parameters(trainer: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"gradient_accumulation_steps": 2}, {"packing": True}, {"packing": True, "packing_strategy": "bfd_split"},
        {"packing": True, "packing_strategy": "wrapped"}, {"packing": True, "shuffle_dataset": True},
        {"padding_free": True, "max_length": None},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()) or "padded",
)  # fmt: skip
def test_channels_under_sft(options: dict[str, Any], tmp_path: Path) -> None:
    """Weighted with their tokens the channels are the trainer's loss, and what is trained is what is trained without."""
    _, canonical = _pair("llama", tmp_path)
    without = _trained(canonical, tmp_path / "out", trl.SFTTrainer, **options)
    watched = _trained(canonical, tmp_path / "out", **options)
    assert watched.train_dataset["input_ids"] == without.train_dataset["input_ids"]
    steps = [entry for entry in watched.state.log_history if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        tokens = {name: entry[f"tokens/{name}"] for name in CHANNELS if f"tokens/{name}" in entry}
        mean = sum(entry[f"loss/{name}"] * count for name, count in tokens.items()) / sum(tokens.values())
        assert sum(key.startswith("tokens/") for key in entry) == len(tokens), "tokens without a channel"
        assert abs(mean - entry["loss"]) < 1e-3 * entry["loss"]  # TRL rounds what it logs
    assert {name for entry in steps for name in CHANNELS if f"loss/{name}" in entry} == set(CHANNELS)
    before, after = _parameters(without), _parameters(watched)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_token_has_the_channel_of_its_document(tmp_path: Path) -> None:
    _, canonical = _pair("llama", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(canonical, trust_remote_code=True)
    wanted: Counter[tuple[int, ...]] = Counter()
    names = {}
    for row in _rows():
        ids = tuple(tokenizer(row["text"] + tokenizer.eos_token)["input_ids"])
        names[ids] = row["channel"]
        wanted[ids] += 1
    trainer = _trained(canonical, tmp_path / "out", packing=True)
    for row in trainer.train_dataset:
        start = 0
        for length in row["seq_lengths"]:
            ids = tuple(row["input_ids"][start : start + length])
            assert row["channel"][start : start + length] == [names[ids]] * length
            wanted[ids] -= 1
            start += length
        assert start == len(row["channel"]) == len(row["labels"])
    assert not +wanted and max(len(row["seq_lengths"]) for row in trainer.train_dataset) > 1


def test_channels_with_lora_and_in_evaluation(tmp_path: Path) -> None:
    _, canonical = _pair("llama", tmp_path)
    settings = trl.SFTConfig(
        **_options(tmp_path / "out", max_length=40, trust_remote_code=True, packing=True, eval_strategy="steps", eval_steps=2)
    )  # fmt: skip
    trainer = _Channels(
        str(canonical), args=settings, train_dataset=_rows(), eval_dataset=_rows(9),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    )  # fmt: skip
    trainer.train()
    (first, *_) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    tokens = {name: first[f"eval_tokens/{name}"] for name in CHANNELS}
    mean = sum(first[f"eval_loss/{name}"] * count for name, count in tokens.items()) / sum(tokens.values())
    assert abs(mean - first["eval_loss"]) < 2e-2 * first["eval_loss"]  # the trainer's is a mean over batches


def test_what_packing_dropped_is_said(tmp_path: Path) -> None:
    """A callback comes too late: the trainer has packed its rows by then."""
    _, canonical = _pair("llama", tmp_path)
    settings = trl.SFTConfig(**_options(tmp_path / "out", max_length=40, trust_remote_code=True, packing=True))
    trainer = trl.SFTTrainer(str(canonical), args=settings, train_dataset=_rows())
    ChannelLossCallback().attach(trainer)
    with pytest.raises(Usage, match="no `channel`") as caught:
        trainer.train()
    assert "ChannelLossMixin" in str(caught.value.hint)
    plain = trl.SFTConfig(**_options(tmp_path / "out", max_length=40, trust_remote_code=True))
    trainer = trl.SFTTrainer(str(canonical), args=plain, train_dataset=_rows())
    ChannelLossCallback().attach(trainer)
    trainer.train()
    assert any(f"loss/{name}" in entry for entry in trainer.state.log_history for name in CHANNELS)


def test_token_classification_is_named_and_adapted(tmp_path: Path) -> None:
    _, canonical = _pair("llama", tmp_path)
    code = json.loads((canonical / "config.json").read_text())["auto_map"]
    assert code["AutoModelForTokenClassification"] == "modeling_canonical.CanonicalForTokenClassification"
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        canonical, trust_remote_code=True, num_labels=3
    )
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj", "v_proj"], r=4)
    )
    assert adapted(IDS, labels=IDS % 3).loss.isfinite()
