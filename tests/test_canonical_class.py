"""The canonical class as transformers' own tools meet it: its Auto classes, its Trainer, its attention interface.

`scripts/test-transformers-4` runs this file too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from torch import Tensor, nn

from llmconvert.converters.huggingface import convert
from llmconvert.models import (
    CanonicalForCausalLM,
    CanonicalForRewardModel,
    CanonicalForTokenClassification,
    CanonicalModelConfig,
    register,
)

FIVE = int(transformers.__version__.split(".")[0]) >= 5


def _pair(arch: str, folder: Path, **overrides: Any) -> tuple[Path, Path]:
    """A checkpoint, and the same in the canonical layout."""
    checkpoints.make(arch, folder / "source", **overrides)
    convert(folder / "source", folder / "canonical", to="canonical", verify="weights")
    return folder / "source", folder / "canonical"


def _auto(directory: Path, **options: Any) -> Any:
    """As anybody loads it: by the Auto class, with the code that lies beside the weights."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def _ids(rows: int = 2, length: int = 17) -> Tensor:
    return torch.randint(3, 131, (rows, length), generator=torch.Generator().manual_seed(7))


def _tiny(**traits: Any) -> CanonicalModelConfig:
    shape = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 2,
             "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip
    return CanonicalModelConfig(**{**shape, **traits})


# Attention: what is asked for is used, or it is an error.


@pytest.mark.parametrize("asked", ["eager", "sdpa", "flex_attention"])
def test_the_auto_classes_give_the_attention_asked_for(asked: str, tmp_path: Path) -> None:
    _, canonical = _pair("llama", tmp_path)
    assert _auto(canonical, attn_implementation=asked).config._attn_implementation == asked
    config = transformers.AutoConfig.from_pretrained(canonical, trust_remote_code=True)
    config._attn_implementation = asked
    assert _auto(canonical, config=config).config._attn_implementation == asked
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True, attn_implementation=asked)
    assert model.config._attn_implementation == asked
    assert _auto(canonical).config._attn_implementation == "sdpa"  # its own choice, where nothing is asked


def test_attention_that_is_not_there_is_an_error_as_it_is_for_llama(tmp_path: Path) -> None:
    source, canonical = _pair("llama", tmp_path)
    for name, error in (("flash_attention_2", ImportError), ("no_such_attention", ValueError)):
        for directory in (source, canonical):
            with pytest.raises(error):
                _auto(directory, attn_implementation=name)
        with pytest.raises(error):
            CanonicalForCausalLM.from_pretrained(canonical, attn_implementation=name)
        with pytest.raises(error):
            _auto(canonical).set_attn_implementation(name)


@pytest.mark.parametrize(
    ("arch", "asked", "match"),
    [
        ("gemma2", "sdpa", "no soft cap"), ("baichuan_13b", "flash_attention_2", "ALiBi"),
        ("baichuan_13b", "flex_attention", "ALiBi"), ("baichuan_13b", "vllm", "ALiBi"), ("baichuan2", "vllm", "NormHead"),
    ],
)  # fmt: skip
def test_attention_that_computes_something_else_is_refused_however_it_is_asked_for(
    arch: str, asked: str, match: str, tmp_path: Path
) -> None:
    _, canonical = _pair(arch, tmp_path)
    model = _auto(canonical)
    before = model.config._attn_implementation
    for ask in (
        lambda: _auto(canonical, attn_implementation=asked),
        lambda: CanonicalForCausalLM.from_pretrained(canonical, attn_implementation=asked),
        lambda: CanonicalForCausalLM._from_config(model.config, attn_implementation=asked),
        lambda: model.set_attn_implementation(asked),
        lambda: model.set_attn_implementation({"": asked}),
    ):
        with pytest.raises(ValueError, match=match):
            ask()
    assert model.set_attn_implementation(before) is None and model.config._attn_implementation == before


