"""Channel losses in Megatron-LM, around the `forward_step` a pre-training script has.

    losses = MegatronChannelLoss(["web", "code"])        # in the order of the blend: `dataset_id` is the place
    pretrain(..., losses.wrap(forward_step), ...)
    ...
    for name, (loss, tokens) in losses.compute().items():  # on every rank, when the step is logged
        writer.add_scalar(f"loss/{name}", loss, iteration)

Megatron's `loss_func` gives (loss, num_tokens, report) on the last stage, and the report is reduced by the keys of the
first microbatch: ranks with other keys would wait for ever, and a channel that one of them lacks would become NaN. So
the report is left alone. Losses of tokens are added up aside and reduced when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor

from llmconvert.errors import BadInput
from llmconvert.training.channel_loss import ChannelLoss, ChannelLossMeter


class ChannelIterator:
    """A data iterator whose batches lack their channels, which it keeps.

    Megatron-LM's `get_batch` passes on what it knows and drops the rest, `dataset_id` too.

    Args:
        batches: gives dicts of tensors.
        key: of the channels' ids in them, [rows] or [rows, tokens].

    Attributes:
        channels: ids of the last batch; None before the first, or if it has none.
        loss_mask: of the last batch, [rows, tokens]; likewise.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], key: str = "dataset_id") -> None:
        """See the class."""
        self._batches, self._key = batches, key
        self.channels: Tensor | None = None
        self.loss_mask: Tensor | None = None

    def __iter__(self) -> ChannelIterator:
        """Itself."""
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch without its channels."""
        batch = dict(next(self._batches))
        self.channels, self.loss_mask = batch.pop(self._key, None), batch.get("loss_mask")
        return batch


class MegatronChannelLoss:
    """Channel losses over all ranks of the last pipeline stage.

    Tokens are counted where tensor rank 0 reads them, the only rank that has a data iterator in Megatron-LM; the others
    of its group hold the same losses and add nothing. Context-parallel ranks count their own part of every row.

    Args:
        channels: names in the order of the ids in the batches: for a blend, in that of its data sets.
        key: of the ids in the batches, one for each row or one for each label.
        group: the ranks to add up; those over tensors, data and context if absent.

    Attributes:
        training: the meter of microbatches of a model in training.
        evaluation: the meter of those of a model in evaluation.
    """

    def __init__(self, channels: Iterable[str], *, key: str = "dataset_id", group: Any = None) -> None:
        """See the class."""
        names = list(channels)
        self._key, self._group = key, group
        self.training, self.evaluation = ChannelLossMeter(names), ChannelLossMeter(names)

    def wrap(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """A `forward_step(data_iterator, model, ...)` that does the same and counts.

        It must take one batch of the iterator and give (output, loss_func).
        """

        @wraps(forward_step)
        def counted(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if data_iterator is None:
                return forward_step(data_iterator, model, *args, **kwargs)
            batches = ChannelIterator(data_iterator, self._key)
            output, loss_func = forward_step(batches, model, *args, **kwargs)
            meter = self.training if model.training else self.evaluation
            return output, self.loss_func(loss_func, batches.loss_mask, batches.channels, meter)

        return counted

    def loss_func(
        self,
        loss_func: Callable[..., Any],
        loss_mask: Tensor | None,
        channels: Tensor | None,
        meter: ChannelLossMeter | None = None,
    ) -> Callable[..., Any]:
        """A loss function that gives what `loss_func` gives, and counts the losses it is handed.

        Args:
            loss_func: Megatron's, of the losses of tokens [rows, tokens].
            loss_mask: [rows, tokens], of whole rows, as the data set gives it.
            channels: ids [rows], or [rows, tokens] of whole rows.
            meter: `training` if absent.

        Raises:
            BadInput: when called, if the batch had no channels or no mask.
        """

        @wraps(loss_func)
        def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("non_loss_data"):
                self._count(output, loss_mask, channels, meter or self.training)
            return loss_func(output, *args, **kwargs)

        return counted

    def compute(self, *, evaluation: bool = False, reset: bool = True) -> dict[str, ChannelLoss]:
        """The channels' losses since the last call: the same on all ranks of the last stage, empty on other stages.

        Every rank must call it: it is one all-reduce of fixed shape.

        Args:
            evaluation: of models in evaluation.
            reset: start anew afterwards.
        """
        from megatron.core import parallel_state  # type: ignore[import-untyped, import-not-found, unused-ignore]

        meter = self.evaluation if evaluation else self.training
        meter.group = self._group or parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        return meter.compute(reset=reset)

    def _count(self, losses: Tensor, mask: Tensor | None, channels: Tensor | None, meter: ChannelLossMeter) -> None:
        from megatron.core import parallel_state  # type: ignore[import-untyped, import-not-found, unused-ignore]

        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return
        if channels is None or mask is None:
            raise BadInput(
                f"the batch has no `{self._key if channels is None else 'loss_mask'}`",
                hint="a blend of data sets gives `dataset_id`; let others give the place of the channel in `channels`",
            )
        if parallel_state.get_context_parallel_world_size() > 1:
            from megatron.core.utils import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
                get_batch_on_this_cp_rank,
            )

            whole = {"mask": mask, "channels": channels if channels.ndim > 1 else None}
            part = get_batch_on_this_cp_rank(whole)
            mask, channels = part["mask"], channels if part["channels"] is None else part["channels"]
        meter.add(losses, mask, channels)
