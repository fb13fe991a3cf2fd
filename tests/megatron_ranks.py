"""Megatron rank files written by hand from transformers models: plain code, for tests only, knowing nothing of ours.

Which layers a rank holds is spelled out case by case, from Megatron-LM's documentation, not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
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
        arch: a name of `checkpoints.NATIVE` or `checkpoints.LARGE`.
        grid: the ranks.
        stages: the layers of every chunk, in order of depth.
        overrides: config values of the model.
        spoiled: "", or which control this is: `fc1` cut in equal parts, `qkv` rows not interleaved; of mixtures of
            experts and latent attention, `swapped` two experts, `bias` of the routers zero, `rope` rows in halves,
            `shared` experts zero, `expert_fc1` cut in equal parts, `order` of the two inputs of `eh_proj`.
        mtp: layers that predict further tokens.
    """

    arch: str
    grid: Grid
    stages: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),)
    overrides: dict[str, Any] = field(default_factory=dict)
    spoiled: str = ""
    mtp: int = 0


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
    "biases_of_attention": Case("llama", Grid(tp=2, pp=2), _HALVES, {"attention_bias": True}),
    "rope_scaling": Case("llama_llama3", Grid(tp=2), overrides=_LLAMA3),
    "rotary_interleaved_half": Case("glm", Grid(tp=2)),
}
CONTROLS = {
    "fc1_cut_naively": Case("llama", Grid(tp=2), spoiled="fc1"),
    "qkv_not_interleaved": Case("llama", Grid(), spoiled="qkv"),
    "qkv_not_interleaved_tp4": Case("llama", Grid(tp=4), spoiled="qkv"),
}

_THREE = {"num_hidden_layers": 3}
_LARGE_GRIDS: dict[str, tuple[Grid, tuple[tuple[int, ...], ...]]] = {
    "tp1": (Grid(), ((0, 1, 2),)),
    "tp2": (Grid(tp=2), ((0, 1, 2),)),
    "ep2": (Grid(ep=2), ((0, 1, 2),)),
    "tp2_ep2": (Grid(tp=2, ep=2), ((0, 1, 2),)),
    "tp2_ep2_etp1": (Grid(tp=2, ep=2, etp=1), ((0, 1, 2),)),
    "pp2_ep2": (Grid(pp=2, ep=2, first=2), ((0, 1), (2,))),
}
_YARN = {"rope_theta": 10000.0, "rope_scaling": {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.8, "mscale_all_dim": 0.6,
    "beta_fast": 32, "beta_slow": 1}}  # fmt: skip
_MODELS: dict[str, Case] = {
    "qwen2_moe": Case("qwen2_moe", Grid(), overrides={
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
        "mlp_only_layers": []}),
    "qwen3_moe": Case("megatron_qwen3_moe", Grid()),
    "mixtral": Case("mixtral", Grid(), overrides={"num_local_experts": 6, "head_dim": 16}),
    "deepseek_v3": Case("megatron_deepseek_v3", Grid(), mtp=1),
    "deepseek_v2": Case("megatron_deepseek_v2", Grid(), overrides=_YARN),
    "glm4_moe": Case("megatron_glm4_moe", Grid()),
}  # fmt: skip


def _large(model: str, grid: str, overrides: dict[str, Any] | None = None, **changes: Any) -> Case:
    case, (cut, stages) = _MODELS[model], _LARGE_GRIDS[grid]
    return replace(
        case, grid=cut, stages=stages, overrides={**_THREE, **case.overrides, **(overrides or {})}, **changes
    )


LARGE_CASES = {
    **{f"{model}_{grid}": _large(model, grid) for model in _MODELS for grid in _LARGE_GRIDS},
    "qwen2_moe_second_layer_dense": _large("qwen2_moe", "tp2_ep2", {"mlp_only_layers": [1]}),
    "qwen3_moe_pre_softmax": _large("qwen3_moe", "ep2", {"norm_topk_prob": False}),
    "glm4_moe_no_qk_norm_mtp": _large("glm4_moe", "pp2_ep2", {"use_qk_norm": False}, mtp=1),
    "deepseek_v3_yarn_two_mtp": _large("deepseek_v3", "tp2", _YARN, mtp=2),
    "deepseek_v3_dense": _large("deepseek_v3", "tp2", {"first_k_dense_replace": 3}, mtp=0),
}
LARGE_CONTROLS = {
    "two_experts_swapped": _large("mixtral", "ep2", spoiled="swapped"),
    "router_bias_dropped": _large("glm4_moe", "tp1", spoiled="bias"),
    "rope_in_halves": _large("deepseek_v2", "tp1", spoiled="rope"),
    "shared_expert_missing": _large("qwen2_moe", "tp1", spoiled="shared"),
    "expert_fc1_cut_naively": _large("qwen3_moe", "tp2", spoiled="expert_fc1"),
    "mtp_inputs_swapped": _large("deepseek_v3", "tp1", spoiled="order"),
}


