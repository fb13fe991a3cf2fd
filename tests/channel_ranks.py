"""Channel losses over several processes: `python channel_ranks.py FOLDER` does all cases on four gloo ranks.

The libraries are imported once and the ranks forked from there, since importing them is most of the time. Rank r
leaves FOLDER/r.json: what each case found there, or the traceback of the first that failed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from channel_oracle import NAMES, VOCABULARY, by_token, of_rows, pad, rows, tiny_llama

from llmconvert.training.channel_loss import ChannelLossMeter

WORLD = 4
BATCHES = 3  # microbatches of every rank


def microbatches() -> list[list[dict[str, Any]]]:
    """BATCHES × WORLD microbatches of unequal sizes; `math` occurs in the first of rank 0 alone."""
    made = [rows(1 + (7 * i) % 4, seed=i, channels=NAMES[:2]) for i in range(BATCHES * WORLD)]
    made[0][0]["channel"] = "math"
    return made


def losses_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Some loss for every label, [rows, tokens], that depends on the label and its place alone."""
    labels = batch["labels"].double()
    return (labels * 0.37 + torch.arange(labels.shape[1]) * 0.11).sin() + 2


def update(meter: ChannelLossMeter, rows_: list[dict[str, Any]]) -> None:
    batch = pad(rows_)
    meter.update(losses_of(batch), batch["labels"], [row["channel"] for row in rows_])


def split_over(ranks: int, group: Any, names: list[str] | None) -> dict[str, Any] | None:
    """The microbatches dealt to so many ranks."""
    if dist.get_rank() >= ranks:
        return None
    meter = ChannelLossMeter(names, group=group)
    for index, batch in enumerate(microbatches()):
        if index % ranks == dist.get_rank():
            update(meter, batch)
    return meter.compute()


def only_one_rank_has_tokens(names: list[str] | None) -> dict[str, Any]:
    meter = ChannelLossMeter(names)
    if dist.get_rank() == 2:
        update(meter, microbatches()[0])
    return meter.compute()


def duplicates(group: Any) -> dict[str, Any]:
    """Ranks 0 and 1 hold the same tokens, as do 2 and 3; `group` joins those whose tokens differ."""
    meter = ChannelLossMeter(NAMES, group=group)
    for index, batch in enumerate(microbatches()):
        if index % 2 == dist.get_rank() // 2:
            update(meter, batch)
    return meter.compute()


