"""The reference models against transformers' own, through mappings written here by hand, and against their quirks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor, nn

from llmconvert.errors import Refused
from llmconvert.verify.reference import find_reference
from llmconvert.verify.reference.baichuan import BaichuanForCausalLM, NormHead, alibi_slopes, form

State = dict[str, Tensor]
LAYERS = 3
LLAMA = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": LAYERS,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
# Rounding of float32 sums taken in another order, relative to the largest logit; a mistake is over a hundredth.
ROUNDING, WRONG = 1e-5, 1e-2


def _native(name: str, state: State, **config: Any) -> nn.Module:
    """A transformers model holding exactly these weights."""
    import transformers

    made = getattr(transformers, f"{name}Config")(**{**LLAMA, **config})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    model.load_state_dict(state, strict=True)
    return model.eval()


def _layerwise(state: State, prefix: str, names: dict[str, str], top: dict[str, str]) -> State:
    """Renamed tensors: `names` within layer {i}, `top` outside."""
    out = {new: state[old] for new, old in top.items()}
    for i in range(LAYERS):
        for new, old in names.items():
            out[f"model.layers.{i}.{new}"] = state[f"{prefix}.{i}.{old}"]
    return out


SAME = {f"{name}.weight": f"{name}.weight" for name in (
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm")}  # fmt: skip
TOP = {name: name for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}


def _baichuan(state: State, normalise: bool = False) -> State:
    out = _layerwise(state, "model.layers", SAME, TOP)
    for i in range(LAYERS):
        packed = state[f"model.layers.{i}.self_attn.W_pack.weight"]
        for k, part in enumerate("qkv"):
            out[f"model.layers.{i}.self_attn.{part}_proj.weight"] = packed[48 * k : 48 * (k + 1)]
    if normalise:
        head = out["lm_head.weight"]
        out["lm_head.weight"] = head / head.square().sum(1, keepdim=True).sqrt()
    return out


def _yi(state: State) -> State:
    names = {**SAME, "input_layernorm.weight": "ln1.weight", "post_attention_layernorm.weight": "ln2.weight"}
    names |= {f"self_attn.{p}_proj.weight": f"self_attn.{p}_proj.weight" for p in "qkv"}
    return _layerwise(state, "model.layers", names, TOP)


def _internlm2(state: State) -> State:
    names = {
        "mlp.gate_proj.weight": "feed_forward.w1.weight", "mlp.up_proj.weight": "feed_forward.w3.weight",
        "mlp.down_proj.weight": "feed_forward.w2.weight", "self_attn.o_proj.weight": "attention.wo.weight",
        "input_layernorm.weight": "attention_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    }  # fmt: skip
    top = {"model.embed_tokens.weight": "model.tok_embeddings.weight", "model.norm.weight": "model.norm.weight",
           "lm_head.weight": "output.weight"}  # fmt: skip
    out = _layerwise(state, "model.layers", names, top)
    for i in range(LAYERS):
        rows = state[f"model.layers.{i}.attention.wqkv.weight"].split(8)  # heads: q q q k v, q q q k v
        for part, heads in {"q": (0, 1, 2, 5, 6, 7), "k": (3, 8), "v": (4, 9)}.items():
            out[f"model.layers.{i}.self_attn.{part}_proj.weight"] = torch.cat([rows[h] for h in heads])
    return out


def _qwen(state: State, gate: str = "w2", up: str = "w1") -> State:
    names = {
        "mlp.gate_proj.weight": f"mlp.{gate}.weight", "mlp.up_proj.weight": f"mlp.{up}.weight",
        "mlp.down_proj.weight": "mlp.c_proj.weight", "self_attn.o_proj.weight": "attn.c_proj.weight",
        "input_layernorm.weight": "ln_1.weight", "post_attention_layernorm.weight": "ln_2.weight",
    }  # fmt: skip
    top = {"model.embed_tokens.weight": "transformer.wte.weight", "model.norm.weight": "transformer.ln_f.weight",
           "lm_head.weight": "lm_head.weight"}  # fmt: skip
    out = _layerwise(state, "transformer.h", names, top)
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            packed = state[f"transformer.h.{i}.attn.c_attn.{kind}"]
            for k, part in enumerate("qkv"):
                out[f"model.layers.{i}.self_attn.{part}_proj.{kind}"] = packed[48 * k : 48 * (k + 1)]
    return out


def _chatglm_mha(state: State) -> State:
    """Without grouped queries each head's query, key and value lie together."""
    regrouped = dict(state)
    for name, packed in state.items():
        if name.endswith("query_key_value.weight"):
            regrouped[name] = packed.unflatten(0, (6, 3, 16)).transpose(0, 1).flatten(0, 2)
    return _chatglm(regrouped, kv_heads=6, bias=False)


