"""The canonical class against the models its traits come from: forward, backward, with a cache, padded, in bfloat16."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import checkpoints
import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from llmconvert.canonical.model import CanonicalConfig
from llmconvert.converters.huggingface import convert
from llmconvert.errors import Refused, Usage
from llmconvert.models import CanonicalForCausalLM, CanonicalForRewardModel, CanonicalModelConfig
from llmconvert.models.devices import layer_device_map, set_device
from llmconvert.models.modeling_canonical import choose_attention, last_tokens
from llmconvert.models.reward import pairwise_loss
from llmconvert.verify.models import load_model

# Of each trait at least one model, and of each implementation it comes from.
ARCHS = (
    "llama_bias", "llama_llama3", "qwen2_tied", "mistral_sliding", "glm", "phi3_partial", "phi3_longrope",
    "phi3_partial_longrope", "gemma", "gemma2",
    "granite", "qwen3", "qwen3_mixed", "glm4", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite",
    "deepseek_v3", "glm4_moe", "qwen", "baichuan2", "baichuan_13b", "chatglm2", "internlm2", "deepseek_moe",
)  # fmt: skip
VARIANTS = {
    "mistral_sliding": ("mistral", {"sliding_window": 7}),
    "qwen3_mixed": ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
}
FIRST = "baichuan_13b", "gemma2", "deepseek_v3", "qwen3_mixed", "glm4", "gemma", "mistral_sliding"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")


def _make(arch: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A checkpoint, and the same in the canonical layout."""
    base, overrides = VARIANTS.get(arch, (arch, {}))
    checkpoints.make(base, folder / "source", dtype=dtype, **overrides)
    convert(folder / "source", folder / "canonical", to="canonical", verify="weights")
    return folder / "source", folder / "canonical"


