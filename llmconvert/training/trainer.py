"""Channel losses in transformers' Trainer: a ready-made trainer, a mixin, or a callback for a trainer as it is.

    trainer = ChannelLossTrainer(model, args, train_dataset=rows_with_a_column_channel)

logs `loss/<channel>` and `tokens/<channel>` beside `loss`, and `eval_loss/<channel>` beside `eval_loss`, to whatever
`report_to` names. Training itself is left as it is: the stock causal loss is computed token by token, once, and then
summed up, which gives the same gradients bit for bit. Where the loss is not the stock one (label smoothing,
`compute_loss_func`, a model's own), what is logged is the plain cross entropy of the logits, computed beside it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.training.channel_loss import NO_CHANNEL, ChannelLossMeter, agree

Batch = dict[str, Any]


class ChannelCollator:
    """Lets another collator make the batch, and adds the channels of its tokens under `column`.

    A row's channel is a name or a number, or, where a row packs several documents, one for each of its tokens. Collators
    that put all rows into one (padding-free packing, such as `DataCollatorWithFlattening`) are noticed.

    Args:
        inner: makes a batch with `input_ids` out of rows without the column.
        channels: all names, in the order of the ids the batch will hold. Without them the batch holds one name for each
            row, and rows with several channels or in one are not possible.
        column: of the dataset and of the batch.
    """

    def __init__(
        self,
        inner: Callable[[list[Batch]], Batch],
        channels: Sequence[str] | None = None,
        column: str = "channel",
    ) -> None:
        """See the class."""
        self.inner, self.column = inner, column
        self.ids = None if channels is None else {name: number for number, name in enumerate(channels)}

    def __call__(self, rows: list[Any]) -> Batch:
        """A batch; without the column if no row has it.

        Raises:
            BadInput: a channel is none of those named beforehand, or there are not as many as tokens.
            Usage: names are needed beforehand.
        """
        rows = [dict(row) for row in rows]
        channels = [row.pop(self.column, None) for row in rows]
        # What the inner collator may keep or not, it keeps; the column comes last, where no one takes it for the input.
        lengths = [len(row["input_ids"]) for row in rows]
        batch = dict(self.inner(rows))
        if all(channel is None for channel in channels):
            return batch
        channels = [channel.tolist() if hasattr(channel, "tolist") else channel for channel in channels]
        packed = any(isinstance(channel, Sequence) and not isinstance(channel, str) for channel in channels)
        count, width = batch["input_ids"].shape
        flat = count == 1 and len(rows) > 1
        if self.ids is None:
            if packed or flat:
                raise Usage(
                    "rows that hold several channels need the names of all channels beforehand",
                    hint='give channels=["web", "code"]',
                )
            batch[self.column] = [NO_CHANNEL if channel is None else str(channel) for channel in channels]
        elif packed or flat:
            spread = [self._spread(channel, length) for channel, length in zip(channels, lengths, strict=True)]
            if flat:
                spread = [[number for row in spread for number in row]]
            batch[self.column] = self._pad(spread, width, batch.get("attention_mask"))
        else:
            batch[self.column] = torch.tensor([self._id(channel) for channel in channels])
        return batch

    def _id(self, channel: Any) -> int:
        if channel is None:
            return -1
        assert self.ids is not None
        number = self.ids.get(str(channel), -1 if str(channel) == NO_CHANNEL else None)
        if number is None:
            raise BadInput(
                f"the channel `{channel}` is not among those named beforehand",
                where=", ".join(self.ids),
                hint="name it too in `channels`",
            )
        return number

    def _spread(self, channel: Any, length: int) -> list[int]:
        """The ids of a row's tokens."""
        if isinstance(channel, str) or not isinstance(channel, Sequence):
            return [self._id(channel)] * length
        if len(channel) != length:
            raise BadInput(f"a row has {length} tokens and {len(channel)} channels", where=self.column)
        return [self._id(one) for one in channel]

    def _pad(self, spread: list[list[int]], width: int, mask: Tensor | None) -> Tensor:
        """Ids [rows, width], -1 where the row is padded: where the mask says, else as the inner collator's tokenizer pads."""
        side = getattr(getattr(self.inner, "tokenizer", None), "padding_side", "right") == "left"
        found = torch.full((len(spread), width), -1, dtype=torch.int64)
        for number, (row, ids) in enumerate(zip(found, spread, strict=True)):
            if ids:
                masked = mask is not None and mask.shape == found.shape and not bool(mask[number].all())
                left = not bool(mask[number, 0]) if masked and mask is not None else side
                cut = ids[-width:] if left else ids[:width]
                (row[-len(cut) :] if left else row[: len(cut)]).copy_(torch.tensor(cut))
        return found


