"""What the JSON files of a checkpoint may say: the types and bounds of every key that is read or handed on.

What passes here can be computed with: a size is a whole number a model can have, a token id is one, a number is finite.
A key that is null is as good as absent. Keys not listed are free; they are read by nobody here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmconvert.checkpoint.files import check_directory, is_finite, read_json, shown
from llmconvert.errors import BadInput

MAX_SIZE = (1 << 31) - 1
"""Of an axis, a context or a token id: what 32 bits hold, as in every library that reads a config."""

MAX_LAYERS = 10_000
MAX_EXPERTS = 100_000
"""Of a layer. Both are fifty times what anybody has published; what is larger would take for ever to write out."""

MAX_LABELS = 100_000
"""Of a classifier. transformers writes out a name for each, whatever the model is for."""


class Kind(NamedTuple):
    """What a key's value may be.

    Attributes:
        expected: in words.
        fits: whether a value, which is not null, is that.
    """

    expected: str
    fits: Callable[[Any], bool]


def _whole(low: int, high: int) -> Kind:
    expected = f"a whole number from {low} to {high:,}"
    return Kind(expected, lambda value: type(value) is int and low <= value <= high)


def _list_of(kind: Kind) -> Kind:
    return Kind(
        f"a list of entries that are each {kind.expected}",
        lambda value: isinstance(value, list) and all(map(kind.fits, value)),
    )


def _either(first: Kind, second: Kind) -> Kind:
    expected = f"{first.expected}, or {second.expected}"
    return Kind(expected, lambda value: first.fits(value) or second.fits(value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e38  # a float32's range; neither NaN nor infinity is below


SIZE, COUNT, LAYERS, EXPERTS = _whole(1, MAX_SIZE), _whole(0, MAX_SIZE), _whole(1, MAX_LAYERS), _whole(0, MAX_EXPERTS)
LABELS = _whole(0, MAX_LABELS)
FURTHER, BYTES = _whole(0, MAX_LAYERS), _whole(0, (1 << 63) - 1)
TOKEN = _whole(-MAX_SIZE, MAX_SIZE)
TOKENS = _either(TOKEN, _list_of(TOKEN))
NUMBER = Kind("a finite number", _is_number)
AMOUNT = Kind("a finite number, not below 0", lambda value: _is_number(value) and value >= 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
POSITIVE = Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS, FLAGS, COUNTS = _list_of(TEXT), _list_of(FLAG), _list_of(COUNT)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))

_ROTARY = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), POSITIVE),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), NUMBER),
    "partial_rotary_factor": AMOUNT,
    "original_max_position_embeddings": SIZE,
    **dict.fromkeys(("short_factor", "long_factor"), _list_of(POSITIVE)),
}  # fmt: skip


def _is_rotary(value: Any) -> bool:
    """Rotary settings, or one set of them for each kind of layer."""
    if not isinstance(value, dict) or not is_finite(value):
        return False
    sets = [value, *(entry for entry in value.values() if isinstance(entry, dict))]
    return not any(faults(entry, _ROTARY) for entry in sets)


ROTARY = Kind("an object of rotary settings, each of its type", _is_rotary)

_QUANTISATION = {
    "quant_method": TEXT,
    "weight_block_size": Kind(
        "two sizes", lambda value: isinstance(value, list) and len(value) == 2 and all(map(SIZE.fits, value))
    ),
}
QUANTISATION = Kind(
    "an object of settings, each of its type",
    lambda value: isinstance(value, dict) and not faults(value, _QUANTISATION),
)

CONFIG: dict[str, Kind] = {
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "ffn_hidden_size", "num_attention_heads", "n_head",
                     "num_key_value_heads", "multi_query_group_num", "vocab_size", "padded_vocab_size",
                     "max_position_embeddings", "seq_length", "n_positions", "max_sequence_length", "head_dim",
                     "kv_channels", "rotary_dim", "kv_lora_rank", "model_max_length"), SIZE),
    **dict.fromkeys(("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim",
                     "sliding_window", "max_window_layers", "first_k_dense_replace", "decoder_sparse_step",
                     "num_experts_per_tok", "n_group", "topk_group", "shared_expert_intermediate_size",
                     "pretraining_tp"), COUNT),
    "num_labels": LABELS,
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), LAYERS),
    "num_nextn_predict_layers": FURTHER,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), EXPERTS),
    **dict.fromkeys(("moe_intermediate_size", "moe_layer_freq"), _either(COUNT, COUNTS)),
    "mlp_only_layers": COUNTS, "moe_layers": FLAGS, "layer_types": TEXTS,
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_ratio", "routed_scaling_factor", "embedding_multiplier",
                     "residual_multiplier", "logits_scaling", "attention_multiplier", "attn_logit_softcapping",
                     "final_logit_softcapping", "query_pre_attn_scalar"), POSITIVE),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "partial_rotary_factor", "rotary_pct",
                     "router_aux_loss_coef", "aux_loss_alpha"), AMOUNT),
    **dict.fromkeys(("initializer_range", "attention_dropout", "hidden_dropout"), SHARE),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias", "qkv_bias", "o_bias",
                     "add_qkv_bias", "add_bias_linear", "bias", "use_bias", "no_bias", "use_sliding_window",
                     "multi_query_attention", "norm_topk_prob", "qk_norm", "use_qk_norm", "alibi", "norm_head",
                     "branch_output_norm", "unit_offset_norm", "embedding_multiplier_rounded", "rotary_interleaved",
                     "rotary_padded", "shared_expert_gate", "router_bias", "rope_interleave", "rmsnorm",
                     "post_layer_norm", "apply_residual_connection_post_layernorm", "use_cache", "use_dynamic_ntk",
                     "use_logn_attn", "is_encoder_decoder", "output_hidden_states", "return_dict"), FLAG),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation", "scoring_func", "topk_method", "dtype",
                     "torch_dtype", "tokenizer_class", "transformers_version", "problem_type"), TEXT),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ROTARY),
    "original_max_position_embeddings": SIZE,
    **dict.fromkeys(("bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"), TOKEN),
    "eos_token_id": TOKENS,
    "architectures": TEXTS,
    "quantization_config": QUANTISATION,
    **dict.fromkeys(("auto_map", "text_config", "id2label", "label2id"), OBJECT),
}  # fmt: skip
"""config.json: what specs, reference models and transformers' own `PreTrainedConfig` read."""

