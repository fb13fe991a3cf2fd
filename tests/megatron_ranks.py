"""Megatron rank files written by hand from transformers models: plain code, for tests only, knowing nothing of ours.

Which layers a rank holds is spelled out case by case, from Megatron-LM's documentation, not computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch
from megatron_oracle import Grid, Model, arguments
from torch import Tensor, nn

PADDED_VOCAB = 136
_SIZES = {"num_attention_heads": 8, "num_hidden_layers": 4}
_LLAMA3 = {"rope_theta": 5e5, "head_dim": 16, "max_position_embeddings": 16384, "rope_scaling": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192}}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A transformers model and how its rank files are cut.

    Attributes:
        arch: a name of `checkpoints.NATIVE`.
        grid: the ranks.
        stages: the layers of every chunk, in order of depth.
        overrides: config values of the model.
        spoiled: "", or which control this is: `fc1` cut in equal parts, or `qkv` rows not interleaved.
    """

    arch: str
    grid: Grid
    stages: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),)
    overrides: dict[str, Any] = field(default_factory=dict)
    spoiled: str = ""


_EIGHT, _SIX, _FIVE = ({"num_hidden_layers": count} for count in (8, 6, 5))
_HALVES = ((0, 1), (2, 3))

CASES = {
    "tp1": Case("llama", Grid()),
    "tp2": Case("llama", Grid(tp=2)),
    "tp2_four_kv_heads": Case("llama", Grid(tp=2), overrides={"num_key_value_heads": 4}),
    "tp2_one_kv_head": Case("llama", Grid(tp=2), overrides={"num_key_value_heads": 1}),
    "tp4_two_kv_heads": Case("llama", Grid(tp=4)),
    "tp4_one_kv_head": Case("llama", Grid(tp=4), overrides={"num_key_value_heads": 1}),
    "tp4_no_groups": Case("llama_mha", Grid(tp=4), overrides={"num_key_value_heads": 8}),
    "pp2": Case("llama", Grid(pp=2), _HALVES),
    "tp2_pp2": Case("llama", Grid(tp=2, pp=2), _HALVES),
    "vpp2": Case("llama", Grid(pp=2, vpp=2), ((0, 1), (2, 3), (4, 5), (6, 7)), _EIGHT),
    "tp2_vpp2": Case("llama", Grid(tp=2, pp=2, vpp=2), ((0,), (1,), (2,), (3,))),
    "first": Case("llama", Grid(pp=2, first=1), ((0,), (1, 2, 3))),
    "first_last": Case("llama", Grid(pp=3, first=1, last=2), ((0,), (1, 2), (3, 4)), _FIVE),
    "vpp2_first": Case("llama", Grid(pp=2, vpp=2, first=2), ((0,), (1, 2), (3,), (4, 5)), _SIX),
    "counted": Case("llama", Grid(pp=2, embedding_counts=True, loss_counts=True), ((0, 1, 2), (3, 4, 5)), _SIX),
    "layout": Case("llama", Grid(pp=2, layout="Et|tttL"), ((0,), (1, 2, 3))),
    "layout_vpp2": Case("llama", Grid(pp=2, vpp=2, layout="Et|tt|t|L"), ((0,), (1, 2), (3,), ())),
    "tied": Case("llama_tied", Grid(tp=2)),
    "tied_pp2": Case("llama_tied", Grid(tp=2, pp=2), _HALVES),
    "tied_vpp2": Case("llama_tied", Grid(pp=2, vpp=2), ((0,), (1,), (2,), (3,))),
    "qkv_bias": Case("qwen2", Grid(tp=2)),
    "qkv_bias_tp4": Case("qwen2_tied", Grid(tp=4)),
    "qk_norm": Case("qwen3", Grid(tp=2, pp=2), _HALVES),
    "qk_norm_tp4": Case("qwen3", Grid(tp=4)),
    "biases": Case("llama_bias", Grid(tp=2)),
    "rope_scaling": Case("llama_llama3", Grid(tp=2), overrides=_LLAMA3),
    "rotary_interleaved_half": Case("glm", Grid(tp=2)),
}
CONTROLS = {
    "fc1_cut_naively": Case("llama", Grid(tp=2), spoiled="fc1"),
    "qkv_not_interleaved": Case("llama", Grid(), spoiled="qkv"),
    "qkv_not_interleaved_tp4": Case("llama", Grid(tp=4), spoiled="qkv"),
}


@cache
def input_ids() -> np.ndarray:
    """Two rows of 19 tokens."""
    return np.random.default_rng(5).integers(0, checkpoints.BASE["vocab_size"], (2, 19))


def build(case: Case) -> nn.Module:
    """The transformers model of a case."""
    return checkpoints.build_native(case.arch, seed=3, **{**_SIZES, **case.overrides})


def expected(case: Case) -> np.ndarray:
    """The transformers model's logits for `input_ids`."""
    with torch.no_grad():
        logits: np.ndarray = build(case)(torch.from_numpy(input_ids())).logits.numpy()
    return logits