class ChannelLossCallback(TrainerCallback):  # type: ignore[misc]
    """Channel losses for a trainer that exists: `ChannelLossCallback().attach(trainer)`.

    It works with any subclass of Trainer, and puts itself before the callbacks there are, so that what it adds to the
    logs is seen by all of them.

    Args:
        channels: all names. If absent they are read from the datasets, where these are `datasets.Dataset`s with one
            channel a row; else taken up as they come.
        column: of the dataset.
        group: the ranks whose tokens differ, as `ChannelLossMeter` has it; all ranks if absent.

    Attributes:
        training: the meter of training steps; emptied whenever the Trainer logs.
        evaluation: the meter of evaluation; emptied whenever an evaluation is logged.
    """

    def __init__(self, channels: Iterable[str] | None = None, *, column: str = "channel", group: Any = None) -> None:
        """See the class."""
        self.column, self._group = column, group
        self._names = None if channels is None else list(channels)
        self._noted: frozenset[str] = frozenset()
        self._meters(self._names)
        self._stock = _TokenLoss()

    def attach(self, trainer: Any) -> ChannelLossCallback:
        """Watch a trainer from now on.

        Raises:
            Refused: the trainer cuts rows across ranks (context or sequence parallelism), or fuses the loss away.
            Usage: it streams its rows from one rank to the others, which needs names beforehand; or it is watched already.
        """
        self._check(trainer)
        if getattr(trainer, "channel_losses", self) is not self:
            raise Usage("the trainer's channels are watched already")
        if not hasattr(trainer, "channel_losses"):
            inner = trainer.compute_loss
            # On the trainer, not on its class: other trainers stay as they are.
            trainer.compute_loss = lambda model, inputs, *args, **kwargs: self.compute_loss(
                trainer, inner, model, inputs, *args, **kwargs
            )
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns.append(self.column)
            trainer.channel_losses = self
        if self._names is None:
            self._meters(self._names_in(trainer))
        if not isinstance(trainer.data_collator, ChannelCollator):
            trainer.data_collator = ChannelCollator(trainer.data_collator, self._names, self.column)
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def compute_loss(
        self,
        trainer: Any,
        compute_loss: Callable[..., Any],
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        **options: Any,
    ) -> Any:
        """Count a batch while `compute_loss`, the trainer's own, works on it; gives what that gives.

        Raises:
            Refused: the model gives neither a stock loss nor logits.
            Usage: a batch of training has no channels.
        """
        channels = inputs.pop(self.column, None)
        labels = inputs.get("labels")
        if channels is None or labels is None:
            if model.training and channels is None:
                raise Usage(
                    f"the batch has no `{self.column}`",
                    hint=f"give the dataset a column `{self.column}`, and let the trainer collate with "
                    "ChannelCollator(collator); TRL's packing keeps it for a trainer derived from ChannelLossMixin",
                )
            return compute_loss(model, inputs, return_outputs, **options)
        meter = self.training if model.training else self.evaluation
        if not model.training:
            labels = labels.where(_first_time(inputs, labels, trainer.accelerator), meter.ignore_index)
        base = _causal_model(trainer.accelerator.unwrap_model(model))
        if _has_fused_head(base):
            with _watched(base) as losses:
                result = compute_loss(model, inputs, return_outputs, **options)
            if not losses:
                raise Refused("the model's fused head gave no losses of tokens", where=type(base).__name__)
            meter.update(losses[-1], labels, channels)
            return result
        stock = base if getattr(base, "loss_function", None) is ForCausalLMLoss and trainer.args.n_gpu <= 1 else None
        if stock is not None:
            stock.loss_function = self._stock
        self._stock.losses = None
        try:
            loss, outputs = compute_loss(model, inputs, True, **options)
        finally:
            if stock is not None:
                stock.loss_function = ForCausalLMLoss
        if self._stock.losses is not None:
            meter.update(self._stock.losses, labels, channels, shift=True)
            self._stock.losses = None
        else:
            logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
            if logits is None:
                raise Refused(
                    "the model gives neither the losses of tokens nor logits",
                    where=type(base).__name__,
                    hint="kernels that fuse head and loss (Liger, for one) leave none: switch that kernel off",
                )
            meter.update(logits, labels, channels)
        return (loss, outputs) if return_outputs else loss

    def on_log(self, args: Any, state: Any, control: Any, logs: Batch | None = None, **_: Any) -> None:
        """Add the channels to the Trainer's logs: to those of a step, or of an evaluation."""
        if logs is None:
            return
        added: dict[str, float] = {}
        if "loss" in logs and "learning_rate" in logs:
            added = _entries("loss", "tokens", self.training)
        for key in [key for key in logs if key.endswith("_loss") and f"{key[: -len('loss')]}runtime" in logs]:
            if key != "train_loss":  # the end of training has a mean and a runtime as well
                added |= _entries(key, f"{key[: -len('loss')]}tokens", self.evaluation)
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Forget a prediction's tokens: its metrics are not logged."""
        self.evaluation.reset()

    def note(self, names: Iterable[str]) -> None:
        """Names of channels in a dataset that no longer lists them, because its rows pack several documents."""
        self._noted = self._noted | set(names)

    def _meters(self, names: list[str] | None) -> None:
        self._names = names
        self.training = ChannelLossMeter(names, group=self._group)
        self.evaluation = ChannelLossMeter(names, group=self._group)

    def _check(self, trainer: Any) -> None:
        cut = getattr(trainer.accelerator, "parallelism_config", None)
        if cut is not None and (getattr(cut, "cp_enabled", False) or getattr(cut, "sp_enabled", False)):
            raise Refused(
                "the Trainer's context and sequence parallelism cut rows without their channels",
                hint="write the loop by hand, with ChannelLossMeter(group=...)",
            )
        streamed = isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)
        if streamed and self._names is None and trainer.args.accelerator_config.dispatch_batches is not False:
            raise Usage(
                "the names of channels have to be known where rows are streamed and dispatched",
                hint='give channels=["web", "code"], or accelerator_config={"dispatch_batches": False}',
            )

    def _names_in(self, trainer: Any) -> list[str] | None:
        """The channels of the trainer's datasets, over all ranks; None where they cannot be listed."""
        evaluated = trainer.eval_dataset
        parts = [trainer.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])]
        names = set(self._noted)
        for part in parts:
            if part is None:
                continue
            feature = (getattr(part, "features", None) or {}).get(self.column)
            if self._noted and feature is not None and not hasattr(feature, "dtype"):  # packed here, and noted then
                continue
            if not hasattr(part, "unique") or not hasattr(feature, "dtype"):  # a list's feature has no dtype
                return None
            names |= {str(name) for name in part.unique(self.column) if name is not None}
        return agree(sorted(names - {NO_CHANNEL}), self._group)


