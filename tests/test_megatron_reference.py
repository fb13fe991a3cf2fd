"""The forward over Megatron shards against transformers and against real megatron-core."""

import gc
import weakref
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_oracle as oracle
import megatron_ranks as ranks
import numpy as np
import pytest
import torch
from megatron_oracle import Grid, Load, Model, Save, arguments
from megatron_ranks import CASES, CONTROLS, Case
from torch import Tensor

from llmconvert.errors import BadInput, Refused
from llmconvert.verify.reference.megatron import MegatronForCausalLM
from llmconvert.verify.reference.shards import Chunk, Read

TOLERANCE = 1e-5
Shards = dict[tuple[int, int, int, int], dict[str, Tensor]]
ALL = {**CASES, **ranks.LARGE_CASES}
WRONG = {**CONTROLS, **{name: case for name, case in ranks.LARGE_CONTROLS.items() if not case.mtp}}


def chunks_of(case: Case) -> list[Chunk]:
    pp = case.grid.pp
    return [Chunk(depth % pp, depth // pp, len(stage)) for depth, stage in enumerate(case.stages)]


def reader(shards: Shards) -> Read:
    return lambda pp, chunk, tp, ep, name: shards[pp, chunk, tp, ep][name]


def reference(case: Case, shards: Shards | None = None, **options: Any) -> MegatronForCausalLM:
    args = vars(arguments(ranks.model_of(case), case.grid, "torch"))
    shards = ranks.shards(case) if shards is None else shards
    return MegatronForCausalLM(args, chunks_of(case), reader(shards), **sizes(case.grid), **options)


def sizes(grid: Grid) -> dict[str, Any]:
    """A grid's numbers of ranks."""
    return {"tp_size": grid.tp, "ep_size": grid.ep, "etp_size": grid.etp}


def main_logits(case: Case, found: np.ndarray) -> np.ndarray:
    """Without those of further tokens."""
    return found[0] if case.mtp else found


def logits(model: MegatronForCausalLM, vocab: int = 131) -> np.ndarray:
    found: Tensor = model(torch.from_numpy(ranks.input_ids()))
    assert found.shape[-1] == ranks.PADDED_VOCAB
    return found[..., :vocab].double().numpy()


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", ALL)
def test_gives_the_logits_of_transformers(name: str) -> None:
    case = ALL[name]
    shards = ranks.shards(case)
    model = reference(case, shards)
    assert relative(logits(model), main_logits(case, ranks.expected(case))) <= TOLERANCE
    last = max(shards)[0]
    unused = {  # what only further tokens need
        (*place, name) for place, part in shards.items() for name in part
        if name.startswith("mtp.") or (case.mtp and place[0] == last > 0 and name.startswith("embedding."))
    }  # fmt: skip
    everything = {(*place, tensor) for place, part in shards.items() for tensor in part}
    assert model.read <= everything - unused
    assert all(".experts." in name for *_, name in everything - unused - model.read)  # an expert nobody was sent to


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shards_give_wrong_logits(name: str) -> None:
    assert relative(logits(reference(WRONG[name])), ranks.expected(WRONG[name])) > 1e-2


def saved(directory: Path, grid: Grid) -> tuple[dict[str, Any], Shards]:
    """The args and the tensors of a checkpoint of format `torch`."""
    shards, args = {}, Namespace()
    for path in directory.glob("iter_0000001/mp_rank_*/model_optim_rng.pt"):
        tp, *rest = (int(part) for part in path.parent.name.removeprefix("mp_rank_").split("_"))
        pp, ep = (rest.pop(0) if rest and size > 1 else 0 for size in (grid.pp, grid.ep))
        state = torch.load(path, weights_only=False)
        args = state["args"]
        for index in range(grid.vpp or 1):
            shards[pp, index, tp, ep] = state["model" if grid.vpp is None else f"model{index}"]
    return vars(args), shards


@pytest.mark.skipif(not oracle.AVAILABLE, reason="needs megatron-core and psutil")
def test_gives_the_logits_of_megatron_core(tmp_path: Path) -> None:
    # What Megatron saved of itself for the cases, and what it makes of the wrong shards.
    large = ("qwen2_moe_tp2_ep2_etp1", "mixtral_ep2", "deepseek_v3_pp2_ep2", "deepseek_v2_tp2", "glm4_moe_tp2_ep2")
    cases = {**CASES, **CONTROLS, **{name: ranks.LARGE_CASES[name] for name in large}}
    jobs: list[Load] = []
    for name, case in cases.items():
        model, directory = ranks.model_of(case), tmp_path / name
        if name in CONTROLS:
            jobs.append(Load(model, case.grid, ranks.write(case, directory), "torch", ranks.input_ids()))
        else:
            jobs.append(Save(model, case.grid, directory, "torch", ranks.input_ids(), seed=4))
    errors = {}
    for (name, case), wanted in zip(cases.items(), oracle.run(jobs), strict=True):
        assert isinstance(wanted, np.ndarray), wanted
        args, shards = saved(tmp_path / name, case.grid)
        model = MegatronForCausalLM(args, chunks_of(case), reader(shards), **sizes(case.grid))
        errors[name] = relative(logits(model), main_logits(case, wanted))
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize("name", ["tp2_pp2", "qk_norm_tp4"])
def test_names_of_transformer_engine(name: str) -> None:
    case = CASES[name]
    spelled = {
        place: {
            tensor.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight").replace(
                "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
            ): value
            for tensor, value in part.items()
        }
        for place, part in ranks.shards(case).items()
    }
    assert relative(logits(reference(case, spelled)), logits(reference(case))) == 0.0


def test_dtypes() -> None:
    case = CASES["tp4_two_kv_heads"]
    exact = logits(reference(case, dtype=torch.float64))
    assert 0 < relative(logits(reference(case)), exact) < 1e-5
    assert 1e-4 < relative(logits(reference(case, dtype=torch.bfloat16)), exact) < 0.1
    built = ranks.build(case).double()
    with torch.no_grad():
        wanted = built(torch.from_numpy(ranks.input_ids())).logits.numpy()
    assert relative(exact, wanted) < 1e-6  # transformers rotates and takes the softmax in float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    case = CASES["tp4_two_kv_heads"]
    found = reference(case, dtype=torch.float64, device="cuda")(torch.from_numpy(ranks.input_ids()))
    assert found.device.type == "cuda"
    assert relative(found[..., :131].cpu().numpy(), logits(reference(case, dtype=torch.float64))) < 1e-12


def test_padding_on_the_left_and_position_ids() -> None:
    model, ids = reference(CASES["qk_norm"]), torch.from_numpy(ranks.input_ids())
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)), 1)
    plain = model(ids)
    torch.testing.assert_close(model(padded, mask)[:, 3:], plain, rtol=1e-5, atol=1e-5)
    shifted = torch.arange(ids.shape[1])[None].expand_as(ids) + 7  # rotary attention sees distances only
    torch.testing.assert_close(model(ids, None, shifted), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids, None, shifted * 2), plain, rtol=1e-2, atol=1e-2)


