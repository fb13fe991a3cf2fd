"""What each process of a sequence parallel group does in the tests: all cases in one run, against one process alone."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from llmconvert.errors import LlmconvertError
from llmconvert.models import register
from llmconvert.models.sequence_parallel import average_gradients, parallelize, sequence_parallel_loss, split_batch
from llmconvert.verify.float64 import float64_throughout

VOCAB, LENGTH = 61, 13  # 13 tokens are neither 2 nor 4 slices
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    # The canonical class.
    "llmconvert": {
        **{key: value for key, value in _LLAMA.items() if key != "attention_bias"},
        "qkv_bias": True,
        "qk_norm": True,
    },
    "mistral": {**_LLAMA, "sliding_window": 4},
    "gemma2": {**_LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0},
    "qwen3": {**_LLAMA, "layer_types": ["full_attention"] * 3},
    "gpt_oss": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "sliding_window": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "deepseek_v3": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 52,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 18,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 8,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


@dataclass(frozen=True)
class Case:
    """A model, a batch, and what to compare with.

    Attributes:
        arch: a name of `CONFIGS`.
        overrides: config values.
        batch: a name of `BATCHES`.
        inner: the attention function the model has.
        double: in float64.
        checkpoint: gradient checkpointing: None, or whether the reentrant one.
        documents: compare with the documents of a packed row one by one, not with the packed row.
    """

    arch: str = "llama"
    overrides: dict[str, Any] = field(default_factory=dict)
    batch: str = "plain"
    inner: str = "sdpa"
    double: bool = True
    checkpoint: bool | None = None
    documents: bool = False


def _heads(heads: int, kv: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv}


CASES = {
    **{f"heads{h}_kv{k}": Case(overrides=_heads(h, k)) for h in (4, 8) for k in (4, 2, 1)},
    **{f"heads{h}_kv{k}_f32": Case(overrides=_heads(h, k), double=False) for h in (4, 8) for k in (4, 2, 1)},
    "heads12_kv6": Case(overrides=_heads(12, 6)),
    **{
        f"{batch}_{inner}_{'f64' if double else 'f32'}": Case(batch=batch, inner=inner, double=double)
        for batch in ("right", "left", "packed")
        for inner in ("sdpa", "eager")
        for double in (True, False)
    },
    **{f"documents_{inner}": Case(batch="packed", inner=inner, documents=True) for inner in ("sdpa", "eager")},
    "documents_f32": Case(batch="packed", double=False, documents=True),
    "eager_one_kv": Case(inner="eager", overrides=_heads(4, 1)),
    "few_labels": Case(batch="few_labels"),
    "all_ones_mask": Case(batch="all_ones"),
    "restarts_under_a_mask": Case(batch="restarts_under_a_mask"),
    "divisible_length": Case(batch="even"),
    "per_head_mask_sdpa": Case(batch="per_head"),
    "per_head_mask_eager": Case(batch="per_head", inner="eager"),
    "checkpoint": Case(checkpoint=False),
    "checkpoint_reentrant": Case(checkpoint=True),
    "checkpoint_packed": Case(batch="packed", checkpoint=False, documents=True),
    "canonical_alibi": Case("llmconvert", {"alibi": True}),
    "canonical_alibi_left": Case("llmconvert", {"alibi": True}, batch="left", inner="eager"),
    "canonical_alibi_packed": Case("llmconvert", {"alibi": True}, batch="packed", documents=True),
    "canonical_windows": Case(
        "llmconvert",
        {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attn_logit_softcapping": 2.0,
            "branch_output_norm": True,
        },
        batch="right",
        inner="eager",
    ),
    "canonical_latent": Case(
        "llmconvert",
        {
            "kv_lora_rank": 14,
            "q_lora_rank": 18,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 8,
            "rotary_dim": 6,
            "head_dim": 6,
            "num_key_value_heads": 4,
            "qk_norm": False,
        },
    ),
    "mistral_sdpa": Case("mistral"),
    "mistral_eager_left": Case("mistral", batch="left", inner="eager"),
    "mistral_documents": Case("mistral", batch="packed", documents=True),
    "gemma2_eager": Case("gemma2", inner="eager"),
    "gemma2_documents": Case("gemma2", batch="packed", inner="eager", documents=True),
    "qwen3": Case("qwen3", batch="right", overrides=_heads(8, 2)),
    "deepseek_v3_sdpa": Case("deepseek_v3"),
    "deepseek_v3_eager_left": Case("deepseek_v3", batch="left", inner="eager"),
    "deepseek_v3_documents": Case("deepseek_v3", batch="packed", documents=True),
    "deepseek_v3_f32": Case("deepseek_v3", double=False),
    "gpt_oss_eager": Case("gpt_oss", batch="right", inner="eager"),
    "gpt_oss_sinks_passed": Case("gpt_oss", inner="sinks_passed", overrides=_heads(8, 1)),
    # A function of the kind flash attention is: a mask [b, T] or none, documents from the positions.
    "by_positions_packed": Case(batch="packed", inner="by_positions", documents=True, overrides=_heads(4, 1)),
    "by_positions_checkpoint": Case(batch="packed", inner="by_positions", documents=True, checkpoint=False),
    "by_positions_right": Case(batch="right", inner="by_positions"),
}


def _by_positions(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """SDPA that masks as flash attention does: by a mask [b, T], or else by where the positions restart."""
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], length), attention_mask.shape
        seen = seen & attention_mask[:, None, None].bool()
    else:
        positions = kwargs["position_ids"]
        assert positions.shape[-1] == length, positions.shape
        document = (positions == 0).cumsum(-1)
        seen = seen & (document[:, None, :, None] == document[:, None, None, :])
    return sdpa_attention_forward(module, query, key, value, seen, scaling=kwargs["scaling"])


def _sinks_passed(module: Any, *states: Any, s_aux: Tensor, **kwargs: Any) -> Any:
    """Eager attention with the sinks it is given, as flash attention is, not with those in the layer."""
    given = SimpleNamespace(sinks=s_aux, num_key_value_groups=module.num_key_value_groups, training=module.training)
    return gpt_oss_attention(given, *states, **kwargs)


AttentionInterface.register("sinks_passed", _sinks_passed)
AttentionMaskInterface.register("sinks_passed", eager_mask)
AttentionInterface.register("by_positions", _by_positions)
AttentionMaskInterface.register("by_positions", lambda attention_mask=None, **kwargs: attention_mask)


def build(arch: str, *, inner: str = "sdpa", seed: int = 0, **overrides: Any) -> Any:
    """A random model in which every tensor matters."""
    torch.manual_seed(seed)
    register()
    config = AutoConfig.for_model(arch, **{**CONFIGS[arch], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=inner, experts_implementation="eager")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.normal_(std=0.2).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.train()


def batch_of(name: str, *, rows: int = 2, seed: int = 1, heads: int = 4) -> dict[str, Tensor]:
    """A whole batch."""
    generator = torch.Generator().manual_seed(seed)
    length = 16 if name in ("even", "per_head") else LENGTH
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, length, generator=generator) < 0.3, -100)
    batch = {"input_ids": ids, "labels": labels}
    if name in ("right", "left"):
        mask = torch.ones_like(ids)
        for row, pads in enumerate((5, 2)):
            where = slice(None, pads) if name == "left" else slice(length - pads, None)
            mask[row, where] = 0
        batch |= {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    if name == "few_labels":  # none in the first slice, nor in the last token's
        batch["labels"] = labels.index_fill(1, torch.arange(9), -100)
    if name == "all_ones":
        batch["attention_mask"] = torch.ones_like(ids)
    if name in ("packed", "restarts_under_a_mask"):
        # One ends in the midst of a slice, one at its end: slices have 7 or 4 tokens.
        rows_of = [[3, 6, 4], [8, 5]]
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows_of])
        batch["labels"] = ids.masked_fill(batch["position_ids"] == 0, -100)
        if name != "packed":
            batch["attention_mask"] = torch.ones_like(ids)
    if name == "per_head":  # ALiBi: biases that differ between heads, added to the causal mask
        distance = torch.arange(length)[:, None] - torch.arange(length)
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -1e30)
        batch["attention_mask"] = bias[None].to(torch.get_default_dtype())
    return batch


def documents(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The documents of packed rows, one by one, without positions."""
    for row in range(len(batch["input_ids"])):
        starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), LENGTH]
        for start, end in zip(starts, starts[1:], strict=False):
            yield {key: batch[key][row : row + 1, start:end] for key in ("input_ids", "labels")}