def parts_of_rows() -> dict[str, Any]:
    """Every rank has a part of each row, as with context parallelism: labels and channels come shifted."""
    meter, width = ChannelLossMeter(NAMES), 12
    for batch in microbatches():
        found = pad([*batch, {"input_ids": [0] * width, "labels": [-100] * width}])
        ids = torch.tensor([[NAMES.index(row["channel"])] * width for row in batch] + [[-1] * width])
        here = slice(dist.get_rank() * width // WORLD, (dist.get_rank() + 1) * width // WORLD)
        meter.update(losses_of(found)[:, here], found["labels"][:, here], ids[:, here])
    return meter.compute()


def steps() -> list[dict[str, Any]]:
    """A result for each step, emptied between them; channels come and go."""
    meter, found = ChannelLossMeter(), []
    for step in range(BATCHES):
        update(meter, microbatches()[step * WORLD + dist.get_rank()])
        found.append(meter.compute(reset=True))
    return found


def training(folder: Path, watched: bool) -> dict[str, Any]:
    """transformers' Trainer over all ranks, with accumulation and an evaluation that does not come out even."""
    from transformers import Trainer, TrainingArguments

    from llmconvert.training.trainer import ChannelLossTrainer

    args = TrainingArguments(
        output_dir=str(folder / f"run_{watched}"), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
        gradient_accumulation_steps=2, per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=3,
        report_to="none", use_cpu=True, ddp_backend="gloo", save_strategy="no", disable_tqdm=True, learning_rate=0.01,
        remove_unused_columns=watched, log_level="error",
    )  # fmt: skip
    model, evaluated = tiny_llama(), rows(13, seed=8)
    given: dict[str, Any] = {"model": model, "args": args, "data_collator": pad}
    if watched:
        trainer = ChannelLossTrainer(**given, train_dataset=rows(60, seed=7), eval_dataset=evaluated)
    else:
        trainer = Trainer(**given, train_dataset=rows(60, seed=7), eval_dataset=evaluated)
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {"logs": trainer.state.log_history, "weights": weights.tolist(), "evaluated": of_rows(model, evaluated)}


def megatron(tp: int, pp: int, watched: bool) -> dict[str, Any]:
    """Three microbatches through megatron-core's own schedule, on a grid of all ranks."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron_oracle import Grid, Model, _randomise, gpt_model

    from llmconvert.training.megatron import MegatronChannelLoss

    parallel_state.initialize_model_parallel(tp, pp)
    model = gpt_model(Model(vocab_size=VOCABULARY, padded_vocab_size=40), Grid(tp=tp, pp=pp))
    with torch.no_grad():
        _randomise(model, seed=1)
    if parallel_state.is_pipeline_last_stage():
        model.parallel_output, model.output_layer.gather_output = True, False
    copy, tokens, seen = parallel_state.get_data_parallel_rank(), 11, []
    random = torch.Generator().manual_seed(copy)
    masked = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None, None]

    def batches() -> Any:
        for number in range(BATCHES):
            text = torch.randint(VOCABULARY, (2, tokens + 1), generator=random)
            mask = (torch.rand(2, tokens, generator=random) < 0.7).float()
            # `code` is on the first copy alone, and on none in the last microbatch.
            ids = torch.tensor([0, 1 if copy == 0 and number < 2 else 2])
            yield {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask, "dataset_id": ids}

    def loss_func(batch: Any, mask: Any, output: Any) -> Any:
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            ids = given[len(seen)]
            seen.append([
                (NAMES[int(ids[row])], float(output[row, place]))
                for row, place in mask.nonzero().tolist()
            ])  # fmt: skip
        total = (output * mask).sum()
        return total, mask.sum().int(), {"lm loss": torch.stack((total.detach(), mask.sum()))}

    given = [batch["dataset_id"] for batch in batches()]
    random.manual_seed(copy)

    def forward_step(data: Any, model: Any) -> Any:
        batch = next(data)
        assert not watched or "dataset_id" not in batch or parallel_state.get_tensor_model_parallel_rank() != 0
        positions = torch.arange(tokens)[None].expand(2, tokens)
        output = model(batch["tokens"], positions, masked, labels=batch["labels"])
        return output, partial(loss_func, batch, batch["loss_mask"])

    counted = MegatronChannelLoss(NAMES)
    model.train()
    reports = get_forward_backward_func()(
        forward_step_func=counted.wrap(forward_step) if watched else forward_step,
        data_iterator=batches(), model=[model], num_microbatches=BATCHES, seq_length=tokens, micro_batch_size=2,
        forward_only=False,
    )  # fmt: skip
    found: dict[str, Any] = {
        "reports": [report["lm loss"].tolist() for report in reports],
        "gradients": torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).tolist(),
        "last": parallel_state.is_pipeline_last_stage(),
    }
    if watched:
        found["channels"] = counted.compute()
        found["evaluation"] = counted.compute(evaluation=True)
        # What the ranks with tensor rank 0 saw, each of the last stage's copies once.
        everything: list[Any] = [None] * WORLD
        dist.all_gather_object(everything, seen)
        found["expected"] = by_token(token for rank in everything for batch in rank for token in batch)
    parallel_state.destroy_model_parallel()
    return found


def context_parallel() -> dict[str, Any]:
    """Two copies of two context-parallel ranks, each with a first and a last part of every row, as Megatron cuts them."""
    from megatron.core import parallel_state

    from llmconvert.training.megatron import MegatronChannelLoss

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    copy, part = parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()
    counted = MegatronChannelLoss(NAMES)
    for seed in range(copy, 4, 2):  # microbatches 0 and 2 on the first copy, 1 and 3 on the second
        losses, mask, ids = context_batch(seed)
        mine = [losses[:, 2 * n : 2 * n + 2] for n in ((0, 3) if part == 0 else (1, 2))]
        given = ids if seed % 4 else ids[:, 0]  # once one for each row
        func = counted.loss_func(lambda output: (output.sum(), 1, {}), mask, given)
        func(torch.cat(mine, 1))
    found = counted.compute()
    parallel_state.destroy_model_parallel()
    return found


def context_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, mask and ids of 3 rows of 8 tokens."""
    random = torch.Generator().manual_seed(seed)
    losses, mask = torch.rand(3, 8, generator=random), (torch.rand(3, 8, generator=random) < 0.6).float()
    ids = torch.randint(3, (3, 8), generator=random)
    return losses, mask, ids if seed % 4 else ids[:, :1].expand(3, 8)


def megatron_on_a_cpu() -> None:
    """Megatron-core asks for things only CUDA has."""
    from megatron.core import tensor_parallel

    zeros = torch.zeros
    torch.zeros = lambda *size, device=None, **options: zeros(*size, **options)  # its schedules count on "cuda"
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment, method-assign]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def work(folder: Path, rank: int) -> None:
    """All cases of one rank."""
    torch.set_num_threads(1)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}.items():
        os.environ[name] = str(value)
    found: dict[str, Any] = {}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
        )
        pair = dist.new_group([0, 1])
        apart = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
        for label, names in (("named", NAMES), ("unnamed", None)):
            found[f"two_{label}"] = split_over(2, pair, names)
            found[f"four_{label}"] = split_over(4, None, names)
            found[f"lonely_{label}"] = only_one_rank_has_tokens(names)
        found["duplicates"] = duplicates(apart)
        found["parts"] = parts_of_rows()
        found["steps"] = steps()
        for watched in (False, True):
            found[f"training_{watched}"] = training(folder, watched)
        if os.environ.get("WITH_MEGATRON"):
            megatron_on_a_cpu()
            found["context"] = context_parallel()
            for tp, pp in ((2, 1), (1, 2)):
                for watched in (False, True):
                    found[f"megatron_{tp}_{pp}_{watched}"] = megatron(tp, pp, watched)
        dist.destroy_process_group()
    except BaseException:
        found["failed"] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit("failed" in found)  # threads of gloo may linger


if __name__ == "__main__":
    import transformers  # noqa: F401 - here once, not in every rank

    if os.environ.get("WITH_MEGATRON"):
        import megatron_oracle  # noqa: F401
        from megatron.core import pipeline_parallel  # noqa: F401
        from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: F401
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(target, rank)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
        for process in ranks:
            process.join(0.1)
    bad = any(process.exitcode for process in ranks)
    for process in ranks:
        if process.is_alive():
            process.kill()
    sys.exit(bad)
