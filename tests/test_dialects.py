"""What a config.json means: keys that are absent, null, or at another value, as the published classes read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.cli.app import main
from llmconvert.converters.huggingface import convert
from llmconvert.converters.planning import plan_conversion
from llmconvert.errors import BadInput, Refused
from llmconvert.spec.dialect import read_config
from llmconvert.spec.registry import registry
from llmconvert.verify.logits import compare_logits

SIZES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_experts",
    "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
}  # fmt: skip
"""Keys without which nothing is read: sizes are never guessed."""


def _stated(arch: str) -> dict[str, Any]:
    """A config.json with every key that transformers' class has."""
    import transformers

    cls, overrides = checkpoints.NATIVE[arch]
    made = getattr(transformers, cls)(**{**checkpoints.BASE, **overrides}).to_dict()
    return {**made, "architectures": [cls.replace("Config", "ForCausalLM")]}


def _meaning(config: dict[str, Any], arch: str) -> Any:
    """What transformers' class makes of a config.json, read by our spec with nothing left out."""
    import transformers

    made = transformers.AutoConfig.for_model(
        config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}
    )
    stated = {**made.to_dict(), "architectures": config["architectures"]}
    spec = registry().detect(stated)
    return replace(read_config(spec, stated), dtype=None)


@pytest.mark.parametrize("arch", [name for name in checkpoints.NATIVE if name != "phi3_partial_longrope"])
def test_an_absent_key_means_what_the_class_says(arch: str) -> None:
    whole = _stated(arch)
    spec = registry().detect(whole)
    tried = 0
    for key in sorted({key for field in spec.fields for key in field.keys} & whole.keys()):
        config = {name: value for name, value in whole.items() if name != key}
        try:
            meant = _meaning(config, arch)
        except Exception:  # the class itself cannot do without
            continue
        try:
            read = replace(read_config(spec, config), dtype=None)
        except (BadInput, Refused) as error:
            assert key in SIZES or "not a multiple" in str(error) or "does not say of each" in str(error), (key, error)
            continue
        tried += 1
        if key in ("layer_types", "rope_parameters"):
            continue  # stated by other keys too, which the class writes and reads in turn
        assert read == meant, key
    assert tried > 5


@pytest.mark.parametrize("key, other", [
    ("kv_channels", 128), ("multi_query_group_num", 1), ("layernorm_epsilon", 1e-5), ("seq_length", 2048),
    ("add_qkv_bias", False),
])  # fmt: skip
def test_chatglm_without_a_key(key: str, other: Any) -> None:
    """Defaults: configuration_chatglm.py as published with ChatGLM2-6B."""
    spec, whole = registry().get("chatglm"), checkpoints.REMOTE["chatglm2"]
    without = {name: value for name, value in whole.items() if name != key}
    assert read_config(spec, without) == read_config(spec, {**whole, key: other})


def test_yi_without_key_value_heads_has_four() -> None:
    spec = registry().get("yi")
    config = {key: value for key, value in checkpoints.REMOTE["yi"].items() if key != "num_key_value_heads"}
    config |= {"num_attention_heads": 8, "hidden_size": 64}
    assert read_config(spec, config).num_key_value_heads == 4
    assert read_config(spec, {**config, "num_key_value_heads": None}).num_key_value_heads == 8


NTK, LOGN = "dynamic NTK acts only beyond", "logn scaling acts only beyond"


@pytest.mark.parametrize("changes, said", [
    ({}, {NTK, LOGN}), ({"use_dynamic_ntk": None, "use_logn_attn": None}, set()),
    ({"use_dynamic_ntk": False}, {LOGN}), ({"use_logn_attn": False, "use_dynamic_ntk": False}, set()),
])  # fmt: skip
def test_what_acts_beyond_the_training_length_is_told(changes: dict[str, Any], said: set[str], tmp_path: Path) -> None:
    source = checkpoints.make("qwen", tmp_path / "src", **changes)
    notes = plan_conversion(source, "llama").notes
    assert {start for start in (NTK, LOGN) if any(note.startswith(start) for note in notes)} == said


def test_it_is_told_where_the_keys_are_absent_too(tmp_path: Path) -> None:
    """They are true by default in configuration_qwen.py."""
    source = checkpoints.make("qwen", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("use_dynamic_ntk", "use_logn_attn")}
    (source / "config.json").write_text(json.dumps(kept))
    assert sum(note.startswith((NTK, LOGN)) for note in plan_conversion(source, "llama").notes) == 2


