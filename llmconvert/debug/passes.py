"""One forward pass with its insides in view: of a model in memory, or of a checkpoint read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmconvert.checkpoint.directory import require_directory
from llmconvert.checkpoint.megatron import is_megatron
from llmconvert.errors import Refused, Usage
from llmconvert.verify.layerwise import LayerwiseModel, find_layers, replaced_forwards, split_hidden
from llmconvert.verify.logits import resolve_device
from llmconvert.verify.models import read_config
from llmconvert.verify.probes import Probe
from llmconvert.verify.runnable import Runnable
from llmconvert.verify.sharded import ShardedModel, describe

_HEAD_AT_ONCE = 8
"""Layers whose streams go through the head together."""

_SOFTMAXES = (torch.softmax, torch.Tensor.softmax, nn.functional.softmax)


class Pass(Protocol):
    """A model and one row of tokens, looked at layer by layer."""

    num_layers: int

    def streams(self, count: int | None = None) -> list[Tensor]:
        """The residual stream before the first layer and after each of the first `count` (all): [1, tokens, hidden]."""
        ...

    def logits(self, streams: Sequence[Tensor]) -> Iterator[Tensor]:
        """What final norm and head make of each stream: [tokens, vocabulary]."""
        ...

    def attention(self, layer: int) -> Tensor:
        """A layer's attention weights, [heads, queries, keys]."""
        ...