class ChannelLossMixin:
    """For a subclass of Trainer: `class MyTrainer(ChannelLossMixin, SFTTrainer): ...`.

    Args:
        *args: Trainer's.
        channels: as `ChannelLossCallback` has it.
        channel_column: the dataset's column.
        channel_group: the ranks whose tokens differ; all ranks if absent.
        **kwargs: Trainer's.

    Attributes:
        channel_losses: the `ChannelLossCallback`, with its meters.
    """

    def __init__(
        self,
        *args: Any,
        channels: Iterable[str] | None = None,
        channel_column: str = "channel",
        channel_group: Any = None,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        self.channel_losses = ChannelLossCallback(channels, column=channel_column, group=channel_group)
        super().__init__(*args, **kwargs)
        self.channel_losses.attach(self)

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, counted."""
        return self.channel_losses.compute_loss(self, super().compute_loss, model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, packing: bool, *rest: Any, **options: Any) -> Any:
        """TRL's, which packs token ids and labels and drops every other column: here the channel goes along.

        The rows are those TRL makes, each with a list of channels, one a token.
        """
        prepare, column = super()._prepare_dataset, self.channel_losses.column  # type: ignore[misc]
        if not packing or column not in (dataset.column_names or ()):
            return prepare(dataset, tokenizer, args, packing, *rest, **options)
        from trl import pack_dataset  # type: ignore[import-not-found, unused-ignore]

        def spread(row: Batch) -> Batch:
            channel = row[column]
            named = NO_CHANNEL if channel is None else channel
            return {column: named if isinstance(named, list) else [str(named)] * len(row["input_ids"])}

        # What packing does not cut, and shuffles itself.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = prepare(dataset, tokenizer, whole, False, *rest, **options)
        if hasattr(dataset, "unique") and hasattr(dataset.features[column], "dtype"):
            self.channel_losses.note(str(name) for name in dataset.unique(column) if name not in (None, NO_CHANNEL))
        dataset = dataset.map(spread).select_columns(["input_ids", "labels", column])
        shuffled = getattr(args, "shuffle_dataset", False)
        dataset = dataset.shuffle(seed=args.seed) if shuffled else dataset
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        return dataset.shuffle(seed=args.seed) if shuffled else dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column, which Trainer would remove as none of the model's arguments."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._signature_columns  # type: ignore[has-type]
        if self.channel_losses.column not in columns:
            self._signature_columns = [*columns, self.channel_losses.column]


class ChannelLossTrainer(ChannelLossMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with channel losses; see `ChannelLossMixin`."""


class _TokenLoss:
    """Transformers' causal loss, the losses of single tokens kept on the way, shaped as the labels are.

    The gradient of each token's loss is what the fused sum or mean would hand it: the same bits.
    """

    def __init__(self) -> None:
        self.losses: Tensor | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        targets = shift_labels.reshape(-1).to(logits.device)
        flat = logits.float().view(-1, vocab_size)
        losses = functional.cross_entropy(flat, targets, ignore_index=ignore_index, reduction="none")
        self.losses = losses.detach().view(shift_labels.shape)
        if num_items_in_batch is None:
            return losses.sum() / (targets != ignore_index).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(losses.device)
        return losses.sum() / num_items_in_batch


def _has_fused_head(model: Any) -> bool:
    """Whether TRL has put a head into the model's forward that gives losses of tokens and no logits."""
    forward = model.forward
    while forward is not None:
        if "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


@contextmanager
def _watched(model: Any) -> Iterator[list[Tensor]]:
    """The losses of tokens a fused head gives, [batch, tokens - 1] each time the model is called."""
    forward, found = model.forward, list[Tensor]()

    def watched(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        probabilities = getattr(outputs, "log_probs", None)
        if probabilities is not None:
            found.append(-probabilities.detach())
        return outputs

    model.forward = watched
    try:
        yield found
    finally:
        model.forward = forward


def _causal_model(model: Any) -> Any:
    """The model with the head, inside an adapter's wrapper if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _entries(loss: str, tokens: str, meter: ChannelLossMeter) -> dict[str, float]:
    """What goes into the logs, under `<loss>/<channel>` and `<tokens>/<channel>`; empties the meter."""
    found = meter.compute(reset=True)
    entries = {f"{loss}/{name}": one.loss for name, one in found.items()}
    return entries | {f"{tokens}/{name}": one.tokens for name, one in found.items()}


def _first_time(inputs: Batch, labels: Tensor, accelerator: Any) -> Tensor:
    """Which labels of an evaluation's batch are met for the first time, bool, shaped to go with `labels`.

    So that all ranks have equal batches, accelerate fills the last one up with rows from the beginning; its
    `GradientState` says how many of the last batch, in order of ranks, are no repetition.
    """
    state = accelerator.gradient_state
    real = state.remainder if state.end_of_dataloader else 0
    if real <= 0:
        return torch.ones_like(labels, dtype=torch.bool)
    positions = inputs.get("position_ids")
    if labels.shape[0] == 1 and positions is not None:  # documents in one row: positions start anew at each
        row = torch.cumsum(positions == positions[:, :1], 1) - 1
        count = int(row[0, -1]) + 1
    else:
        row, count = torch.arange(labels.shape[0], device=labels.device)[:, None].expand(labels.shape), labels.shape[0]
    found: Tensor = row + accelerator.process_index * count < real
    return found
