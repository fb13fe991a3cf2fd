"""Loss sums and token counts per channel (data source), exact to the token.

The loss of channel c is the sum of the losses of its target tokens over their number, across all microbatches and
ranks since the last reset. Hence the mean of the channels' losses, weighted with their tokens, is the mean loss of
all tokens, whatever the lengths, padding, packing or accumulation.

Nothing here waits for the device before a result is asked for: a microbatch costs one `index_add_` of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from llmconvert.errors import BadInput, Usage

NO_CHANNEL = "no_channel"
"""The name under which tokens without a channel are counted, so that the channels still add up to the total."""

_CHUNK = 1 << 25  # logits turned to float32 at a time: 128 MiB


class ChannelLoss(NamedTuple):
    """A channel's result.

    Attributes:
        loss: mean over its target tokens, in nats.
        tokens: how many there were, or the sum of their weights where the loss mask holds other weights than 0 and 1.
    """

    loss: float
    tokens: float


class ChannelLossMeter:
    """Accumulates losses of tokens by channel.

    Sums are float64: a window may hold 10^8 tokens, of which float32 would lose the last ones added. Where the device
    has no float64 (MPS) they are float32.

    Args:
        channels: all names, known beforehand and in the same order on every rank: results then take one all-reduce of
            fixed shape, and integer ids stand for places in this sequence. If absent, channels are taken up as
            they come and ranks agree on the names whenever a result is computed (one `all_gather_object` more).
        group: the ranks to add up: those whose tokens differ. With tensor parallelism, whose ranks all hold the
            same tokens, give the data-parallel group; with context parallelism, where each holds a part of
            every row, the group over data and context. All ranks of the default group if absent.
        ignore_index: the label of tokens that do not count.

    Raises:
        Usage: a name occurs twice or is `NO_CHANNEL`.
    """

    def __init__(
        self, channels: Iterable[str] | None = None, *, group: dist.ProcessGroup | None = None, ignore_index: int = -100
    ) -> None:
        """See the class."""
        names = [] if channels is None else [str(name) for name in channels]
        if len({NO_CHANNEL, *names}) != len(names) + 1:
            raise Usage(
                "the names of channels are not distinct",
                where=", ".join(names),
                hint=f"name each once; `{NO_CHANNEL}` stands for tokens without a channel",
            )
        self.group, self.ignore_index = group, ignore_index
        self._fixed = channels is not None
        # Row 0 is for tokens without a channel, so that a new name only ever adds a row.
        self._rows = {name: row for row, name in enumerate([NO_CHANNEL, *names])}
        self._table: Tensor | None = None

    @property
    def channels(self) -> list[str]:
        """The names known so far on this rank, in the order of their ids."""
        return list(self._rows)[1:]

    def update(
        self,
        logits_or_loss: Tensor,
        labels: Tensor,
        channels: str | Sequence[str | int | None] | Tensor,
        *,
        shift: bool | None = None,
    ) -> None:
        """Count a microbatch. No gradient flows through, and the device is not waited for.

        Args:
            logits_or_loss: logits [..., tokens, vocabulary]; or the losses of single tokens, [..., tokens] or [...,
                tokens - 1], or either of them flat; or, where all tokens are of one channel, their mean loss.
            labels: int [..., tokens]; those equal to `ignore_index` do not count.
            channels: one name for all; or one for each row of `labels`, as a sequence of names or an integer tensor of
                ids [rows]; or one for each token, as ids shaped as `labels` are. They lie as the labels lie: if labels
                come shifted, so must they. Ids outside the names, such as -1 for padding, count as `NO_CHANNEL`.
            shift: the entry at t belongs to the label at t + 1, as in transformers' models. If absent: yes for logits,
                a mean, and losses that are one shorter than the labels; no for losses as long as the labels.

        Raises:
            BadInput: the shapes do not go together, or a name is not among those known beforehand.
            Usage: ids without names known beforehand, or one mean for several channels.
        """
        with torch.no_grad():
            value = logits_or_loss.detach()
            labels = labels.detach().to(value.device)
            rows = self._row_numbers(channels, labels)
            if value.ndim == 0:
                self._mean(value, labels, rows, channels, shift is not False)
            elif value.ndim > labels.ndim or (value.ndim == 2 and value.shape[0] == labels.numel() != value.numel()):
                self._logits(value, labels, rows, shift is not False)
            else:
                self._losses(value, labels, rows, shift)

    def add(self, losses: Tensor, weights: Tensor, channels: str | Sequence[str | int | None] | Tensor) -> None:
        """Count tokens whose losses and weights lie side by side, as in Megatron's loss functions.

        Args:
            losses: floating point [..., tokens].
            weights: of the same shape, a mask as a rule; what weighs 0 does not count, not even a NaN.
            channels: as for `update`.

        Raises:
            BadInput: as for `update`.
            Usage: ids without names known beforehand.
        """
        with torch.no_grad():
            if losses.shape != weights.shape:
                raise _mismatch("losses and weights", losses, weights)
            weights = weights.detach().to(losses.device)
            self._count(losses.detach(), weights, self._row_numbers(channels, weights))

    def compute(self, *, reset: bool = False) -> dict[str, ChannelLoss]:
        """Loss and tokens of each channel that had any, over all ranks of the group. Every rank must call it.

        Args:
            reset: start anew afterwards.
        """
        names, table = self._reduced()
        if reset:
            self.reset()
        found = {}
        for name, (total, weight) in zip(names, table.tolist(), strict=True):
            if weight:
                found[name] = ChannelLoss(total / weight, int(weight) if weight == int(weight) else weight)
        return found

    def reset(self) -> None:
        """Forget what was counted; names stay."""
        self._table = None

    def _row_numbers(self, channels: str | Sequence[str | int | None] | Tensor, labels: Tensor) -> Tensor:
        """Rows of the table, int64, shaped as `labels`."""
        if isinstance(channels, str):
            rows = torch.tensor(self._row(channels))
        elif not isinstance(channels, Tensor) and any(not isinstance(c, str | Integral | None) for c in channels):
            raise Usage(
                "channels are neither names or ids a row nor a tensor of ids",
                hint="give one name or id for each row, or torch.tensor(ids) with one for each token",
            )
        elif not isinstance(channels, Tensor):
            rows = torch.tensor([self._row(channel) for channel in channels], dtype=torch.int64)
        elif not self._fixed:
            raise Usage(
                "channels came as ids, but their names are not known",
                hint='give them in the order of the ids: ChannelLossMeter(channels=["web", "code"])',
            )
        else:
            ids = channels.to(torch.int64)
            rows = torch.where((ids >= 0) & (ids < len(self._rows) - 1), ids + 1, 0)
        if rows.shape != labels.shape[: rows.ndim]:
            raise _mismatch("channels and labels", rows, labels)
        rows = rows.to(labels.device, non_blocking=True)
        return rows.reshape(*rows.shape, *[1] * (labels.ndim - rows.ndim)).expand(labels.shape)

    def _row(self, channel: str | int | None) -> int:
        if channel is None:
            return 0
        if self._fixed and not isinstance(channel, str):
            return int(channel) + 1 if 0 <= int(channel) < len(self._rows) - 1 else 0
        name = str(channel)
        if name not in self._rows:
            if self._fixed:
                raise BadInput(
                    f"the channel `{name}` is not among those named beforehand",
                    where=", ".join(self.channels),
                    hint="name it too, or name none and let channels be taken up as they come",
                )
            self._rows[name] = len(self._rows)
        return self._rows[name]

    def _mean(self, value: Tensor, labels: Tensor, rows: Tensor, channels: Any, shift: bool) -> None:
        if isinstance(channels, Tensor) or not (isinstance(channels, str) or len(set(channels)) == 1):
            raise Usage(
                "one mean loss cannot be shared out among several channels",
                hint="give logits, or the losses of single tokens (cross_entropy with reduction='none')",
            )
        labels, rows = (labels[..., 1:], rows[..., 1:]) if shift else (labels, rows)
        self._count(value.expand(labels.shape), labels != self.ignore_index, rows)

    def _logits(self, logits: Tensor, labels: Tensor, rows: Tensor, shift: bool) -> None:
        if logits.shape[:-1].numel() != labels.numel():
            raise _mismatch("logits and labels", logits, labels)
        if shift:
            # The last place predicts nothing that is known. Padding the labels spares a copy of the logits.
            labels = functional.pad(labels[..., 1:], (0, 1), value=self.ignore_index)
            rows = functional.pad(rows[..., 1:], (0, 1))
        logits, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        size = max(1, _CHUNK // logits.shape[-1])
        parts = zip(torch.split(logits, size), torch.split(flat, size), strict=True)
        losses = [
            functional.cross_entropy(part.float(), target, ignore_index=self.ignore_index, reduction="none")
            for part, target in parts
        ]
        self._count(torch.cat(losses), flat != self.ignore_index, rows)

    def _losses(self, losses: Tensor, labels: Tensor, rows: Tensor, shift: bool | None) -> None:
        shorter = labels[..., 1:].shape
        if losses.numel() == shorter.numel() and losses.numel() != labels.numel() and shift is not False:
            labels, rows = labels[..., 1:], rows[..., 1:]
        elif losses.numel() == labels.numel():
            losses = losses.reshape(labels.shape)
            if shift:
                losses, labels, rows = losses[..., :-1], labels[..., 1:], rows[..., 1:]
        else:
            raise _mismatch("losses and labels", losses, labels)
        self._count(losses, labels != self.ignore_index, rows)

    def _count(self, losses: Tensor, weights: Tensor, rows: Tensor) -> None:
        table = self._table_on(losses.device)
        weights = weights.reshape(-1).to(table.dtype)
        sums = torch.where(weights != 0, losses.reshape(-1).to(table.dtype) * weights, 0.0)
        table.index_add_(0, rows.reshape(-1), torch.stack((sums, weights), 1))

    def _table_on(self, device: torch.device) -> Tensor:
        """The table of sums and counts, [1 + channels, 2], on a device and with a row for every name."""
        if self._table is None:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._table = torch.zeros(len(self._rows), 2, dtype=dtype, device=device)
        missing = len(self._rows) - self._table.shape[0]
        if missing:
            self._table = functional.pad(self._table, (0, 0, 0, missing))
        self._table = self._table.to(device)
        return self._table

    def _reduced(self) -> tuple[list[str], Tensor]:
        """Names and the table over all ranks of the group."""
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1
        device = self._table.device if self._table is not None else torch.device("cpu")
        if parallel and self._table is None and "nccl" in dist.get_backend(self.group):
            device = torch.device("cuda", torch.cuda.current_device())  # a rank that had no tokens yet
        table, names = self._table_on(device), list(self._rows)
        if not parallel:
            return names, table
        if not self._fixed:
            names = agree(names, self.group)
            own, table = table, torch.zeros(len(names), 2, dtype=table.dtype, device=device)
            places = [names.index(name) for name in self._rows]
            table[torch.tensor(places, device=device)] = own
        else:
            table = table.clone()
        dist.all_reduce(table, group=self.group)
        return names, table


def agree(names: Sequence[str], group: dist.ProcessGroup | None = None) -> list[str]:
    """The names of all ranks of a group, each once, in the same order everywhere; as given where there is one rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(names)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, list(names), group=group)
    return list(dict.fromkeys(chain.from_iterable(gathered)))


def _mismatch(what: str, left: Tensor, right: Tensor) -> BadInput:
    return BadInput(f"the shapes of {what} do not go together: {list(left.shape)} and {list(right.shape)}")
