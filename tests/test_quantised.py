"""Quantised checkpoints: named alike by every command, their weights counted and not the words they are packed in."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from math import ceil, prod
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.checkpoint.safetensors import layout
from llmconvert.converters.huggingface import convert
from llmconvert.converters.inspection import inspect
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.split import plan_split, split_checkpoint
from llmconvert.converters.roundtrip import round_trip
from llmconvert.errors import LlmconvertError, Refused
from llmconvert.spec.draft import draft

Stored = dict[str, tuple[str, tuple[int, ...]]]
Packing = Callable[[str, int, int], Stored]
"""The tensors a linear map [out, in] of a name becomes: dtype and shape by name."""

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 640,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1001,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "torch_dtype": "float16", "tie_word_embeddings": False,
}  # fmt: skip


def _gptq(bits: int) -> Packing:
    def packed(name: str, out: int, inner: int) -> Stored:
        return {
            f"{name}.qweight": ("I32", (inner * bits // 32, out)), f"{name}.g_idx": ("I32", (inner,)),
            f"{name}.qzeros": ("I32", (inner // 128, out * bits // 32)), f"{name}.scales": ("F16", (inner // 128, out)),
        }  # fmt: skip

    return packed


def _awq(name: str, out: int, inner: int) -> Stored:
    return {
        f"{name}.qweight": ("I32", (inner, out // 8)), f"{name}.qzeros": ("I32", (inner // 128, out // 8)),
        f"{name}.scales": ("F16", (inner // 128, out)),
    }  # fmt: skip


def _mlx(bits: int, group: int = 64) -> Packing:
    def packed(name: str, out: int, inner: int) -> Stored:
        scales = ("F16", (out, inner // group))
        return {f"{name}.weight": ("U32", (out, inner * bits // 32)), f"{name}.scales": scales, f"{name}.biases": scales}

    return packed


def _nf4(name: str, out: int, inner: int) -> Stored:
    n = out * inner
    return {
        f"{name}.weight": ("U8", (n // 2, 1)), f"{name}.weight.absmax": ("U8", (n // 64,)),
        f"{name}.weight.quant_map": ("F32", (16,)), f"{name}.weight.nested_absmax": ("F32", (ceil(n / 64 / 256),)),
        f"{name}.weight.nested_quant_map": ("F32", (256,)),
        f"{name}.weight.quant_state.bitsandbytes__nf4": ("U8", (83,)),
    }  # fmt: skip


def _int8(name: str, out: int, inner: int) -> Stored:
    return {f"{name}.weight": ("I8", (out, inner)), f"{name}.SCB": ("F32", (out,)), f"{name}.weight_format": ("U8", ())}


def _packed(bits: int) -> Packing:
    def packed(name: str, out: int, inner: int) -> Stored:
        return {
            f"{name}.weight_packed": ("I32", (out, ceil(inner * bits / 32))), f"{name}.weight_shape": ("I64", (2,)),
            f"{name}.weight_scale": ("BF16", (out, inner // 32)),
        }  # fmt: skip

    return packed


def _nvfp4(name: str, out: int, inner: int) -> Stored:
    return {
        f"{name}.weight": ("U8", (out, inner // 2)), f"{name}.weight_scale": ("F8_E4M3", (out, inner // 16)),
        f"{name}.weight_scale_2": ("F32", ()), f"{name}.input_scale": ("F32", ()),
    }  # fmt: skip


def _ct_nvfp4(name: str, out: int, inner: int) -> Stored:
    return {
        f"{name}.weight_packed": ("U8", (out, inner // 2)), f"{name}.weight_scale": ("F8_E4M3", (out, inner // 16)),
        f"{name}.weight_global_scale": ("F32", (1,)),
    }  # fmt: skip


def _fp8_rows(name: str, out: int, inner: int) -> Stored:
    return {f"{name}.weight": ("F8_E4M3", (out, inner)), f"{name}.weight_scale": ("F32", (out, 1))}


def _fp8_tensor(name: str, out: int, inner: int) -> Stored:
    return {f"{name}.weight": ("F8_E4M3", (out, inner)), f"{name}.weight_scale_inv": ("F32", ()),
            f"{name}.activation_scale": ("F32", ())}  # fmt: skip


def _int8_rows(name: str, out: int, inner: int) -> Stored:
    return {f"{name}.weight": ("I8", (out, inner)), f"{name}.weight_scale": ("BF16", (out, 1))}


def _hqq(name: str, out: int, inner: int) -> Stored:
    return {f"{name}.W_q": ("U8", (out * inner // 128, 64)), f"{name}.zero": ("F16", (out * inner // 64, 1)),
            f"{name}.nbits": ("I32", (1,))}  # fmt: skip


_GROUPS = {"format": "pack-quantized", "quant_method": "compressed-tensors"}
FORMS: dict[str, tuple[Packing, dict[str, Any], str]] = {
    "gptq": (_gptq(4), {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq, 4 bits"),
    "gptq, 3 bits": (_gptq(3), {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "gptq, 3 bits"),
    "gptq, nothing said": (_gptq(8), {}, "gptq"),
    "awq": (_awq, {"quantization_config": {"quant_method": "awq", "w_bit": 4}}, "awq, 4 bits"),
    "awq, nothing said": (_awq, {}, "gptq or awq"),
    "mlx": (_mlx(4), {"quantization": {"group_size": 64, "bits": 4}}, "mlx, 4 bits"),
    "mlx, 6 bits": (_mlx(6), {"quantization": {"group_size": 64, "bits": 6}}, "mlx, 6 bits"),
    "nf4": (_nf4, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, 4 bits"),
    "int8": (_int8, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes, 8 bits"),
    "packed": (_packed(4), {"quantization_config": {**_GROUPS, "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}},
               "compressed-tensors, pack-quantized"),
    "packed, odd groups": (_packed(8), {"quantization_config": _GROUPS}, "compressed-tensors, pack-quantized"),
    "modelopt": (_nvfp4, {}, "modelopt, NVFP4"),
    "nvfp4": (_ct_nvfp4, {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
              "compressed-tensors, nvfp4-pack-quantized"),
    "fp8 by rows": (_fp8_rows, {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm_fp8"),
    "fp8 by tensors": (_fp8_tensor, {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, "fp8"),
    "int8 by rows": (_int8_rows, {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
                     "compressed-tensors, int-quantized"),
}  # fmt: skip
UNCOUNTED: dict[str, tuple[Packing, dict[str, Any], str]] = {
    "hqq": (_hqq, {"quantization_config": {"quant_method": "hqq"}}, "hqq"),
}


def _plain() -> dict[str, tuple[int, ...]]:
    h, f, v = 256, 640, 1001
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,), "lm_head.weight": (v, h)}
    for i in range(2):
        own = f"model.layers.{i}."
        shapes |= {f"{own}self_attn.{p}_proj.weight": (n, h) for p, n in (("q", 256), ("k", 128), ("v", 128), ("o", 256))}
        shapes |= {f"{own}self_attn.{p}_proj.bias": (n,) for p, n in (("q", 256), ("k", 128), ("v", 128))}
        shapes |= {f"{own}mlp.gate_proj.weight": (f, h), f"{own}mlp.up_proj.weight": (f, h), f"{own}mlp.down_proj.weight": (h, f)}
        shapes |= {f"{own}input_layernorm.weight": (h,), f"{own}post_attention_layernorm.weight": (h,)}
    return shapes


COUNT = sum(map(prod, _plain().values()))


def _write(directory: Path, packing: Packing, more: Mapping[str, Any], config: Mapping[str, Any] = CONFIG) -> Path:
    """A model whose linear maps are packed, as headers over a file of zeros; stored shapes hold what they say."""
    stored: Stored = {}
    inner: dict[str, tuple[int, ...]] = {}
    for name, shape in _plain().items():
        if "_proj.weight" in name:
            stored |= packing(name.removesuffix(".weight"), *shape)
            inner[f"{name.removesuffix('.weight')}.weight_shape"] = shape
        else:
            stored[name] = ("F16", shape)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**config, **more}))
    prefix, offsets = layout(stored)
    end = len(prefix) + sum(prod(shape) * ITEMSIZE[dtype] for dtype, shape in stored.values())
    with (directory / "model.safetensors").open("wb") as file:
        file.write(prefix)
        file.truncate(end)
        for name, shape in inner.items():
            if name in offsets:
                file.seek(offsets[name])
                file.write(struct.pack("<2q", *shape))
    return directory


def _make(form: str, directory: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    packing, more, _ = {**FORMS, **UNCOUNTED}[form]
    made = _write(directory, packing, more, config)
    if form == "modelopt":
        settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
        (made / "hf_quant_config.json").write_text(json.dumps(settings))
    return made


def _said(source: Path, tmp_path: Path) -> dict[str, str]:
    """What each command says of a checkpoint it does not read."""
    calls: dict[str, Callable[[], object]] = {
        "convert": lambda: convert(source, tmp_path / "out", to="llama"),
        "dry run": lambda: convert(source, tmp_path / "out", to="canonical", dry_run=True),
        "split": lambda: split_checkpoint(source, tmp_path / "out", Grid()),
        "megatron-args": lambda: plan_split(source, Grid()),
        "roundtrip": lambda: round_trip(source, "llama"),
        "new-spec": lambda: draft(str(source)),
    }
    said = {"inspect": inspect(source)["problem"]}
    for name, call in calls.items():
        with pytest.raises(LlmconvertError) as caught:
            call()
        said[name] = caught.value.what
        assert caught.value.exit_code == 3 and caught.value.hint
    assert not (tmp_path / "out").exists()
    return said


@pytest.mark.parametrize("form", [*FORMS, *UNCOUNTED])
def test_every_command_says_the_same_and_inspect_counts(form: str, tmp_path: Path) -> None:
    source, named = _make(form, tmp_path / "src"), {**FORMS, **UNCOUNTED}[form][2]
    found = inspect(source)
    assert found["quantised"] == named and found["architecture"] == "qwen2"
    assert found["parameters"] == COUNT == sum(found["memory"]["parts"].values())
    assert found["memory"]["inference"]["weights_stored"] == found["bytes"]
    said = _said(source, tmp_path)
    assert len(set(said.values())) == 1, said
    assert "quantised" in said["convert"] or "FP8" in said["convert"]


@pytest.mark.parametrize("form", [*FORMS, *UNCOUNTED])
def test_an_unknown_model_is_counted_by_its_tensors(form: str, tmp_path: Path) -> None:
    strange = {**CONFIG, "model_type": "strange", "architectures": ["StrangeForCausalLM"]}
    source = _make(form, tmp_path / "src", strange)
    found = inspect(source)
    assert found["architecture"] is None and found["named"] == "`strange` (StrangeForCausalLM)"
    assert found["parameters"] == (None if form in UNCOUNTED else COUNT)
    # Whichever comes first, both are said: neither alone would help.
    said = _said(source, tmp_path)
    first, besides, second = said["split"].partition("; besides, ")
    hint = inspect(source)["hint"]
    assert hint.startswith("take the original 16-bit checkpoint; then `llmconvert new-spec DIR` drafts")
    assert besides and second == "no spec reads `strange` (StrangeForCausalLM)"
    assert ("quantised" in first or "FP8" in first) and said.pop("new-spec") == first  # which is for models no spec reads
    assert len(set(said.values())) == 1, said


def test_settings_left_over_from_another_time_are_named_so(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(Refused, match="no tensor shows it") as caught:
        convert(source, tmp_path / "dst", to="llama")
    assert "remove `quantization_config`" in (caught.value.hint or "")


def test_mxfp4_experts_are_counted(tmp_path: Path) -> None:
    """gpt-oss: [experts, rows, groups, 16] bytes of two codes each; its router and sinks are plain."""
    stored: Stored = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (4, 128, 3, 16)),
        "model.layers.0.mlp.experts.gate_up_proj_scales": ("U8", (4, 128, 3)),
        "model.layers.0.mlp.experts.gate_up_proj_bias": ("BF16", (4, 128)),
        "model.layers.0.self_attn.sinks": ("BF16", (8,)),
    }  # fmt: skip
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prefix, _ = layout(stored)
    size = sum(prod(shape) * ITEMSIZE[dtype] for dtype, shape in stored.values())
    (tmp_path / "model.safetensors").write_bytes(prefix + bytes(size))
    found = inspect(tmp_path)
    assert found["parameters"] == 4 * 128 * 96 + 4 * 128 + 8
    assert "quantised (mxfp4" in found["problem"] and "GPT-OSS is known and not read" in found["problem"]
    assert found["hint"].startswith("keep the checkpoint in its own architecture")


def test_scales_of_fp8_are_no_parameters(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src")
    convert(source, tmp_path / "fp8", to="llama", dtype="fp8-block128", verify="none")
    plain, eight = inspect(source), inspect(tmp_path / "fp8")
    assert eight["parameters"] == plain["parameters"] and eight["tensors"] > plain["tensors"]
    assert eight["quantised"] == "fp8" and "problem" not in eight
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    (tmp_path / "fp8" / "config.json").write_text(json.dumps({**config, "model_type": "odd", "architectures": ["Odd"]}))
    assert inspect(tmp_path / "fp8")["parameters"] == plain["parameters"]