def model_of(case: Case) -> Model:
    """Megatron's sizes for the model of a case."""
    model = build(case)
    config, names = model.config, model.state_dict()
    heads, rope = config.num_attention_heads, config.rope_parameters
    return Model(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        padded_vocab_size=PADDED_VOCAB,
        norm_epsilon=config.rms_norm_eps,
        rotary_base=int(rope["rope_theta"]),
        rotary_percent=rope.get("partial_rotary_factor") or 1.0,
        rotary_interleaved=case.arch == "glm",
        rope_scaling_factor=rope.get("factor"),
        add_qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        add_bias_linear="model.layers.0.mlp.down_proj.bias" in names,
        qk_layernorm="model.layers.0.self_attn.q_norm.weight" in names,
        tied=config.tie_word_embeddings,
    )


def shards(case: Case) -> dict[tuple[int, int, int], dict[str, Tensor]]:
    """The tensors of every (pipeline rank, chunk, tensor rank), under the names of megatron-core's local spec."""
    state, model, tp = dict(build(case).state_dict()), model_of(case), case.grid.tp
    for name in [name for name in state if name.endswith("gate_up_proj.weight")]:
        stem, halves = name.removesuffix("gate_up_proj.weight"), state[name].chunk(2)
        state[f"{stem}gate_proj.weight"], state[f"{stem}up_proj.weight"] = halves

    def vocabulary(name: str) -> Tensor:
        rows = torch.zeros(PADDED_VOCAB, model.hidden_size)
        rows[: model.vocab_size] = state[name]
        return rows

    def attention(stem: str, kind: str) -> Tensor:
        parts = [state[f"{stem}self_attn.{x}_proj.{kind}"] for x in "qkv"]
        if case.spoiled == "qkv":
            return torch.cat(parts)
        groups = zip(*(part.chunk(model.num_query_groups) for part in parts), strict=True)
        return torch.cat([part for group in groups for part in group])

    def gated(stem: str, kind: str, rank: int) -> Tensor:
        gate, up = state[f"{stem}mlp.gate_proj.{kind}"], state[f"{stem}mlp.up_proj.{kind}"]
        if case.spoiled == "fc1":
            return torch.cat([gate, up]).chunk(tp)[rank]
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])

    def layer(index: int, local: int, rank: int) -> dict[str, Tensor]:
        stem = f"model.layers.{index}."
        found = {
            "input_layernorm.weight": state[f"{stem}input_layernorm.weight"],
            "self_attention.linear_qkv.weight": attention(stem, "weight").chunk(tp)[rank],
            "self_attention.linear_proj.weight": state[f"{stem}self_attn.o_proj.weight"].chunk(tp, 1)[rank],
            "pre_mlp_layernorm.weight": state[f"{stem}post_attention_layernorm.weight"],
            "mlp.linear_fc1.weight": gated(stem, "weight", rank),
            "mlp.linear_fc2.weight": state[f"{stem}mlp.down_proj.weight"].chunk(tp, 1)[rank],
        }
        if model.add_qkv_bias or model.add_bias_linear:
            found["self_attention.linear_qkv.bias"] = attention(stem, "bias").chunk(tp)[rank]
        if model.add_bias_linear:
            found["self_attention.linear_proj.bias"] = state[f"{stem}self_attn.o_proj.bias"]
            found["mlp.linear_fc1.bias"] = gated(stem, "bias", rank)
            found["mlp.linear_fc2.bias"] = state[f"{stem}mlp.down_proj.bias"]
        if model.qk_layernorm:
            found["self_attention.q_layernorm.weight"] = state[f"{stem}self_attn.q_norm.weight"]
            found["self_attention.k_layernorm.weight"] = state[f"{stem}self_attn.k_norm.weight"]
        return {f"decoder.layers.{local}.{name}": tensor for name, tensor in found.items()}

    everything = {}
    for depth, stage in enumerate(case.stages):
        for rank in range(tp):
            part: dict[str, Tensor] = {}
            if depth == 0:
                part["embedding.word_embeddings.weight"] = vocabulary("model.embed_tokens.weight").chunk(tp)[rank]
            for local, index in enumerate(stage):
                part |= layer(index, local, rank)
            if depth == len(case.stages) - 1:
                part["decoder.final_layernorm.weight"] = state["model.norm.weight"]
                if not model.tied or case.grid.pp > 1:
                    part["output_layer.weight"] = vocabulary("lm_head.weight").chunk(tp)[rank]
            everything[depth % case.grid.pp, depth // case.grid.pp, rank] = part
    return everything


def write(case: Case, directory: Path) -> Path:
    """A checkpoint of format `torch`."""
    folder = directory / "iter_0000001"
    for (pp_rank, _, tp_rank), part in shards(case).items():
        name = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if case.grid.pp > 1 else "")
        path = folder / name / "model_optim_rng.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole = torch.load(path, weights_only=False)
        else:
            whole = {"args": arguments(model_of(case), case.grid, "torch"), "checkpoint_version": 3.0, "iteration": 1}
        chunks = sum(key.startswith("model") for key in whole)
        whole["model" if case.grid.vpp is None else f"model{chunks}"] = {k: v.clone() for k, v in part.items()}
        torch.save(whole, path)
    (directory / "latest_checkpointed_iteration.txt").write_text("1")
    return directory