Reference = tuple[Any, Tensor]


def alone(model: Any, batches: Iterable[dict[str, Tensor]]) -> Reference | None:
    """A copy of the model that has seen the whole batches in one process, the first one: its gradients and its loss.

    The loss is the mean over the labelled tokens of all batches.
    """
    if dist.get_rank():
        return None
    model = copy.deepcopy(model)
    losses, count = [], 0
    for batch in batches:
        inputs = {key: entry for key, entry in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100))
        count += int((targets != -100).sum())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    return model, loss.detach()


def together(model: Any, batch: dict[str, Tensor], group: Any = None, **options: Any) -> Tensor:
    """This process's part in a step; gradients not yet averaged."""
    inputs = split_batch(batch, group, pad_token_id=7)
    shift_labels = inputs.pop("shift_labels")
    loss = sequence_parallel_loss(model(**inputs).logits, shift_labels, group, **options)
    loss.backward()
    return loss.detach()


def differences(model: Any, loss: Tensor, reference: Reference | None) -> dict[str, float]:
    """The largest errors of the loss, over all processes, and of a gradient, and how large gradients are."""
    losses = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(losses, loss)
    gradients = {
        name.removeprefix("module."): tensor.grad.full_tensor() if hasattr(tensor.grad, "full_tensor") else tensor.grad
        for name, tensor in model.named_parameters()
    }
    if reference is None:
        return {}
    other, expected = reference
    errors, sizes = [], []
    for name, parameter in other.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            errors.append(float((gradients[name] - parameter.grad).abs().max()))
            sizes.append(float(parameter.grad.abs().max()))
    return {
        "loss": max(float((each - expected).abs()) for each in losses),
        "gradient": max(errors),
        "largest": max(sizes),
        "parameters": len(errors),
    }