def test_hidden_states_of_every_layer() -> None:
    case = CASES["layout_vpp2"]
    model, ids, seen = reference(case), torch.from_numpy(ranks.input_ids()), []
    assert len(model.layers) == 4
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(ids)
    with torch.no_grad():
        wanted = ranks.build(case).model(ids, output_hidden_states=True).hidden_states[1:4]
    for found, right in zip(seen, wanted, strict=False):  # the last one transformers gives is normed
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    places = torch.arange(ids.shape[1])[None].expand_as(ids)
    torch.testing.assert_close(model.layers[1](seen[0], places), seen[1])


def test_holds_few_tensors_at_a_time() -> None:
    case = CASES["tp2"]
    shards, alive, most = ranks.shards(case), weakref.WeakSet[Tensor](), 0

    def read(pp: int, chunk: int, tp: int, ep: int, name: str) -> Tensor:
        nonlocal most
        tensor = shards[pp, chunk, tp, ep][name].clone()
        alive.add(tensor)
        most = max(most, sum(entry.numel() for entry in alive))
        return tensor

    args = vars(arguments(ranks.model_of(case), case.grid, "torch"))
    MegatronForCausalLM(args, chunks_of(case), read, tp_size=2)(torch.from_numpy(ranks.input_ids()))
    gc.collect()
    assert len(alive) == 0
    layer = sum(value.numel() for key, value in shards[0, 0, 0, 0].items() if ".layers.0." in key)
    assert most < layer  # of one rank; the model has four layers on two