@pytest.mark.parametrize("arch", ["llama", "gemma2", "deepseek_v3", "mistral"])
def test_flex_attention_computes_the_model(arch: str, tmp_path: Path) -> None:
    _, canonical = _pair(arch, tmp_path, **({"sliding_window": 7} if arch == "mistral" else {}))
    ids, mask = _ids(), torch.ones(2, 17, dtype=torch.int64)
    mask[1, :5] = 0
    found = []
    for name in ("eager", "flex_attention"):
        with torch.no_grad():
            found.append(_auto(canonical, attn_implementation=name)(ids, attention_mask=mask).logits[mask.bool()])
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()


# Shapes.


@pytest.mark.parametrize("arch", ["qwen3", "glm4_moe"])
def test_a_width_that_is_no_multiple_of_the_heads(arch: str, tmp_path: Path) -> None:
    """As in GLM-4.5: 5,120 for 96 heads."""
    source, canonical = _pair(arch, tmp_path, hidden_size=52)
    ids = _ids()
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")(ids).logits
        mine = _auto(canonical, attn_implementation="eager")(ids).logits
    assert (mine - theirs).abs().max() < 5e-6 * theirs.abs().max()


# Training with transformers' Trainer.


def _losses(model: nn.Module, folder: Path, steps: int = 6, **options: Any) -> list[float]:
    rows = _ids(8, 24)
    labels = rows.clone()
    labels[:, :5] = -100
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, seed=5,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, optim="adamw_torch", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("remote", [True, False])
def test_smoothed_labels_are_shifted_as_llamas_are(remote: bool, tmp_path: Path) -> None:
    source, canonical = _pair("llama", tmp_path)
    for options in ({"label_smoothing_factor": 0.3}, {"label_smoothing_factor": 0.3, "gradient_accumulation_steps": 2}):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
        mine = (_auto if remote else CanonicalForCausalLM.from_pretrained)(canonical, attn_implementation="eager")
        wanted = _losses(theirs, tmp_path / "theirs", **options)
        found = _losses(mine, tmp_path / "mine", **options)
        assert max(abs(a - b) / b for a, b in zip(found, wanted, strict=True)) < 1e-4


def test_pipelines_take_it_for_text_generation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert CanonicalForCausalLM.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    # The name is no promise of a class: without the code beside the weights there is none.
    _, canonical = _pair("llama", tmp_path)
    found = transformers.AutoModelForCausalLM._model_mapping
    assert all(config.model_type != "llmconvert" or config in found._extra_content for config in found)