# Transformers' norms and eager softmax round to float32 in a float64 model, not the same in one process as in many.
# What recomputes layers in its backward pass must do without, where the mode does not reach, and uses SDPA.
_wide = float64_throughout


def run_case(case: Case) -> dict[str, float]:
    """Loss and gradients of a case, together against alone."""
    with _wide() if case.double and case.checkpoint is None else contextlib.nullcontext():
        model = build(case.arch, inner=case.inner, **case.overrides)
        model = model.double() if case.double else model
        batch = batch_of(case.batch)
        reference = alone(model, documents(batch) if case.documents else [batch])
        if case.checkpoint is not None:
            model.gradient_checkpointing_enable({"use_reentrant": case.checkpoint})
        parallelize(model)
        loss = together(model, batch)
        average_gradients(model.parameters())
        return differences(model, loss, reference)


def _control() -> dict[str, float]:
    """Slices without the all-to-alls."""
    model = build("llama")
    batch = batch_of("plain")
    reference = alone(model, [batch])
    loss = together(model, batch)
    average_gradients(model.parameters())
    return differences(model, loss, reference)


def _local_mask() -> dict[str, float]:
    """A second control: documents not kept apart."""
    model = build("llama")
    batch = batch_of("packed")
    reference = alone(model, documents(batch))
    parallelize(model)
    loss = together(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    average_gradients(model.parameters())
    return differences(model, loss, reference)


def _removed() -> dict[str, float]:
    """Without gradients the logits are the whole model's; after `remove` it is what it was, and can be changed again."""
    model = build("llama")
    batch = {key: entry for key, entry in batch_of("right").items() if key != "labels"}
    whole = model(**batch).logits
    handle = parallelize(model)
    inputs = split_batch(batch)
    del inputs["position_ids"]  # it counts on by itself, past what other processes hold
    with torch.no_grad():
        mine = model(**inputs).logits
    slices = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(slices, mine)
    apart = (torch.cat(slices, 1)[:, :LENGTH] - whole).abs().max()
    handle.remove()
    same = torch.equal(model(**batch).logits, whole) and model.config._attn_implementation == "sdpa"
    model.generate(batch["input_ids"][:, :3], max_new_tokens=2, do_sample=False)
    parallelize(model).remove()
    return {"same": float(same), "logits": float(apart)}


def _split() -> dict[str, float]:
    """Slices put together are the whole."""
    batch = {**batch_of("right"), "channel": torch.arange(2 * LENGTH).view(2, LENGTH), "name": "x", "cu_seq_lens_q": 1}
    size = dist.get_world_size()
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, split_batch(batch, pad_token_id=7))
    assert set(parts[0]) == {"input_ids", "attention_mask", "position_ids", "shift_labels", "channel", "name"}
    whole = {key: torch.cat([part[key] for part in parts], 1) for key in parts[0] if key != "name"}
    share = whole["input_ids"].shape[1] // size
    assert [part["input_ids"].shape[1] for part in parts] == [share] * size and share * size - LENGTH < size
    for key in ("input_ids", "attention_mask", "channel"):
        assert torch.equal(whole[key][:, :LENGTH], batch[key]), key
    assert (whole["input_ids"][:, LENGTH:] == 7).all() and (whole["attention_mask"][:, LENGTH:] == 0).all()
    assert torch.equal(whole["position_ids"], torch.arange(share * size)[None])
    assert torch.equal(whole["shift_labels"][:, : LENGTH - 1], batch["labels"][:, 1:])
    assert (whole["shift_labels"][:, LENGTH - 1 :] == -100).all()
    assert "attention_mask" not in split_batch(batch_of("plain"))
    assert (split_batch(batch_of("all_ones"))["attention_mask"] == 1).all()
    return {}


