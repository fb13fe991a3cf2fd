"""A model's config as Megatron-LM's arguments: what it holds, what they say, and how they are typed.

Names are Megatron-LM's (`megatron/training/arguments.py`). What a checkpoint's `args` carry is read by its
`--use-checkpoint-args`; what they do not carry has to be given on the training command line: `flags`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llmconvert.canonical.model import LATENT_NORM_EPS, CanonicalConfig, traits
from llmconvert.converters.megatron.grid import Grid
from llmconvert.errors import Refused

_HOLDS = frozenset(
    {"qkv_bias", "o_bias", "mlp_bias", "tied_embeddings", "interleaved_rotary", "partial_rotary", "grouped_query",
     "explicit_head_dim", "rope_scaling", "qk_norm", "moe", "dense_layers", "shared_experts", "shared_expert_gate",
     "sigmoid_router", "router_bias", "router_groups", "routed_scaling", "mla", "mtp"}
)  # fmt: skip
"""Traits megatron-core's GPT model can have."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core fixes of Llama 3's rotary scaling."""

YARN = {
    "factor": "rotary_scaling_factor", "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim",
}  # fmt: skip
"""YaRN's settings and what megatron-core calls them; it knows them with latent attention."""
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
YARN_FIXED = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
"""What Megatron-LM trains latent attention with: fields of MLATransformerConfig that no option sets.

So it is in core 0.14 to 0.19, whose `--yarn-…` are for attention without latents (`argument_utils.
_apply_yarn_config_from_args`); `--use-checkpoint-args` does not take them either.
"""

NOT_CARRIED = (
    "norm-epsilon", "qk-layernorm", "use-rope-scaling", "rope-scaling-factor", "multi-latent-attention", "q-lora-rank",
    "kv-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim", "v-head-dim", "rope-type", "rotary-scaling-factor", "mscale",
    "mscale-all-dim", "moe-router-num-groups", "moe-router-group-topk", "moe-router-dtype", "mtp-num-layers",
    "moe-shared-expert-gate", "transformer-impl",
)  # fmt: skip
"""Options of a model that `--use-checkpoint-args` does not take from a checkpoint (`load_args_from_checkpoint`)."""


BIASES = "megatron-core has biases on q, k and v, or on all linear layers; with experts not on all, with latents on none of q, k and v"


def holds(config: CanonicalConfig) -> frozenset[str]:
    """Traits megatron-core's GPT model can have, given the others a model has.

    `add_bias_linear` would give the router and each expert biases, and shared experts refuse it (`moe/router.py`,
    `moe/shared_experts.py`); the projections of latent attention never have any (`multi_latent_attention.py`).
    """
    lacking = {"o_bias", "mlp_bias"} if config.num_experts else set()
    return _HOLDS - lacking - ({"qkv_bias"} if config.kv_lora_rank is not None else set())


def coupled(config: CanonicalConfig) -> tuple[tuple[str, ...], ...]:
    """Biases Megatron has together or not at all: `add_bias_linear` is all of them, `add_qkv_bias` those of q, k and v."""
    linear = traits(config) & holds(config) & {"o_bias", "mlp_bias"}
    return (("qkv_bias", "o_bias", "mlp_bias"),) if linear else ()


def check_holds(config: CanonicalConfig) -> None:
    """Check what traits alone do not say.

    Raises:
        Refused: a rotary scaling or a router that megatron-core does not compute.
    """
    c, scaling = config, config.rope_scaling
    if c.num_experts and c.scoring_func == "sigmoid" and (not c.norm_topk_prob or c.num_experts_per_tok == 1):
        raise Refused(
            f"megatron-core divides sigmoid scores by their sum if several experts are chosen, and does not if one is; the "
            f"checkpoint says norm_topk_prob {c.norm_topk_prob} and num_experts_per_tok {c.num_experts_per_tok}"
        )
    if c.kv_lora_rank is not None and (c.qkv_bias or c.o_bias):
        raise Refused("megatron-core has no biases in latent attention (`attention_bias`)")
    if c.num_experts and c.scoring_func == "softmax" and c.norm_topk_prob and c.num_experts_per_tok == 1:
        raise Refused("a token's one expert weighs 1 whatever the router says, and megatron-core trains no such router")
    if scaling is None:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    if c.kv_lora_rank is not None and kind == "yarn":
        odd = {key: scaling[key] for key in scaling if key not in {*YARN, "rope_type", "type"}}
        settings = _yarn(config)
        if odd or (not settings["mscale_all_dim"] and settings["mscale"] != 1.0):
            raise Refused(f"megatron-core computes YaRN otherwise with {odd or dict(scaling)}")
        return
    fixed = {key: scaling.get(key) for key in LLAMA3}
    if kind != "llama3" or fixed != LLAMA3:
        raise Refused(
            f"megatron-core does not compute rotary scaling {dict(scaling)}: it knows Llama 3's, with {LLAMA3}",
            hint="to train at lengths below the original one, remove `rope_scaling` in a copy of config.json",
        )


