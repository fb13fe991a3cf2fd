"""Tiny checkpoints of every architecture, made by code that is not ours where there is some.

Shapes are awkward on purpose (heads ≠ key/value heads, head_dim ≠ hidden/heads, odd layer count, odd vocabulary) and
every parameter matters: no zero biases, no unit norms.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

BASE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}

_EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}  # fmt: skip
_GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}
_LATENT = {
    **_EXPERTS, "num_key_value_heads": 6, "head_dim": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 20, "rms_norm_eps": 1e-6,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# name: (transformers config class, overrides)
NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_theta": 5e5, "head_dim": 16}),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("LlamaConfig", TIED),
    "llama_mha": ("LlamaConfig", {"num_key_value_heads": 6}),
    "llama_llama3": ("LlamaConfig", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "qwen2": ("Qwen2Config", {"rope_theta": 1e6}),
    "qwen2_tied": ("Qwen2Config", TIED),
    "qwen2_yarn": ("Qwen2Config", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                                    "original_max_position_embeddings": 64}}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "glm": ("GlmConfig", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
    "phi3_partial": ("Phi3Config", {"partial_rotary_factor": 0.75, "hidden_size": 96}),
    "phi3_longrope": ("Phi3Config", {"original_max_position_embeddings": 64, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 3.0, 5.0]}}),
    "phi3_partial_longrope": ("Phi3Config", {
        "partial_rotary_factor": 0.75, "hidden_size": 96, "original_max_position_embeddings": 64, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.1], "long_factor": [1.0, 2.0, 3.0, 5.0, 6.0, 7.0]}}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window": 7,
                                "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}),
    "granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 7.0,
                                  "attention_multiplier": 0.2, **TIED}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False}),
    "ernie4_5_tied": ("Ernie4_5Config", {"head_dim": 16}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40,
                                     "num_experts_per_tok": 2, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 32, "head_dim": 16,
                                     "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "deepseek_v2": ("DeepseekV2Config", {**_LATENT, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
                                         "routed_scaling_factor": 3.0}),
    "deepseek_v2_lite": ("DeepseekV2Config", {**_LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1,
                                              "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3Config", {**_LATENT, **_GROUPS, "rope_scaling": _YARN}),
    "moonlight": ("DeepseekV3Config", {**_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
                                       "num_nextn_predict_layers": 0}),
    "glm4_moe": ("Glm4MoeConfig", {**_EXPERTS, **_GROUPS, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
}  # fmt: skip
# For Megatron alone, which routes as transformers does only within bounds. Transformers weighs a group of experts by its
# best two, megatron-core by its best top_k / topk_group: only where these are two do both route alike.
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "megatron_qwen3_moe": ("Qwen3MoeConfig", {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16, "norm_topk_prob": True}),
    "megatron_glm4_moe": ("Glm4MoeConfig", {
        "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16, "use_qk_norm": True,
        "attention_bias": True, "routed_scaling_factor": 1.7}),
    # The norms of the latents have eps 1e-6 whatever the config says; Megatron has one eps for all.
    "megatron_deepseek_v2": ("DeepseekV2Config", {
        "num_key_value_heads": 8, "q_lora_rank": None, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
        "v_head_dim": 10, "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "rms_norm_eps": 1e-6}),
    "megatron_deepseek_v3": ("DeepseekV3Config", {
        "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
        "v_head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
        "moe_intermediate_size": 40, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6}),
}  # fmt: skip

_QWEN = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 48, "intermediate_size": 208,
    "num_hidden_layers": 3, "num_attention_heads": 6, "kv_channels": 8, "vocab_size": 131, "seq_length": 256,
    "max_position_embeddings": 32768, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 1e6, "no_bias": True,
    "rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True, "scale_attn_weights": True,
    "tokenizer_class": "QWenTokenizer", "tie_word_embeddings": False, "torch_dtype": "float32",
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
}  # fmt: skip
_BAICHUAN = {
    "architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan", "hidden_size": 48, "intermediate_size": 104,
    "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 131, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_CHATGLM = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": 48, "ffn_hidden_size": 104,
    "num_layers": 3, "num_attention_heads": 6, "kv_channels": 16, "multi_query_attention": True,
    "multi_query_group_num": 2, "padded_vocab_size": 131, "layernorm_epsilon": 1e-5, "seq_length": 256,
    "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True, "original_rope": True,
    "tie_word_embeddings": False, "torch_dtype": "float32", "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_YI = {
    **BASE, "architectures": ["YiForCausalLM"], "model_type": "Yi", "hidden_act": "silu", "rope_theta": 5e6,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
_INTERNLM2 = {
    **BASE, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "hidden_act": "silu", "bias": False,
    "rope_theta": 1e6, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip

_DEEPSEEK_MOE = {
    **BASE, **_EXPERTS, "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "hidden_act": "silu",
    "num_key_value_heads": 6, "norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001, "seq_aux": True, "rope_theta": 10000, "rope_scaling": None, "attention_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip

REMOTE: dict[str, dict[str, Any]] = {
    "qwen": _QWEN,
    "qwen_2023": {
        **{k: v for k, v in _QWEN.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                                        "intermediate_size", "seq_length")},
        "n_embd": 48, "n_layer": 3, "n_head": 6, "ffn_hidden_size": 208, "n_positions": 256,
    },
    "baichuan": _BAICHUAN,
    "baichuan2": {**_BAICHUAN, "architectures": ["BaichuanForCausalLM"], "model_max_length": 256},
    "baichuan_13b": {**{k: v for k, v in _BAICHUAN.items() if k != "max_position_embeddings"},
                     "architectures": ["BaichuanForCausalLM"], "model_max_length": 256, "gradient_checkpointing": False,
                     "position_embedding": "ALIBI", "norm_head": False},
    "chatglm2": _CHATGLM,
    "chatglm_mha": {**_CHATGLM, "multi_query_attention": False, "add_qkv_bias": False},
    "glm4_9b": {**_CHATGLM, "architectures": ["ChatGLMForConditionalGeneration"], "rope_ratio": 500,
                "num_hidden_layers": 3, "eos_token_id": [2, 3, 4], "layernorm_epsilon": 1.5625e-7, "vocab_size": 131},
    "yi": _YI,
    "internlm2": _INTERNLM2,
    "deepseek_moe": _DEEPSEEK_MOE,
}  # fmt: skip

ALL = (*NATIVE, *REMOTE)


def randomise(model: nn.Module, seed: int) -> None:
    """Make every parameter matter: N(0, 0.2), and norm weights around one; likewise the routers' correction biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(_lowest_bias(), 0.4, generator=generator)