class _SoftmaxRecorder(TorchFunctionMode):
    """Keeps what softmax makes of scores [batch, heads, tokens, tokens]; routers' have fewer axes."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.found = tokens, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _SOFTMAXES and out.ndim == 4 and out.shape[-2:] == (self.tokens, self.tokens):
            self.found.append(out)
        return out

    def weights(self, where: str) -> Tensor:
        """The heads' weights, those of all tensor-parallel ranks in order.

        Raises:
            Refused: the layer takes no softmax over all tokens.
        """
        if not self.found:
            raise Refused(
                "the layer takes no softmax over its tokens that could be seen", where=where,
                hint="attention with sinks, linear attention and state-space layers are not shown",
            )  # fmt: skip
        return torch.cat([out[0].detach().float() for out in self.found])


class ModelPass:
    """A model in memory: any decoder with a list of layers.

    Args:
        model: the model; its mode and its attention implementation are as before afterwards.
        input_ids: [1, tokens].

    Raises:
        Refused: it has no list of layers.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor) -> None:
        """See the class."""
        self.model, self.name = model, type(model).__name__
        count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        self.layers = find_layers(model, self.name)[1][:count]
        self.num_layers, self._tuples = len(self.layers), False
        device = next(p.device for p in model.parameters() if p.device.type != "meta")
        self.inputs: dict[str, Any] = {
            "input_ids": input_ids.to(device),
            "attention_mask": torch.ones_like(input_ids).to(device),
        }
        if hasattr(model, "config"):
            self.inputs["use_cache"] = False

    @torch.no_grad()
    def _run(self) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            out = self.model(**self.inputs)
        finally:
            self.model.train(training)
        logits: Tensor = getattr(out, "logits", out)
        return logits

    def streams(self, count: int | None = None) -> list[Tensor]:
        """See `Pass`."""
        seen: list[Tensor] = []
        hooks = [
            self.layers[0].register_forward_pre_hook(
                lambda _, a, k: seen.append(split_hidden(a, k)[0]), with_kwargs=True
            )
        ]

        def keep(layer: nn.Module, given: Any, out: Any) -> None:
            self._tuples = isinstance(out, tuple)
            seen.append(out[0] if self._tuples else out)

        hooks += [layer.register_forward_hook(keep) for layer in self.layers[:count]]
        try:
            self._run()
        finally:
            for hook in hooks:
                hook.remove()
        # The last layer's output may be changed in place by what comes after; a device map puts them in many places.
        return [stream.detach().clone() for stream in seen]

    def logits(self, streams: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `Pass`; after `streams`. The model's own forward, its layers passing by what the last one is to give."""
        last = self.layers[-1]
        for stream in streams:

            def give(*args: Any, stream: Tensor = stream, **kwargs: Any) -> Any:
                return self._shaped(stream)

            def skip(*args: Any, **kwargs: Any) -> Any:
                return self._shaped(split_hidden(args, kwargs)[0])

            with replaced_forwards({layer: give if layer is last else skip for layer in self.layers}):
                yield self._run()[0]

    def _shaped(self, hidden: Tensor) -> Any:
        return (hidden,) if self._tuples else hidden

    def attention(self, layer: int) -> Tensor:
        """See `Pass`: this layer alone is run once more, with eager attention, on what the layers before made of the row."""
        given = self.streams(layer + 1)[layer]
        tokens = given.shape[1]
        recorder = _SoftmaxRecorder(tokens)
        wanted = self.layers[layer]
        forward = wanted.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            _, rest, named = split_hidden(args, kwargs)
            with recorder:
                return forward(given, *rest, **named)

        def skip(*args: Any, **kwargs: Any) -> Any:
            return self._shaped(split_hidden(args, kwargs)[0])

        others = {other: record if other is wanted else skip for other in self.layers}
        with _eager(self.model), replaced_forwards(others):
            self._run()
        return recorder.weights(f"{self.name}, layer {layer}")


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Eager attention for a while, where the model has a choice."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before in (None, "eager"):
        yield
        return
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


class CheckpointPass:
    """A checkpoint directory, Hugging Face's or Megatron's, with one block in memory at a time.

    Args:
        directory: the checkpoint.
        input_ids: [1, tokens].
        dtype: of the computation.
        device: where.

    Raises:
        LlmconvertError: it cannot be opened, or there is no code to run it.
    """

    def __init__(self, directory: Path, input_ids: Tensor, dtype: torch.dtype, device: str) -> None:
        """See the class."""
        self.directory = directory
        mask = torch.ones_like(input_ids)
        self.probe = Probe("prompt", input_ids, mask, mask.cumsum(-1) - 1)
        self.runner = _open(directory, dtype, device)
        self.num_layers = len(self.runner.layers)

    def streams(self, count: int | None = None) -> list[Tensor]:
        """See `Pass`."""
        streams = self.runner.begin([self.probe])
        for index in range(self.num_layers if count is None else count):
            with self.runner.block(index):
                streams.append(self.runner.layer(index, streams[-1:])[0].out)
        return streams

    def logits(self, streams: Sequence[Tensor]) -> Iterator[Tensor]:
        """See `Pass`; after `streams`."""
        for start in range(0, len(streams), _HEAD_AT_ONCE):
            part = torch.cat(list(streams[start : start + _HEAD_AT_ONCE]))
            for _, logits in self.runner.end([part]):
                yield from logits

    def attention(self, layer: int) -> Tensor:
        """See `Pass`."""
        given = self.streams(layer)[-1]
        recorder = _SoftmaxRecorder(given.shape[1])
        with self.runner.block(layer), recorder:
            self.runner.layer(layer, [given])
        return recorder.weights(f"{self.directory}, layer {layer}")


def _open(directory: Path, dtype: torch.dtype, device: str) -> Runnable:
    if is_megatron(directory):
        sizes = describe(directory)
        return ShardedModel(directory, dtype, device, vocab_size=sizes["vocab_size"] or sizes["rows"])
    try:
        return LayerwiseModel(directory, dtype, device, whole=False)
    except Refused as error:
        if "by layers" not in error.what:
            raise
        return LayerwiseModel(directory, dtype, device, whole=True)


def open_pass(
    model: nn.Module | str | Path, input_ids: Tensor, *, dtype: str = "float32", device: str = "auto"
) -> Pass:
    """Look at a model or a checkpoint on one row of tokens.

    Args:
        model: a model in memory, or a checkpoint directory.
        input_ids: [1, tokens].
        dtype: of the computation, for a directory: float32, bfloat16, float16 or float64.
        device: for a directory: auto (CUDA where there is one), cpu, cuda:1.

    Raises:
        Usage: there is no such directory or dtype, or an id is not in the vocabulary.
        LlmconvertError: it cannot be run.
    """
    if isinstance(model, nn.Module):
        _check_vocabulary(input_ids, getattr(getattr(model, "config", None), "vocab_size", None))
        return ModelPass(model, input_ids)
    directory = require_directory(Path(model))
    kinds = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
    if dtype not in kinds:
        raise Usage(f"`{dtype}` is not a dtype to compute in", hint=f"choose {', '.join(kinds)}")
    device = resolve_device(device)
    config = describe(directory) if is_megatron(directory) else read_config(directory)
    _check_vocabulary(input_ids, config.get("padded_vocab_size") or config.get("vocab_size"))
    return CheckpointPass(directory, input_ids, kinds[dtype], device)


def _check_vocabulary(input_ids: Tensor, size: Any) -> None:
    if isinstance(size, int) and size and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < size:
        wrong = int(input_ids.min()) if int(input_ids.min()) < 0 else int(input_ids.max())
        raise Usage(f"token ids must be from 0 to {size - 1}; the prompt has {wrong}",
                    hint="another model's tokenizer may have made them")  # fmt: skip
