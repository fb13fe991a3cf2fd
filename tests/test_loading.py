"""A result that its own class cannot load is not published: what is built without memory, and what of it can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from safetensors.torch import save_file

from llmconvert.converters import running
from llmconvert.converters.huggingface import convert
from llmconvert.converters.megatron import grid as grids
from llmconvert.converters.megatron.merge import merge_checkpoint
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.converters.reward import to_reward
from llmconvert.errors import ProofFailed
from llmconvert.models import CanonicalModelConfig
from llmconvert.verify import loading
from llmconvert.verify.loading import prove_loads

FIVE = int(transformers.__version__.split(".")[0]) >= 5
FURTHER = "deepseek_v3", "glm4_moe"


def _edit(directory: Path, **changes: Any) -> None:
    """Change config.json; a value of ... takes a key out."""
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in checkpoints.tensors(directory).items()}


@pytest.mark.parametrize("arch", checkpoints.ALL)
def test_every_checkpoint_loads_and_its_canonical_form_too(arch: str, tmp_path: Path) -> None:
    """What transformers itself wrote, first: so the proof does not refuse what is right."""
    checkpoints.make(arch, tmp_path / "a")
    found = prove_loads(tmp_path / "a")
    kind = json.loads((tmp_path / "a/config.json").read_text())["model_type"]
    if arch in checkpoints.REMOTE:
        assert found == f"not loaded: this transformers has no class for `{kind}`"
    else:
        assert found.startswith("its class loads it: `") and ("further tokens" in found) == (arch in FURTHER)
    report = convert(tmp_path / "a", tmp_path / "b", to="canonical", verify="weights")
    assert report.loading == "its class loads it: `CanonicalForCausalLM`"
    record = json.loads((tmp_path / "b/llmconvert-report.json").read_text())
    assert record["loading"] == report.loading


def test_transformers_agrees_with_the_verdict(tmp_path: Path) -> None:
    """The same directories, loaded for real: what is said to load lacks nothing, what is said not to does."""
    for arch in ("qwen3_moe", "deepseek_v3", "glm"):
        checkpoints.make(arch, tmp_path / arch)
        _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / arch, output_loading_info=True)
        assert not info["missing_keys"] and prove_loads(tmp_path / arch).startswith("its class loads it")
        state = checkpoints.tensors(tmp_path / arch)
        lost = next(name for name in sorted(state) if "layers.1." in name and name.endswith("up_proj.weight"))
        for old in (tmp_path / arch).glob("model*"):
            old.unlink()
        save_file(
            {k: v for k, v in state.items() if k != lost}, tmp_path / arch / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(ProofFailed, match=f"no tensor `{lost}`"):
            prove_loads(tmp_path / arch)


def _take(text: str) -> Callable[[dict[str, tuple[int, ...]]], None]:
    def edit(shapes: dict[str, tuple[int, ...]]) -> None:
        for name in [name for name in shapes if text in name]:
            del shapes[name]

    return edit


def _reshape(text: str, shape: tuple[int, ...]) -> Callable[[dict[str, tuple[int, ...]]], None]:
    return lambda shapes: shapes.update({name: shape for name in shapes if text in name})


def _add(name: str) -> Callable[[dict[str, tuple[int, ...]]], None]:
    return lambda shapes: shapes.update({name: (48,)})


FAULTS = [
    ("llama", _take("layers.2.self_attn.k_proj"), "no tensor `model.layers.2.self_attn.k_proj.weight`"),
    ("llama", _take("lm_head"), "no tensor `lm_head.weight`"),
    ("llama", _reshape("layers.1.mlp.up_proj", (104, 47)), r"`model.layers.1.mlp.up_proj.weight` is \[104, 47\], not \[104, 48\]"),
    ("llama", _add("model.layers.1.self_attn.q_proj.bias"), "`model.layers.1.self_attn.q_proj.bias` has no place in it"),
    ("llama", _add("model.layers.3.input_layernorm.weight"), "`model.layers.3.input_layernorm.weight` has no place in it"),
    ("llama", _take("layers.1."), "no tensor `model.layers.1."),
    ("qwen3_moe", _take("layers.1.mlp.experts.3.up_proj"), "no tensor `model.layers.1.mlp.experts.3.up_proj.weight`"),
    ("qwen3_moe", _take("layers.2.mlp.experts.7."), "experts"),  # the last, so that those that are there can be fused
    ("qwen3_moe", _take("layers.2.mlp.gate."), "no tensor `model.layers.2.mlp.gate.weight`"),
    ("qwen3_moe", _reshape("layers.0.mlp.experts.2.down_proj", (48, 31)), "."),
    ("deepseek_v3", _take("layers.2.mlp.gate.e_score_correction_bias"), "no tensor .*e_score_correction_bias"),
    ("canonical qwen3_moe", _take("layers.2.mlp.experts.7.up"), "no tensor `model.layers.2.mlp.experts.7.up_proj.weight`"),
    ("canonical deepseek_v3", _take("layers.2.self_attn.kv_b_proj"), "no tensor `model.layers.2.self_attn.kv_b_proj.weight`"),
    ("canonical deepseek_v3", _take("layers.3.eh_proj"), "no tensor `model.layers.3.eh_proj.weight`"),
    ("canonical gemma2", _add("model.layers.2.odd.weight"), "`model.layers.2.odd.weight` has no place in it"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "edit", "match"), FAULTS)
def test_what_does_not_fit_is_named(arch: str, edit: Any, match: str, tmp_path: Path) -> None:
    arch, canonical = arch.removeprefix("canonical "), arch.startswith("canonical ")
    where = checkpoints.make(arch, tmp_path / "a")
    if canonical:
        convert(where, tmp_path / "b", to="canonical", verify="weights")
        where = tmp_path / "b"
    shapes = _shapes(where)
    prove_loads(where, shapes)
    edit(shapes)
    with pytest.raises(ProofFailed, match=match):
        prove_loads(where, shapes)


def test_tied_tensors_may_be_left_out_and_no_others(tmp_path: Path) -> None:
    checkpoints.make("llama_tied", tmp_path / "a")
    shapes = _shapes(tmp_path / "a")
    assert "lm_head.weight" not in shapes
    prove_loads(tmp_path / "a", shapes)
    prove_loads(tmp_path / "a", {**shapes, "lm_head.weight": (131, 48)})
    prove_loads(tmp_path / "a", {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    _edit(tmp_path / "a", tie_word_embeddings=False)
    with pytest.raises(ProofFailed, match="no tensor `lm_head.weight`"):
        prove_loads(tmp_path / "a", shapes)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("config.json", {"pad_token_id": {"a": 1}}, r"`pad_token_id` in config.json is \{\"a\": 1\}"),
        ("config.json", {"bos_token_id": True}, "`bos_token_id`"), ("config.json", {"pad_token_id": [0]}, "`pad_token_id`"),
        ("config.json", {"eos_token_id": [2, "3"]}, "`eos_token_id`"), ("config.json", {"eos_token_id": [2, None]}, "null"),
        ("config.json", {"eos_token_id": float("inf")}, "Infinity"),
        ("generation_config.json", {"pad_token_id": "0"}, "`pad_token_id` in generation_config.json"),
        ("generation_config.json", {"eos_token_id": 2.5}, "`eos_token_id` in generation_config.json"),
        ("config.json", {"hidden_act": "no_such"}, "no_such"), ("config.json", {"num_attention_heads": 5}, "."),
        ("config.json", {"rope_scaling": {"rope_type": "no_such", "factor": 2.0}}, "no_such"),
    ],
)  # fmt: skip
def test_configs_that_are_not_taken(name: str, change: dict[str, Any], match: str, tmp_path: Path) -> None:
    checkpoints.make("llama", tmp_path / "a")
    prove_loads(tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ProofFailed, match=match):
        prove_loads(tmp_path / "a")


def test_generation_settings_are_read(tmp_path: Path) -> None:
    checkpoints.make("llama", tmp_path / "a")
    for text in ("{", "[]"):
        (tmp_path / "a/generation_config.json").write_text(text)
        with pytest.raises(ProofFailed, match=r"generation_config.json is not (a )?JSON"):
            prove_loads(tmp_path / "a")
    _edit(tmp_path / "a", eos_token_id=[2, 3], pad_token_id=None)
    (tmp_path / "a/generation_config.json").unlink()
    prove_loads(tmp_path / "a")


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    checkpoints.make("llama", tmp_path / "a")
    (tmp_path / "a/modeling_own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    code = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    _edit(tmp_path / "a", auto_map=code)
    assert prove_loads(tmp_path / "a").startswith("its class loads it: `LlamaForCausalLM`")
    # Another layout of tensors may be right for code that is not run, so nothing is proved and that is said.
    shapes = {**_shapes(tmp_path / "a"), "model.extra.weight": (3,)}
    assert prove_loads(tmp_path / "a", shapes).startswith("not loaded: the code it names is not run here")
    _edit(tmp_path / "a", model_type="own")
    assert prove_loads(tmp_path / "a") == "not loaded: this transformers has no class for `own`"
    assert not (tmp_path / "canary").exists()


def test_the_canonical_code_is_llmconverts(tmp_path: Path) -> None:
    checkpoints.make("gemma2", tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="canonical", verify="weights")
    with (tmp_path / "b/modeling_canonical.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(ProofFailed, match="modeling_canonical.py is not llmconvert's"):
        prove_loads(tmp_path / "b")


# In conversions.


def _unloadable(folder: Path) -> Path:
    """A checkpoint whose Llama transformers 5 refuses: 52 wide with 6 heads, as Mistral's config allows."""
    return checkpoints.make("mistral", folder, hidden_size=52)