def _yarn(config: CanonicalConfig) -> dict[str, Any]:
    """YaRN's settings in full; transformers takes the context for the original one where a config names none."""
    assert config.rope_scaling is not None
    defaults = {**YARN_DEFAULTS, "original_max_position_embeddings": config.max_position_embeddings}
    return {
        **defaults,
        **{key: value for key, value in config.rope_scaling.items() if key in YARN and value is not None},
    }


def departures(config: CanonicalConfig) -> tuple[str, ...]:
    """Where Megatron-LM is known to compute something else, in words: weights are the same, logits differ."""
    c, found = config, []
    if c.num_experts and c.n_group > 1 and c.topk_method != "greedy":
        best, here = 2 if c.topk_method == "noaux_tc" else 1, c.num_experts_per_tok // c.topk_group
        if best != here:
            found.append(
                f"a group of experts is scored by its best {best}, in megatron-core by its best {here} "
                "(num_experts_per_tok / topk_group): tokens go to other experts there"
            )
    if c.kv_lora_rank is not None and c.rms_norm_eps != LATENT_NORM_EPS:
        found.append(
            f"the norms inside latent attention have an eps of {LATENT_NORM_EPS:g}, in megatron-core that of the others, "
            f"{c.rms_norm_eps:g}"
        )
    if c.kv_lora_rank is not None and c.rope_scaling is not None:
        settings = _yarn(c)
        odd = [
            f"{key} {settings[key]:g}, there {fixed:g}" for key, fixed in YARN_FIXED.items() if settings[key] != fixed
        ]
        if odd:
            found.append(
                f"YaRN has {', '.join(odd)}: Megatron-LM trains another model, unless its code sets these fields of "
                "MLATransformerConfig, which no option does"
            )
    return tuple(found)


def remarks(config: CanonicalConfig) -> tuple[str, ...]:
    """What a user should know of a model in Megatron-LM: `departures`, and what its command line does not take."""
    base = config.rope_theta
    odd = (
        f"`--rotary-base` takes whole numbers, and this is {base!r}: `megatron-args.sh` has `--use-checkpoint-args` in its "
        "place, which takes it from the checkpoint"
    )
    return departures(config) + (() if float(base).is_integer() else (odd,))


def refuse_departures(config: CanonicalConfig) -> None:
    """Refuse a model whose logits are known to come out otherwise in megatron-core, where logits are to be proved.

    Raises:
        Refused: saying where they part.
    """
    found = departures(config)
    if found:
        raise Refused(
            f"logits cannot be the same: {'; '.join(found)}",
            hint="`--verify weights` writes it all the same: the weights are exact",
        )


def _mixture(c: CanonicalConfig) -> dict[str, Any]:
    """Arguments of a mixture of experts."""
    if not c.num_experts:
        return {"num_experts": None}
    layers = [int(experts) for experts in c.moe_layers]
    grouped = c.n_group > 1 and c.topk_method != "greedy"
    return {
        "num_experts": c.num_experts, "moe_layer_freq": 1 if all(layers) else layers,
        "moe_ffn_hidden_size": c.moe_intermediate_size, "moe_router_topk": c.num_experts_per_tok,
        "moe_router_score_function": c.scoring_func,
        "moe_router_pre_softmax": c.scoring_func == "softmax" and not c.norm_topk_prob,
        "moe_router_topk_scaling_factor": None if c.routed_scaling_factor == 1.0 else c.routed_scaling_factor,
        "moe_router_enable_expert_bias": c.router_bias, "moe_router_dtype": "fp32",
        "moe_router_num_groups": c.n_group if grouped else None,
        "moe_router_group_topk": c.topk_group if grouped else None,
        "moe_shared_expert_intermediate_size": c.shared_expert_intermediate_size or None,
        "moe_shared_expert_gate": c.shared_expert_gate,
    }  # fmt: skip