def _lowest_bias() -> float:
    """Not so negative that the published code and transformers choose from different groups, which 4 soon does."""
    import transformers

    return -0.2 if transformers.__version__ >= "5" else 0.0


def with_further_tokens(state: dict[str, torch.Tensor], layers: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A DeepSeek-V3 or GLM-4.5 state dict with the layer that predicts a further token, which transformers leaves out."""
    generator = torch.Generator().manual_seed(seed)
    last, own, result = f"model.layers.{layers - 1}.", f"model.layers.{layers}.", dict(state)
    hidden, dtype = state["model.norm.weight"].shape[0], state["model.norm.weight"].dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.2).to(dtype)

    result |= {own + name.removeprefix(last): random(*t.shape) for name, t in state.items() if name.startswith(last)}
    biases = f"{own}mlp.gate.e_score_correction_bias"
    if biases in result:
        result[biases].clamp_(min=_lowest_bias())
    result |= {f"{own}{name}.weight": 1 + random(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    result |= {f"{own}{name}.weight": state[f"{original}.weight"].clone() for name, original in copies.items()}
    return result | {f"{own}eh_proj.weight": random(hidden, 2 * hidden)}


def saved(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What transformers writes: it names experts one by one and leaves a tied head out."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = {name: tensor.clone() for name, tensor in tensors(Path(folder)).items()}
        return state, json.loads((Path(folder) / "config.json").read_text())


def build_native(arch: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The real transformers model, tiny and random."""
    import transformers

    cls, extra = {**NATIVE, **LARGE}[arch]
    config = getattr(transformers, cls)(**{**BASE, **extra, **overrides})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, seed)
    return model.eval()