@pytest.mark.skipif(not FIVE, reason="transformers 4 takes any width")
@pytest.mark.parametrize("verify", ["weights", "none"])
def test_what_does_not_load_is_not_published(verify: str, tmp_path: Path) -> None:
    source = _unloadable(tmp_path / "a")
    if verify == "none":
        assert convert(source, tmp_path / "b", to="llama", verify=verify).loading is None
        return
    with pytest.raises(ProofFailed, match="does not load it.*not a multiple") as caught:
        convert(source, tmp_path / "b", to="llama", verify=verify)
    assert caught.value.exit_code == 5 and not (tmp_path / "b").exists()


@pytest.mark.skipif(not FIVE, reason="transformers 4 takes any width")
def test_of_what_takes_long_it_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_LONG", 0)
    source = _unloadable(tmp_path / "a")
    with pytest.raises(ProofFailed, match="does not load it") as caught:
        convert(source, tmp_path / "b", to="llama", verify="weights")
    assert caught.value.where == "nothing was written" and {path.name for path in tmp_path.iterdir()} == {"a"}
    checkpoints.make("deepseek_v3", tmp_path / "c")
    assert convert(tmp_path / "c", tmp_path / "d", to="canonical", verify="weights").published


def test_rewards_and_megatron_go_through_it(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "a")
    assert to_reward(source, tmp_path / "b").loading == "its class loads it: `LlamaForSequenceClassification`"
    found = to_reward(source, tmp_path / "c", head="v_head")
    assert found.loading == "its class loads it: `LlamaForCausalLM`"  # TRL loads its value head by itself
    canonical = to_reward(source, tmp_path / "d", to="canonical")
    assert canonical.loading == "its class loads it: `CanonicalForRewardModel`"
    split = split_checkpoint(source, tmp_path / "ranks", grids.Grid(2, 1), verify="weights")
    assert split.loading is None
    merged = merge_checkpoint(tmp_path / "ranks", tmp_path / "e", verify="weights")
    assert merged.loading == "its class loads it: `LlamaForCausalLM`"