def _chatglm(state: State, kv_heads: int = 2, bias: bool = True) -> State:
    names = {
        "mlp.gate_up_proj.weight": "mlp.dense_h_to_4h.weight", "mlp.down_proj.weight": "mlp.dense_4h_to_h.weight",
        "self_attn.o_proj.weight": "self_attention.dense.weight", "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    }  # fmt: skip
    top = {"model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
           "model.norm.weight": "transformer.encoder.final_layernorm.weight",
           "lm_head.weight": "transformer.output_layer.weight"}  # fmt: skip
    out = _layerwise(state, "transformer.encoder.layers", names, top)
    ends = (0, 6 * 16, (6 + kv_heads) * 16, (6 + 2 * kv_heads) * 16)
    for i in range(LAYERS):
        for kind in ("weight", "bias") if bias else ("weight",):
            packed = state[f"transformer.encoder.layers.{i}.self_attention.query_key_value.{kind}"]
            for k, part in enumerate("qkv"):
                out[f"model.layers.{i}.self_attn.{part}_proj.{kind}"] = packed[ends[k] : ends[k + 1]]
    return out


GLM = {"head_dim": 16, "num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1e-5, "pad_token_id": 0}
GLM_MHA = {**GLM, "num_key_value_heads": 6, "attention_bias": False}
# arch: (transformers class, mapping, its config)
TWINS: dict[str, tuple[str, Callable[[State], State], dict[str, Any]]] = {
    "baichuan": ("Llama", _baichuan, {}),
    "baichuan2": ("Llama", lambda state: _baichuan(state, normalise=True), {}),
    "yi": ("Llama", _yi, {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e6}),
    "internlm2": ("Llama", _internlm2, {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "qwen": ("Qwen2", _qwen, {"rope_theta": 1e6}),
    "qwen_2023": ("Qwen2", _qwen, {"rope_theta": 1e6}),
    "chatglm2": ("Glm", _chatglm, GLM),
    "chatglm_mha": ("Glm", _chatglm_mha, GLM_MHA),
    "glm4_9b": ("Glm", _chatglm, {**GLM, "rope_theta": 5e6, "rms_norm_eps": 1.5625e-7}),
}
# Beyond what the tiny configs say, so that positions far out are allowed.
LONG = {"qwen": {"seq_length": 262144}, "qwen_2023": {"n_positions": 262144}}
IDS = torch.randint(0, 131, (2, 19), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def _distance(
    reference: nn.Module, native: nn.Module, position_ids: Tensor | None = None, native_mask: Tensor | None = None,
    native_positions: Tensor | None = None,
) -> float:  # fmt: skip
    """The largest difference of logits, relative to the largest logit."""
    places = position_ids if native_positions is None else native_positions
    ours = reference(IDS, position_ids=position_ids)
    theirs = native(input_ids=IDS, position_ids=places, attention_mask=native_mask).logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _twins(arch: str, reference_config: dict[str, Any] | None = None, **native: Any) -> tuple[nn.Module, nn.Module]:
    name, mapping, config = TWINS[arch]
    reference, _ = checkpoints.build_remote(arch, **LONG.get(arch, {}), **(reference_config or {}))
    return reference, _native(name, mapping(reference.state_dict()), **{**config, **native})


@pytest.mark.parametrize("arch", TWINS)
def test_the_same_model_as_transformers_has(arch: str) -> None:
    reference, native = _twins(arch)
    assert _distance(reference, native) < ROUNDING


@pytest.mark.parametrize("arch", TWINS)
def test_the_same_at_positions_far_out(arch: str) -> None:
    """Angles rounded otherwise than elsewhere differ by 1e-4 of the scale at 10^5 and beyond."""
    reference, native = _twins(arch)
    places = torch.linspace(0, 262143, 19).long().expand(2, -1)
    assert _distance(reference, native, places) < ROUNDING


@pytest.mark.parametrize("arch, native", [
    ("yi", {"rope_theta": 1e4}), ("internlm2", {"rope_theta": 1e4}), ("qwen", {"rope_theta": 1e4}),
    ("glm4_9b", {"rope_theta": 1e4}), ("baichuan", {"rope_theta": 1e5}),
    ("chatglm2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
])  # fmt: skip
def test_a_wrong_rotation_shows(arch: str, native: dict[str, Any]) -> None:
    assert _distance(*_twins(arch, **native)) > WRONG


def test_a_forgotten_norm_head_shows() -> None:
    reference, _ = checkpoints.build_remote("baichuan2")
    assert _distance(reference, _native("Llama", _baichuan(reference.state_dict()))) > WRONG


def test_gate_and_up_exchanged_show() -> None:
    reference, _ = checkpoints.build_remote("qwen")
    assert _distance(reference, _native("Qwen2", _qwen(reference.state_dict(), "w1", "w2"), rope_theta=1e6)) > WRONG


def test_linear_scaling_divides_positions() -> None:
    scaling = {"type": "linear", "factor": 3.0}
    native = {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6}}
    reference, twin = _twins("internlm2", {"rope_scaling": scaling}, **native)
    assert _distance(reference, twin) < ROUNDING
    assert _distance(_twins("internlm2")[0], twin) > WRONG


@pytest.mark.parametrize("heads", [4, 6, 40])
def test_alibi_slopes_are_those_of_bloom(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    assert torch.allclose(alibi_slopes(heads), theirs)


def test_alibi_is_llama_without_rotation_under_a_slanted_mask() -> None:
    """Llama at position 0 everywhere does not rotate; its mask takes a bias a head."""
    reference, _ = checkpoints.build_remote("baichuan_13b")
    native = _native("Llama", _baichuan(reference.state_dict()))
    distance = (torch.arange(19)[None, :] - torch.arange(19)[:, None]).float()
    slanted = alibi_slopes(6)[:, None, None] * distance
    mask = slanted.masked_fill(distance > 0, float("-inf"))[None].expand(2, -1, -1, -1)
    still = torch.zeros_like(IDS)
    assert _distance(reference, native, native_mask=mask, native_positions=still) < ROUNDING
    assert _distance(reference, native) > WRONG  # rotating instead


@pytest.mark.parametrize("arch", checkpoints.REMOTE)
@torch.no_grad()
def test_left_padding_changes_nothing(arch: str) -> None:
    model, _ = checkpoints.build_remote(arch)
    lengths = (4, 11, 19)
    ids = IDS[:1].repeat(3, 1)
    mask = torch.stack([(torch.arange(19) >= 19 - n).long() for n in lengths])
    padded = model(ids, attention_mask=mask)
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, -n:])
        assert torch.allclose(padded[row, -n:], alone[0], rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("arch", checkpoints.REMOTE)
@torch.no_grad()
def test_only_distances_between_positions_matter(arch: str) -> None:
    model, _ = checkpoints.build_remote(arch)
    model = model.double()
    places = torch.arange(19)[None].expand(2, -1)
    here, there = model(IDS, position_ids=places), model(IDS, position_ids=places + 100)
    assert torch.allclose(here, there, rtol=0, atol=1e-4 * float(here.abs().max()))
    stretched = model(IDS, position_ids=2 * places)
    assert float((here - stretched).abs().max()) > WRONG * float(here.abs().max())


@pytest.mark.parametrize("arch", checkpoints.REMOTE)
@torch.no_grad()
def test_a_later_token_is_not_seen(arch: str) -> None:
    model, _ = checkpoints.build_remote(arch)
    other = IDS.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 131
    assert torch.equal(model(IDS)[:, :10], model(other)[:, :10])


def test_chatglm_stores_its_frequencies() -> None:
    model, _ = checkpoints.build_remote("chatglm2")
    stored = model.state_dict()["transformer.rotary_pos_emb.inv_freq"]
    assert stored.shape == (4,) and stored[0] == 1.0  # half of 16 dimensions, in pairs


def test_which_baichuan_it_is_follows_the_config() -> None:
    first, second = checkpoints.REMOTE["baichuan"], checkpoints.REMOTE["baichuan2"]
    alibi = {key: value for key, value in checkpoints.REMOTE["baichuan_13b"].items() if key not in ("position_embedding", "norm_head")}
    assert form(first) == form({**first, "vocab_size": 125696}) == (False, False)
    assert form(second) == form({**second, "vocab_size": 64001}) == (False, True)
    with pytest.raises(Refused, match="does not tell"):
        form(alibi)
    large = {"num_attention_heads": 40, "num_hidden_layers": 40}
    for sizes in (large, {"gradient_checkpointing": False}):
        assert form({**alibi, **sizes, "vocab_size": 64000}) == (True, False)
        assert form({**alibi, **sizes, "vocab_size": 125696}) == form({**alibi, **sizes, "z_loss_weight": 0}) == (True, True)
    assert form({**alibi, "position_embedding": "ALIBI", "norm_head": True}) == (True, True)
    assert isinstance(BaichuanForCausalLM({**second, "num_hidden_layers": 1}).lm_head, NormHead)


@pytest.mark.parametrize("config", [{"use_logn_attn": False}, {"use_dynamic_ntk": False}])
def test_qwen_refuses_what_dynamic_scaling_reaches(config: dict[str, Any]) -> None:
    model, _ = checkpoints.build_remote("qwen", seq_length=12, **config)
    model(IDS[:, :12])
    with pytest.raises(ValueError, match="seq_length 12"):
        model(IDS[:, :13])


def test_qwen_without_dynamic_scaling_has_no_limit() -> None:
    model, _ = checkpoints.build_remote("qwen", seq_length=12, use_logn_attn=False, use_dynamic_ntk=False)
    model(IDS)


@pytest.mark.parametrize("length", [12, 256])
def test_dynamic_scaling_acts_beyond_the_length(length: int) -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    native = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}}
    reference, twin = _twins(
        "internlm2", {"rope_scaling": scaling, "max_position_embeddings": length}, max_position_embeddings=length, **native
    )
    assert _distance(reference, twin) < ROUNDING
    assert (_distance(_twins("internlm2")[0], twin) > WRONG) == (length == 12)


@pytest.mark.parametrize("arch, key, value", [
    ("qwen", "rotary_pct", 0.5), ("qwen", "scale_attn_weights", False), ("qwen", "kv_channels", 16),
    ("yi", "rope_scaling", {"type": "linear", "factor": 2.0}), ("yi", "attention_bias", True),
    ("baichuan", "hidden_act", "gelu"), ("chatglm2", "rmsnorm", False), ("chatglm2", "post_layer_norm", False),
    ("chatglm2", "apply_residual_connection_post_layernorm", True),
    ("internlm2", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
])  # fmt: skip
def test_what_is_not_modelled_is_refused(arch: str, key: str, value: Any) -> None:
    with pytest.raises(Refused, match=f"`{key}`"):
        checkpoints.build_remote(arch, **{key: value})


def test_find_reference_knows_its_own() -> None:
    for arch in checkpoints.REMOTE:
        config = checkpoints.REMOTE[arch]
        assert find_reference(config) is not None, arch
    assert find_reference({"model_type": "chatglm", "position_encoding_2d": True}) is None
    for arch, (cls, _) in checkpoints.NATIVE.items():
        names = [cls.replace("Config", "ForCausalLM")]
        assert find_reference({"model_type": arch, "architectures": names}) is None, arch
    assert find_reference({}) is None
