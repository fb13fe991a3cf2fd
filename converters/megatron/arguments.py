"""A model's config as Megatron-LM's arguments, and back.

Names are Megatron-LM's (`megatron/training/arguments.py`). What a checkpoint's `args` carry is read by its
`--use-checkpoint-args`; what they do not carry has to be given on the training command line: `flags`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llmconvert.canonical.model import CanonicalConfig, traits
from llmconvert.converters.megatron.grid import Grid
from llmconvert.errors import BadInput, Refused

HOLDS = frozenset(
    {"qkv_bias", "o_bias", "mlp_bias", "tied_embeddings", "interleaved_rotary", "partial_rotary", "grouped_query",
     "explicit_head_dim", "rope_scaling", "qk_norm"}
)  # fmt: skip
"""Traits megatron-core's dense GPT model can have."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core fixes of Llama 3's rotary scaling."""

NOT_CARRIED = ("norm-epsilon", "qk-layernorm", "use-rope-scaling", "rope-scaling-factor")
"""Options `--use-checkpoint-args` does not take from a checkpoint."""


def coupled(config: CanonicalConfig) -> tuple[tuple[str, ...], ...]:
    """Biases Megatron has together or not at all: `add_bias_linear` is all of them, `add_qkv_bias` those of q, k and v."""
    return (("qkv_bias", "o_bias", "mlp_bias"),) if traits(config) & {"o_bias", "mlp_bias"} else ()


def check_holds(config: CanonicalConfig) -> None:
    """Check what traits alone do not say.

    Raises:
        Refused: a rotary scaling that megatron-core does not compute.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    fixed = {key: scaling.get(key) for key in _LLAMA3}
    if kind != "llama3" or fixed != _LLAMA3:
        raise Refused(
            f"megatron-core does not compute rotary scaling {dict(scaling)}: it knows Llama 3's, with {_LLAMA3}",
            hint="to train at lengths below the original one, remove `rope_scaling` in a copy of config.json",
        )


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
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "num_experts": None, "multi_latent_attention": False,
        "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": None,
        "tensor_model_parallel_size": grid.tp, "pipeline_model_parallel_size": grid.pp,
        "virtual_pipeline_model_parallel_size": grid.vpp if grid.vpp > 1 else None,
        "decoder_first_pipeline_num_layers": grid.first, "decoder_last_pipeline_num_layers": grid.last,
        "account_for_embedding_in_pipeline_split": grid.embedding_counts,
        "account_for_loss_in_pipeline_split": grid.loss_counts, "pipeline_model_parallel_layout": grid.layout,
        "expert_model_parallel_size": 1, "params_dtype": dtype, "bf16": dtype == "bfloat16", "fp16": dtype == "float16",
        "iteration": 1, "consumed_train_samples": 0, "consumed_valid_samples": 0, "ckpt_format": "torch",
    }  # fmt: skip


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def grid_of(args: Mapping[str, Any], tp: int, pp: int, vpp: int) -> Grid:
    """The grid a checkpoint was cut by."""
    return Grid(
        tp, pp, vpp, args.get("decoder_first_pipeline_num_layers"), args.get("decoder_last_pipeline_num_layers"),
        bool(args.get("account_for_embedding_in_pipeline_split")), bool(args.get("account_for_loss_in_pipeline_split")),
        args.get("pipeline_model_parallel_layout") or None,
    )  # fmt: skip


_FIXED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",), "swiglu": (True,), "squared_relu": (None, False), "quick_geglu": (None, False),
    "num_experts": (None, 0), "multi_latent_attention": (None, False), "apply_layernorm_1p": (None, False),
    "mtp_num_layers": (None, 0), "window_size": (None,), "rotary_seq_len_interpolation_factor": (None, 1),
    "apply_residual_connection_post_layernorm": (None, False), "qk_l2_norm": (None, False),
    "attention_output_gate": (None, False), "softmax_scale": (None,),
}  # fmt: skip
"""Arguments that change the maths, with the values under which it is that of a dense Llama."""


