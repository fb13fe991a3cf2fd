"""Reward models: written for transformers' sequence classification and TRL's value head, and taken from one to the other."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from llmconvert.cli.app import app
from llmconvert.converters.reward import CLASSES, to_reward
from llmconvert.errors import BadInput, LlmconvertError, ProofFailed, Refused, Usage
from llmconvert.models import CanonicalForRewardModel
from llmconvert.verify.models import load_model

IDS = torch.tensor([[0, 0, 3, 14, 15, 92], [65, 35, 89, 79, 32, 38]])
MASK = (IDS != 0).long()


def value_model(folder: Path, arch: str = "llama", form: str = "in", bias: float = 0.0, **overrides: object) -> Path:
    """A checkpoint as TRL saves it: the causal model's tensors, and `v_head.summary` among them or in a file beside."""
    checkpoints.make(arch, folder, shards=1, **overrides)
    generator = torch.Generator().manual_seed(5)
    head = {
        "v_head.summary.weight": torch.randn(1, 48, generator=generator),
        "v_head.summary.bias": torch.tensor([bias]),
    }
    if form == "beside":
        save_file(head, folder / "value_head.safetensors")
        return folder
    state = load_file(folder / "model.safetensors")
    if form == "prefixed":
        state = {f"pretrained_model.{name}": tensor for name, tensor in state.items()}
    save_file({**state, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rewards(folder: Path) -> Tensor:
    """What TRL's value head gives at the last token: a linear map of the states after the final norm."""
    head = load_file(folder / "model.safetensors")
    model = load_model(folder, torch.float32, "cpu")
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        states = model.model(input_ids=IDS, attention_mask=MASK, position_ids=positions).last_hidden_state
    return states[:, -1] @ head["v_head.summary.weight"].T + head["v_head.summary.bias"]


@pytest.mark.parametrize("form", ["in", "beside", "prefixed"])
def test_a_value_head_becomes_a_score(form: str, tmp_path: Path) -> None:
    wanted = rewards(value_model(tmp_path / "plain"))
    report = to_reward(value_model(tmp_path / "a", form=form), tmp_path / "b")
    assert report.dropped == {
        "lm_head.weight": "a reward model has no language model's head", "v_head.summary.bias": "checked to be zero"
    }  # fmt: skip
    model, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.num_labels == 1
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=MASK, position_ids=positions).logits
    assert torch.allclose(found, wanted, atol=1e-5) and wanted.abs().min() > 0.1


@pytest.mark.parametrize("arch", ["llama", "qwen2_tied"])
def test_there_and_back_bit_for_bit(arch: str, tmp_path: Path) -> None:
    source = value_model(tmp_path / "a", arch)
    to = "llama" if arch == "llama" else "qwen2"
    to_reward(source, tmp_path / "b", to=to, verify="logits")
    options = {"lm_head_from": str(source)} if arch == "llama" else {}
    found = to_reward(tmp_path / "b", tmp_path / "c", to=to, head="v_head", verify="logits", **options)
    assert found.logits is not None and found.logits["max_reward_difference"] < 1e-12
    before, after = checkpoints.tensors(source), checkpoints.tensors(tmp_path / "c")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_new_head_is_zeros_on_any_architecture(tmp_path: Path) -> None:
    for arch, to, cls in (
        ("baichuan2", "llama", "LlamaForSequenceClassification"), ("gemma2", "gemma2", "Gemma2ForSequenceClassification"),
        ("baichuan_13b", "canonical", "CanonicalForRewardModel"), ("deepseek_v3", "canonical", "CanonicalForRewardModel"),
    ):  # fmt: skip
        checkpoints.make(arch, tmp_path / arch)
        report = to_reward(tmp_path / arch, tmp_path / f"{arch}-reward", to=to, verify="logits")
        assert any("zeros" in note for note in report.notes)
        config = json.loads((tmp_path / f"{arch}-reward/config.json").read_text())
        assert config["architectures"] == [cls] and len(config["id2label"]) == 1
        tensors = checkpoints.tensors(tmp_path / f"{arch}-reward")
        assert not tensors["score.weight"].any() and "lm_head.weight" not in tensors
    model = CanonicalForRewardModel.from_pretrained(tmp_path / "baichuan_13b-reward")
    assert model(input_ids=IDS, attention_mask=MASK).logits.tolist() == [[0.0], [0.0]]


def test_a_bias_is_not_lost_unasked(tmp_path: Path) -> None:
    source = value_model(tmp_path / "a", bias=0.5)
    with pytest.raises(Refused, match="not zero.*drop-bias"):
        to_reward(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    report = to_reward(source, tmp_path / "b", drop_bias=True)
    assert report.dropped["v_head.summary.bias"] == "left out as asked"
    to_reward(source, tmp_path / "c", head="v_head", verify="logits")
    assert checkpoints.tensors(tmp_path / "c")["v_head.summary.bias"].item() == 0.5


def test_a_wrong_head_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of rewards can fail: it is code of its own, and transformers', that runs both."""
    from llmconvert.verify.rewards import compare_rewards

    source = value_model(tmp_path / "a")
    to_reward(source, tmp_path / "b")
    state = load_file(tmp_path / "b/model.safetensors")
    state["score.weight"][0, 7] += 1e-4
    save_file(state, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    assert not compare_rewards(source, tmp_path / "b")["verdict"]
    from llmconvert.converters import reward

    monkeypatch.setattr(reward, "cast", lambda expression, dtype: reward.fill(expression.shape, dtype))
    with pytest.raises(ProofFailed):
        to_reward(source, tmp_path / "c", verify="logits")
    assert not (tmp_path / "c").exists()


def test_every_class_named_is_transformers_own() -> None:
    for name, cls in CLASSES.items():
        assert hasattr(transformers, cls) or name == "canonical"


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    source = value_model(tmp_path / "a")
    to_reward(source, tmp_path / "b")
    state = load_file(source / "model.safetensors")

    def broken(name: str, **heads: Tensor) -> Path:
        folder = checkpoints.make("llama", tmp_path / name, shards=1)
        own = {key: tensor for key, tensor in state.items() if "v_head" not in key}
        save_file({**own, **heads}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    two = broken("two", **{"score.weight": torch.ones(1, 48), "v_head.summary.weight": torch.ones(1, 48)})
    labels = broken("labels", **{"score.weight": torch.ones(3, 48)})
    wide = broken("wide", **{"v_head.summary.weight": torch.ones(1, 47)})
    checkpoints.make("granite", tmp_path / "granite")
    cases: list[tuple[Path, dict[str, object], type[LlmconvertError], str]] = [
        (two, {}, BadInput, "one is either"), (labels, {}, BadInput, "one number"), (wide, {}, BadInput, "for a width of 48"),
        (tmp_path / "b", {"head": "v_head"}, Refused, "has none"),
        (tmp_path / "b", {"head": "v_head", "lm_head_from": str(tmp_path / "b")}, BadInput, "no `lm_head.weight`"),
        (source, {"lm_head_from": str(source)}, Usage, "leave it out|without the language"),
        (source, {"head": "value"}, Usage, "not a form"), (source, {"dtype": "fp8-block128"}, Usage, "not written in `fp8"),
        (tmp_path / "granite", {"to": "granite"}, Refused, "no reward model of `granite`"),
    ]  # fmt: skip
    for folder, options, error, match in cases:
        with pytest.raises(error, match=match):
            to_reward(folder, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    source = value_model(tmp_path / "a")
    plan = CliRunner().invoke(app, ["to-reward", str(source), str(tmp_path / "b"), "--dry-run", "--json"])
    assert plan.exit_code == 0 and not (tmp_path / "b").exists()
    assert json.loads(plan.stdout)["target_architecture"] == "LlamaForSequenceClassification"
    run = CliRunner().invoke(
        app, ["to-reward", str(source), str(tmp_path / "b"), "--dtype", "bfloat16", "--pad-token-id", "7"]
    )
    assert run.exit_code == 0 and "come back" in run.stdout
    assert json.loads((tmp_path / "b/config.json").read_text())["pad_token_id"] == 7
    assert all(tensor.dtype == torch.bfloat16 for tensor in checkpoints.tensors(tmp_path / "b").values())


def test_rewards_are_compared_but_for_a_bias_left_out(tmp_path: Path) -> None:
    source = value_model(tmp_path / "a", bias=0.5)
    report = to_reward(source, tmp_path / "b", drop_bias=True, verify="logits")
    assert report.logits is not None and report.logits["verdict"]
    with pytest.raises(Refused, match="cannot be compared"):
        to_reward(value_model(tmp_path / "p", form="prefixed"), tmp_path / "c", verify="logits")
    with pytest.raises(Usage, match="beyond the vocabulary"):
        to_reward(source, tmp_path / "c", drop_bias=True, pad_token_id=131)