def _rows(side: str = "left") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 131, (3, 17), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 4, 11)):
        if count:
            mask[row, slice(None, count) if side == "left" else slice(-count, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    out = model(**inputs)
    return getattr(out, "logits", out)


def _apart(a: Tensor, b: Tensor, mask: Tensor) -> float:
    real = mask.bool()
    return float((a.double() - b.double())[real].abs().max() / b.double()[real].abs().max())


@pytest.mark.parametrize("arch", ARCHS)
def test_every_trait_computes_what_its_model_does(arch: str, tmp_path: Path) -> None:
    source, canonical = _make(arch, tmp_path)
    theirs = load_model(source, torch.float32, "cpu")
    ours, loaded = CanonicalForCausalLM.from_pretrained(
        canonical, attn_implementation="eager", output_loading_info=True
    )
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    for side in ("left", "right"):
        rows = _rows(side)
        ours.zero_grad()
        theirs.zero_grad()
        mine, wanted = _logits(ours, **rows), _logits(theirs, **rows)
        assert _apart(mine, wanted, rows["attention_mask"]) < 5e-6
        # The gradient of the embedding has passed through every layer; of the norm, through the head alone.
        weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
        weights = weights * rows["attention_mask"][..., None]
        (mine * weights).sum().backward()
        (wanted * weights).sum().backward()
        (embedding,) = (p for n, p in theirs.named_parameters() if n.endswith(EMBEDDINGS) and "layers" not in n)
        assert ours.model.embed_tokens.weight.grad is not None and embedding.grad is not None
        assert _apart(ours.model.embed_tokens.weight.grad, embedding.grad, torch.ones(len(embedding))) < 2e-5
    # With a cache, token after token, each row alone and then as one padded batch.
    rows = _rows("left")
    whole = _logits(ours, **rows)
    step = ours(**{name: value[:, :9] for name, value in rows.items()}, use_cache=True)
    parts = [step.logits]
    for place in range(9, 17):
        step = ours(
            input_ids=rows["input_ids"][:, place : place + 1], attention_mask=rows["attention_mask"][:, : place + 1],
            position_ids=rows["position_ids"][:, place : place + 1], past_key_values=step.past_key_values, use_cache=True,
        )  # fmt: skip
        parts.append(step.logits)
    assert _apart(torch.cat(parts, 1), whole, rows["attention_mask"]) < 5e-6


@pytest.mark.parametrize("arch", ARCHS)
def test_bfloat16_is_as_near_to_float32_as_the_models_own(arch: str, tmp_path: Path) -> None:
    source, canonical = _make(arch, tmp_path, torch.bfloat16)
    rows = _rows()
    real = rows["attention_mask"].bool()
    models = [
        load_model(source, torch.float32, "cpu"),
        load_model(source, torch.bfloat16, "cpu"),
        CanonicalForCausalLM.from_pretrained(canonical, attn_implementation="eager", dtype=torch.bfloat16),
    ]
    assert models[2].dtype == torch.bfloat16
    logits, gradients = [], []
    for model in models:
        logits.append(_logits(model, **rows).float()[real])
        logits[-1].logsumexp(-1).sum().backward()
        (embedding,) = (p for n, p in model.named_parameters() if n.endswith(EMBEDDINGS) and "layers" not in n)
        gradients.append(embedding.grad.float()[rows["input_ids"][real].unique()])
    # A router may send a token elsewhere after a rounding, so the median and not the worst token is compared.
    for exact, theirs, mine in (logits, gradients):
        spread = [(x - exact).abs().amax(-1).median() for x in (mine, theirs)]
        assert spread[0] < 1.5 * spread[1] + 2e-3 * exact.abs().max()


@pytest.mark.parametrize("arch", FIRST)
def test_there_and_back_with_proved_logits(arch: str, tmp_path: Path) -> None:
    """Models stock Llama cannot hold: converted with logits proved, saved by transformers, converted home bit for bit."""
    base, overrides = VARIANTS.get(arch, (arch, {}))
    checkpoints.make(base, tmp_path / "a", **overrides)
    report = convert(tmp_path / "a", tmp_path / "b", to="canonical")
    assert report.logits is not None and report.logits["verdict"]
    CanonicalForCausalLM.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    family = json.loads((tmp_path / "b/llmconvert.json").read_text())["source"]["spec"]
    convert(tmp_path / "c", tmp_path / "d", to=family, verify="weights")
    before, after = checkpoints.tensors(tmp_path / "a"), checkpoints.tensors(tmp_path / "d")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    ids = _rows()["input_ids"]
    a, d = (_logits(load_model(tmp_path / name, torch.float32, "cpu"), input_ids=ids) for name in ("a", "d"))
    assert torch.equal(a, d)


def test_a_trait_that_is_ignored_is_seen(tmp_path: Path) -> None:
    """The comparison can fail: with a trait switched off in config.json the logits are elsewhere."""
    for arch, change in (
        ("gemma2", {"attn_logit_softcapping": None}), ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"layer_types": None}), ("gemma2", {"branch_output_norm": None}), ("baichuan_13b", {"alibi": False}),
        ("baichuan2", {"norm_head": False}), ("glm4", {"rotary_interleaved": False}), ("glm4", {"rotary_dim": 16}),
        ("granite", {"residual_multiplier": 1.0}), ("deepseek_v3", {"topk_group": 2}),
        ("deepseek_v3", {"routed_scaling_factor": 1.0}), ("qwen2_moe", {"norm_topk_prob": True}),
    ):  # fmt: skip
        folder = tmp_path / f"{arch}{sorted(change)[0]}"
        source, canonical = _make(arch, folder)
        config = json.loads((canonical / "config.json").read_text())
        (canonical / "config.json").write_text(json.dumps({**config, **change}))
        rows = _rows()
        with torch.no_grad():
            mine = _logits(CanonicalForCausalLM.from_pretrained(canonical, attn_implementation="eager"), **rows)
            wanted = _logits(load_model(source, torch.float32, "cpu"), **rows)
        assert _apart(mine, wanted, rows["attention_mask"]) > 1e-3, (arch, change)
        shutil.rmtree(folder)


def test_the_config_says_what_the_canonical_config_does() -> None:
    theirs = {field.name for field in dataclasses.fields(CanonicalConfig)} - {"mtp_copies", "dtype"}
    said = CanonicalModelConfig().to_dict()
    assert theirs - {"rope_theta", "rope_scaling"} <= set(said) and said["rope_parameters"]["rope_theta"] == 10000.0
    old = CanonicalModelConfig(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert old.rope_parameters == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}


def test_a_tokenizer_is_found_without_trusting_the_code(tmp_path: Path) -> None:
    import transformers

    tiny.make("deepseek_v3", tmp_path / "a", tokenizer=True, num_nextn_predict_layers=0)  # with YaRN
    convert(tmp_path / "a", tmp_path / "b", to="canonical", verify="weights")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b")("the quick fox")["input_ids"]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "baichuan_13b", "deepseek_v3", "mistral_sliding", "granite"])
