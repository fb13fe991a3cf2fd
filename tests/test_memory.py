"""Parameters by part, caches and model states: against transformers' own models, ranks written, and published figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from test_published import PUBLISHED

from llmconvert.canonical import memory
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.converters.huggingface import convert
from llmconvert.converters.inspection import inspect
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.converters.memory import Parallelism
from llmconvert.errors import Usage
from llmconvert.spec.dialect import read_config
from llmconvert.spec.registry import registry

ROOT = Path(__file__).resolve().parent.parent

PATTERNS = {
    "norms": "norm", "shared_experts": r"\.shared_expert", "routed_experts": r"\.experts\.", "router": r"\.mlp\.gate\.weight$",
    "attention": r"\.self_attn\.", "mlp": r"\.mlp\.", "embedding": r"embed_tokens", "head": "lm_head",
}  # fmt: skip
"""The part of a parameter of transformers', by the first of these found in its name."""


def canonical(config: dict[str, Any]) -> CanonicalConfig:
    return read_config(registry().detect(config), config)


ARCHITECTURES = ["llama", "llama_bias", "qwen2_tied", "gemma", "glm4", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe",
                 "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "glm4_moe"]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parts_are_those_of_transformers_own_model(arch: str) -> None:
    model = checkpoints.build_native(arch)
    state, config = checkpoints.saved(model)
    expected = Counter[str]()
    for name, parameter in model.named_parameters():
        expected[next(part for part, pattern in PATTERNS.items() if re.search(pattern, name))] += parameter.numel()
    bias = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    further = 0
    if config.get("num_nextn_predict_layers"):
        whole, last = checkpoints.with_further_tokens(state, 3), "model.layers.3."
        own = {name.removeprefix(last): t.numel() for name, t in whole.items() if name.startswith(last)}
        copies = own.pop("embed_tokens.weight") + own.pop("shared_head.head.weight")
        assert copies == 2 * 131 * 48
        bias += own.pop("mlp.gate.e_score_correction_bias")
        expected |= {"mtp": sum(own.values()), "mtp_copies": copies}
        further = expected["mtp"] + copies
    expected |= {"router_bias": bias} if bias else {}
    parts = memory.parameters_by_part(canonical(config))
    assert parts == dict(expected)
    trained = sum(p.numel() for p in model.parameters())
    assert sum(parts.values()) == trained + bias + further


@pytest.mark.parametrize("arch", ["llama", "qwen2_tied", "glm4", "mixtral", "deepseek_v2", "deepseek_v3"])
def test_the_cache_is_as_large_as_that_of_transformers(arch: str) -> None:
    model, tokens = checkpoints.build_native(arch), 7
    with torch.no_grad():
        layers = model(torch.arange(2 * tokens).view(2, tokens), use_cache=True).past_key_values.layers
    held = memory.cache(canonical(checkpoints.saved(model)[1]))
    assert len(layers) == 3
    assert {(layer.keys.numel() + layer.values.numel()) / (2 * tokens) for layer in layers} == {held.held}
    if arch == "deepseek_v3":
        assert held == memory.Cache(expanded=6 * (12 + 8) + 6 * 20, latent=16 + 8)


LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float16",
}  # fmt: skip


def test_llama_2_7b_by_hand() -> None:
    config = canonical(LLAMA_7B)
    assert memory.parameters_by_part(config) == {
        "embedding": 32000 * 4096, "attention": 32 * 4 * 4096**2, "mlp": 32 * 3 * 4096 * 11008, "norms": 65 * 4096,
        "head": 32000 * 4096,
    }  # fmt: skip
    held = memory.held(config)
    assert held.total == memory.active_parameters(config) == 6_738_415_616
    states = memory.model_states(held)
    assert (states.weights, states.gradients, states.optimizer) == (13_476_831_232, 13_476_831_232, 80_860_987_392)
    assert f"{states.total / 1e9:.1f}" == "107.8"
    assert memory.model_states(memory.Held(7_000_000_000)).total == 112_000_000_000
    assert memory.model_states(memory.Held(7_000_000_000), gradient_bytes=4).total == 126_000_000_000
    # 524,288 bytes a token in 16 bit: 2 for keys and values x 32 layers x 4096 x 2 bytes.
    assert memory.cache(config).held * 32 * 2 == 524_288
    # Half of the heads, one head; one head too where there are more ranks than heads.
    assert [memory.cache(config, tp).held for tp in (2, 32, 64)] == [4096, 256, 256]


