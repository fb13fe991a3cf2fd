"""The expression algebra against eager torch, and the laws of specs and rewrites, over random shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmconvert.canonical.lowerings import ADD, REMOVE, lower
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel, shapes, traits
from llmconvert.canonical.rotary import deinterleaved, padded
from llmconvert.checkpoint.safetensors import read_header
from llmconvert.spec.dialect import emit
from llmconvert.spec.expand import bind
from llmconvert.spec.registry import registry
from llmconvert.tensors import evaluate as engine
from llmconvert.tensors import expressions as ex
from llmconvert.tensors.evaluate import Reader, evaluate, pieces, to_torch
from llmconvert.verify.reference.common import angles, rotate_halves, rotate_neighbours

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def _evaluate(expression: ex.Expression) -> torch.Tensor:
    with Reader() as reader:
        return to_torch(evaluate(expression, 0, expression.rows, reader), expression.dtype)


@st.composite
def programs(draw: st.DrawFn) -> list[tuple]:
    """A list of operations, as data: applied alike to expressions and to eager tensors."""
    count = draw(st.integers(0, 5))
    kinds = ("rows", "gather", "columns", "scale", "shift", "normalize", "cast", "concat", "interleave", "mean")
    return [(draw(st.sampled_from(kinds)), draw(st.integers(0, 2**30))) for _ in range(count)]


def _apply(program: list[tuple], expression: ex.Expression, tensor: torch.Tensor) -> tuple[ex.Expression, torch.Tensor]:
    for kind, seed in program:
        random = np.random.default_rng(seed)
        n = expression.rows
        if kind == "rows":
            start = int(random.integers(0, n))
            stop = int(random.integers(start + 1, n + 1))
            expression, tensor = ex.rows(expression, start, stop), tensor[start:stop]
        elif kind in ("gather", "columns"):
            axis = 0 if kind == "gather" else 1
            size = expression.shape[axis]
            period = int(random.choice([p for p in range(1, size + 1) if size % p == 0]))
            pattern = [int(e) for e in random.integers(-1, period, size=int(random.integers(1, 2 * period + 1)))]
            expression = ex.gather(expression, pattern, period, axis)
            groups = tensor.unflatten(axis, (size // period, period))
            zero = torch.zeros_like(groups.select(axis + 1, 0))
            picked = [zero if e < 0 else groups.select(axis + 1, e) for e in pattern]
            tensor = torch.stack(picked, axis + 1).flatten(axis, axis + 1)
        elif kind == "scale":
            factor = float(random.normal()) or 0.5
            expression, tensor = ex.scale(expression, factor), tensor.float() * factor
        elif kind == "shift":
            expression, tensor = ex.shift(expression, 1.0), tensor.float() + 1.0
        elif kind == "normalize":
            expression, tensor = ex.normalize_rows(expression), torch.nn.functional.normalize(tensor, dim=-1)
        elif kind == "cast":
            dtype = list(DTYPES)[seed % 2]
            expression, tensor = ex.cast(expression, dtype), tensor.to(DTYPES[dtype])
        elif kind == "concat":
            expression, tensor = ex.concat([expression, expression]), torch.cat((tensor, tensor))
        elif kind == "mean":
            halved = ex.cast(ex.scale(expression, 0.5), expression.dtype)
            both = torch.stack((tensor.double(), (tensor.float() * 0.5).to(tensor.dtype).double()))
            expression, tensor = ex.mean([expression, halved]), both.mean(0).to(tensor.dtype)
        elif kind == "interleave":
            chunk = int(random.choice([p for p in range(1, n + 1) if n % p == 0]))
            expression = ex.interleave([expression, expression], (chunk, chunk))
            tensor = torch.stack((tensor.unflatten(0, (-1, chunk)),) * 2, 1).flatten(0, 2)
    return expression, tensor


@RELAXED
@given(program=programs(), height=st.integers(1, 12), width=st.integers(1, 9), dtype=st.sampled_from(list(DTYPES)))
def test_expressions_equal_eager_torch(program: list, height: int, width: int, dtype: str, tmp_path: Path) -> None:
    tensor = torch.randn(height, width).to(DTYPES[dtype])
    save_file({"t": tensor}, tmp_path / "t.safetensors")
    expression, expected = _apply(program, ex.stored(read_header(tmp_path / "t.safetensors")["t"]), tensor)
    assert expression.shape == tuple(expected.shape)
    assert DTYPES[expression.dtype] == expected.dtype
    assert torch.equal(_evaluate(expression).nan_to_num(), expected.nan_to_num())


@RELAXED
@given(program=programs(), height=st.integers(1, 40), block=st.integers(1, 400), shortest=st.integers(1, 64))
def test_block_size_never_changes_the_result(
    program: list, height: int, block: int, shortest: int, tmp_path: Path
) -> None:
    save_file({"t": torch.randn(height, 6)}, tmp_path / "t.safetensors")
    expression, expected = _apply(
        program, ex.stored(read_header(tmp_path / "t.safetensors")["t"]), torch.zeros(height, 6)
    )
    del expected
    with Reader() as reader, pytest.MonkeyPatch.context() as patch:
        whole = evaluate(expression, 0, expression.rows, reader)
        patch.setattr(engine, "BLOCK_BYTES", block)
        patch.setattr(engine, "_SHORTEST_MOVE", shortest)
        parts = [
            b for e, low, high in pieces(expression, 0, expression.rows) for b in engine.blocks(e, low, high, reader)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


@RELAXED
@given(half=st.integers(1, 8), data=st.data())
def test_rotary_layouts_are_the_same_rotation(half: int, data: st.DataObject) -> None:
    """A permuted head under Llama's rotation is the permuted result of the original rotation."""
    head_dim, rotary_dim = 2 * half, 2 * data.draw(st.integers(1, half))
    x = torch.randn(1, 1, 5, head_dim, dtype=torch.float64)
    places = torch.arange(5)[None] * 977
    angle = angles(places, rotary_dim, 1e4)
    original = torch.cat((rotate_neighbours(x[..., :rotary_dim], angle), x[..., rotary_dim:]), -1)
    order = deinterleaved(head_dim, rotary_dim)
    spread = [order[j] for j in padded(head_dim, rotary_dim)]
    assert sorted(spread) == list(range(head_dim))
    frequencies = torch.zeros(1, 5, half, dtype=torch.float64)
    frequencies[..., : rotary_dim // 2] = angle
    assert torch.allclose(rotate_halves(x[..., spread], frequencies), original[..., spread], atol=1e-12)
    theta = 1e4 ** (head_dim / rotary_dim)
    assert torch.allclose(angles(places, head_dim, theta)[..., : rotary_dim // 2], angle)


@pytest.mark.parametrize("wide", ["F32", "F64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_cast_that_only_widens_leaves_no_trace(dtype: str, wide: str, tmp_path: Path) -> None:
    save_file({"t": torch.randn(3, 4).to(DTYPES[dtype])}, tmp_path / "t.safetensors")
    tensor = ex.stored(read_header(tmp_path / "t.safetensors")["t"])
    assert ex.cast(ex.cast(tensor, wide), dtype) is tensor
    other = "F16" if dtype == "BF16" else "BF16"
    assert ex.cast(ex.cast(tensor, wide), other) == ex.cast(tensor, other)
    narrowed = ex.cast(ex.cast(tensor, other), "F32")
    assert narrowed != ex.cast(tensor, "F32")


@st.composite
def configs(draw: st.DrawFn) -> CanonicalConfig:
    kv = draw(st.integers(1, 3))
    heads = kv * draw(st.integers(1, 3))
    head_dim = 4 * draw(st.integers(1, 4))
    return CanonicalConfig(
        hidden_size=draw(st.integers(1, 24)), intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 4)), num_attention_heads=heads, num_key_value_heads=kv, head_dim=head_dim,
        vocab_size=draw(st.integers(1, 40)), rms_norm_eps=1e-6, max_position_embeddings=64, rope_theta=1e4,
        rotary_dim=draw(st.sampled_from([head_dim, head_dim // 2])), rotary_interleaved=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()), qkv_bias=draw(st.booleans()), o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()), qk_norm=draw(st.booleans()),
    )  # fmt: skip


def _model(config: CanonicalConfig, folder: Path) -> CanonicalModel:
    state = {name: torch.randn(shape) for name, shape in shapes(config).items()}
    save_file(state, folder / "m.safetensors")
    header = read_header(folder / "m.safetensors")
    return CanonicalModel(config, {name: ex.stored(header[name]) for name in state})


@RELAXED
@given(config=configs(), name=st.sampled_from(sorted(registry().specs)))
def test_take_apart_undoes_put_together(config: CanonicalConfig, name: str, tmp_path: Path) -> None:
    """Writing a model in any dialect and reading it back by the same rows gives every canonical tensor."""
    spec = registry().specs[name]
    model = _model(config, tmp_path)
    stored = emit(spec, model, {})
    back: dict[str, ex.Expression] = {}
    for binding in bind(spec, config, {}):
        assert stored[binding.stored].shape == binding.shape
        back |= binding.take_apart(stored[binding.stored], config)
    kept = {n for b in bind(spec, config, {}) for n in b.parts}
    assert kept <= set(model.tensors)
    for tensor in kept:
        assert torch.equal(_evaluate(back[tensor]), _evaluate(model.tensors[tensor]))


@RELAXED
@given(
    config=configs(), key=st.sampled_from(["interleaved_rotary", "partial_rotary", "grouped_query", "tied_embeddings"])
)
def test_steps_are_undone_exactly(config: CanonicalConfig, key: str, tmp_path: Path) -> None:
    if key == "partial_rotary":
        config = replace(config, rotary_interleaved=False)
    if key not in traits(config):
        return
    model = _model(config, tmp_path)
    step = REMOVE[key]
    changed = step.apply(model)
    assert key not in traits(changed.config)
    assert {n: e.shape for n, e in changed.tensors.items()} == shapes(changed.config)
    assert step.undo is not None
    again = step.undo(changed, config)
    assert again.config == config
    for name, expression in model.tensors.items():
        assert torch.equal(_evaluate(again.tensors[name]), _evaluate(expression)), name


def test_a_widened_head_scores_the_same(tmp_path: Path) -> None:
    config = CanonicalConfig(24, 20, 1, 4, 2, 8, 31, 1e-6, 64, 1e4, 8)
    model = _model(config, tmp_path)
    wide = ADD["partial_rotary"].apply(model)
    assert wide.config.head_dim == 16 and wide.config.rotary_dim == 8
    name = "model.layers.0.self_attn.{}_proj.weight"
    q, k = (_evaluate(model.tensors[name.format(p)]) for p in "qk")
    wq, wk = (_evaluate(wide.tensors[name.format(p)]) for p in "qk")
    for head in range(4):
        before = q[8 * head : 8 * head + 8].T @ k[8 * (head // 2) : 8 * (head // 2) + 8] / math.sqrt(8)
        after = wq[16 * head : 16 * head + 16].T @ wk[16 * (head // 2) : 16 * (head // 2) + 16] / math.sqrt(16)
        assert torch.allclose(before, after, atol=1e-5)


def test_lowering_is_refused_where_there_is_no_step(tmp_path: Path) -> None:
    config = CanonicalConfig(24, 20, 1, 4, 2, 8, 31, 1e-6, 64, 1e4, 8, qk_norm=True)
    from llmconvert.errors import Refused

    with pytest.raises(Refused, match="qk_norm"):
        lower(_model(config, tmp_path), "plain", frozenset({"grouped_query", "explicit_head_dim"}), frozenset())
