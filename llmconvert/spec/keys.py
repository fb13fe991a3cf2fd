"""Config keys no spec field reads: which change the maths, and which are only along for the ride."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from llmconvert.errors import Refused

MATHS: dict[str, tuple[Any, ...]] = {
    "alibi": (False, None), "attention_multiplier": (None,), "attn_logit_softcapping": (None,), "attn_scale": (None,),
    "clip_qkv": (None,), "embedding_multiplier": (1, None), "embed_scale": (1, None), "final_logit_softcapping": (None,),
    "logit_scale": (1, None), "logits_scaling": (1, None), "residual_multiplier": (1, None), "scale_emb": (1, None),
    "scale_depth": (None,), "dim_model_base": (None,), "query_pre_attn_scalar": (None,), "softcap": (None,),
    "use_qk_norm": (False, None), "qk_norm": (False, None), "qk_layernorm": (False, None),
    "use_bidirectional_attention": (False, None), "parallel_residual": (False, None), "use_parallel_residual": (False, None),
    "no_rope_layers": (None, []), "no_rope_layer_interval": (None, 0), "rope_interleaved": (False, None),
    "rotary_pct": (1, None), "partial_rotary_factor": (1, None), "position_encoding_2d": (False, None),
    "num_experts": (None, 0, 1), "num_local_experts": (None, 0, 1), "n_routed_experts": (None, 0),
    "num_nextn_predict_layers": (None, 0), "kv_lora_rank": (None,), "use_sliding_window": (False, None),
    "sliding_window": (None,), "attention_chunk_size": (None,), "layer_types": (None,), "residual_scale": (1, None),
    "norm_head": (False, None), "normalization": (None, "RMSNorm", "rmsnorm"), "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None), "use_mrope": (False, None), "mlp_bias": (False, None),
    "attention_bias": (False, None), "use_bias": (False, None), "bias": (False, None),
}  # fmt: skip
"""Keys that change what a model computes, each with the values that mean nothing special."""

EXPERTS = (
    "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "topk_method", "n_group",
    "topk_group", "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "mlp_only_layers",
    "n_shared_experts", "shared_expert_intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_experts",
    "num_local_experts", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim",
    "v_head_dim", "rope_interleave", "num_nextn_predict_layers",
)  # fmt: skip
"""Keys that say something of experts, latent attention or further tokens: never carried into another architecture."""

_STRUCTURE = frozenset(
    {"architectures", "model_type", "auto_map", "transformers_version", "_name_or_path", "_from_model_config",
     "torch_dtype", "dtype", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta", "head_dim",
     "max_sequence_length", "pretraining_tp", "_attn_implementation_autoset", "attn_implementation"}
)  # fmt: skip
"""Keys written anew or tied to the source's own code: never carried over."""


def unread(config: Mapping[str, Any], read: set[str]) -> list[str]:
    """Keys that change the maths and that no field of a spec reads, with their values."""
    return [
        f"`{key}` = {reprlib.repr(config[key])}"
        for key, neutral in MATHS.items()
        if key in config and key not in read and not _neutral(key, config, neutral)
    ]


def check_unread(config: Mapping[str, Any], read: set[str], spec: str) -> None:
    """Refuse keys that change the maths and that no field of the spec reads.

    Raises:
        Refused: naming all of them.
    """
    odd = unread(config, read)
    if odd:
        raise Refused(
            f"config.json sets {', '.join(odd)}, which changes what the model computes and spec `{spec}` does not read",
            where="config.json",
            hint="if the key is a leftover without effect, remove it from a copy of config.json",
        )


def check_required(config: Mapping[str, Any], required: Mapping[str, Any], spec: str) -> None:
    """Refuse values that change the maths and that the spec does not describe; code reads a null where true is as false.

    Raises:
        Refused: naming all of them.
    """
    odd = [
        f"`{k}` = {'null' if config[k] is None else reprlib.repr(config[k])}"
        for k, value in required.items()
        if k in config and (value is True if config[k] is None else config[k] != value)
    ]
    if odd:
        raise Refused(
            f"config.json sets {', '.join(odd)}, which changes what the model computes and spec `{spec}` does not describe",
            where="config.json",
            hint="only the published form of the architecture is converted",
        )


def _neutral(key: str, config: Mapping[str, Any], neutral: tuple[Any, ...]) -> bool:
    value = config[key]
    if key == "sliding_window" and config.get("use_sliding_window") is False:
        return True
    if key == "layer_types" and isinstance(value, list):
        return all(kind == "full_attention" for kind in value)
    return any(same(value, n) for n in neutral)


def same(value: Any, other: Any) -> bool:
    """Whether two values of config keys are equal; a boolean is never a number."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def carried(config: Mapping[str, Any], read: set[str]) -> dict[str, Any]:
    """The keys to carry over as they are: token ids, dropout, labels, and whatever nobody reads.

    A key that is null is as good as absent, and stays behind: classes of transformers 5 take no null for a number. Token
    ids may be null.
    """
    left = {*read, *_STRUCTURE, *MATHS, *EXPERTS}
    return {k: v for k, v in config.items() if k not in left and (v is not None or k.endswith("_token_id"))}
