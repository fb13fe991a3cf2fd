"""Published configs and tensor names (facts copied from public repositories), at full size over sparse files."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from sparse import make_sparse

from llmconvert.converters.planning import plan_conversion
from llmconvert.errors import LlmconvertError, Refused

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "published" / "checkpoints.json").read_text()
)

CONVERTS = {
    "chatglm2-6b": 6_243_584_000, "devstral-small": 23_572_403_200, "gemma": 2_506_172_416 + 256_000 * 2048,
    "glm-4-9b-chat": 9_399_951_360, "internlm-20b": 20_088_714_240, "internlm2-chat-1.8b": 1_889_110_016,
    "llama-7b-hf": 6_738_415_616, "qwen-7b": 7_721_324_544, "qwen1.5-14b-chat": 14_167_290_880,
    "qwen2.5-14b-cogito": 14_765_947_904, "qwen2.5-3b-tied": 3_085_938_688, "smollm2-135m": 134_515_008,
    "yi-1.5-6b-merge": 6_061_035_520,
}  # fmt: skip
"""Parameters of the Llama each becomes, without the o_proj biases some are given (from the model cards, where they say)."""

REFUSED = {
    "baichuan-13b-chat": "alibi", "baichuan2-13b-chat": "alibi", "chatglm-6b": "first version", "deepseek-r1": "mla",
    "llama-3.1-8b-finetune": "quantised", "mixtral-8x22b-wizardlm2": "moe", "qwen-7b-chat-int4": "quantised",
    "qwen3-1.7b": "qk_norm", "qwen3-32b": "qk_norm", "deepseek-v3-base": "mla",
}  # fmt: skip


def _names(templates: dict[str, int]) -> list[str]:
    names = []
    for template, count in templates.items():
        fields = template.count("{i}")
        if not fields:
            names.append(template)
        elif fields == 1:
            names += [template.replace("{i}", str(i)) for i in range(count)]
        else:
            for i, j in itertools.product(range(count // 8), range(8)):
                names.append(template.replace("{i}", str(i), 1).replace("{i}", str(j), 1))
    return names


def _shape(name: str, c: dict[str, Any]) -> tuple[int, ...]:
    """Shapes by name, from the config, written down apart from the specs."""
    h, heads = c["hidden_size"], c["num_attention_heads"]
    d = c.get("head_dim") or c.get("kv_channels") or h // heads
    kv = c.get("num_key_value_heads") or (c["multi_query_group_num"] if c.get("multi_query_attention") else heads)
    f = c.get("ffn_hidden_size") or c.get("inner_hidden_size") or c["intermediate_size"]
    f = f // 2 if c["model_type"] == "qwen" else f
    vocab = c.get("padded_vocab_size") or c["vocab_size"]
    module, _, param = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if leaf in ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "lm_head", "output", "output_layer"):
        return (vocab, h)
    if param == "inv_freq":
        return (d // 4,) if "rotary_pos_emb" in name else (d // 2,)
    outputs = {
        "q_proj": heads * d, "k_proj": kv * d, "v_proj": kv * d, "o_proj": h, "wo": h, "dense": h, "gate_proj": f,
        "up_proj": f, "w1": f, "w3": f, "down_proj": h, "dense_h_to_4h": 2 * f, "dense_4h_to_h": h, "W_pack": 3 * h,
        "c_attn": 3 * h, "wqkv": (heads + 2 * kv) * d, "query_key_value": (heads + 2 * kv) * d, "c_proj": h,
    }  # fmt: skip
    outputs["w2"] = f if c["model_type"] == "qwen" else h
    if leaf in outputs and "norm" not in leaf:
        if param == "bias":
            return (outputs[leaf],)
        inputs = {"o_proj": heads * d, "wo": heads * d, "dense": heads * d, "down_proj": f, "dense_4h_to_h": f}
        inputs["w2"] = h if c["model_type"] == "qwen" else f
        fan_in = f if name.endswith("mlp.c_proj.weight") else inputs.get(leaf, h)
        return (outputs[leaf], fan_in)
    return (d,) if leaf in ("q_norm", "k_norm") else (h,)


def _checkpoint(name: str, directory: Path) -> Path:
    entry = PUBLISHED[name]
    # Where the list of tensors is not known, enough of them that they could be a model's of so many layers.
    templates = entry.get("templates", {"model.embed_tokens.weight": 1, "model.layers.{i}.input_layernorm.weight": 200})
    shapes = {n: _shape(n, entry["config"]) for n in _names(templates)}
    return make_sparse(entry["config"], shapes, directory)


@pytest.mark.parametrize("name", CONVERTS)
def test_published_checkpoint_plans(name: str, tmp_path: Path) -> None:
    conversion = plan_conversion(_checkpoint(name, tmp_path / "src"), "llama")
    added = sum(math.prod(o.expression.shape) for o in conversion.plan.tensors if o.name.endswith("o_proj.bias"))
    parameters = sum(math.prod(o.expression.shape) for o in conversion.plan.tensors)
    assert parameters - added == CONVERTS[name]
    config = json.loads(conversion.plan.texts["config.json"])
    assert {"rope_theta", "rope_scaling", "torch_dtype", "head_dim"} <= config.keys()
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", REFUSED)
def test_published_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        plan_conversion(_checkpoint(name, tmp_path / "src"), "llama")
    assert REFUSED[name] in str(caught.value)
    assert caught.value.exit_code == 3
    assert caught.value.hint


def test_every_published_checkpoint_is_decided() -> None:
    undecided = set(PUBLISHED) - set(CONVERTS) - set(REFUSED)
    assert undecided == {"qwen2.5-7b-instruct"}  # a config without a list of tensors


def test_glm_reaches_every_reader(tmp_path: Path) -> None:
    conversion = plan_conversion(_checkpoint("glm-4-9b-chat", tmp_path / "src"), "llama")
    config = json.loads(conversion.plan.texts["config.json"])
    assert config["rope_theta"] == pytest.approx(5e6**2)
    scaling = config["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert scaling["short_factor"] == scaling["long_factor"] == [1.0] * 32 + [1e30] * 32
    assert scaling["original_max_position_embeddings"] == config["max_position_embeddings"] == 131072
    assert (scaling["factor"], scaling["attention_factor"]) == (1.0, 1.0)
    assert config["rms_norm_eps"] == 1.5625e-07
    assert config["eos_token_id"] == [151329, 151336, 151338]


def test_transformers_5_config_is_read_and_written_for_4(tmp_path: Path) -> None:
    conversion = plan_conversion(_checkpoint("smollm2-135m", tmp_path / "src"), "llama")
    config = json.loads(conversion.plan.texts["config.json"])
    assert config["rope_theta"] == 100000
    assert config["tie_word_embeddings"] is True
    assert config["torch_dtype"] == "bfloat16"


def test_inv_freq_is_dropped_with_a_line(tmp_path: Path) -> None:
    conversion = plan_conversion(_checkpoint("llama-7b-hf", tmp_path / "src"), "llama")
    assert len(conversion.ledger.dropped) == 32


def test_contradicting_bias_key_is_an_error(tmp_path: Path) -> None:
    entry = PUBLISHED["qwen2.5-14b-cogito"]
    config = {**entry["config"], "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False}
    shapes = {n: _shape(n, config) for n in _names(entry["templates"])}
    with pytest.raises(LlmconvertError, match="attention_bias") as caught:
        plan_conversion(make_sparse(config, shapes, tmp_path), "mistral")
    assert caught.value.exit_code == 4