@pytest.mark.parametrize("theta, told", [(10000.0, False), (5e6, True)])
def test_rope_ratio_is_told_when_written(theta: float, told: bool, tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src", rope_theta=theta)
    assert any("`rope_ratio`" in note for note in plan_conversion(source, "chatglm").notes) == told


def test_internlm2_gets_the_two_keys_it_insists_on(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4}
    source = checkpoints.make("llama_mha", tmp_path / "src", rope_scaling=scaling)
    convert(source, tmp_path / "dst", to="internlm2", verify="weights")
    written = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert written["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert isinstance(written["rope_scaling"]["factor"], float)
    assert compare_logits(source, tmp_path / "dst", greedy_tokens=0).verdict


def test_qwen_v1_is_reached_from_a_bare_llama(tmp_path: Path) -> None:
    source = checkpoints.make("llama_mha", tmp_path / "src")
    report = convert(source, tmp_path / "dst", to="qwen1")
    assert report.target_architecture == "qwen1" and report.logits is not None and report.logits["verdict"]
    written = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert written["architectures"] == ["QWenLMHeadModel"] and written["use_dynamic_ntk"] is False


@pytest.mark.parametrize("arch", ["yi", "internlm2", "qwen", "deepseek_moe", "baichuan"])
def test_tied_models_come_home_tied(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src", tie_word_embeddings=True)
    through = "canonical" if arch == "deepseek_moe" else "llama"
    convert(source, tmp_path / "there", to=through)
    assert json.loads((tmp_path / "there" / "config.json").read_text())["tie_word_embeddings"] is True
    convert(
        tmp_path / "there", tmp_path / "home", to=registry().detect(checkpoints.REMOTE[arch]).name, verify="weights"
    )
    before, after = checkpoints.tensors(source), checkpoints.tensors(tmp_path / "home")
    assert before.keys() - after.keys() <= {"lm_head.weight", "output.weight"} and len(after) == len(before) - 1
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_a_null_where_true_is_the_default_is_false(tmp_path: Path) -> None:
    """transformers' `if self.norm_topk_prob` and the published code's take it so."""
    source = checkpoints.make("moonlight", tmp_path / "src", norm_topk_prob=None)
    report = convert(source, tmp_path / "dst", to="canonical")
    assert report.config["norm_topk_prob"] is False and report.logits is not None and report.logits["verdict"]


@pytest.mark.parametrize("arch, key", [
    ("moonlight", "rope_interleave"), ("glm", "partial_rotary_factor"), ("glm4", "partial_rotary_factor"),
    ("qwen", "scale_attn_weights"), ("chatglm2", "rmsnorm"),
])  # fmt: skip
def test_a_null_that_readers_take_for_another_model_is_refused(arch: str, key: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: None}))
    with pytest.raises(Refused, match=f"`{key}`.* null"):
        plan_conversion(source, "canonical")


@pytest.mark.parametrize("arch, spec", [("baichuan2", "baichuan2"), ("baichuan_13b", "baichuan2_13b")])
def test_a_tied_head_that_the_published_code_normalises_is_refused(arch: str, spec: str, tmp_path: Path) -> None:
    """Its first forward pass overwrites the head, and so the embedding of every later one."""
    source = checkpoints.make(arch, tmp_path / "src", tie_word_embeddings=True, norm_head=True, position_embedding=
                              "ROPE" if arch == "baichuan2" else "ALIBI")  # fmt: skip
    with pytest.raises(Refused, match="tie_word_embeddings"):
        plan_conversion(source, "canonical", source_name=spec)


BAICHUAN = {key: value for key, value in checkpoints.REMOTE["baichuan"].items() if key != "max_position_embeddings"}
BAICHUAN |= {"architectures": ["BaichuanForCausalLM"], "model_max_length": 256}
MAP = {"auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"}}
SEVEN, THIRTEEN = (
    {"num_attention_heads": 32, "num_hidden_layers": 32},
    {"num_attention_heads": 40, "num_hidden_layers": 40},
)