def _unused() -> dict[str, float]:
    """Gradients that only some processes have, or none; a batch without labels."""
    rank, size = dist.get_rank(), dist.get_world_size()
    everywhere, somewhere, nowhere, frozen = (torch.ones(2, requires_grad=number < 3) for number in range(4))
    everywhere.grad = torch.tensor([1.0, rank])
    if rank == size - 1:
        somewhere.grad = torch.tensor([3.0, 4.0])
    average_gradients([everywhere, somewhere, nowhere, frozen])
    assert torch.equal(everywhere.grad, torch.tensor([1.0, (size - 1) / 2])), everywhere.grad
    assert torch.equal(somewhere.grad, torch.tensor([3.0, 4.0]) / size), somewhere.grad
    assert nowhere.grad is None and frozen.grad is None
    logits = torch.ones(1, 3, 5, requires_grad=True)
    loss = sequence_parallel_loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    half = sequence_parallel_loss(logits.bfloat16(), torch.tensor([[1, -100, 2]]))
    assert half.dtype == torch.get_default_dtype() and abs(float(half) - math.log(5)) < 1e-6
    return {}


def _accumulated() -> dict[str, float]:
    """Two micro-batches, weighted by their tokens."""
    model = build("llama")
    batches = [batch_of("plain"), batch_of("few_labels", seed=5)]
    reference = alone(model, batches)
    parallelize(model)
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    loss = torch.stack([together(model, batch, num_items=items) for batch in batches]).sum()
    average_gradients(model.parameters())
    return differences(model, loss, reference)


def _interleaved() -> dict[str, float]:
    """Two forward passes, of different packing, before their backward passes recompute the layers."""
    model = build("llama", inner="by_positions").double()
    first, second = batch_of("packed"), {**batch_of("packed", seed=4), "position_ids": torch.arange(LENGTH)[None]}
    reference = alone(model, [*documents(first), second])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parallelize(model)
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in (first, second))
    losses = []
    for batch in (first, second):
        inputs = split_batch(batch)
        labels = inputs.pop("shift_labels")
        losses.append(sequence_parallel_loss(model(**inputs).logits, labels, num_items=items))
    loss = losses[0] + losses[1]
    loss.backward()
    average_gradients(model.parameters())
    return differences(model, loss.detach(), reference)


