"""Train on sequences longer than one device holds: each process of a group keeps a slice of every sequence.

All but attention works token by token, so a slice is enough for it. Around attention two all-to-alls turn a slice of
the tokens with all heads into all tokens with a slice of the heads, and back (DeepSpeed-Ulysses, Jacobs et al.,
arXiv:2309.14509). The attention function itself stays what the model had: eager, SDPA, flash.

    handle = parallelize(model, group)
    inputs = split_batch(batch, group)
    shift_labels = inputs.pop("shift_labels")
    loss = sequence_parallel_loss(model(**inputs).logits, shift_labels, group)
    loss.backward()
    average_gradients(model.parameters(), group)  # DDP and FSDP do this themselves

Loss and gradients are those of one process with the whole batch. Shapes below: b sequences, T tokens in all,
t = T / P of them in each of P processes, h query heads, d their dimension.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmconvert.errors import Refused, Usage
from llmconvert.models.sequence_slices import average_gradients, sequence_parallel_loss, split_batch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

__all__ = ["SequenceParallel", "average_gradients", "parallelize", "sequence_parallel_loss", "split_batch"]

# Layers whose tokens meet in the attention function only; others carry a state or an index along the sequence.
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_numbers = itertools.count()


def parallelize(model: Any, group: ProcessGroup | None = None) -> SequenceParallel:
    """Make `model`'s attention span the sequence whose slices the processes of `group` hold.

    The model takes inputs as `split_batch` makes them: [b, t] tokens of this process, in order of rank. Its attention
    function is replaced by one that wraps it, registered with transformers together with its mask function. Call it
    before wrapping the model in DDP or FSDP, on every process of the group alike. It is for training: a key-value
    cache is refused.

    Args:
        model: a transformers decoder whose attention goes through `ALL_ATTENTION_FUNCTIONS`.
        group: the processes that share a sequence; default all.

    Returns:
        A handle; its `remove()` gives the model its own attention back.

    Raises:
        Refused: its heads or its layers cannot be divided so.
        Usage: it is parallel already, or there are no processes.
    """
    import torch.distributed as distributed

    group = distributed.group.WORLD if group is None and distributed.is_initialized() else group
    if group is None:
        raise Usage("torch.distributed has no processes yet", hint="call init_process_group, or start with torchrun")
    config, name = model.config, type(model).__name__
    if str(config._attn_implementation).startswith("sequence_parallel"):
        raise Usage(f"{name} is sequence parallel already", hint="call remove() of the first handle")
    if any(getattr(config, key, None) is not None for key in config.sub_configs):
        raise Refused(f"{name} has parts other than a decoder", hint="parallelize its language model alone")
    foreign = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if foreign:
        raise Refused(
            f"layers of type {sorted(foreign)} carry a state along the sequence outside the attention function",
            where=name,
            hint="sequence parallelism needs attention layers only",
        )
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int):
        _check_heads(heads, distributed.get_world_size(group), name)
    return SequenceParallel(model, group)


def _check_heads(heads: int, size: int, where: str) -> None:
    if heads % size:
        fitting = [count for count in range(1, heads + 1) if heads % count == 0]
        raise Refused(
            f"{heads} query heads cannot be divided among {size} processes",
            where=where,
            hint=f"a group may have {', '.join(map(str, fitting))} processes",
        )


def _hide_added_pads(mask: Any, attention_mask: Tensor, size: int) -> Any:
    """Take what `split_batch` added out of an additive mask for good.

    Tokens of left padding see nothing. Eager attention, whose masks are large negative numbers, then gives them the
    mean over all columns; an added column must not count in it, as there is none in one process.

    Args:
        mask: [b, 1, T, T] if it is additive; any other is returned as it is.
        attention_mask: [b, T].
        size: the number of processes; fewer columns than these were added.

    Returns:
        The mask, minus infinity in columns at the end that are padding in every row of the batch.
    """
    import torch

    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or not mask.is_floating_point():
        return mask
    later = attention_mask.bool().any(0).flip(0).cumsum(0).flip(0)
    added = (later == 0) & (torch.arange(len(later), device=later.device) > len(later) - size)
    return mask.masked_fill(added, -torch.inf)


class SequenceParallel:
    """A model made sequence parallel by `parallelize`.

    Attributes:
        group: the processes that share a sequence.
        size: how many they are, P.
        rank: which of them this is.
        inner: the name of the attention function that is wrapped.
    """

    def __init__(self, model: Any, group: ProcessGroup) -> None:
        import torch.distributed as distributed

        try:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
        except ImportError as error:
            raise Refused(
                "this transformers has no attention interface", hint='pip install "transformers>=5.20"'
            ) from error

        self.group = group
        self.size, self.rank = distributed.get_world_size(self.group), distributed.get_rank(self.group)
        self.inner: str = model.config._attn_implementation
        self._model = model
        self._attention: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(self.inner)
        self._mask: Callable[..., Any] | None = ALL_MASK_ATTENTION_FUNCTIONS.get(self.inner)
        self._whole_mask: dict[str, Any] | None = None
        self._gathered: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        self._calls = 0

        # No "flash" or "sdpa" in it: transformers reads meaning into these.
        own = f"sequence_parallel_{next(_numbers)}"
        AttentionInterface.register(own, self._attend)
        if self._mask is not None:
            # Without one under the same name, transformers would pass no mask at all.
            AttentionMaskInterface.register(own, self._make_mask)
        model.set_attn_implementation(own)
        if model.config._attn_implementation != own:
            raise Refused(
                "its attention does not go through transformers' attention interface", where=type(model).__name__
            )
        body = model.base_model
        self._names = {part: list(inspect.signature(part.forward).parameters) for part in (model, body)}
        self._hooks = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            body.register_forward_hook(self._after),
        ]
        if body is not model:
            self._hooks.append(model.register_forward_pre_hook(self._check_labels, with_kwargs=True))

    def remove(self) -> None:
        """Give the model the attention function back that it had."""
        for hook in self._hooks:
            hook.remove()
        self._model.set_attn_implementation(self.inner)

    # Before and after the layers.

    def _check_labels(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names[module], args, strict=False)), **kwargs}
        if given.get("labels") is not None and given.get("shift_labels") is None:
            raise Usage(
                "labels would be shifted within the slice, and averaged over its tokens",
                where=type(module).__name__,
                hint="split_batch shifts them; give them to sequence_parallel_loss, with the model's logits",
            )

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Complete what the layers and the mask need to know of the whole sequence."""
        import torch
        from transformers.masking_utils import find_packed_sequence_indices

        given = {**dict(zip(self._names[module], args, strict=False)), **kwargs}
        if given.get("past_key_values") is not None:
            raise Usage(
                "a key-value cache cannot be divided among processes",
                where=type(module).__name__,
                hint="sequence parallelism is for training; call remove() of its handle to generate",
            )
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        batch, slice_ = tokens.shape[:2]
        length = slice_ * self.size
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        packed = whole = None
        if positions is None:
            first = self.rank * slice_
            positions = torch.arange(first, first + slice_, device=tokens.device)[None]
        elif positions.ndim != 2:
            raise Refused(f"position ids of {positions.ndim} dimensions are not supported", where=type(module).__name__)
        elif mask is None:
            # As in one process: positions tell documents apart only where no attention mask is given.
            whole = self._gather_once(positions).expand(batch, -1)
            packed = find_packed_sequence_indices(whole)
        unmasked = mask is None
        if mask is None:
            # Anything but None, so that transformers does not look for documents in the slice.
            mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        elif mask.ndim == 2 and mask.shape[1] == slice_:
            mask = self._gather(mask.to(torch.uint8))
        if mask.shape[-1] != length:
            raise Usage(
                f"an attention mask of shape {list(mask.shape)} does not fit {self.size} slices of {slice_} tokens",
                hint=f"[{batch}, {slice_}] of this process, or [{batch}, 1, {length}, {length}] of the whole",
            )
        self._whole_mask = {"length": length, "packed": packed, "positions": whole, "unmasked": unmasked}
        self._calls = 0
        return (), {**given, "attention_mask": mask, "position_ids": positions, "use_cache": False}

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._whole_mask = None
        if not self._calls:
            raise Refused(
                "its attention does not go through transformers' attention interface",
                where=type(module).__name__,
                hint="load it with transformers' own class for its architecture",
            )

    def _make_mask(self, **kwargs: Any) -> Any:
        """The inner function's mask for the whole sequence, [b, 1, T, T], [b, T] or None as it makes it."""
        from transformers.masking_utils import packed_sequence_compatibility_function

        told = self._whole_mask
        if told is None or self._mask is None:
            raise Usage("a mask was asked for outside the model's forward pass")
        kwargs.update(q_length=told["length"], kv_length=told["length"], q_offset=0, kv_offset=0)
        if told["unmasked"]:
            kwargs["attention_mask"] = None
        if told["packed"] is not None:
            kwargs["mask_function"] = packed_sequence_compatibility_function(
                kwargs["mask_function"], told["positions"], told["packed"]
            )
            kwargs["allow_is_causal_skip"] = False
        mask = self._mask(**kwargs)
        return mask if told["unmasked"] else _hide_added_pads(mask, kwargs["attention_mask"], self.size)

    # Within a layer.

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The inner attention over the whole sequence for this process's heads.

        Args:
            module: the attention layer.
            query: [b, h, t, d].
            key: [b, key-value heads, t, d].
            value: [b, key-value heads, t, d of values], which may differ (latent attention).
            attention_mask: of the whole sequence; [b, h, T, T] where it differs between heads.
            **kwargs: for the inner function.

        Returns:
            [b, t, h, d of values], and no weights: they would be those of some heads only.
        """
        import torch

        self._calls += 1
        heads, slice_, name = query.shape[1], query.shape[2], type(module).__name__
        _check_heads(heads, self.size, name)
        own = slice(self.rank * heads // self.size, (self.rank + 1) * heads // self.size)
        # The fewest copies that give each process whole heads; they divide the queries of a key-value head.
        copies = self.size // math.gcd(self.size, key.shape[1])
        if copies > 1:
            key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
        # All three under way before the first is waited for.
        query, key, value = [self._receive(sent) for sent in [self._send(part) for part in (query, key, value)]]

        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
            length = slice_ * self.size
            if attention_mask.shape[-1] != length or attention_mask.shape[-2] not in (1, length):
                raise Refused(
                    f"an attention mask of shape {list(attention_mask.shape)} is not one of {length} tokens", where=name
                )
            if attention_mask.shape[1] == heads:
                attention_mask = attention_mask[:, own]
        positions = kwargs.get("position_ids")
        if positions is not None and positions.shape[-1] == slice_:
            kwargs["position_ids"] = self._gather_once(positions)
        if kwargs.get("s_aux") is not None:  # attention sinks, [h]
            kwargs["s_aux"] = kwargs["s_aux"][own]

        seen = self._seen_by_inner(module, heads, own, copies)
        output = self._inner_of(module)(seen, query, key, value, attention_mask, **kwargs)
        whole: Tensor = output[0]
        batch, _, fewer, width = whole.shape
        sent = self._exchange(whole.reshape(batch, self.size, slice_, fewer, width).transpose(0, 1))
        back = sent.permute(1, 2, 0, 3, 4).clone(memory_format=torch.contiguous_format)
        return back.flatten(2, 3), None

    def _send(self, states: Tensor) -> Tensor:
        """[b, h, t, d] to [P, b, h/P, t, d], the slices of this process's heads by source; it may not have arrived."""
        batch, heads, slice_, width = states.shape
        return self._exchange(states.reshape(batch, self.size, heads // self.size, slice_, width).transpose(0, 1))

    def _receive(self, sent: Tensor) -> Tensor:
        """[P, b, h/P, t, d] to [b, h/P, T, d]."""
        import torch

        # A clone waits, and is a plain tensor; the flattening would copy in any case.
        return sent.permute(1, 2, 0, 3, 4).clone(memory_format=torch.contiguous_format).flatten(2, 3)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Give part i of the first dimension, [P, ...], to process i, and take one of each; autograd sends back."""
        # What torch's deprecation of `torch.distributed.nn.functional.all_to_all_single` points to.
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        received: Tensor = all_to_all_single_autograd(parts.contiguous(), None, None, self.group)
        return received

    def _inner_of(self, module: nn.Module) -> Callable[..., Any]:
        """The wrapped function; each modelling file has an eager one of its own, beside the class with `forward`."""
        if self._attention is not None:
            return self._attention
        owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        eager = getattr(sys.modules.get(owner.__module__), "eager_attention_forward", None)
        if eager is None:
            raise Refused(
                f"no function for {self.inner} attention is to be found", where=owner.__name__, hint="load it with sdpa"
            )
        found: Callable[..., Any] = eager
        return found

    def _seen_by_inner(self, module: nn.Module, heads: int, own: slice, copies: int) -> nn.Module:
        """The layer as the inner function must see it: with this process's heads, by the inner function's name."""
        groups = getattr(module, "num_key_value_groups", None)
        sliced = {
            name: parameter[own]  # gpt-oss keeps its attention sinks, [h], in the layer
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.shape[:1] == (heads,)
        }
        flash = "flash" in self.inner
        if not sliced and not flash and (copies == 1 or groups is None):
            return module
        seen: Any = copy.copy(module)  # shallow: what is not replaced is the layer's own
        vars(seen)["_parameters"] = {**module._parameters, **sliced}
        if groups is not None:
            seen.num_key_value_groups = groups // copies
        if flash:  # it looks up its kernel by this name
            seen.config = copy.copy(seen.config)
            seen.config._attn_implementation_internal = self.inner
        shown: nn.Module = seen
        return shown

    def _gather(self, slice_: Tensor) -> Tensor:
        """[..., t] of every process to [..., T]; not for gradients."""
        import torch
        import torch.distributed as distributed

        parts = [torch.empty_like(slice_, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(parts, slice_.contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def _gather_once(self, slice_: Tensor) -> Tensor:
        """As `_gather`, but each layer gives the same tensor: remember the last one."""
        last = self._gathered
        if last is not None and last[0]() is slice_ and last[1] == slice_._version:
            return last[2]
        whole = self._gather(slice_)
        self._gathered = weakref.ref(slice_), slice_._version, whole
        return whole