def test_sdpa_and_eager_are_one_function(arch: str, tmp_path: Path) -> None:
    _, canonical = _make(arch, tmp_path)
    rows = _rows()
    eager = CanonicalForCausalLM.from_pretrained(canonical, attn_implementation="eager")
    chosen = CanonicalForCausalLM.from_pretrained(canonical)
    assert chosen.attention == ("eager" if arch == "gemma2" else "sdpa")  # SDPA has no soft cap
    assert f"attention={chosen.attention}" in str(chosen)
    with torch.no_grad():
        assert _apart(_logits(chosen, **rows), _logits(eager, **rows), rows["attention_mask"]) < 5e-6
        unpadded = rows["input_ids"][:1]
        assert _apart(_logits(chosen, input_ids=unpadded), _logits(eager, input_ids=unpadded), torch.ones(1, 17)) < 5e-6
    if arch == "gemma2":
        with pytest.raises(ValueError, match="scaled_dot_product_attention|sdpa"):
            CanonicalForCausalLM.from_pretrained(canonical, attn_implementation="sdpa")
    out = eager(**rows, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 3 and len(out.hidden_states) == 4
    assert torch.allclose(out.attentions[1].sum(-1), torch.ones(1), atol=1e-5)
    assert torch.equal(eager.lm_head(out.hidden_states[-1]).argmax(-1), out.logits.argmax(-1))


def test_the_fastest_attention_that_computes_the_model_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmconvert.models import modeling_canonical

    monkeypatch.setattr(modeling_canonical, "is_flash_attn_2_available", lambda: True)
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert choose_attention(CanonicalModelConfig(), half, cuda)[0] == "flash_attention_2"
    assert choose_attention(CanonicalModelConfig(attn_logit_softcapping=5.0), half, cuda)[0] == "flash_attention_2"
    assert choose_attention(CanonicalModelConfig(alibi=True), half, cuda) == (
        "sdpa", "not flash attention: ALiBi needs a bias on the scores")  # fmt: skip
    assert choose_attention(CanonicalModelConfig(), torch.float32, cuda)[0] == "sdpa"
    assert choose_attention(CanonicalModelConfig(attn_logit_softcapping=5.0), half, torch.device("cpu"))[0] == "eager"
    monkeypatch.setattr(modeling_canonical, "is_flash_attn_2_available", lambda: False)
    assert "not installed" in choose_attention(CanonicalModelConfig(), half, cuda)[1]


def test_packed_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    for arch in ("llama", "baichuan_13b", "gemma2"):
        _, canonical = _make(arch, tmp_path / arch)
        for name in ("eager", "sdpa"):
            if (arch, name) == ("gemma2", "sdpa"):
                continue
            model = CanonicalForCausalLM.from_pretrained(canonical, attn_implementation=name)
            ids = _rows()["input_ids"][:1]
            places = torch.tensor([[*range(6), *range(11)]])
            with torch.no_grad():
                packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
                apart = torch.cat(
                    [model(input_ids=part, use_cache=False).logits for part in (ids[:, :6], ids[:, 6:])], 1
                )
            assert _apart(packed, apart, torch.ones(1, 17)) < 5e-6


def test_generation_with_a_cache_is_generation_without(tmp_path: Path) -> None:
    for arch in ("baichuan_13b", "gemma2", "deepseek_v3", "mistral_sliding"):
        _, canonical = _make(arch, tmp_path / arch)
        model = CanonicalForCausalLM.from_pretrained(canonical)
        rows = {name: value for name, value in _rows().items() if name != "position_ids"}
        made = [
            model.generate(**rows, max_new_tokens=12, do_sample=False, use_cache=cached, pad_token_id=0)
            for cached in (True, False)
        ]
        assert torch.equal(*made), arch
        refused = arch == "deepseek_v3" and transformers.__version__ < "5"
        with pytest.raises(ValueError, match="fixed size") if refused else nullcontext():
            fixed = model.generate(
                **rows, max_new_tokens=12, do_sample=False, cache_implementation="static", pad_token_id=0
            )
            assert torch.equal(fixed, made[0]), arch


def test_checkpointed_gradients_are_the_gradients(tmp_path: Path) -> None:
    _, canonical = _make("deepseek_v3", tmp_path)
    model = CanonicalForCausalLM.from_pretrained(canonical).train()
    rows = _rows("right")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**rows, labels=labels).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    # Layers that predict further tokens are kept and not run, so they do not ask for gradients either.
    idle = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert idle and all(name.startswith("model.layers.3.") for name in idle)


