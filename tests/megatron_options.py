"""What Megatron-LM's command line takes: its own parser where there is a checkout of it, and its rules everywhere.

No release of megatron-core on PyPI holds `megatron.training`: neither wheel nor source archive of 0.16.1 has more than
`megatron.core`. So the rules of its parser are written down here, for the options `megatron-args.sh` may hold, from
core_v0.16.1: `megatron/training/arguments.py` (`_add_*_args`, `moe_freq_type`, `_eval_pattern`, `validate_args`,
`core_transformer_config_from_args`) and the checks of `TransformerConfig.__post_init__`. With `MEGATRON_LM=DIR`, a
checkout of core_v0.16.1, the real functions run, and the rules are held against them.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = os.environ.get("MEGATRON_LM")


def whole(text: str) -> int:
    """`type=int`."""
    return int(text)


def layers(text: str) -> int | list[int]:
    """`moe_freq_type`: a number, or a list in the characters `,`, digits, `[]`, `()`, `+`, `*` alone."""
    if "[" not in text:
        return int(text)
    if re.search(r"[^,\d\[\]()+*]", text):
        raise ValueError(f"invalid pattern: {text}")
    found = ast.literal_eval(text) if re.fullmatch(r"\[[\d,]*\]", text) else None
    assert isinstance(found, list), "no other lists are written here"
    return found


# What each option takes: a function of its word, the words it takes, True for a switch; and the argument it sets.
_WHOLE = (
    "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers", "--expert-model-parallel-size",
    "--expert-tensor-parallel-size", "--ffn-hidden-size", "--hidden-size", "--kv-channels", "--kv-lora-rank",
    "--make-vocab-size-divisible-by", "--max-position-embeddings", "--moe-ffn-hidden-size", "--moe-router-group-topk",
    "--moe-router-num-groups", "--moe-router-topk", "--moe-shared-expert-intermediate-size", "--mtp-num-layers",
    "--num-attention-heads", "--num-experts", "--num-layers", "--num-query-groups",
    "--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-size", "--q-lora-rank", "--qk-head-dim",
    "--qk-pos-emb-head-dim", "--rotary-base", "--seq-length", "--tensor-model-parallel-size", "--v-head-dim",
    "--vocab-size",
)  # fmt: skip
_NUMBERS = (
    "--attention-dropout", "--hidden-dropout", "--moe-router-topk-scaling-factor", "--mscale", "--mscale-all-dim",
    "--norm-epsilon", "--rope-scaling-factor", "--rotary-percent", "--rotary-scaling-factor",
)  # fmt: skip
_SWITCHES = (
    "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split", "--add-qkv-bias", "--bf16",
    "--disable-bias-linear", "--fp16", "--group-query-attention", "--moe-grouped-gemm",
    "--moe-router-enable-expert-bias", "--moe-router-pre-softmax", "--moe-shared-expert-gate",
    "--multi-latent-attention", "--qk-layernorm", "--rotary-interleaved", "--swiglu",
    "--untie-embeddings-and-output-weights", "--use-checkpoint-args", "--use-rope-scaling",
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(_WHOLE, whole), **dict.fromkeys(_NUMBERS, float), **dict.fromkeys(_SWITCHES, True),
    "--moe-layer-freq": layers, "--pipeline-model-parallel-layout": str,
    "--moe-router-dtype": ("fp32", "fp64"), "--moe-router-score-function": ("softmax", "sigmoid"),
    "--normalization": ("LayerNorm", "RMSNorm"),
    "--position-embedding-type": ("learned_absolute", "rope", "mrope", "relative", "none"),
    "--rope-type": ("rope", "yarn"), "--transformer-impl": ("local", "transformer_engine", "inference_optimized"),
}  # fmt: skip
_SETS = {"--norm-epsilon": "layernorm_epsilon", "--disable-bias-linear": "add_bias_linear"}
_DEFAULTS = {
    "expert_model_parallel_size": 1, "moe_layer_freq": 1, "moe_router_topk": 2, "mscale": 1.0, "mscale_all_dim": 0.0,
    "num_query_groups": 1, "pipeline_model_parallel_size": 1, "rotary_base": 10000, "rotary_percent": 1.0,
    "rotary_scaling_factor": 1.0, "tensor_model_parallel_size": 1, "rope_scaling_factor": 8.0,
    "moe_router_score_function": "softmax", "transformer_impl": "transformer_engine",
}  # fmt: skip


def sets(option: str) -> str:
    """The argument an option sets."""
    return _SETS.get(option) or option[2:].replace("-", "_")


def words(*scripts: Path) -> list[list[str]]:
    """The options in each `megatron-args.sh`, as a shell that sources it passes them on."""
    command = 'for script; do source "$script"; printf "%s\\0" "${MODEL_ARGS[@]}"; printf "\\1\\0"; done'
    found = subprocess.run(
        ["bash", "-euc", command, "bash", *map(str, scripts)], capture_output=True, text=True, check=True, timeout=60
    )
    return [part.split("\0")[:-1] for part in found.stdout.split("\1\0")[:-1]]


def parsed(given: list[str]) -> dict[str, Any]:
    """What the parser makes of options; fails where it would stop."""
    found: dict[str, Any] = {sets(option): False for option, kind in OPTIONS.items() if kind is True}
    found |= {sets(option): None for option, kind in OPTIONS.items() if kind is not True} | _DEFAULTS
    found["add_bias_linear"] = True
    rest = list(given)
    while rest:
        option = rest.pop(0)
        kind = OPTIONS[option]  # an option the parser does not know stops it
        if kind is True:
            found[sets(option)] = option != "--disable-bias-linear"
        elif isinstance(kind, tuple):
            assert rest[0] in kind, f"{option} {rest[0]}"
            found[sets(option)] = rest.pop(0)
        else:
            found[sets(option)] = kind(rest.pop(0))
    return found


def validated(args: dict[str, Any]) -> dict[str, Any]:
    """What `validate_args` and the config's own checks ask of a model's options; each comment names the check."""
    a = args
    stages, layout = a["pipeline_model_parallel_size"], a["pipeline_model_parallel_layout"]
    virtual = a["num_virtual_stages_per_pipeline_rank"]
    assert not (layout and virtual)  # "No more than one of the following arguments can be set at the same time"
    if layout:
        text = layout.replace(",", "")
        for pattern in (r"\(([^()]*)\)\*(\d+)", r"(.)\*(\d+)"):
            while (match := re.search(pattern, text)) is not None:
                text = text[: match.start()] + match[1] * int(match[2]) + text[match.end() :]
        assert len(text.split("|")) % stages == 0  # get_num_stages_from_str
        # validate_layer_layout
        assert text.count("m") == (a["mtp_num_layers"] or 0) and text.count("t") == a["num_layers"]
        assert text.count("E") == text.count("L") == 1
    uneven = a["decoder_first_pipeline_num_layers"] or a["decoder_last_pipeline_num_layers"]
    counted = a["account_for_embedding_in_pipeline_split"] + a["account_for_loss_in_pipeline_split"]
    if not layout and not virtual and not uneven:
        assert (a["num_layers"] + counted) % stages == 0  # "Number of layers should be divisible by …"
    assert not (virtual and virtual > 1 and stages < 2)  # "pipeline-model-parallel size should be greater than 1"
    assert not (uneven and counted)  # "… cannot be set with account_for_…"
    assert a["hidden_size"] and a["num_attention_heads"] and a["max_position_embeddings"] >= a["seq_length"]
    assert not (a["bf16"] and a["fp16"])
    heads, tp = a["num_attention_heads"], a["tensor_model_parallel_size"]
    assert heads % tp == 0  # "num_attention_heads must be a multiple of tensor_model_parallel_size"
    if a["group_query_attention"]:
        groups = a["num_query_groups"]
        assert heads % groups == 0 and (groups % tp == 0 or tp % groups == 0)  # __post_init__
    if a["rope_type"] == "yarn":
        assert a["multi_latent_attention"]  # 'Common attention only support rope_type="rope"'
    if a["multi_latent_attention"]:
        assert not a[
            "group_query_attention"
        ]  # "Group query attention is mutually exclusive with multi latent attention"
        assert not a["rotary_interleaved"]  # "rotary_interleaved does not work with multi_latent_attention"
    if a["num_experts"]:
        freq = a["moe_layer_freq"]
        assert isinstance(freq, int) or len(freq) == a["num_layers"]  # "Invalid length of moe_layer_pattern"
        assert a["num_experts"] % a["expert_model_parallel_size"] == 0
        # "Expert bias for aux-loss-free routing only supports sigmoid score function"
        assert not a["moe_router_enable_expert_bias"] or a["moe_router_score_function"] == "sigmoid"
        if a["moe_router_num_groups"]:
            assert a["moe_router_group_topk"] <= a["moe_router_num_groups"]
            assert a["num_experts"] % a["moe_router_num_groups"] == 0
        # "bias is not supported in the shared experts", "Bias in Moe is only supported when ETP==1"
        assert not a["add_bias_linear"]
        # "Please use --moe-router-pre-softmax when topk is 1."
        assert a["moe_router_topk"] > 1 or a["moe_router_pre_softmax"] or a["moe_router_score_function"] == "sigmoid"
    else:
        assert a["expert_model_parallel_size"] == 1
    return args


def check(*scripts: Path) -> list[dict[str, Any]]:
    """What Megatron-LM makes of each `megatron-args.sh`, by its rules."""
    return [validated(parsed(given)) for given in words(*scripts)]


def assert_same(given: list[str], real: dict[str, Any]) -> None:
    """The rules make of options what the real parser makes of them."""
    by_rule = parsed(given)
    switches = {sets(option) for option, kind in OPTIONS.items() if kind is True}
    named = {sets(word) for word in given if word in OPTIONS} | switches | _DEFAULTS.keys()
    by_rule["add_qkv_bias"] |= by_rule["add_bias_linear"]  # as validate_args does
    for key in named - {"num_virtual_stages_per_pipeline_rank"}:
        assert real[key] == by_rule[key], (key, by_rule[key], real[key])


def real_parser(cases: list[list[str]]) -> list[dict[str, Any]]:
    """Megatron-LM's own `parse_args`, `validate_args` and config, run in a process of their own.

    Returns:
        For each case its arguments of plain types and, under `config`, the config's fields; or `error`.
    """
    text = json.dumps(cases)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(CHECKOUT)], input=text, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    result: list[dict[str, Any]] = json.loads(found.stdout.splitlines()[-1])
    return result


# What follows runs in that process only.


def _import_parser(checkout: str) -> Any:
    """`megatron.training.arguments` alone: its package imports tokenizers and kernels that the parser does not use."""
    import types

    sys.path.insert(0, checkout)
    import megatron.core  # noqa: F401  torch first, and the checkout's core

    training = types.ModuleType("megatron.training")
    training.__path__ = [f"{checkout}/megatron/training"]
    module = types.ModuleType("megatron.legacy.model.module")
    for name in ("get_args", "get_timers", "get_adlr_autoresume"):
        setattr(training, name, None)
    module.param_is_not_shared = None  # type: ignore[attr-defined]
    sys.modules |= {"megatron.training": training, "megatron.legacy.model.module": module}
    from megatron.training import arguments

    arguments.get_device_arch_version = lambda: 9  # it would ask a GPU
    return arguments


def _serve(checkout: str) -> None:
    import contextlib
    import dataclasses
    import io

    arguments, answers = _import_parser(checkout), []
    # What a run gives besides, and what a machine without Transformer Engine has to switch off.
    more = ["--micro-batch-size", "1", "--tokenizer-type", "NullTokenizer", "--lr", "1e-5", "--train-iters", "10",
            "--no-rope-fusion", "--no-gradient-accumulation-fusion"]  # fmt: skip
    for given in json.loads(sys.stdin.read()):

        def of(option: str, default: int, given: list[str] = given) -> int:
            return int(given[given.index(option) + 1]) if option in given else default

        tp, ep = of("--tensor-model-parallel-size", 1), of("--expert-model-parallel-size", 1)
        world = of("--pipeline-model-parallel-size", 1) * math.lcm(tp, ep * of("--expert-tensor-parallel-size", tp))
        os.environ |= {"WORLD_SIZE": str(world), "RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        sys.argv = ["pretrain_gpt.py", *given, *more]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                args = arguments.validate_args(arguments.parse_args())
                config = arguments.core_transformer_config_from_args(args)
        except BaseException as error:  # argparse leaves by SystemExit
            answers.append({"error": f"{type(error).__name__}: {error} {said.getvalue()[-300:]}"})
            continue
        plain = (bool, int, float, str, list, type(None))
        answer = {key: value for key, value in vars(args).items() if isinstance(value, plain)}
        fields = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
        answer["config"] = {key: value for key, value in fields if isinstance(value, plain)}
        answers.append(answer)
    print(json.dumps(answers, default=str))


if __name__ == "__main__":
    _serve(sys.argv[1])
