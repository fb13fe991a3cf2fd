"""Sequence parallelism: processes that hold slices of the sequences agree with one that holds them whole."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import sequence_parallel_ranks as ranks
import torch
from transformers import Trainer

Results = dict[str, Any]


# All tests of one run go to one worker: the run is made once.
SIZES = [
    pytest.param(2, marks=pytest.mark.xdist_group("two processes"), id="2_processes"),
    pytest.param(4, marks=[pytest.mark.xdist_group("four processes"), pytest.mark.slow], id="4_processes"),
]


@pytest.fixture(scope="module", params=SIZES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What all cases gave, in one run of so many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    # The server imports torch and transformers once, and starts no threads before it forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sequence_parallel_ranks"])
    processes = [
        context.Process(target=ranks.main, args=(rank, request.param, str(folder))) for rank in range(request.param)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    found: Results = torch.load(folder / "results.pt")
    return found


def _close(result: Any, tolerance: float) -> None:
    assert isinstance(result, dict), result
    assert result["loss"] <= tolerance and result["gradient"] <= tolerance, result
    assert result["largest"] > 0.1 and result["parameters"] > 20, "gradients too small to tell"


@pytest.mark.parametrize("name", list(ranks.CASES))
def test_loss_and_every_gradient_are_those_of_one_process(results: Results, name: str) -> None:
    _close(results[name], 1e-12 if ranks.CASES[name].double else 1e-5)


@pytest.mark.parametrize("name", ["accumulated", "interleaved", "ddp", "fsdp", "loop"])
def test_steps_of_several_batches_and_the_documented_loop(results: Results, name: str) -> None:
    _close(results[name], 1e-12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What transformers' own Trainer does in one process."""
    return ranks.train(Trainer, str(tmp_path_factory.mktemp("trained")), batch_size=2)


def test_the_documented_trainer_trains_as_one_process_does(results: Results, trained: Results) -> None:
    assert isinstance(results["trainer"], dict), results["trainer"]
    assert len(trained["losses"]) == 3 and results["trainer"]["losses"] == pytest.approx(trained["losses"], abs=1e-6)
    start = {name: tensor.detach() for name, tensor in ranks.build("llama").double().named_parameters()}
    for name, weight in trained["weights"].items():
        assert float((results["trainer"]["weights"][name] - weight).abs().max()) < 1e-6, name
        assert float((start[name] - weight).abs().max()) > 1e-3, f"{name} was not trained"


@pytest.mark.parametrize("name", ["control", "control_documents"])
def test_the_comparison_sees_attention_within_the_slice_and_documents_not_kept_apart(
    results: Results, name: str
) -> None:
    assert isinstance(results[name], dict), results[name]
    assert results[name]["loss"] > 1e-2 and results[name]["gradient"] > 1e-2


def test_split_batch(results: Results) -> None:
    assert results["split"] == {}, results["split"]


def test_gradients_that_only_some_have_and_batches_without_labels(results: Results) -> None:
    assert results["unused"] == {}, results["unused"]


def test_remove_gives_the_model_its_attention_back(results: Results) -> None:
    assert isinstance(results["removed"], dict), results["removed"]
    assert results["removed"]["same"] == 1.0 and results["removed"]["logits"] < 1e-12


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("heads", ["Refused", "query heads cannot be divided among"]),
        ("again", ["Usage", "sequence parallel already"]),
        ("hybrid", ["Refused", "linear_attention"]),
        ("labels", ["Usage", "split_batch"]),
        ("cache", ["Usage", "remove()"]),
        ("mask", ["Usage", "attention mask of shape [2, 13]"]),
        ("whole mask", ["Usage", "pad the batch"]),
        ("interface", ["Refused", "attention interface"]),
    ],
)
def test_what_cannot_be_done_is_refused(results: Results, name: str, words: list[str]) -> None:
    assert isinstance(results["errors"], dict), results["errors"]
    message = results["errors"][name]
    assert all(word in message for word in words), message