GENERATION: dict[str, Kind] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN),
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id"), TOKENS),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "top_k", "num_beams"), AMOUNT),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), NUMBER),
    **dict.fromkeys(("do_sample", "use_cache"), FLAG),
}
"""generation_config.json."""

TOKENIZER: dict[str, Kind] = {
    "tokenizer_class": TEXT,
    "auto_map": _either(OBJECT, _either(TEXT, Kind("a list", lambda value: isinstance(value, list)))),
    "added_tokens_decoder": Kind(
        "an object of objects", lambda v: isinstance(v, dict) and all(isinstance(entry, dict) for entry in v.values())
    ),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _either(TEXT, OBJECT)),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "legacy"), FLAG),
}
"""tokenizer_config.json."""

_LAYERED = Kind(
    "a short text that speaks of layers",
    lambda value: isinstance(value, str) and len(value) < 10_000 and re.search(r"\d{5}", value) is None,
)

ARGUMENTS: dict[str, Kind] = {
    **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
                     "expert_tensor_parallel_size", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                     "num_query_groups", "kv_channels", "seq_length", "max_position_embeddings", "vocab_size",
                     "padded_vocab_size", "make_vocab_size_divisible_by", "kv_lora_rank", "qk_pos_emb_head_dim"), SIZE),
    **dict.fromkeys(("virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers",
                     "decoder_last_pipeline_num_layers", "moe_ffn_hidden_size", "moe_router_topk",
                     "moe_router_num_groups", "moe_router_group_topk", "moe_shared_expert_intermediate_size",
                     "q_lora_rank", "qk_head_dim", "v_head_dim", "original_max_position_embeddings"), COUNT),
    "num_layers": LAYERS, "mtp_num_layers": FURTHER, "num_experts": EXPERTS,
    "moe_layer_freq": _either(COUNT, _either(COUNTS, _LAYERED)),
    **dict.fromkeys(("rotary_base", "rope_scaling_factor", "rotary_scaling_factor"), POSITIVE),
    **dict.fromkeys(("norm_epsilon", "layernorm_epsilon", "rotary_percent", "moe_router_topk_scaling_factor"), AMOUNT),
    **dict.fromkeys(("mscale", "mscale_all_dim", "beta_fast", "beta_slow"), NUMBER),
    **dict.fromkeys(("group_query_attention", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "rotary_interleaved",
                     "use_rope_scaling", "multi_latent_attention", "untie_embeddings_and_output_weights",
                     "moe_router_pre_softmax", "moe_router_enable_expert_bias", "moe_shared_expert_gate",
                     "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"), FLAG),
    **dict.fromkeys(("position_embedding_type", "rope_type", "normalization", "moe_router_score_function"), TEXT),
    "pipeline_model_parallel_layout": _LAYERED,
}  # fmt: skip
"""Megatron-LM's arguments, as a checkpoint holds them."""

ITERATION = {"iteration": _either(COUNT, TEXT)}
"""What stands beside them in a rank file."""

_BESIDE = {"generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER}


def faults(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """What is wrong with a mapping, a sentence for each key whose value is not of its kind."""
    return [
        f"`{key}` is {shown(values[key])}, expected {kind.expected}"
        for key, kind in kinds.items()
        if values.get(key) is not None and not kind.fits(values[key])
    ]


def check(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Refuse a mapping with values that are not of their kinds.

    Raises:
        BadInput: naming the first few keys, with what they hold and what they should.
    """
    wrong = faults(values, kinds)
    if wrong:
        more = f"; and {len(wrong) - 4} more keys" if len(wrong) > 4 else ""
        raise BadInput("; ".join(wrong[:4]) + more, where=where, hint="copy the original file, or mend it in a copy")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check a config.json.

    Raises:
        BadInput: a key has a value no model can have, is Python's own, or names other weights than are read.
    """
    for key in config:
        if key.startswith("__"):
            # transformers makes an attribute of every key.
            raise BadInput(
                f"`{key[:60]}` is no setting of a model", where=where, hint="remove it from a copy of the file"
            )
    if config.get("transformers_weights") is not None:
        raise BadInput(
            "`transformers_weights` names a file that transformers loads in place of the usual ones, and others do not",
            where=where,
            hint="in a copy, give the file its usual name (`model.safetensors`) and remove the key",
        )
    check(config, CONFIG, where)


def read_config(directory: Path) -> dict[str, Any]:
    """A checkpoint's config.json, checked, as are the directory's entries and what stands beside it in JSON.

    Raises:
        BadInput: it is missing or not JSON; it, or a file beside it that says how to generate or tokenize, has a value
            that cannot be meant; or something in the directory is no file.
        InputOutput: it cannot be read.
    """
    names = check_directory(directory)
    config = read_json(directory / "config.json")
    check_config(config, str(directory / "config.json"))
    for name, kinds in _BESIDE.items():
        if name in names:
            check(read_json(directory / name), kinds, str(directory / name))
    return config
