"""Mixtures of experts, latent attention, layers that predict further tokens: to themselves, to each other, to the
canonical layout, and back, byte for byte; what they cannot become, and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from llmconvert.canonical import model as canonical
from llmconvert.converters.huggingface import convert
from llmconvert.errors import BadInput, Refused
from llmconvert.spec.dialect import read_config, write_config
from llmconvert.spec.expand import bind
from llmconvert.spec.registry import registry
from llmconvert.verify.logits import compare_logits

OWN = {
    "mixtral": "mixtral", "qwen2_moe": "qwen2_moe", "qwen3_moe": "qwen3_moe", "deepseek_moe": "deepseek_moe",
    "deepseek_v2": "deepseek_v2", "deepseek_v2_lite": "deepseek_v2", "deepseek_v3": "deepseek_v3",
    "moonlight": "deepseek_v3", "glm4_moe": "glm4_moe", "glm4": "glm4", "qwen3": "qwen3",
}  # fmt: skip


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def rewrite(directory: Path, edit: Any) -> Path:
    """Change a checkpoint's tensors; it becomes one file."""
    state = checkpoints.tensors(directory)
    for old in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        old.unlink()
    save_file(edit(state), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("form", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", OWN)
def test_to_itself_and_through_the_canonical_layout(arch: str, dtype: torch.dtype, form: int, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src", dtype=dtype, form=form)
    before = checkpoints.tensors(source)
    convert(source, tmp_path / "same", to=OWN[arch], verify="weights")
    same(before, checkpoints.tensors(tmp_path / "same"))
    convert(source, tmp_path / "canonical", to="canonical", verify="weights")
    convert(tmp_path / "canonical", tmp_path / "back", to=OWN[arch], verify="weights")
    same(before, checkpoints.tensors(tmp_path / "back"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("src", "back")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("arch", OWN)
def test_what_is_written_is_read_alike(arch: str, tmp_path: Path) -> None:
    """By transformers itself where it has the class: logits, with every tensor the model has in place."""
    source = checkpoints.make(arch, tmp_path / "src")
    convert(source, tmp_path / "dst", to=OWN[arch], verify="weights")
    found = compare_logits(source, tmp_path / "dst", load="whole", greedy_tokens=0)
    # Our own reference sums in an order that depends on where its tensors lie in memory.
    assert found.relative == 0.0 or (arch == "deepseek_moe" and found.exact_relative == 0.0)


@pytest.mark.parametrize(
    ("arch", "target"), [("deepseek_moe", "qwen2_moe"), ("mixtral", "deepseek_moe"), ("mixtral", "qwen3_moe")]
)
def test_to_each_other(arch: str, target: str, tmp_path: Path) -> None:
    source = checkpoints.make(
        arch, tmp_path / "src", **({"num_key_value_heads": 6} if target == "deepseek_moe" else {})
    )
    convert(source, tmp_path / "dst", to=target, verify="weights")
    assert compare_logits(source, tmp_path / "dst", load="whole").relative <= (1e-4 if target == "qwen3_moe" else 1e-5)
    if target != "qwen3_moe":
        convert(tmp_path / "dst", tmp_path / "back", to=arch, verify="weights")
        same(checkpoints.tensors(source), checkpoints.tensors(tmp_path / "back"))


def test_a_trained_gate_of_shared_experts_is_not_dropped(tmp_path: Path) -> None:
    source = checkpoints.make(
        "qwen2_moe", tmp_path / "src", qkv_bias=False, mlp_only_layers=[0], shared_expert_intermediate_size=64
    )
    with pytest.raises(Refused, match="the gate is not zero"):
        convert(source, tmp_path / "dst", to="deepseek_moe", verify="weights")


NOT = [
    ("mixtral", "mistral", "moe"), ("deepseek_v3", "llama", "mla"), ("deepseek_v3", "deepseek_v2", "mtp"),
    ("moonlight", "deepseek_v2", "sigmoid_router"), ("glm4_moe", "qwen3_moe", "router_bias"),
    ("qwen2_moe", "qwen3_moe", "shared_experts"), ("qwen2_moe", "mixtral", "dense_layers"),
    ("mixtral", "qwen2_moe", "shared_experts"), ("glm4", "llama", "branch_output_norm"), ("llama_mha", "deepseek_v3", "mla"),
    ("llama", "mixtral", "moe"), ("deepseek_v2", "glm4_moe", "mla"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "target", "trait"), NOT)
def test_refused_with_the_trait(arch: str, target: str, trait: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=f"`{trait}`"):
        convert(checkpoints.make(arch, tmp_path / "src"), tmp_path / "dst", to=target, verify="weights")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("arch", ["qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_fused_experts_are_read_and_written_one_by_one(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src")
    apart = checkpoints.tensors(source)

    def fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {name: t for name, t in state.items() if ".experts." not in name}
        for stem in sorted({name.partition("experts.")[0] for name in state if ".mlp.experts." in name}):
            count = sum(name.startswith(stem) and name.endswith("experts.0.up_proj.weight") for name in state)
            assert count == 1
            number = len(
                {name.split("experts.")[1].split(".")[0] for name in state if name.startswith(stem + "experts.")}
            )
            part = {
                p: [state[f"{stem}experts.{j}.{p}_proj.weight"] for j in range(number)] for p in ("gate", "up", "down")
            }
            pairs = zip(part["gate"], part["up"], strict=True)
            result[stem + "experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            result[stem + "experts.down_proj"] = torch.stack(part["down"])
        return result

    fused = rewrite(source, fuse)
    assert any(name.endswith("experts.gate_up_proj") for name in checkpoints.tensors(fused))
    convert(fused, tmp_path / "dst", to=OWN[arch], verify="weights")
    same(apart, checkpoints.tensors(tmp_path / "dst"))


def test_further_token_layers_are_kept_or_told(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "src")

    def lose(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in state.items() if not name.startswith("model.layers.3.")}

    report = convert(rewrite(source, lose), tmp_path / "dst", to="deepseek_v3", verify="weights")
    assert any("num_nextn_predict_layers 1, the checkpoint holds 0" in note for note in report.notes)
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["num_nextn_predict_layers"] == 0

    def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for name, t in state.items() if name != "model.layers.3.mlp.experts.5.up_proj.weight"}

    with pytest.raises(BadInput, match=r"1 missing: `model.layers.3.mlp.experts.5.up_proj.weight`"):
        convert(rewrite(checkpoints.make("deepseek_v3", tmp_path / "b"), half), tmp_path / "dst2", to="deepseek_v3")


SENSELESS = [
    ("deepseek_v3", {"num_experts_per_tok": 9}, BadInput), ("deepseek_v3", {"n_group": 3}, BadInput),
    ("deepseek_v3", {"topk_group": 5}, BadInput), ("deepseek_v3", {"scoring_func": "softmax"}, Refused),
    ("deepseek_v3", {"rope_interleave": False}, Refused), ("deepseek_v3", {"attention_bias": True}, BadInput),
    ("deepseek_v2", {"norm_topk_prob": True}, Refused), ("deepseek_moe", {"moe_layer_freq": 2}, Refused),
    ("deepseek_v3", {"n_routed_experts": 7}, BadInput), ("deepseek_v3", {"kv_lora_rank": None}, BadInput),
    ("qwen2_moe", {"num_experts": -4}, BadInput), ("glm4_moe", {"n_shared_experts": 3}, BadInput),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "values", "error"), SENSELESS)
def test_configs_that_do_not_fit(arch: str, values: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(error):
        convert(source, tmp_path / "dst", to=OWN[arch], verify="weights")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sizes_have_one_name_a_tensor(data: st.DataObject) -> None:
    """In every dialect: names and shapes of a config, read back from what is written, are the same."""
    spec = registry().specs[
        data.draw(st.sampled_from(["deepseek_v3", "deepseek_v2", "glm4_moe", "qwen3_moe", "canonical"]))
    ]
    arch = {"canonical": "deepseek_v3"}.get(spec.name, spec.name)
    whole = data.draw(st.integers(1, 5))
    experts, groups = data.draw(st.sampled_from([(4, 1), (6, 3), (8, 2)]))
    cls, own = checkpoints.NATIVE[arch]
    config = {**checkpoints.BASE, **own, "num_hidden_layers": whole, "n_routed_experts": experts, "num_experts": experts,
              "num_local_experts": experts, "n_group": groups, "topk_group": groups, "num_experts_per_tok": 2,
              "first_k_dense_replace": data.draw(st.integers(0, whole)), "mlp_only_layers": [0] if whole > 1 else []}  # fmt: skip
    source = registry().specs[arch]
    others = (
        ("num_experts", "num_local_experts") if arch != "qwen3_moe" else ("n_routed_experts", "first_k_dense_replace")
    )
    config = {key: value for key, value in config.items() if key not in others}
    read = read_config(source, config)
    if "mtp_copies" not in spec.holds:
        read = replace(read, mtp_copies=False)
    shapes = canonical.shapes(read)
    assert len(shapes) == len(set(shapes)) and list(shapes)[0] == "model.embed_tokens.weight"
    expert_layers = sum(read.has_experts(i) for i in read.layers)
    assert sum(".experts." in name for name in shapes) == 3 * experts * expert_layers
    bindings = bind(spec, read, config)
    assert sorted(name for b in bindings for name in b.parts) == sorted(shapes)
    assert len({b.stored for b in bindings}) == len(bindings)
    again = read_config(spec, json.loads(json.dumps(write_config(spec, read, {}, "BF16"))))
    assert canonical.shapes(again) == shapes