def test_fifty_steps_of_training_follow_the_sources(tmp_path: Path) -> None:
    """The loss curve of the converted checkpoint is the source architecture's, under transformers' own Trainer."""
    import transformers

    generator = torch.Generator().manual_seed(3)
    data = [
        {"input_ids": row, "labels": row} for row in torch.randint(3, 131, (4, 24), generator=generator).repeat(25, 1)
    ]

    def train(model: nn.Module, folder: Path) -> list[float]:
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=50, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, seed=5,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, optim="adamw_torch",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    for arch in ("qwen3", "gemma2"):
        source, canonical = _make(arch, tmp_path / arch)
        theirs = train(transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager"), tmp_path)
        ours = CanonicalForCausalLM.from_pretrained(canonical, attn_implementation="eager")
        mine = train(ours, tmp_path)
        assert len(mine) == 50 and mine[-1] < mine[0]
        assert max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True)) < 1e-3
        ours.save_pretrained(tmp_path / arch / "trained")
        convert(tmp_path / arch / "trained", tmp_path / arch / "home", to=arch, verify="logits")


def test_fsdp_wraps_layers(tmp_path: Path) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    config = CanonicalModelConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    model = CanonicalForCausalLM(config)
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {cls.__name__ for cls in wrapped} == {"CanonicalDecoderLayer"}


_ALONE = """
import sys, torch

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "llmconvert":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="eager")
assert "llmconvert" not in sys.modules
torch.save(model(torch.tensor([[3, 14, 15, 92, 65]])).logits, sys.argv[2])
model.save_pretrained(sys.argv[3])
try:
    model.show_cos_distance(input_ids=[1, 2])
except ImportError as error:
    assert "pip install" in str(error)
else:
    raise SystemExit("llmconvert was found, so this proves nothing")
"""


def test_a_checkpoint_loads_where_llmconvert_is_not_installed(tmp_path: Path) -> None:
    _, canonical = _make("gemma2", tmp_path)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-I", "-c", _ALONE, str(canonical), str(tmp_path / "logits"), str(tmp_path / "again")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    wanted = CanonicalForCausalLM.from_pretrained(canonical, attn_implementation="eager")
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    assert torch.equal(torch.load(tmp_path / "logits"), wanted(ids).logits)
    assert (tmp_path / "again/modeling_canonical.py").read_bytes() == (canonical / "modeling_canonical.py").read_bytes()


# Devices.


@pytest.mark.parametrize(("layers", "devices"), [(3, 2), (3, 3), (7, 3), (12, 5), (1, 1)])
def test_layers_are_spread_in_order_and_by_size(layers: int, devices: int) -> None:
    config = CanonicalModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2
    )
    with torch.device("meta"):
        model = CanonicalForCausalLM(config)
    # Any devices will do: torch has more kinds than this machine.
    names = ["cpu", "meta", "xla", "xpu", "hpu"][:devices]
    found = layer_device_map(model, names)
    placed = [found[f"model.layers.{i}"].type for i in range(layers)]
    assert sorted(placed, key=names.index) == placed and set(placed) == set(names)
    assert found["model.embed_tokens"].type == names[0] and found["lm_head"].type == names[-1]
    parameters = {name for name, _ in model.named_parameters()}
    assert all(any(name.startswith(f"{part}.") for part in found) for name in parameters)
    if layers > 2 * devices:
        sizes = [sum(p.nbytes for n, p in model.named_parameters() if found[_part(n, found)].type == d) for d in names]
        assert max(sizes) < 1.6 * sum(sizes) / devices


def _part(name: str, parts: dict[str, torch.device]) -> str:
    return next(part for part in parts if name.startswith(f"{part}."))