def test_eight_bits_load_as_sixteen(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "a", dtype=torch.bfloat16)
    found = convert(source, tmp_path / "b", to="deepseek_v3", dtype="fp8-block128", verify="weights").loading
    assert found is not None and found.startswith("its class loads it: `DeepseekV3ForCausalLM`")


def test_where_transformers_is_missing_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints.make("llama", tmp_path / "a")
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "transformers" else object())
    assert convert(source, tmp_path / "b", to="llama", verify="weights").loading == (
        "not loaded: transformers is not installed")  # fmt: skip


# Large models: names and shapes of DeepSeek-V3, 61 layers of 256 experts, and one file's worth of nothing.

WIDTH, EXPERTS = 7168, 256


def _deepseek() -> dict[str, tuple[int, ...]]:
    def mlp(stem: str, width: int) -> dict[str, tuple[int, ...]]:
        own = {"gate_proj": (width, WIDTH), "up_proj": (width, WIDTH), "down_proj": (WIDTH, width)}
        return {f"{stem}.{name}.weight": shape for name, shape in own.items()}

    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (129280, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (129280, WIDTH),
    }  # fmt: skip
    attention = {
        "q_a_proj": (1536, WIDTH), "q_a_layernorm": (1536,), "q_b_proj": (128 * 192, 1536), "kv_a_layernorm": (512,),
        "kv_a_proj_with_mqa": (576, WIDTH), "kv_b_proj": (128 * 256, 512), "o_proj": (WIDTH, 128 * 128),
    }  # fmt: skip
    for layer in range(61):
        stem = f"model.layers.{layer}"
        found |= {f"{stem}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        found |= {f"{stem}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        if layer < 3:
            found |= mlp(f"{stem}.mlp", 18432)
            continue
        found |= {f"{stem}.mlp.gate.weight": (EXPERTS, WIDTH), f"{stem}.mlp.gate.e_score_correction_bias": (EXPERTS,)}
        found |= mlp(f"{stem}.mlp.shared_experts", 2048)
        for number in range(EXPERTS):
            found |= mlp(f"{stem}.mlp.experts.{number}", 2048)
    return found


def test_a_model_of_hundreds_of_gigabytes_is_tried_in_one_layer_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = _deepseek()
    config = CanonicalModelConfig(
        vocab_size=129280, hidden_size=WIDTH, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
        head_dim=64, rotary_dim=64, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, num_experts=EXPERTS, num_experts_per_tok=8, moe_layers=[False] * 3 + [True] * 58,
        moe_intermediate_size=2048, shared_expert_intermediate_size=2048, router_bias=True, scoring_func="sigmoid",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["CanonicalForCausalLM"]}))
    shutil.copy(Path(loading.__file__).parents[1] / "models/modeling_canonical.py", tmp_path)
    built = []
    differences = loading._differences
    monkeypatch.setattr(loading, "_differences", lambda model, known: built.append(model) or differences(model, known))
    assert prove_loads(tmp_path, shapes) == "its class loads it: `CanonicalForCausalLM`"
    assert [len(model.model.layers) for model in built] == [2]
    # Every layer counts: one that lacks a tensor is of a kind of its own, and so is one the config says otherwise of.
    lost = "model.layers.40.mlp.experts.17.up_proj.weight"
    with pytest.raises(ProofFailed, match=f"no tensor `{lost}`"):
        prove_loads(tmp_path, {name: shape for name, shape in shapes.items() if name != lost})
    _edit(tmp_path, moe_layers=[i not in (0, 1, 2, 33) for i in range(61)])
    with pytest.raises(ProofFailed, match=r"no tensor `model\.layers\.33\.mlp\.down_proj"):
        prove_loads(tmp_path, shapes)
    if FIVE:
        native = transformers.DeepseekV3Config().to_dict()
        (tmp_path / "config.json").write_text(json.dumps({**native, "architectures": ["DeepseekV3ForCausalLM"]}))
        assert prove_loads(tmp_path, shapes) == "its class loads it: `DeepseekV3ForCausalLM`"
        with pytest.raises(ProofFailed, match=f"no tensor `{lost}`"):
            prove_loads(tmp_path, {name: shape for name, shape in shapes.items() if name != lost})
