"""A process's slice of a batch, and the loss and gradients of all slices: what goes around sequence parallel attention.

Shapes: b sequences, T tokens in all, t = T / P of them in each of P processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llmconvert.errors import Usage

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

IGNORED = -100
# What tells a flash kernel where packed documents begin: true of the unpadded batch, and implied by the positions.
_BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def split_batch(
    batch: Mapping[str, Any], group: ProcessGroup | None = None, *, pad_token_id: int = 0
) -> dict[str, Any]:
    """The slice of a batch that this process trains on; every process of the group gives the same whole batch.

    Tokens are padded on the right to a multiple of the group's size. These pads have no labels, and no token before
    them sees them; only where `attention_mask` masks something already are they masked too, since a mask costs the
    fast kernels.

    Args:
        batch: `input_ids` [b, T], and where wanted `labels` and `position_ids` ([b, T] or [1, T]; documents packed
            into a row are told apart by positions that restart, if there is no `attention_mask`) and `attention_mask`
            [b, T]. Any other tensor that begins with [b, T] is sliced as well, and the rest is passed on.
        group: the processes that share a sequence; default all.
        pad_token_id: the token to pad with.

    Returns:
        The batch of [b, t] tokens. `position_ids` count from the start of the sequence, not of the slice. In place of
        `labels` there is `shift_labels`: at each token the label of the next one, which may belong to the next slice,
        -100 where there is none.

    Raises:
        Usage: there are no `input_ids`, or a whole mask [b, 1, T, T] of a length that must be padded.
    """
    import torch
    import torch.distributed as distributed
    from torch.nn.functional import pad

    tokens = batch.get("input_ids")
    if tokens is None:
        raise Usage("a batch without input_ids cannot be split")
    size, rank = distributed.get_world_size(group), distributed.get_rank(group)
    rows, length = tokens.shape
    more = -length % size
    share = (length + more) // size
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=tokens.device)[None]
    added = torch.arange(1, more + 1, device=positions.device)
    whole = {"position_ids": torch.cat([positions, positions[..., -1:] + added], -1)}
    labels = batch.get("shift_labels")
    if labels is None and batch.get("labels") is not None:
        labels = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    if labels is not None:
        whole["shift_labels"] = pad(labels, (0, more), value=IGNORED)

    passed: dict[str, Any] = {}
    for key, entry in batch.items():
        if key in {"position_ids", "labels", "shift_labels", *_BOUNDARIES} or entry is None:
            continue
        if key == "attention_mask" and entry.ndim == 4:
            if more:
                raise Usage(
                    f"a mask of {length} tokens cannot be padded for {size} processes",
                    where=key,
                    hint=f"pad the batch and its mask to {length + more} tokens",
                )
            passed[key] = entry
        elif isinstance(entry, torch.Tensor) and entry.shape[:2] == (rows, length):
            fill = pad_token_id if key == "input_ids" else 0
            if key == "attention_mask":
                fill = int(bool(entry.all()))
            whole[key] = pad(entry, (0, 0) * (entry.ndim - 2) + (0, more), value=fill)
        else:
            passed[key] = entry
    own = slice(rank * share, (rank + 1) * share)
    return {**passed, **{key: entry[:, own].contiguous() for key, entry in whole.items()}}


def sequence_parallel_loss(
    logits: Tensor,
    shift_labels: Tensor,
    group: ProcessGroup | None = None,
    *,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Cross-entropy over the whole sequence: the sum over all processes' tokens by the number of labelled ones.

    The value is the same on every process of the group. Its gradients are to be averaged over them: the average is
    the gradient of the value. DDP and FSDP average over all processes they span, which may be several such groups
    with a batch each (data parallelism); a bare loop calls `average_gradients`.

    Args:
        logits: [b, t, vocabulary], of this process's tokens.
        shift_labels: [b, t], from `split_batch`.
        group: the processes that share a sequence; default all.
        num_items: divide by this in place of the group's labelled tokens. For gradient accumulation: those of all
            micro-batches of the step. For data parallelism weighted by tokens: those of all groups by the number of
            groups.

    Returns:
        A scalar, in float32 at least; 0 where nothing is labelled.
    """
    import torch
    import torch.distributed as distributed
    from torch.nn.functional import cross_entropy

    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    labels = shift_labels.to(logits.device).flatten()
    mine = cross_entropy(logits.flatten(0, -2), labels, ignore_index=IGNORED, reduction="sum")
    sums = torch.stack([mine.detach().double(), (labels != IGNORED).sum().double()])
    distributed.all_reduce(sums, group=group)
    items = sums[1].clamp(min=1) if num_items is None else torch.as_tensor(num_items).to(sums)
    share = mine / items.to(mine.dtype)
    total = (sums[0] / items).to(mine.dtype)
    # The value of the whole; the gradient of this process's share, times P, since P are averaged.
    return total + distributed.get_world_size(group) * (share - share.detach())


def average_gradients(parameters: Iterable[Tensor], group: ProcessGroup | None = None) -> None:
    """Average gradients over a group in place, for a loop without DDP or FSDP.

    A parameter without a gradient here that has one elsewhere (an expert that got no token of this slice) counts as
    zero; one without a gradient anywhere keeps none.
    """
    import torch
    import torch.distributed as distributed

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    used = torch.tensor([parameter.grad is not None for parameter in trained], device=trained[0].device).int()
    distributed.all_reduce(used, op=distributed.ReduceOp.MAX, group=group)
    gradients: list[Tensor] = []
    for parameter, anywhere in zip(trained, used.tolist(), strict=True):
        if anywhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        together = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(together, group=group)
        together /= distributed.get_world_size(group)
        parts = torch.split_with_sizes(together, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Iterable[Tensor], size: int = 1 << 24) -> Iterable[list[Tensor]]:
    """Runs of one dtype and device and of `size` elements at most, unless one alone has more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        alike = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and sum(other.numel() for other in bucket) + tensor.numel() <= size):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