def _latent(c: CanonicalConfig) -> dict[str, Any]:
    """Arguments of latent attention."""
    if c.kv_lora_rank is None:
        return {"multi_latent_attention": False}
    scaling = _yarn(c) if c.rope_scaling else None
    return {
        "multi_latent_attention": True, "q_lora_rank": c.q_lora_rank, "kv_lora_rank": c.kv_lora_rank,
        "qk_head_dim": c.qk_nope_head_dim, "qk_pos_emb_head_dim": c.qk_rope_head_dim, "v_head_dim": c.v_head_dim,
        "kv_channels": c.v_head_dim, "group_query_attention": False, "num_query_groups": c.num_attention_heads,
        "qk_layernorm": True, "rope_type": "yarn" if scaling else "rope", "rotary_interleaved": False,
        "rotary_percent": 1.0, "use_rope_scaling": False, "rope_scaling_factor": 8.0,
        **({YARN[key]: value for key, value in scaling.items()} if scaling else {}),
    }  # fmt: skip


def to_arguments(
    config: CanonicalConfig, grid: Grid, padded_vocab_size: int, divisible_by: int, dtype: str
) -> dict[str, Any]:
    """Arguments for a model, plain values only.

    Args:
        config: the model, lowered to what Megatron holds.
        grid: how it is cut.
        padded_vocab_size: rows of the embedding.
        divisible_by: make_vocab_size_divisible_by.
        dtype: params_dtype, as torch names it.
    """
    c, scaling = config, config.rope_scaling or {}
    grouped = c.num_key_value_heads != c.num_attention_heads
    return {
        "num_layers": c.num_hidden_layers, "hidden_size": c.hidden_size, "ffn_hidden_size": c.intermediate_size,
        "num_attention_heads": c.num_attention_heads, "group_query_attention": grouped,
        "num_query_groups": c.num_key_value_heads, "kv_channels": c.head_dim,
        "seq_length": c.max_position_embeddings, "max_position_embeddings": c.max_position_embeddings,
        "vocab_size": c.vocab_size, "padded_vocab_size": padded_vocab_size, "make_vocab_size_divisible_by": divisible_by,
        "position_embedding_type": "rope", "add_position_embedding": False, "use_rotary_position_embeddings": True,
        "rotary_base": _whole(c.rope_theta), "rotary_percent": c.rotary_dim / c.head_dim,
        "rotary_interleaved": c.rotary_interleaved, "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": bool(scaling), "rope_scaling_factor": float(scaling.get("factor", 8.0)),
        "add_bias_linear": c.o_bias, "add_qkv_bias": c.qkv_bias, "swiglu": True, "squared_relu": False,
        "normalization": "RMSNorm", "norm_epsilon": c.rms_norm_eps, "layernorm_epsilon": c.rms_norm_eps,
        "apply_layernorm_1p": False, "qk_layernorm": c.qk_norm, "apply_query_key_layer_scaling": False,
        "apply_residual_connection_post_layernorm": False,
        "untie_embeddings_and_output_weights": not c.tie_word_embeddings,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "mtp_num_layers": c.num_nextn_predict_layers or None,
        "tensor_model_parallel_size": grid.tp, "pipeline_model_parallel_size": grid.pp,
        "virtual_pipeline_model_parallel_size": grid.vpp if grid.vpp > 1 else None,
        "decoder_first_pipeline_num_layers": grid.first, "decoder_last_pipeline_num_layers": grid.last,
        "account_for_embedding_in_pipeline_split": grid.embedding_counts,
        "account_for_loss_in_pipeline_split": grid.loss_counts, "pipeline_model_parallel_layout": grid.layout,
        "expert_model_parallel_size": grid.ep, "expert_tensor_parallel_size": grid.expert_tp,
        "params_dtype": dtype, "bf16": dtype == "bfloat16", "fp16": dtype == "float16",
        "iteration": 1, "consumed_train_samples": 0, "consumed_valid_samples": 0, "ckpt_format": "torch",
        **_mixture(c), **_latent(c),
    }  # fmt: skip


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def grid_of(args: Mapping[str, Any], tp: int, pp: int, vpp: int, ep: int, etp: int) -> Grid:
    """The grid a checkpoint was cut by."""
    return Grid(
        tp, pp, vpp, args.get("decoder_first_pipeline_num_layers"), args.get("decoder_last_pipeline_num_layers"),
        bool(args.get("account_for_embedding_in_pipeline_split")), bool(args.get("account_for_loss_in_pipeline_split")),
        args.get("pipeline_model_parallel_layout") or None, ep, etp,
    )  # fmt: skip