def from_arguments(args: Mapping[str, Any], vocab_size: int | None = None) -> CanonicalConfig:
    """The model a checkpoint's arguments describe.

    Args:
        args: as in the checkpoint.
        vocab_size: the true vocabulary, where the arguments do not say.

    Raises:
        Refused: a model that is no dense decoder with RMSNorm, rotary embedding and SwiGLU.
        BadInput: the arguments lack a size.
    """
    wrong = [f"`{key}` {args.get(key)!r}" for key, allowed in _FIXED.items() if args.get(key) not in allowed]
    if args.get("position_embedding_type") != "rope" and not args.get("use_rotary_position_embeddings"):
        wrong.append(f"`position_embedding_type` {args.get('position_embedding_type')!r}")
    if wrong:
        raise Refused(f"no Hugging Face model here computes {', '.join(wrong)}", where="args")

    def get(*keys: str) -> Any:
        found = next((args[key] for key in keys if args.get(key) is not None), None)
        if found is None:
            raise BadInput(f"the checkpoint's args lack `{keys[0]}`", where="args", hint="give `--config CONFIG.json`")
        return found

    heads, hidden = get("num_attention_heads"), get("hidden_size")
    grouped = args.get("group_query_attention", True)
    head_dim = args.get("kv_channels") or hidden // heads
    share = args.get("rotary_percent")
    biases = bool(args.get("add_bias_linear"))
    scaling = None
    if args.get("use_rope_scaling"):
        scaling = {"rope_type": "llama3", "factor": float(get("rope_scaling_factor")), **_LLAMA3}
    true_size = vocab_size or args.get("vocab_size")
    if not isinstance(true_size, int):
        raise BadInput(
            f"the true vocabulary is not in the args, only the padded one of {args.get('padded_vocab_size')}",
            where="args",
            hint="give `--vocab-size`, the number of tokens of the tokenizer",
        )
    return CanonicalConfig(
        hidden_size=hidden,
        intermediate_size=get("ffn_hidden_size"),
        num_hidden_layers=get("num_layers"),
        num_attention_heads=heads,
        num_key_value_heads=(args.get("num_query_groups") or heads) if grouped else heads,
        head_dim=head_dim,
        vocab_size=true_size,
        rms_norm_eps=get("norm_epsilon", "layernorm_epsilon"),
        max_position_embeddings=get("max_position_embeddings", "seq_length"),
        rope_theta=float(args.get("rotary_base") or 10000),
        rotary_dim=head_dim if share is None or share >= 1.0 else int(head_dim * share),
        rope_scaling=scaling,
        rotary_interleaved=bool(args.get("rotary_interleaved")),
        tie_word_embeddings=not args.get("untie_embeddings_and_output_weights"),
        qkv_bias=biases or bool(args.get("add_qkv_bias")),
        o_bias=biases,
        mlp_bias=biases,
        qk_norm=bool(args.get("qk_layernorm")),
    )


def flags(args: Mapping[str, Any]) -> list[str]:
    """Megatron-LM's command-line options for a model, one option with its values an entry."""
    options = [
        "--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads", "--kv-channels", "--seq-length",
        "--max-position-embeddings", "--make-vocab-size-divisible-by", "--vocab-size", "--normalization",
        "--norm-epsilon", "--position-embedding-type", "--rotary-base", "--rotary-percent",
        "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--decoder-first-pipeline-num-layers",
        "--decoder-last-pipeline-num-layers", "--pipeline-model-parallel-layout", "--attention-dropout", "--hidden-dropout",
    ]  # fmt: skip
    switches = [
        "--swiglu", "--add-qkv-bias", "--qk-layernorm", "--rotary-interleaved", "--use-rope-scaling",
        "--untie-embeddings-and-output-weights", "--account-for-embedding-in-pipeline-split",
        "--account-for-loss-in-pipeline-split", "--bf16", "--fp16",
    ]  # fmt: skip

    def value(option: str) -> Any:
        return args.get(option[2:].replace("-", "_"))

    found = [f"{option} {shlex.quote(str(value(option)))}" for option in options if value(option) is not None]
    if args["group_query_attention"]:
        found += ["--group-query-attention", f"--num-query-groups {args['num_query_groups']}"]
    if args["use_rope_scaling"]:
        found.append(f"--rope-scaling-factor {args['rope_scaling_factor']}")
    vpp = args.get("virtual_pipeline_model_parallel_size")
    if vpp and not args.get("pipeline_model_parallel_layout"):
        found.append(f"--num-virtual-stages-per-pipeline-rank {vpp}")
    found += [option for option in switches if value(option)]
    if not args["add_bias_linear"]:
        found.append("--disable-bias-linear")
    return sorted(found)


def script(args: Mapping[str, Any], directory: str) -> str:
    """A shell fragment with the options, to be sourced by a training script."""
    lines = [
        '# Options of Megatron-LM for this checkpoint; source it and pass "${MODEL_ARGS[@]}" to pretrain_gpt.py.',
        f"# --use-checkpoint-args does not take {', '.join('--' + name for name in NOT_CARRIED)} from a checkpoint:",
        "# give them here, or the model trained is another.",
        "MODEL_ARGS=(",
        *(f"    {flag}" for flag in flags(args)),
        ")",
        f"# --load {directory} --ckpt-format torch --no-load-optim --no-load-rng --finetune",
    ]
    return "\n".join(lines) + "\n"