@pytest.mark.parametrize("changes, names, code, spec", [
    ({"architectures": ["BaiChuanForCausalLM"]}, (), None, "baichuan"),
    ({"max_position_embeddings": 256}, (), None, "baichuan2"),
    (SEVEN, (), None, "baichuan2"),
    ({**SEVEN, "gradient_checkpointing": False}, (), None, "baichuan2"),
    ({}, ("model.layers.0.self_attn.rotary_emb.inv_freq",), None, "baichuan2"),
    ({**THIRTEEN, "vocab_size": 64000}, (), None, "baichuan_13b"),
    ({**THIRTEEN, "vocab_size": 125696}, (), None, "baichuan2_13b"),
    ({**THIRTEEN, "vocab_size": 64000, "max_position_embeddings": 4096}, (), None, "baichuan_13b"),
    ({"gradient_checkpointing": [False], "vocab_size": 125696}, (), None, "baichuan2_13b"),
    ({"gradient_checkpointing": False, "z_loss_weight": 0}, (), None, "baichuan2_13b"),
    (MAP, (), "class RotaryEmbedding: ...\nclass NormHead: ...", "baichuan2"),
    ({**MAP, "vocab_size": 125800}, (), "def _fill_with_neg_inf(alibi): ...\nclass NormHead: ...", "baichuan2_13b"),
    ({**MAP, "vocab_size": 64010}, (), "def _fill_with_neg_inf(alibi): ...", "baichuan_13b"),
    # The code has the last word.
    ({**MAP, **SEVEN, "max_position_embeddings": 4096}, (), "alibi NormHead", "baichuan2_13b"),
    ({"position_embedding": "ALIBI", "norm_head": True, "max_position_embeddings": 256}, (), None, "baichuan2_13b"),
    # Nothing tells, or too much.
    ({}, (), None, None), ({"model_max_length": 4096}, (), None, None),
    ({"gradient_checkpointing": False, "max_position_embeddings": 256}, (), None, None),
    ({**THIRTEEN, "vocab_size": 64001}, (), None, None),
])  # fmt: skip
def test_which_baichuan_it_is(
    changes: dict[str, Any], names: tuple[str, ...], code: str | None, spec: str | None, tmp_path: Path
) -> None:
    if code is not None:
        (tmp_path / "modeling_baichuan.py").write_text(code)
    config = {**BAICHUAN, **changes}
    stored = {name: StoredTensor(name, tmp_path / "model.safetensors", 0, "F32", (4,)) for name in names}
    if spec is not None:
        assert registry().detect(config, stored, tmp_path).name == spec
        return
    with pytest.raises(Refused, match="does not tell which") as caught:
        registry().detect(config, stored, tmp_path)
    assert "--from" in str(caught.value.hint) and '"norm_head"' in str(caught.value.hint)


def test_added_tokens_do_not_change_the_head(tmp_path: Path) -> None:
    """A Baichuan2 7B of 125,696 + 8 tokens, or of any number, is one."""
    source = checkpoints.make("baichuan2", tmp_path / "src", vocab_size=139)
    report = convert(source, tmp_path / "dst", to="llama")
    assert any("NormHead" in step["name"] for step in report.steps)


def test_a_contradiction_of_what_the_user_says_is_refused(tmp_path: Path) -> None:
    source = checkpoints.make("baichuan_13b", tmp_path / "src")
    with pytest.raises(Refused, match="`position_embedding` = 'ALIBI'"):
        plan_conversion(source, "llama", source_name="baichuan2")


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


@pytest.mark.parametrize("changes, agree", [
    ({"mscale": 1.0, "mscale_all_dim": 1.0}, True), ({"mscale": 0.707, "mscale_all_dim": 0.707}, True), ({}, True),
    ({"mscale": 1.0}, True), ({"mscale": 0.707}, False), ({"mscale_all_dim": 0.707}, False),
    ({"mscale": 0.5, "mscale_all_dim": 0}, False), ({"mscale": 1, "mscale_all_dim": 1, "truncate": False}, False),
    ({"mscale": 1, "mscale_all_dim": 1, "original_max_position_embeddings": None}, False),
    ({"mscale": 1, "mscale_all_dim": 1, "beta_fast": None}, True), ({"attention_factor": 1.2}, False),
])  # fmt: skip
def test_yarn_that_means_two_things_is_refused(changes: dict[str, Any], agree: bool, tmp_path: Path) -> None:
    scaling = {key: value for key, value in {**YARN, **changes}.items() if value is not None}
    source = checkpoints.make("moonlight", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "rope_parameters"} | {
        "rope_scaling": scaling,
        "rope_theta": 10000,
    }
    (source / "config.json").write_text(json.dumps(config))
    plan_conversion(source, "deepseek_v3", dtype="bfloat16")  # it stays what it is
    if agree:
        plan_conversion(source, "canonical")
        return
    with pytest.raises(Refused, match="YaRN") as caught:
        plan_conversion(source, "canonical")
    assert "attention_factor" in str(caught.value.hint)


@pytest.mark.parametrize("command", [
    ["inspect", "SRC", "--json"], ["convert", "SRC", "DST", "--to", "llama", "--verify", "weights"],
    ["baichuan-to-llama", "SRC", "DST"], ["split", "SRC", "DST", "--verify", "weights"], ["megatron-args", "SRC", "--json"],
    ["roundtrip", "SRC", "--to", "canonical", "--verify", "weights"], ["to-reward", "SRC", "DST", "--pad-token-id", "0"],
])  # fmt: skip
def test_every_command_can_be_told_what_it_is(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.make("baichuan2", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("norm_head", "position_embedding", "max_position_embeddings")}
    (source / "config.json").write_text(json.dumps(config | {"model_max_length": 256}))
    arguments = [{"SRC": str(source), "DST": str(tmp_path / "dst")}.get(word, word) for word in command]
    code = _run(arguments)
    shown = capsys.readouterr()
    assert code == (0 if command[0] == "inspect" else 3) and "--from baichuan2" in shown.out + shown.err
    assert _run([*arguments, "--from", "baichuan2"]) == 0
    shown = capsys.readouterr()
    assert "does not tell which" not in shown.out + shown.err
    if command[0] == "inspect":
        assert json.loads(shown.out)["architecture"] == "baichuan2"


def _run(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