def build_remote(arch: str, seed: int = 0, **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The reference model and its config.json."""
    from llmconvert.verify.reference import find_reference

    config = {**REMOTE[arch], **overrides}
    cls = find_reference(config)
    assert cls is not None
    model = cls(config)
    randomise(model, seed)
    return model.eval(), config


def write_weights(state: dict[str, torch.Tensor], directory: Path, shards: int = 3, fmt: str = "safetensors") -> None:
    """Save a state dict in so many shards, dealt round-robin so that fused groups cross them, with an index."""
    names = sorted(state)
    suffix, index = (
        ("safetensors", "model.safetensors.index.json")
        if fmt == "safetensors"
        else ("bin", "pytorch_model.bin.index.json")
    )
    stem = "model" if fmt == "safetensors" else "pytorch_model"
    weight_map = {}
    for k in range(shards):
        file = f"{stem}-{k + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        part = {name: state[name].clone().contiguous() for name in names[k::shards]}
        weight_map |= dict.fromkeys(part, file)
        if fmt == "safetensors":
            save_file(part, directory / file, metadata={"format": "pt"})
        else:
            torch.save(part, directory / file)
    if shards > 1:
        (directory / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def _as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers 4 saved it: rope_theta and rope_scaling at the top, `torch_dtype`."""
    if "rope_parameters" not in config:  # it is transformers 4 that saved it
        return config
    rope = dict(config.pop("rope_parameters") or {})
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    share = rope.pop("partial_rotary_factor", None)
    if share is not None and config["model_type"] in ("glm", "glm4", "phi3"):
        config["partial_rotary_factor"] = share
    config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if config["model_type"] == "phi3" and config["rope_scaling"]:
        config["rope_scaling"] = {key: rope[key] for key in ("short_factor", "long_factor")} | {
            "type": rope["rope_type"]
        }
    config["torch_dtype"] = config.pop("dtype", "float32")
    return config


def make(
    arch: str, directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, shards: int = 3,
    fmt: str = "safetensors", form: int = 4, **overrides: Any,
) -> Path:  # fmt: skip
    """Write a complete tiny checkpoint.

    Args:
        arch: one of `ALL`.
        directory: made if absent.
        dtype: of the weights.
        seed: of the weights.
        shards: weight files.
        fmt: safetensors or bin.
        form: 4 for config.json as transformers 4 wrote it, 5 as 5 does.
        overrides: config values.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if arch in NATIVE:
        model = build_native(arch, seed, **overrides).to(dtype)
        state, config = saved(model)
        config["architectures"] = [type(model).__name__]
        config.pop("torch_dtype", None)
        if config.get("num_nextn_predict_layers"):
            state = with_further_tokens(state, config["num_hidden_layers"], seed)
        config["torch_dtype" if "rope_parameters" not in config else "dtype"] = str(dtype).removeprefix("torch.")
        config = _as_transformers_4(config) if form == 4 else config
    else:
        model, config = build_remote(arch, seed, **overrides)
        state = {k: v.to(dtype) for k, v in model.state_dict().items()}
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_new_tokens": 20}))
    write_weights(state, directory, shards, fmt)
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by safetensors and torch themselves."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= load_file(path)
    if not state:
        for path in sorted(directory.glob("*.bin")):
            state |= torch.load(path, weights_only=True)
    return state


Edit = Callable[[dict[str, torch.Tensor]], None]