@pytest.mark.parametrize("cls", [CanonicalForRewardModel, CanonicalForTokenClassification])
def test_a_mean_loss_is_divided_by_the_accumulated_batches(cls: Any, tmp_path: Path) -> None:
    """Two batches accumulated are one batch of both."""
    token = cls is CanonicalForTokenClassification
    rows = _ids(4, 12)
    labels = [row % 3 if token else float(row[0]) / 60 for row in rows]
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    trained = []
    for size, steps in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = cls(_tiny(num_labels=3 if token else 1, classifier_dropout=0.0))
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps, seed=5,
            learning_rate=0.1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, optim="sgd",
            max_grad_norm=0.0,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=data).train()
        trained.append(model)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_token_classification_is_llamas(tmp_path: Path) -> None:
    source, canonical = _pair("llama", tmp_path)
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(source, num_labels=5)
    theirs.save_pretrained(tmp_path / "classifier")
    # The same weights under the same names, in a canonical directory.
    shutil.copytree(tmp_path / "classifier", tmp_path / "same")
    config = json.loads((canonical / "config.json").read_text())
    labels = {"id2label": {str(i): f"L{i}" for i in range(5)}, "label2id": {f"L{i}": i for i in range(5)}}
    (tmp_path / "same/config.json").write_text(json.dumps({**config, **labels}))
    shutil.copy(canonical / "modeling_canonical.py", tmp_path / "same")
    mine, info = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "same", trust_remote_code=True, output_loading_info=True
    )
    assert type(mine).__name__ == "CanonicalForTokenClassification"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = _ids()
    labels = (ids % 5).masked_fill(ids % 7 == 0, -100)
    a, b = theirs(ids, labels=labels), mine(ids, labels=labels)
    assert torch.allclose(a.logits, b.logits, atol=1e-5) and torch.allclose(a.loss, b.loss, atol=1e-6)
    for model in (theirs, mine):
        model.train()
        torch.manual_seed(3)
        model(ids, labels=labels).loss.backward()
    assert torch.allclose(theirs.score.weight.grad, mine.score.weight.grad, atol=1e-5)
    register()
    assert transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "same").score.bias is not None


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_balancing_loss_of_experts_is_the_sources(arch: str, tmp_path: Path) -> None:
    source, canonical = _pair(arch, tmp_path, router_aux_loss_coef=0.5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").train()
    mine = _auto(canonical, attn_implementation="eager").train()
    ids, mask = _ids(), torch.ones(2, 17, dtype=torch.int64)
    mask[1, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    plain = mine(ids, attention_mask=mask, labels=labels).loss
    mine.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for model in (theirs, mine):
        model.config.output_router_logits = True
        out = model(ids, attention_mask=mask, labels=labels, use_cache=False)
        out.loss.backward()
        found.append(out)
    assert len(found[0].router_logits) == len(found[1].router_logits)
    assert torch.allclose(found[0].aux_loss, found[1].aux_loss, rtol=1e-4)
    assert torch.allclose(found[0].loss, found[1].loss, rtol=1e-5) and found[1].loss - plain > 0.1
    gates = [{n: p.grad for n, p in model.named_parameters() if n.endswith("gate.weight")} for model in (theirs, mine)]
    pairs = list(zip(gates[0].values(), gates[1].values(), strict=True))
    assert pairs and all(torch.allclose(a, b, atol=1e-4 * a.abs().max()) for a, b in pairs)
    assert not hasattr(mine.model.layers[0].mlp.gate, "recorded"), "nothing is held on to"


# What else replaces modules or reads them.


def test_a_scaled_embedding_stays_scaled_when_it_grows() -> None:
    model = CanonicalForCausalLM(_tiny(embedding_multiplier=6.5, tie_word_embeddings=True)).eval()
    checkpoints.randomise(model, 0)
    ids = _ids()
    with torch.no_grad():
        before = model(ids).logits
        given = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert torch.equal(given, before)
        model.resize_token_embeddings(140, mean_resizing=False)
        assert torch.allclose(model(ids).logits[..., :131], before, atol=1e-5)


def test_a_norm_head_is_not_lost_in_silence(tmp_path: Path) -> None:
    _, canonical = _pair("baichuan2", tmp_path)
    model = _auto(canonical)
    head = model.get_output_embeddings()
    assert not isinstance(head, nn.Linear) and getattr(head, "bias", None) is None
    with pytest.raises(AttributeError, match="NormHead"):
        head.bias  # noqa: B018 - as a fused head reads it
    with pytest.raises(TypeError, match="nn.Linear|Linear"):
        model.resize_token_embeddings(140)


def test_a_router_is_no_linear_map() -> None:
    """Adapters and quantisers replace every nn.Linear; what a router gives is not one's."""
    model = CanonicalForCausalLM(
        _tiny(num_experts=4, num_experts_per_tok=2, moe_layers=[False, True], moe_intermediate_size=24)
    )
    assert not any(isinstance(module, nn.Linear) for name, module in model.named_modules() if name.endswith("gate"))
    weight = model.model.layers[1].mlp.gate.weight
    assert 0.5 < weight.std() / model.config.initializer_range < 1.5, "drawn at random, not left as it was found"
    assert "model.layers.1.mlp.gate.weight" in model.state_dict()


def test_logits_are_scaled_the_same_by_a_head_of_another_engine() -> None:
    config = _tiny(logits_scaling=8.0)
    assert config.logit_scale == 0.125 and "logit_scale" not in config.to_dict()