def test_a_model_is_spread_and_gathered_again(tmp_path: Path) -> None:
    _, canonical = _make("qwen2_tied", tmp_path)
    model = CanonicalForCausalLM.from_pretrained(canonical)
    ids = _rows()["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(CanonicalForCausalLM.from_pretrained(canonical, device_map="auto")(ids).logits, before)
        assert torch.equal(model.set_device("cpu")(ids).logits, before)
        found = layer_device_map(model, ["cpu", "meta"])
        assert found["lm_head"].type == "cpu", "a tied head stays with the embedding"
        spread = CanonicalForCausalLM.from_pretrained(canonical, devices=["cpu"])
        assert torch.equal(spread(ids).logits, before)
    for wrong, match in (([], "no devices"), (["cpu"] * 4, "4 devices for 3 layers"), ([99], "no CUDA device 99")):
        with pytest.raises(Usage, match=match):
            layer_device_map(model, wrong)
    with pytest.raises(Usage, match="no `layers`"):
        set_device(nn.Linear(2, 2), ["cpu", "meta"])


# Rewards.


def test_the_last_real_token_is_found_on_either_side() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert last_tokens(mask).tolist() == [3, 1, 3, 2]
    with pytest.raises(ValueError, match="all padding"):
        last_tokens(torch.tensor([[0, 0]]))


def test_rewards_do_not_depend_on_padding_and_train(tmp_path: Path) -> None:
    _, canonical = _make("qwen3", tmp_path)
    torch.manual_seed(0)
    model = CanonicalForRewardModel.from_pretrained(canonical, num_labels=1)
    with torch.no_grad():
        model.score.weight.normal_(0, 0.2)
    found = []
    for side in ("left", "right"):
        rows = _rows(side)
        alone = [
            model(input_ids=ids[mask.bool()][None]).logits
            for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
        ]
        together = model(**rows).logits
        assert together.shape == (3, 1) and torch.allclose(torch.cat(alone), together, atol=1e-5)
        unmasked = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, 0)
        if side == "right":
            by_padding = model(input_ids=unmasked, position_ids=rows["position_ids"]).logits
            assert torch.allclose(by_padding, together, atol=1e-5)
        found.append(together)
    better, worse = found[0][:1], found[0][1:2]
    loss = pairwise_loss(better, worse)
    assert torch.allclose(loss, torch.log1p(torch.exp(worse - better)).mean(), atol=1e-6)
    assert pairwise_loss(better, worse, margin=1.0) > loss
    loss.backward()
    assert model.score.weight.grad is not None and model.model.embed_tokens.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="chosen"):
        pairwise_loss(better, found[0])
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id"):
        model(input_ids=_rows()["input_ids"])


# Traits together that no published model has together: made with the class, and folded away for another architecture.

MIXED = {
    "qwen3": {"qk_norm": True, "attention_multiplier": 0.4, "residual_multiplier": 0.3, "logits_scaling": 3.0,
              "embedding_multiplier": 2.0},
    "glm4": {"branch_output_norm": True, "residual_multiplier": 0.3, "unit_offset_norm": True, "qkv_bias": True,
             "attention_multiplier": 0.4},
    "qwen3_moe": {"qk_norm": True, "residual_multiplier": 0.3, "unit_offset_norm": True, "num_experts": 4,
                  "num_experts_per_tok": 2, "moe_layers": [True] * 3, "moe_intermediate_size": 24},
    "deepseek_v2": {"num_key_value_heads": 6, "head_dim": 8, "rotary_dim": 8, "rotary_interleaved": True, "kv_lora_rank": 16,
                    "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20, "num_experts": 4,
                    "num_experts_per_tok": 2, "moe_layers": [False, True, True], "moe_intermediate_size": 24,
                    "shared_expert_intermediate_size": 48, "residual_multiplier": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("target", MIXED)
def test_traits_are_folded_where_a_norm_or_experts_follow(target: str, tmp_path: Path) -> None:
    config = CanonicalModelConfig(
        **{"vocab_size": 131, "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 3, "num_attention_heads": 6,
           "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, **MIXED[target]}
    )  # fmt: skip
    model = CanonicalForCausalLM(config)
    checkpoints.randomise(model, 3)
    model.save_pretrained(tmp_path / "canonical")
    report = convert(tmp_path / "canonical", tmp_path / "out", to=target)
    assert report.logits is not None and report.logits["verdict"]
    assert any(step["exactness"] == "exact to rounding" for step in report.steps)


def test_what_the_class_cannot_load_is_said(tmp_path: Path) -> None:
    source, _ = _make("qwen2", tmp_path)
    with pytest.raises(ValueError, match="of type `qwen2`.*--to canonical"):
        CanonicalForCausalLM.from_pretrained(source)
    _, alibi = _make("baichuan_13b", tmp_path / "b")
    with pytest.raises(ValueError, match="ALiBi"):
        CanonicalForCausalLM.from_pretrained(alibi, attn_implementation="flash_attention_2")


def test_deepseek_v2_with_the_temperature_of_yarn(tmp_path: Path) -> None:
    """transformers 4.57 leaves it out: nothing there can say whether the canonical model is right, which it is under 5."""
    scaling = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
               "original_max_position_embeddings": 64}  # fmt: skip
    source = checkpoints.make("deepseek_v2", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    with pytest.raises(Refused, match="temperature") if transformers.__version__ < "5" else nullcontext():
        report = convert(source, tmp_path / "dst", to="canonical")
        assert report.logits is not None and report.logits["verdict"]
