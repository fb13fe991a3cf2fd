"""Block-wise FP8: golden values from the formula itself, written out here, and what must be seen when it goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.converters.huggingface import convert
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.merge import merge_checkpoint
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.errors import BadInput, ProofFailed, Refused, Usage
from llmconvert.tensors.evaluate import Reader, evaluate, to_torch
from llmconvert.tensors.expressions import (
    Expression,
    block_scales,
    cast,
    columns,
    concat,
    dequantize,
    quantize,
    rows,
    stored,
)

BLOCK = [16, 16]


def expanded(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """The scale of every element."""
    m, n = (torch.arange(size) // each for size, each in zip(shape, block, strict=True))
    return scale.float()[m][:, n]


def dequantised(
    q: Tensor, scale: Tensor, block: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """fp32(q) · scale of its block, rounded once (DeepSeek-V3, README_WEIGHTS.md)."""
    if scale.dtype == torch.uint8:
        scale = 2.0 ** (scale.double() - 127)
    return (q.float() * expanded(scale, tuple(q.shape), block)).to(dtype)


def quantised(weight: Tensor, power_of_two: bool = False, block: int = 16) -> tuple[Tensor, Tensor]:
    """E4M3 numbers and float32 scales, one a block."""
    m, n = (-(-size // block) for size in weight.shape)
    padded = torch.zeros(m * block, n * block)
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    scale = padded.view(m, block, n, block).abs().amax((1, 3)) / 448
    if power_of_two:
        scale = 2.0 ** scale.log2().ceil()
    q = (weight.float() / expanded(scale, tuple(weight.shape), (block, block))).to(torch.float8_e4m3fn)
    return q, scale


def make(arch: str, directory: Path, scales: str = "float32", **overrides: Any) -> Path:
    """A tiny checkpoint whose attention and MLP matrices are FP8 in blocks of 16, as DeepSeek publishes them."""
    source = checkpoints.make(arch, directory, dtype=torch.bfloat16, shards=1, **overrides)
    state: dict[str, Tensor] = {}
    for name, tensor in checkpoints.tensors(source).items():
        state[name] = tensor
        if tensor.ndim == 2 and "_proj" in name and "eh_proj" not in name:
            q, scale = quantised(tensor, power_of_two=scales in ("float8_e8m0fnu", "uint8"))
            state[name] = q
            if scales == "uint8":
                scale = (scale.log2() + 127).to(torch.uint8)
            state[name + "_scale_inv"] = scale.to(getattr(torch, scales))
    save_file(state, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                     "weight_block_size": BLOCK}  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    return source


def expected(source: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    state = checkpoints.tensors(source)
    return {
        name: dequantised(tensor, state[name + "_scale_inv"], dtype=dtype) if name + "_scale_inv" in state else tensor
        for name, tensor in state.items()
        if not name.endswith("_scale_inv")
    }


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
def test_dequantises_by_the_formula_and_nothing_else(scales: str, tmp_path: Path) -> None:
    source = make("deepseek_v3", tmp_path / "src", scales)
    report = convert(source, tmp_path / "dst", to="deepseek_v3", verify="weights")
    assert "dequantised in float32 and rounded once" in " ".join(report.notes)
    found, wanted = checkpoints.tensors(tmp_path / "dst"), expected(source)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"


def test_float32_is_not_rounded_on_the_way(tmp_path: Path) -> None:
    source = make("qwen3_moe", tmp_path / "src")
    convert(source, tmp_path / "dst", to="qwen3_moe", dtype="float32", verify="weights")
    found, wanted = checkpoints.tensors(tmp_path / "dst"), expected(source, torch.float32)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in wanted.items())


def test_packed_targets_and_ranks_get_the_same_numbers(tmp_path: Path) -> None:
    source = make("qwen2", tmp_path / "src")
    wanted = expected(source)
    convert(source, tmp_path / "phi", to="llama", verify="weights")
    found = checkpoints.tensors(tmp_path / "phi")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    split_checkpoint(source, tmp_path / "ranks", Grid(tp=2, pp=3), verify="weights")
    merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    found = checkpoints.tensors(tmp_path / "merged")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("arch", ["deepseek_v3", "mixtral"])
def test_keep_fp8_moves_bytes_and_scales(arch: str, tmp_path: Path) -> None:
    source = make(arch, tmp_path / "src")
    target = "deepseek_moe" if arch == "mixtral" else arch
    convert(source, tmp_path / "dst", to=target, keep_fp8=True, verify="weights")
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == BLOCK
    convert(tmp_path / "dst", tmp_path / "back", to=arch, keep_fp8=True, verify="weights")
    before, after = checkpoints.tensors(source), checkpoints.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(t.view(torch.uint8), after[n].view(torch.uint8)) for n, t in before.items())


def test_keep_fp8_is_refused_where_bytes_would_change(tmp_path: Path) -> None:
    source = make("mixtral", tmp_path / "src")
    with pytest.raises(Refused, match="is rewritten on the way"):
        convert(source, tmp_path / "dst", to="qwen3_moe", keep_fp8=True, verify="weights")
    with pytest.raises(Refused, match="packs several tensors"):
        convert(
            make("llama_mha", tmp_path / "q"),
            tmp_path / "dst",
            to="phi3",
            keep_fp8=True,
            verify="weights",
        )
    with pytest.raises(Usage, match="keeps every tensor's dtype"):
        convert(source, tmp_path / "dst", to="mixtral", keep_fp8=True, dtype="bfloat16")


def test_requantising_gives_back_the_numbers_and_says_the_error(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "src", dtype=torch.bfloat16)
    report = convert(source, tmp_path / "eight", to="deepseek_v3", dtype="fp8-block128", verify="weights")
    assert report.roundtrip is not None and report.roundtrip["quantised"] > 100
    assert 2**-6 < report.roundtrip["largest_error"] <= 2**-4
    state, before = checkpoints.tensors(tmp_path / "eight"), checkpoints.tensors(source)
    for name, tensor in before.items():
        if name + "_scale_inv" not in state:
            assert torch.equal(state[name], tensor)
            continue
        q, scale = quantised(tensor, block=128)
        assert torch.equal(state[name + "_scale_inv"], scale)
        assert torch.equal(state[name].view(torch.uint8), q.view(torch.uint8)), name
    assert {n for n in before if n + "_scale_inv" not in state and before[n].ndim == 2} == {
        n
        for n in before
        if n.endswith(
            ("embed_tokens.weight", "lm_head.weight", "head.head.weight", "mlp.gate.weight", "eh_proj.weight")
        )
    }
    convert(tmp_path / "eight", tmp_path / "sixteen", to="deepseek_v3", verify="weights")
    convert(tmp_path / "sixteen", tmp_path / "again", to="deepseek_v3", dtype="fp8-block128", verify="weights")
    again = checkpoints.tensors(tmp_path / "again")
    assert all(
        torch.equal(t.view(torch.uint8), again[n].view(torch.uint8))
        for n, t in state.items()
        if t.dtype == torch.float8_e4m3fn
    )


def _spoil(source: Path, edit: Any) -> Path:
    state = checkpoints.tensors(source)
    edit(state)
    save_file(state, source / "model.safetensors")
    return source


_SCALE = "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop(_SCALE), "1 missing: `model.layers.1.mlp.experts.3.down_proj.weight_scale_inv`"),
        (lambda s: s.update({_SCALE: torch.ones(2, 2)}), "1 wrong: .*expected one a block"),
        (lambda s: s.update({_SCALE: torch.ones(3, 3, dtype=torch.int32)}), "1 wrong"),
        (lambda s: s.update({"model.norm.weight_scale_inv": torch.ones(1)}), "1 unknown"),
    ],
)
def test_scales_that_do_not_fit_are_named(edit: Any, message: str, tmp_path: Path) -> None:
    source = _spoil(make("deepseek_v3", tmp_path / "src"), edit)
    with pytest.raises(BadInput, match=message):
        convert(source, tmp_path / "dst", to="deepseek_v3", verify="weights")


def test_other_kinds_of_fp8_are_refused(tmp_path: Path) -> None:
    source = make("qwen2", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    for settings_, error in (
        ({"quant_method": "fp8"}, Refused),
        ({"quant_method": "compressed-tensors"}, Refused),
        (None, BadInput),
    ):
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": settings_}))
        with pytest.raises(error):
            convert(source, tmp_path / "dst", to="llama", verify="weights")


@pytest.mark.parametrize("shift", [(0, 1), (1, 0)])
def test_a_tile_off_by_one_fails_the_proof(
    shift: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmconvert.tensors.evaluate as module

    true = module._bands

    def wrong(expression: Any, start: int, stop: int, reader: Reader) -> Any:
        for band, scales in true(expression, start, stop, reader):
            yield band, scales.roll(BLOCK[1], 0) if shift[1] and type(expression).__name__ == "Dequantize" else scales
            if shift[0] and type(expression).__name__ == "Dequantize":
                return

    source = make("deepseek_v3", tmp_path / "src")
    monkeypatch.setattr(module, "_bands", wrong)
    with pytest.raises(ProofFailed, match="round trip fails"):
        convert(source, tmp_path / "dst", to="deepseek_v3", verify="weights")


def _read(expression: Expression) -> Tensor:
    with Reader() as reader:
        block = evaluate(expression, 0, expression.rows, reader)
    if expression.dtype == "F8_E4M3":
        return torch.from_numpy(block).view(torch.float8_e4m3fn)
    assert expression.dtype in TO_NAME
    return to_torch(block, expression.dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_any_cut(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    m, n = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    block = (data.draw(st.sampled_from([1, 3, 16, 128])), data.draw(st.sampled_from([1, 5, 16, 128])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    bits = torch.randint(0, 256, (m, n), generator=generator, dtype=torch.uint8)
    bits[(bits & 0x7F) == 0x7F] = 0  # no NaN: it equals nothing
    scale = torch.rand(-(-m // block[0]), -(-n // block[1]), generator=generator) + 2.0**-20
    folder = tmp_path_factory.mktemp("fp8")
    save_file({"q": bits.view(torch.float8_e4m3fn), "s": scale}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    held = open_checkpoint(folder).tensors
    q, s = stored(held["q"]), stored(held["s"])
    wide = dequantised(bits.view(torch.float8_e4m3fn), scale, block, torch.float32)
    plain = dequantize(q, s, block)
    assert torch.equal(_read(plain), wide)
    low, left = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, n - 1))
    part = columns(rows(cast(plain, "BF16"), low, m), left, n)
    assert torch.equal(_read(part), wide.bfloat16()[low:, left:])
    halves = concat([rows(plain, 0, low), rows(plain, low, m)]) if low else plain
    assert torch.equal(_read(quantize(halves, s, block)).view(torch.uint8) & 0x7F, bits & 0x7F)
    scales = _read(block_scales(plain, block))
    largest = torch.stack([
        torch.stack([wide[i : i + block[0], j : j + block[1]].abs().max() for j in range(0, n, block[1])])
        for i in range(0, m, block[0])
    ])  # fmt: skip
    assert torch.equal(scales, torch.where(largest == 0, 1.0, largest / 448))


def test_not_a_number_stays_one(tmp_path: Path) -> None:
    save_file(
        {"q": torch.tensor([[0x7F, 0xFF, 1]], dtype=torch.uint8).view(torch.float8_e4m3fn), "s": torch.ones(1, 1)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    held = open_checkpoint(tmp_path).tensors
    found = _read(dequantize(stored(held["q"]), stored(held["s"]), (128, 128)))
    assert found.isnan().tolist() == [[True, True, False]] and float(found[0, 2]) == 2.0**-9
