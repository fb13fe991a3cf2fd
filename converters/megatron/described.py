"""The model that a checkpoint's arguments describe: Megatron-LM's, as a run saves them, or `to_arguments`'s."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.layer_lists import layer_list
from llmconvert.converters.megatron.arguments import LLAMA3, YARN, YARN_DEFAULTS, YARN_FIXED
from llmconvert.errors import BadInput, Refused

_FIXED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",), "swiglu": (True,), "squared_relu": (None, False), "quick_geglu": (None, False),
    "apply_layernorm_1p": (None, False), "window_size": (None,), "moe_router_score_function": (None, "softmax", "sigmoid"),
    "moe_apply_probs_on_input": (None, False), "cache_mla_latents": (None, False), "rotary_seq_len_interpolation_factor": (None, 1),
    "apply_residual_connection_post_layernorm": (None, False), "qk_l2_norm": (None, False),
    "attention_output_gate": (None, False), "softmax_scale": (None,),
}  # fmt: skip
"""Arguments that change the maths, with the values under which it is that of a dense Llama."""


_LARGEST = 2**31 - 1
_WHOLE = dict.fromkeys(
    ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "seq_length",
     "max_position_embeddings", "original_max_position_embeddings", "vocab_size", "padded_vocab_size", "moe_router_topk",
     "moe_ffn_hidden_size", "moe_router_num_groups", "moe_router_group_topk", "q_lora_rank", "kv_lora_rank",
     "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"), (1, _LARGEST),
) | {
    "num_layers": (1, 10_000), "num_experts": (1, 100_000), "mtp_num_layers": (0, 1000),
    "moe_shared_expert_intermediate_size": (0, _LARGEST), "decoder_first_pipeline_num_layers": (0, 10_000),
    "decoder_last_pipeline_num_layers": (0, 10_000),
}  # fmt: skip
_NUMBERS = (
    "norm_epsilon", "layernorm_epsilon", "rotary_base", "rotary_percent", "rope_scaling_factor",
    "rotary_scaling_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "moe_router_topk_scaling_factor",
)  # fmt: skip
_WORDS = ("position_embedding_type", "rope_type", "pipeline_model_parallel_layout")


def check_types(args: Mapping[str, Any]) -> None:
    """Check that arguments are of the kinds and within the bounds that sizes and settings of a model are.

    Raises:
        BadInput: naming those that are not.
    """

    def whole(value: Any, least: int, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf

    odd = [key for key, bounds in _WHOLE.items() if args.get(key) is not None and not whole(args[key], *bounds)]
    odd += [key for key in _NUMBERS if args.get(key) is not None and not number(args[key])]
    odd += [key for key in _WORDS if args.get(key) is not None and not isinstance(args[key], str)]
    frequency = args.get("moe_layer_freq")
    listed = isinstance(frequency, list) and all(whole(entry, 0, 1) for entry in frequency)
    if frequency is not None and not listed and not isinstance(frequency, str) and not whole(frequency, 1, 10_000):
        odd.append("moe_layer_freq")
    if odd:
        shown = ", ".join(f"`{key}` {str(args[key])[:40]!r}" for key in odd[:4])
        raise BadInput(f"the checkpoint's args have senseless values: {shown}", where="args")


def from_arguments(args: Mapping[str, Any], vocab_size: int | None = None) -> CanonicalConfig:
    """The model a checkpoint's arguments describe.

    Args:
        args: as in the checkpoint.
        vocab_size: the true vocabulary, where the arguments do not say.

    Raises:
        Refused: a model that is no decoder with RMSNorm, rotary embedding and SwiGLU.
        BadInput: the arguments lack a size, or have a senseless one.
    """
    check_types(args)
    wrong = [f"`{key}` {args.get(key)!r}" for key, allowed in _FIXED.items() if args.get(key) not in allowed]
    if args.get("position_embedding_type") not in ("rope", "yarn") and not args.get("use_rotary_position_embeddings"):
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
        scaling = {"rope_type": "llama3", "factor": float(get("rope_scaling_factor")), **LLAMA3}
    latent = bool(args.get("multi_latent_attention"))
    if latent:
        scaling = _latent_scaling(args)
    elif args.get("position_embedding_type") == "yarn":
        raise Refused("YaRN without latent attention (`position_embedding_type` yarn) is not read", where="args")
    true_size = vocab_size or args.get("vocab_size")
    if not isinstance(true_size, int):
        raise BadInput(
            f"the true vocabulary is not in the args, only the padded one of {args.get('padded_vocab_size')}",
            where="args",
            hint="give `--vocab-size`, the number of tokens of the tokenizer",
        )
    if latent:
        head_dim, share, grouped = get("qk_pos_emb_head_dim"), None, False
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
        rotary_interleaved=latent or bool(args.get("rotary_interleaved")),
        tie_word_embeddings=not args.get("untie_embeddings_and_output_weights"),
        qkv_bias=biases or bool(args.get("add_qkv_bias")),
        o_bias=biases,
        mlp_bias=biases,
        qk_norm=bool(args.get("qk_layernorm")) and not latent,
        num_nextn_predict_layers=args.get("mtp_num_layers") or 0,
        **(_from_mixture(args, get) if args.get("num_experts") else {}),
        **(_from_latent(args, get) if latent else {}),
    )


def _latent_scaling(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """YaRN as MLATransformerConfig has it from the arguments and its own defaults; None where that is plain rotation."""
    factor, everywhere = float(args.get("rotary_scaling_factor") or 40.0), args.get("mscale_all_dim") or 0.0
    if factor == 1.0:  # what Megatron-LM calls YaRN by default
        return None
    if (args.get("rope_type") or "yarn") == "yarn":
        defaults = {**YARN_DEFAULTS, **YARN_FIXED, "factor": factor}
        return {"rope_type": "yarn"} | {
            key: args[name] if args.get(name) is not None else defaults[key] for key, name in YARN.items()
        }
    if everywhere:
        raise Refused(
            f"megatron-core scales attention by `mscale_all_dim` {everywhere} without YaRN too, and no Hugging Face model "
            "here does",
            where="args",
        )
    return None


def _from_latent(args: Mapping[str, Any], get: Callable[..., Any]) -> dict[str, Any]:
    if not args.get("qk_layernorm"):
        raise Refused(
            "no Hugging Face model here has latent attention without norms (`qk_layernorm` False)", where="args"
        )
    return {
        "q_lora_rank": args.get("q_lora_rank"), "kv_lora_rank": get("kv_lora_rank"),
        "qk_nope_head_dim": get("qk_head_dim"), "qk_rope_head_dim": get("qk_pos_emb_head_dim"),
        "v_head_dim": get("v_head_dim"),
    }  # fmt: skip


def _from_mixture(args: Mapping[str, Any], get: Callable[..., Any]) -> dict[str, Any]:
    sigmoid = args.get("moe_router_score_function") == "sigmoid"
    groups = args.get("moe_router_num_groups") or 1
    biased = bool(args.get("moe_router_enable_expert_bias"))
    layers, count, chosen = args.get("moe_layer_freq", 1), get("num_layers"), args.get("moe_router_topk") or 2
    if isinstance(layers, str):
        layers = layer_list(layers)
    if isinstance(layers, int):
        layers = [i % layers == 0 for i in range(count)]
    if len(layers) != count:
        raise BadInput(f"`moe_layer_freq` speaks of {len(layers)} layers, `num_layers` of {count}", where="args")
    return {
        "num_experts": get("num_experts"), "num_experts_per_tok": chosen,
        "moe_layers": tuple(map(bool, layers)), "moe_intermediate_size": get("moe_ffn_hidden_size", "ffn_hidden_size"),
        "shared_expert_intermediate_size": args.get("moe_shared_expert_intermediate_size") or 0,
        "shared_expert_gate": bool(args.get("moe_shared_expert_gate")),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        # Of one expert a sigmoid's score is not divided by itself (`topk_routing_with_score_function`).
        "norm_topk_prob": chosen > 1 if sigmoid else not args.get("moe_router_pre_softmax"),
        "routed_scaling_factor": args.get("moe_router_topk_scaling_factor") or 1.0,
        "topk_method": "noaux_tc" if biased else "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups, "topk_group": args.get("moe_router_group_topk") or 1, "router_bias": biased,
    }  # fmt: skip