@pytest.mark.parametrize(
    "change",
    [
        {"moe_router_score_function": "tanh"}, {"normalization": "LayerNorm"}, {"swiglu": False},
        {"apply_layernorm_1p": True}, {"position_embedding_type": "learned_absolute",
        "use_rotary_position_embeddings": False}, {"window_size": (128, 0)}, {"squared_relu": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_refuses_what_it_does_not_compute(change: dict[str, Any]) -> None:
    args = {**vars(arguments(Model(), Grid(), "torch")), **change}
    with pytest.raises(Refused, match=next(iter(change))):
        MegatronForCausalLM(args, [Chunk(0, 0, 4)], reader({}), tp_size=1)


@pytest.mark.parametrize(
    ("change", "layers", "tp", "words"),
    [
        ({"norm_epsilon": None}, 4, 1, "lack `norm_epsilon`"),
        ({}, 3, 1, "4 layers, the shards hold 3"),
        ({}, 4, 3, "cannot share heads 8, padded_vocab_size 136, ffn_hidden_size 104, num_query_groups 2"),
    ],
)
def test_args_that_do_not_fit(change: dict[str, Any], layers: int, tp: int, words: str) -> None:
    args = {**vars(arguments(Model(), Grid(), "torch")), **change}
    with pytest.raises(BadInput, match=words):
        MegatronForCausalLM(args, [Chunk(0, 0, layers)], reader({}), tp_size=tp)


def test_groups_count_only_where_grouping_is_on() -> None:
    case = CASES["tp4_no_groups"]
    args = {**vars(arguments(ranks.model_of(case), case.grid, "torch")), "group_query_attention": False}
    args["num_query_groups"] = 1  # Megatron-LM's default
    model = MegatronForCausalLM(args, chunks_of(case), reader(ranks.shards(case)), tp_size=4)
    assert relative(logits(model), ranks.expected(case)) <= TOLERANCE


def _drop(part: dict[str, Tensor]) -> None:
    del part["decoder.layers.1.mlp.linear_fc2.weight"]


def _narrow(part: dict[str, Tensor]) -> None:
    part["decoder.layers.1.mlp.linear_fc2.weight"] = part["decoder.layers.1.mlp.linear_fc2.weight"][:, 1:]


def _drift(part: dict[str, Tensor]) -> None:
    part["decoder.layers.1.input_layernorm.weight"] = part["decoder.layers.1.input_layernorm.weight"] + 1e-6


@pytest.mark.parametrize(
    ("spoil", "words"), [(_drop, "has no `decoder.layers.1"), (_narrow, "is \\(48, 51\\), not"), (_drift, "differs")]
)
def test_says_where_shards_are_wrong(spoil: Callable[[dict[str, Tensor]], None], words: str) -> None:
    shards = ranks.shards(CASES["tp2_pp2"])
    spoil(shards[1, 0, 1, 0])
    with pytest.raises(BadInput, match=words) as caught:
        logits(reference(CASES["tp2_pp2"], shards))
    assert caught.value.where == "pipeline rank 1, chunk 0, tensor rank 1"