def _wrapped(wrap: Callable[[Any], Any]) -> dict[str, float]:
    """Under a wrapper that averages over all processes: groups of two, each with a batch of its own."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replica", "sequence"))
    group = mesh["sequence"].get_group()
    model = build("llama", **_heads(4, 1))
    replicas = mesh["replica"].size()
    batches = [batch_of(("plain", "right")[number], seed=number) for number in range(replicas)]
    reference = alone(model, batches)
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    parallelize(model, group)
    wrapped = wrap(model)
    loss = together(wrapped, batches[mesh["replica"].get_local_rank()], group, num_items=items / replicas)
    dist.all_reduce(loss, group=mesh["replica"].get_group())
    return differences(wrapped, loss / replicas, reference)


def _sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


RECIPES = (Path(__file__).resolve().parent.parent / "docs" / "sequence-parallel.md").read_text(encoding="utf-8")


def recipe(title: str) -> str:
    """The program under a title of the documentation."""
    return RECIPES.split(f"## {title}\n")[1].split("```python\n")[1].split("```")[0]


def _loop() -> dict[str, float]:
    """The documented loop, one step, with an optimizer that leaves the gradients alone."""
    model, batch = build("llama"), batch_of("packed")
    reference = alone(model, documents(batch))
    gradients: dict[str, Tensor] = {}
    losses: list[Tensor] = []

    class Optimizer:
        def step(self) -> None:
            gradients.update({name: tensor.grad.clone() for name, tensor in model.named_parameters()})

        def zero_grad(self) -> None:
            model.zero_grad()

    names = {"model": model, "batches": [batch], "optimizer": Optimizer()}
    exec(recipe("A bare loop"), names)
    losses.append(names["loss"].detach())
    for name, tensor in model.named_parameters():
        tensor.grad = gradients[name]
    return differences(model, losses[0], reference)


def train(trainer_class: Any, folder: str, **options: Any) -> dict[str, Any]:
    """Three steps of a Trainer over twelve rows of a dataset: the losses it logs, and the weights it ends with."""
    rows = []
    for seed in range(6):
        batch = batch_of("right", seed=seed)
        rows += [{key: entry[row] for key, entry in batch.items()} for row in range(2)]
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=options.pop("batch_size"),
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.5,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model = build("llama").double()
    trainer = trainer_class(model, arguments, train_dataset=rows, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": {name: tensor.detach() for name, tensor in model.named_parameters()}}


def _trainer() -> dict[str, Any]:
    """The documented Trainer, groups of two."""
    names: dict[str, Any] = {}
    exec(recipe("With `Trainer`"), names)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replica", "sequence"))
    options = {"batch_size": 4 // dist.get_world_size(), "group": mesh["sequence"].get_group()}
    return train(names["SequenceParallelTrainer"], tempfile.mkdtemp(), **options)


def _message(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except LlmconvertError as error:
        return f"{type(error).__name__}: {error}; {error.hint}"
    return "nothing was raised"


def _errors() -> dict[str, str]:
    """What is refused, and in which words."""
    few = {2: 3, 4: 6}[dist.get_world_size()]
    model = build("llama")
    inputs = split_batch(batch_of("plain"))
    inputs.pop("shift_labels")
    handle = parallelize(model)
    whole = torch.ones(2, LENGTH, dtype=torch.long)
    hybrid = build("qwen3")
    hybrid.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    messages = {
        "heads": _message(lambda: parallelize(build("llama", **_heads(few, few)))),
        "again": _message(lambda: parallelize(model)),
        "hybrid": _message(lambda: parallelize(hybrid)),
        "labels": _message(lambda: model(**inputs, labels=inputs["input_ids"])),
        "cache": _message(lambda: model.generate(inputs["input_ids"], max_new_tokens=2)),
        "mask": _message(lambda: model(inputs["input_ids"], whole)),
        "whole mask": _message(lambda: split_batch({"input_ids": whole, "attention_mask": whole[:, None, None]})),
    }
    handle.remove()
    with _own_attention(model):
        handle = parallelize(model)
        messages["interface"] = _message(lambda: model(**inputs))
    return messages


@contextlib.contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """Its layers attend by themselves, past the interface."""
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    yield


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "control": _control,
    "control_documents": _local_mask,
    "removed": _removed,
    "split": _split,
    "unused": _unused,
    "accumulated": _accumulated,
    "interleaved": _interleaved,
    "ddp": lambda: _wrapped(torch.nn.parallel.DistributedDataParallel),
    "fsdp": lambda: _wrapped(_sharded),
    "errors": _errors,
    "loop": _loop,
    "trainer": _trainer,
}


# Accelerate asks for an address, though the processes have met already.
_HERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def main(rank: int, size: int, folder: str) -> None:
    """Run everything in one process of the group; the first writes what was found."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)} | _HERE
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    work = {**{name: (lambda case=case: run_case(case)) for name, case in CASES.items()}, **CHECKS}
    for name, each in work.items():
        try:
            with contextlib.nullcontext() if name in (*CASES, "interleaved", "trainer") else _wide():
                results[name] = each()
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()  # whoever failed alone is seen here, by the others' time-out
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()