@cache
def input_ids() -> np.ndarray:
    """Two rows of 19 tokens."""
    return np.random.default_rng(5).integers(0, checkpoints.BASE["vocab_size"], (2, 19))


def build(case: Case) -> nn.Module:
    """The transformers model of a case."""
    return checkpoints.build_native(case.arch, seed=3, **{**_SIZES, **case.overrides})


def further(case: Case, model: nn.Module) -> Any:
    """The layers of a case that predict further tokens, by transformers: they share its embedding and head."""
    from transformers.modeling_layers import MtpModel  # only late versions have it

    found = MtpModel(model, case.mtp)
    checkpoints.randomise(found.layers, seed=4)
    return found.eval()


def expected(case: Case) -> np.ndarray:
    """What transformers gives for `input_ids`, shaped as the oracle gives it: logits, or several stacked with `mtp`."""
    ids, model = torch.from_numpy(input_ids()), build(case)
    with torch.no_grad():
        logits = [model(ids).logits]
        if case.mtp:
            hidden, layers, places = (
                model.model(ids).last_hidden_state,
                further(case, model),
                torch.arange(ids.shape[1]),
            )
            for index in range(case.mtp):
                ids = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)  # Megatron pads with token 0
                hidden = layers.forward_layer(index, hidden, places[None], None, input_ids=ids)
                logits.append(model.lm_head(hidden))
    found: np.ndarray = (torch.stack(logits) if case.mtp else logits[0]).numpy()
    return found


def tensors(case: Case) -> dict[str, Tensor]:
    """The tensors of a case under the names transformers 5 has in memory; further layers follow the last, as published.

    Those of further layer k, besides the ones of every layer, are `model.layers.{L+k}.enorm`, `hnorm`, `eh_proj` and
    `shared_head.norm`.
    """
    model = build(case)
    state = dict(model.state_dict())
    if "model.layers.0.self_attn.o_proj.bias" in state:  # Megatron has biases on all linear layers then
        for name in [
            name for name in state if name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight"))
        ]:
            state.setdefault(name.replace("weight", "bias"), torch.zeros(len(state[name])))
    if case.mtp:
        for name, tensor in further(case, model).layers.state_dict().items():
            index, _, rest = name.partition(".")
            rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            state[f"model.layers.{model.config.num_hidden_layers + int(index)}.{rest}"] = tensor
    return state


def model_of(case: Case) -> Model:
    """Megatron's sizes for the model of a case."""
    model = build(case)
    config, names = model.config, model.state_dict()
    heads, rope = config.num_attention_heads, config.rope_parameters
    large: dict[str, Any] = {}
    frequency = tuple(int(f"model.layers.{i}.mlp.gate.weight" in names) for i in range(config.num_hidden_layers))
    if any(frequency):
        large = _mixture(case, config) | {"moe_layer_freq": 1 if all(frequency) else frequency}
    if case.arch in ("megatron_deepseek_v2", "megatron_deepseek_v3"):
        large |= {
            "multi_latent_attention": True,
            "q_lora_rank": config.q_lora_rank,
            "kv_lora_rank": config.kv_lora_rank,
            "qk_head_dim": config.qk_nope_head_dim,
            "qk_pos_emb_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
        }
        if rope["rope_type"] == "yarn":
            large |= {name: rope[name] for name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")}
            large |= {
                "rope_type": "yarn",
                "rotary_scaling_factor": rope["factor"],
                "original_max_position_embeddings": rope["original_max_position_embeddings"],
            }
    latent = "multi_latent_attention" in large
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
        rope_scaling_factor=rope["factor"] if rope["rope_type"] == "llama3" else None,
        add_qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        add_bias_linear="model.layers.0.self_attn.o_proj.bias" in names,
        qk_layernorm=latent or "model.layers.0.self_attn.q_norm.weight" in names,
        tied=config.tie_word_embeddings,
        mtp_num_layers=case.mtp or None,
        **large,
    )