def test_totals_and_active_parameters_as_published() -> None:
    """Mixtral-8x7B: 46.7B and 12.9B. DeepSeek-V3 is published as 671B and 37B, which is 36.6B without the embedding."""
    sizes = {"num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
    mixtral = {**LLAMA_7B, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **sizes}
    assert memory.held(canonical(mixtral)).total == 46_702_792_704
    assert memory.active_parameters(canonical(mixtral)) == 12_879_925_248
    config = canonical(PUBLISHED["deepseek-v3-base"]["config"])
    parts = memory.parameters_by_part(config)
    main = sum(n for part, n in parts.items() if part not in ("mtp", "mtp_copies"))
    assert main - 256 == 671_026_419_200  # one of the routers' biases is in the layer that predicts further
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    norms, expert = 2 * 7168 + 1536 + 512, 3 * 7168 * 2048
    mixture = attention + norms + 256 * 7168 + 9 * expert
    dense = attention + norms + 3 * 7168 * 18432
    assert memory.active_parameters(config) == 58 * mixture + 3 * dense + 7168 + 2 * 129280 * 7168 == 37_552_282_624
    assert parts["mtp"] == mixture + 248 * expert + 2 * 7168**2 + 3 * 7168
    assert parts["mtp_copies"] == 2 * 129280 * 7168


# Rajbhandari et al., table 1, in GB as printed: rows by model, columns by number of data-parallel ranks.
DP = (1, 4, 16, 64, 256, 1024)
TABLE = {
    (7.5e9, 1): (120, 52.5, 35.6, 31.4, 30.4, 30.1), (7.5e9, 2): (120, 41.3, 21.6, 16.6, 15.4, 15.1),
    (7.5e9, 3): (120, 30, 7.5, 1.88, 0.47, 0.12),
    (128e9, 1): (2048, 896, 608, 536, 518, 513), (128e9, 2): (2048, 704, 368, 284, 263, 257),
    (128e9, 3): (2048, 512, 128, 32, 8, 2),
    (1e12, 1): (16000, 7000, 4750, 4187, 4046, 4011), (1e12, 2): (16000, 5500, 2875, 2218, 2054, 2013),
    (1e12, 3): (16000, 4000, 1000, 250, 62.5, 15.6),
}  # fmt: skip


@pytest.mark.parametrize(("parameters", "zero"), TABLE)
def test_the_table_of_the_zero_paper(parameters: float, zero: int) -> None:
    for dp, printed in zip(DP, TABLE[parameters, zero], strict=True):
        found = memory.model_states(memory.Held(int(parameters)), zero=zero, dp=dp).total / 1e9
        # Printed to three or four figures, some of them cut and not rounded.
        assert found == pytest.approx(printed, rel=3e-3, abs=0.005), (dp, found)
        assert memory.model_states(memory.Held(int(parameters)), zero=0, dp=dp).total == 16 * parameters


def test_experts_are_shared_out_over_the_ranks_that_hold_the_same_ones() -> None:
    held = memory.Held(dense=1001, experts=600, untrained=8)
    states = [memory.model_states(held, zero=zero, dp=8, expert_dp=2) for zero in range(4)]
    dense, experts = 126, 300  # 1001 / 8, rounded up, and 600 / 2
    assert [s.optimizer for s in states] == [12 * 1601, *[12 * (dense + experts)] * 3]
    assert [s.gradients for s in states] == [2 * 1601, 2 * 1601, *[2 * (dense + experts)] * 2]
    assert [s.weights for s in states] == [*[2 * 1609] * 3, 2 * (127 + experts)]


def of_ranks(directory: Path) -> dict[int, set[tuple[int, int]]]:
    """Elements and bytes of the tensors in each rank file, by pipeline rank."""
    found: dict[int, set[tuple[int, int]]] = {}
    for path in (directory / "release").glob("*/model_optim_rng.pt"):
        whole = torch.load(path, weights_only=False)
        states = [whole[key] for key in whole if re.fullmatch(r"model\d*", key)]
        held = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
        stage = re.fullmatch(r"mp_rank_\d\d(?:_(\d{3}))?(?:_(\d{3}))?", path.parent.name)
        assert stage is not None
        pp = int(stage[1]) if whole["args"].pipeline_model_parallel_size > 1 else 0
        size = sum(t.numel() for t in held), sum(t.numel() * t.element_size() for t in held)
        found.setdefault(pp, set()).add(size)
    return found


SPLITS = {
    "dense": ("qwen2", Grid(tp=2, pp=2, last=1), {}),
    "tied": ("qwen2_tied", Grid(tp=2, pp=2, last=1), {}),
    "folded": ("granite", Grid(tp=2), {}),
    "virtual": ("llama_bias", Grid(tp=2, pp=2, vpp=2), {"num_hidden_layers": 4}),
    "experts": ("qwen3_moe", Grid(ep=2), {}),
    "few layers with experts": ("qwen2_moe", Grid(tp=2, pp=3, ep=2), {}),
    "expert tensor ranks": ("glm4_moe", Grid(tp=2, pp=3, ep=4, etp=1), {}),
    "latent and MTP": ("deepseek_v3", Grid(tp=2, pp=2, first=2, ep=2), {}),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_rank_holds_what_split_writes_for_it(case: str, tmp_path: Path) -> None:
    arch, grid, overrides = SPLITS[case]
    # Every other case in 16 bit: bytes are counted apart from elements.
    dtype = torch.bfloat16 if list(SPLITS).index(case) % 2 else torch.float32
    source = checkpoints.make(arch, tmp_path / "hf", dtype=dtype, **overrides)
    divisible = 16
    split_checkpoint(source, tmp_path / "ranks", grid, divisible_by=divisible, verify="none", workers=1)
    written = of_ranks(tmp_path / "ranks")
    assert all(len(sizes) == 1 for sizes in written.values())
    expected = [next(iter(written[pp])) for pp in range(grid.pp)]
    before = inspect(source, parallelism=Parallelism(grid, divisible_by=divisible))["memory"]["ranks"]
    after = inspect(tmp_path / "ranks")["memory"]["ranks"]
    for ranks in (before, after):
        stages = ranks["stages"]
        assert [(stage["parameters"], stage["inference"]["weights"]) for stage in stages] == expected
        assert sorted(layer for stage in stages for layer in stage["layers"]) == list(
            range(overrides.get("num_hidden_layers", 3))
        )
        assert ranks["world_size"] == len(list((tmp_path / "ranks" / "release").iterdir()))


def test_expert_ranks_need_not_fit_into_tensor_ranks(tmp_path: Path) -> None:
    """TP 6 and two expert ranks of one tensor rank each, which no rank files can be named for."""
    source = checkpoints.make("qwen3_moe", tmp_path / "hf", moe_intermediate_size=48)

    def ranks(**grid: int) -> dict[str, Any]:
        asked = Parallelism(Grid(**grid), zero=1, divisible_by=1)
        found: dict[str, Any] = inspect(source, parallelism=asked)["memory"]["ranks"]
        return found

    parts = memory.parameters_by_part(canonical(json.loads((source / "config.json").read_text())))
    both, tensor, whole = ranks(tp=6, ep=2, etp=1), ranks(tp=6), ranks()
    counts = [found["stages"][0]["parameters"] for found in (both, tensor, whole)]
    assert counts[0] == counts[1] - parts["routed_experts"] // 6 + parts["routed_experts"] // 2
    assert counts[2] == sum(parts.values())
    assert [(found["dp"], found["expert_dp"]) for found in (both, tensor)] == [(1, 3), (1, 1)]


def test_stages_make_up_the_model(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "hf")
    found = inspect(source, parallelism=Parallelism(Grid(pp=3), divisible_by=1))["memory"]
    stages, parts, whole = found["ranks"]["stages"], found["parts"], found["inference"]
    # The last stage, which predicts further tokens, has an embedding of its own; that one and no other is there twice.
    parameters = sum(parts.values()) - parts["mtp_copies"] + parts["embedding"]
    assert sum(stage["parameters"] for stage in stages) == parameters
    for kind, width in (("weights", 2), ("gradients", 2), ("optimizer", 12)):
        count = parameters if kind == "weights" else parameters - parts["router_bias"]
        assert sum(stage["training"][kind] for stage in stages) == width * count
    for kind in ("kv_cache_per_token", "kv_cache_per_token_expanded", "kv_cache_per_1k_tokens"):
        assert sum(stage["inference"][kind] for stage in stages) == whole[kind]
    cut = inspect(source, parallelism=Parallelism(Grid(tp=2)))["memory"]["ranks"]["stages"][0]["inference"]
    assert cut["kv_cache_per_token"] == whole["kv_cache_per_token"]  # all tensor ranks have the latent
    assert 2 * cut["kv_cache_per_token_expanded"] == whole["kv_cache_per_token_expanded"]


def test_without_a_grid_nothing_is_padded_and_any_model_is_counted(tmp_path: Path) -> None:
    """ZeRO alone needs no Megatron: ALiBi and norms on branch outputs, which megatron-core lacks, do not matter."""
    for arch in ("baichuan_13b", "glm4"):
        source = checkpoints.make(arch, tmp_path / arch)
        whole = sum(t.numel() for t in checkpoints.tensors(source).values())
        found = inspect(source, parallelism=Parallelism(dp=4, zero=3))["memory"]
        (stage,) = found["ranks"]["stages"]
        assert found["training"]["total"] == 16 * whole == 4 * stage["training"]["total"]
        refused = inspect(source, parallelism=Parallelism(Grid(tp=2)))["memory"]
        assert "megatron cannot hold" in refused["problem"] and "ranks" not in refused


FAULTS = {
    "zero": (lambda: Parallelism(zero=4), "no ZeRO stage 4"),
    "gradients": (lambda: Parallelism(gradients="float16"), "not a dtype of gradients"),
    "dp": (lambda: Parallelism(dp=0), "at least 1"),
    "experts": (lambda: Parallelism(Grid(tp=2, ep=4, etp=2), dp=2), "no multiple of the 4 expert ranks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_shared_out_is_refused(fault: str) -> None:
    call, message = FAULTS[fault]
    with pytest.raises(Usage, match=message):
        call()


def test_a_grid_the_model_does_not_fit_is_an_error(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path)
    for grid, message in ((Grid(tp=5), "5 tensor ranks"), (Grid(pp=2), "shared evenly"), (Grid(ep=2), "dense")):
        with pytest.raises(Usage, match=message):
            inspect(source, parallelism=Parallelism(grid))


def test_the_command(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "hf")
    options = ["--tp", "2", "--ep", "4", "--dp", "8", "--zero", "1", "--gradients", "float32"]
    command = [sys.executable, "-m", "llmconvert", "inspect", str(source), *options]
    found = json.loads(subprocess.check_output([*command, "--json"], cwd=ROOT))["memory"]
    assert (
        found["training"]["total"]
        == 18 * (sum(found["parts"].values()) - found["parts"]["mtp_copies"]) - 16 * (found["parts"]["router_bias"])
    )
    assert (found["ranks"]["expert_dp"], found["ranks"]["world_size"]) == (2, 16)
    assert found["inference"]["kv_cache"] == "latent"
    assert found["inference"]["kv_cache_per_token"] == 3 * (16 + 8) * 4
    assert found["inference"]["kv_cache_per_token_expanded"] == 3 * 6 * (12 + 8 + 20) * 4
    text = subprocess.check_output(command, cwd=ROOT, text=True)
    for fragment in (
        "routed experts 92,160",
        "KV cache 288 B a token, latent",
        "float32 gradients 4",
        "ZeRO 1: 16 ranks",
    ):
        assert fragment in text


def test_fp8_is_counted_as_stored_and_as_bfloat16(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "hf", dtype=torch.bfloat16)
    convert(source, tmp_path / "fp8", to="deepseek_v3", dtype="fp8-block128", verify="none")
    tensors = checkpoints.tensors(tmp_path / "fp8").values()
    assert any(t.dtype == torch.float8_e4m3fn for t in tensors)
    plain, eight = (inspect(tmp_path / name)["memory"]["inference"] for name in ("hf", "fp8"))
    assert eight["weights_fp8"] == sum(t.numel() * t.element_size() for t in tensors)
    assert eight["weights"] == plain["weights"] > eight["weights_fp8"] and "weights_fp8" not in plain


def test_a_sliding_window_bounds_the_cache(tmp_path: Path) -> None:
    found = inspect(checkpoints.make("mistral", tmp_path, sliding_window=100))["memory"]["inference"]
    assert found["kv_cache_tokens"] == 100
    assert found["kv_cache_per_1k_tokens"] == 100 * found["kv_cache_per_token"] == 100 * 3 * 2 * 2 * 16 * 4