def flags(args: Mapping[str, Any]) -> list[str]:
    """Megatron-LM's command-line options for a model, one option with its values an entry."""
    options = [
        "--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads", "--kv-channels", "--seq-length",
        "--max-position-embeddings", "--make-vocab-size-divisible-by", "--vocab-size", "--normalization",
        "--norm-epsilon", "--position-embedding-type", "--rotary-base", "--rotary-percent",
        "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--decoder-first-pipeline-num-layers",
        "--decoder-last-pipeline-num-layers", "--pipeline-model-parallel-layout", "--attention-dropout", "--hidden-dropout",
        "--num-experts", "--moe-ffn-hidden-size", "--moe-router-topk", "--moe-router-score-function",
        "--moe-router-topk-scaling-factor", "--moe-router-num-groups", "--moe-router-group-topk", "--moe-router-dtype",
        "--moe-shared-expert-intermediate-size", "--moe-layer-freq", "--q-lora-rank", "--kv-lora-rank", "--qk-head-dim",
        "--qk-pos-emb-head-dim", "--v-head-dim", "--rope-type", "--rotary-scaling-factor", "--mscale", "--mscale-all-dim",
        "--mtp-num-layers", "--transformer-impl",
    ]  # fmt: skip
    switches = [
        "--swiglu", "--add-qkv-bias", "--qk-layernorm", "--rotary-interleaved", "--use-rope-scaling",
        "--untie-embeddings-and-output-weights", "--account-for-embedding-in-pipeline-split",
        "--account-for-loss-in-pipeline-split", "--bf16", "--fp16", "--moe-router-pre-softmax", "--moe-grouped-gemm",
        "--moe-router-enable-expert-bias", "--moe-shared-expert-gate", "--multi-latent-attention",
    ]  # fmt: skip

    def value(option: str) -> Any:
        return args.get(option[2:].replace("-", "_"))

    # Megatron-LM takes a list of layers only without spaces in it.
    given = {option: str(value(option)).replace(" ", "") for option in options if value(option) is not None}
    found = [f"{option} {shlex.quote(text)}" for option, text in given.items()]
    if args["group_query_attention"]:
        found += ["--group-query-attention", f"--num-query-groups {args['num_query_groups']}"]
    if args["use_rope_scaling"]:
        found.append(f"--rope-scaling-factor {args['rope_scaling_factor']}")
    if args.get("num_experts"):
        for size in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            found.append(f"--{size.replace('_', '-')} {args[size]}")
    vpp = args.get("virtual_pipeline_model_parallel_size")
    if vpp and not args.get("pipeline_model_parallel_layout"):
        found.append(f"--num-virtual-stages-per-pipeline-rank {vpp}")
    found += [option for option in switches if value(option)]
    if not isinstance(args["rotary_base"], int):
        # The parser takes whole numbers; this takes the base from the checkpoint, and stops without one.
        found = [*(flag for flag in found if not flag.startswith("--rotary-base ")), "--use-checkpoint-args"]
    if not args["add_bias_linear"]:
        found.append("--disable-bias-linear")
    return sorted(found)


def script(args: Mapping[str, Any], directory: str) -> str:
    """A shell fragment with the options, to be sourced by a training script."""
    found = flags(args)
    names = {flag.split()[0] for flag in found}
    lost = ", ".join(f"--{name}" for name in NOT_CARRIED if f"--{name}" in names)
    lines = [
        '# Options of Megatron-LM for this checkpoint; source it and pass "${MODEL_ARGS[@]}" to pretrain_gpt.py.',
        f"# --use-checkpoint-args does not take {lost} from a checkpoint:",
        "# give them here, or the model trained is another.",
        "MODEL_ARGS=(",
        *(f"    {flag}" for flag in found),
        ")",
        f"# --load {directory} --ckpt-format {args['ckpt_format']} --no-load-optim --no-load-rng --finetune",
    ]
    return "\n".join(lines) + "\n"