def _mixture(case: Case, config: Any) -> dict[str, Any]:
    """Megatron's words for the experts of a model, from the meaning of each architecture's config."""
    width = config.intermediate_size if case.arch == "mixtral" else config.moe_intermediate_size
    found = {"moe_ffn_hidden_size": width, "moe_router_topk": config.num_experts_per_tok}
    if case.arch in ("mixtral", "megatron_qwen3_moe", "qwen2_moe"):
        found |= {"num_experts": config.num_local_experts if case.arch == "mixtral" else config.num_experts}
        found |= {"moe_router_pre_softmax": case.arch != "mixtral" and not config.norm_topk_prob}
        if case.arch == "qwen2_moe":
            shared = config.shared_expert_intermediate_size
            found |= {"moe_shared_expert_intermediate_size": shared, "moe_shared_expert_gate": True}
        return found
    found |= {
        "num_experts": config.n_routed_experts,
        "moe_shared_expert_intermediate_size": config.n_shared_experts * width,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
    }
    if case.arch == "megatron_deepseek_v2":
        return found | {"moe_router_pre_softmax": True}
    found |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    if config.n_group > 1:
        found |= {"moe_router_num_groups": config.n_group, "moe_router_group_topk": config.topk_group}
    return found


def shards(case: Case) -> dict[tuple[int, int, int, int], dict[str, Tensor]]:
    """The tensors of every (pipeline rank, chunk, tensor rank, expert rank), named as in megatron-core's local spec.

    Where attention and experts are cut differently not every pair of the last two is a rank.
    """
    state, model, tp, ep = tensors(case), model_of(case), case.grid.tp, case.grid.ep
    etp = case.grid.etp or tp
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
        gate, up = state[f"{stem}gate_proj.{kind}"], state[f"{stem}up_proj.{kind}"]
        if case.spoiled == "fc1":
            return torch.cat([gate, up]).chunk(tp)[rank]
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])

    def halves(rows: Tensor) -> Tensor:
        """Rows with those of the rotary part, which come last, in halves, as other models have them."""
        if case.spoiled != "rope":
            return rows
        kept, turned = rows[..., : -model.qk_pos_emb_head_dim, :], rows[..., -model.qk_pos_emb_head_dim :, :]
        return torch.cat([kept, turned[..., 0::2, :], turned[..., 1::2, :]], -2)

    def queries(rows: Tensor) -> Tensor:
        return halves(rows.unflatten(0, (model.num_attention_heads, -1))).flatten(0, 1)

    def latent(stem: str, rank: int) -> dict[str, Tensor]:
        whole = {
            "linear_kv_down_proj": halves(state[f"{stem}kv_a_proj_with_mqa.weight"]),
            "linear_kv_up_proj": state[f"{stem}kv_b_proj.weight"],
        }
        norms = {"kv_layernorm.weight": state[f"{stem}kv_a_layernorm.weight"]}
        if model.q_lora_rank is None:
            whole["linear_q_proj"] = queries(state[f"{stem}q_proj.weight"])
        else:
            whole["linear_q_down_proj"] = state[f"{stem}q_a_proj.weight"]
            whole["linear_q_up_proj"] = queries(state[f"{stem}q_b_proj.weight"])
            norms["q_layernorm.weight"] = state[f"{stem}q_a_layernorm.weight"]
        return {f"{name}.weight": rows.chunk(tp)[rank] for name, rows in whole.items()} | norms

    def experts(stem: str, rank: int, expert_tp_rank: int, expert_rank: int) -> dict[str, Tensor]:
        found = {"router.weight": state[f"{stem}gate.weight"]}
        if model.moe_router_enable_expert_bias:
            bias = state[f"{stem}gate.e_score_correction_bias"]
            found["router.expert_bias"] = torch.zeros_like(bias) if case.spoiled == "bias" else bias
        fc1, fc2 = state[f"{stem}experts.gate_up_proj"], state[f"{stem}experts.down_proj"]
        if case.spoiled == "swapped":
            order = [1, 0, *range(2, len(fc1))]
            fc1, fc2 = fc1[order], fc2[order]
        mine = len(fc1) // ep
        for local in range(mine):
            both, down = fc1[expert_rank * mine + local], fc2[expert_rank * mine + local]
            rows = torch.cat([half.chunk(etp)[expert_tp_rank] for half in both.chunk(2)])
            if case.spoiled == "expert_fc1":
                rows = both.chunk(etp)[expert_tp_rank]
            found[f"experts.local_experts.{local}.linear_fc1.weight"] = rows
            found[f"experts.local_experts.{local}.linear_fc2.weight"] = down.chunk(etp, 1)[expert_tp_rank]
        if model.moe_shared_expert_intermediate_size:
            name = "shared_expert" if model.moe_shared_expert_gate else "shared_experts"
            down = state[f"{stem}{name}.down_proj.weight"].chunk(tp, 1)[rank]
            found["shared_experts.linear_fc1.weight"] = gated(f"{stem}{name}.", "weight", rank)
            found["shared_experts.linear_fc2.weight"] = torch.zeros_like(down) if case.spoiled == "shared" else down
        if model.moe_shared_expert_gate:
            found["shared_experts.gate_weight"] = state[f"{stem}shared_expert_gate.weight"]
        return found

    def layer(prefix: str, index: int, rank: int, expert_tp_rank: int, expert_rank: int) -> dict[str, Tensor]:
        stem = f"model.layers.{index}."
        found = {
            "input_layernorm.weight": state[f"{stem}input_layernorm.weight"],
            "self_attention.linear_proj.weight": state[f"{stem}self_attn.o_proj.weight"].chunk(tp, 1)[rank],
            "pre_mlp_layernorm.weight": state[f"{stem}post_attention_layernorm.weight"],
        }
        if model.multi_latent_attention:
            parts = latent(f"{stem}self_attn.", rank)
            found |= {f"self_attention.{name}": tensor for name, tensor in parts.items()}
        else:
            found["self_attention.linear_qkv.weight"] = attention(stem, "weight").chunk(tp)[rank]
        if f"{stem}mlp.gate.weight" in state:
            parts = experts(f"{stem}mlp.", rank, expert_tp_rank, expert_rank)
            found |= {f"mlp.{name}": tensor for name, tensor in parts.items()}
        else:
            found["mlp.linear_fc1.weight"] = gated(f"{stem}mlp.", "weight", rank)
            found["mlp.linear_fc2.weight"] = state[f"{stem}mlp.down_proj.weight"].chunk(tp, 1)[rank]
        if model.add_qkv_bias or model.add_bias_linear:
            found["self_attention.linear_qkv.bias"] = attention(stem, "bias").chunk(tp)[rank]
        if model.add_bias_linear:
            found["self_attention.linear_proj.bias"] = state[f"{stem}self_attn.o_proj.bias"]
            found["mlp.linear_fc1.bias"] = gated(f"{stem}mlp.", "bias", rank)
            found["mlp.linear_fc2.bias"] = state[f"{stem}mlp.down_proj.bias"]
        if model.qk_layernorm and not model.multi_latent_attention:
            found["self_attention.q_layernorm.weight"] = state[f"{stem}self_attn.q_norm.weight"]
            found["self_attention.k_layernorm.weight"] = state[f"{stem}self_attn.k_norm.weight"]
        return {f"{prefix}{name}": tensor for name, tensor in found.items()}

    def further_layer(index: int, *ranks: int) -> dict[str, Tensor]:
        stem, prefix = f"model.layers.{model.num_layers + index}.", f"mtp.layers.{index}."
        joined = state[f"{stem}eh_proj.weight"]  # its input is the embedding, then the hidden state
        if case.spoiled == "order":
            joined = joined.roll(model.hidden_size, 1)
        return {
            f"{prefix}enorm.weight": state[f"{stem}enorm.weight"],
            f"{prefix}hnorm.weight": state[f"{stem}hnorm.weight"],
            f"{prefix}eh_proj.weight": joined.chunk(tp)[ranks[0]],
            f"{prefix}final_layernorm.weight": state[f"{stem}shared_head.norm.weight"],
            **layer(f"{prefix}transformer_layer.", model.num_layers + index, *ranks),
        }

    # Attention and experts number the ranks of a stage each in its own way, the tensor rank fastest, then the expert rank.
    places = [(place % tp, place % etp, place // etp % ep) for place in range(math.lcm(tp, etp * ep))]
    everything = {}
    for depth, stage in enumerate(case.stages):
        last = depth == len(case.stages) - 1
        for ranks in places:
            part: dict[str, Tensor] = {}
            if depth == 0 or (last and case.mtp):
                part["embedding.word_embeddings.weight"] = vocabulary("model.embed_tokens.weight").chunk(tp)[ranks[0]]
            for local, index in enumerate(stage):
                part |= layer(f"decoder.layers.{local}.", index, *ranks)
            if last:
                part["decoder.final_layernorm.weight"] = state["model.norm.weight"]
                for index in range(case.mtp):
                    part |= further_layer(index, *ranks)
                if not model.tied or case.grid.pp > 1:
                    part["output_layer.weight"] = vocabulary("lm_head.weight").chunk(tp)[ranks[0]]
            everything[depth % case.grid.pp, depth // case.grid.pp, ranks[0], ranks[2]] = part
    return everything


def write(case: Case, directory: Path) -> Path:
    """A checkpoint of format `torch`."""
    folder = directory / "iter_0000001"
    for (pp_rank, _, tp_rank, ep_rank), part in shards(case).items():
        name = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if case.grid.pp > 1 else "")
        name += f"_{ep_rank:03d}" if case.grid.ep > 1 else ""
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
