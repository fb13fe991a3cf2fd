"""Run a model one block at a time: a block's weights are read, used on all probes, and let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmconvert.errors import BadInput, Refused
from llmconvert.verify.experts import Matrices, ModelWeights, StreamedExperts, fused_experts, index_of, routed_modules
from llmconvert.verify.float64 import float64_throughout
from llmconvert.verify.models import FileWeights, Weights, check_fit, empty_model, load_model, tied_names
from llmconvert.verify.probes import Probe
from llmconvert.verify.runnable import Call, Halves, Seen

_PIECE = 1 << 22


class _ModuleWeights:
    """The weights of a module that is whole in memory."""

    def __init__(self, module: nn.Module) -> None:
        self._state = module.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name]
        return tensor


class _Stop(Exception):
    """The last layer's input is known; the rest of the forward is not wanted."""


class LayerwiseModel:
    """A checkpoint run block by block.

    The model's own `forward` is run twice with its layers replaced: once to see what each layer is given, and once to
    hand the last layer's output to the final norm and the head. The layers are run in between, one after the other,
    each on every probe, with what they were given.

    Args:
        directory: the checkpoint.
        dtype: of the computation; float64 is float64 throughout.
        device: where.
        whole: load the model whole, by transformers, instead of reading blocks as they are needed.
        attention: transformers' attention implementation.
        rounded: tensors to disturb by a rounding to the dtype named; see `disturb`.

    Raises:
        BadInput: the tensors do not fit the model.
        Refused: there is no code for this model, or it cannot be run by blocks.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: str, *, whole: bool, attention: str = "eager",
        rounded: Mapping[str, torch.dtype] | None = None,
    ) -> None:  # fmt: skip
        """See the class."""
        self.directory, self.dtype, self.device, self.whole = directory, dtype, torch.device(device), whole
        self.norms: dict[str, float] = {}
        self._rounded = rounded or {}
        with self._arithmetic():
            self.module = empty_model(directory, dtype, attention)
        fused = fused_experts(self.module)
        self._files = ModelWeights(FileWeights(directory), fused)
        self._weights: Weights = (
            _ModuleWeights(load_model(directory, dtype, device, attention)) if whole else self._files
        )
        if not whole:
            try:
                check_fit(self.module, self._weights, directory, strict=False)
            except BadInput as error:
                if _fuses(self.module, fused):
                    raise Refused(
                        "transformers fuses tensors of this model in a way that is not known here, so it cannot be run by "
                        "layers",
                        where=str(directory),
                        hint="give the whole model memory enough and add `--load whole`",
                    ) from error
                raise
        self._experts = {
            id(module): (path, StreamedExperts(module, partial(self._expert, path))) for path, module in fused.items()
        }
        for module in fused.values():
            module.__dict__["forward"] = self._experts[id(module)][1].forward
        self._alias = {name: names for names in tied_names(self.module).values() for name in names}
        self._check_tied()
        self._load_buffers()
        self.layers_name, layers = find_layers(self.module, str(directory))
        inside = {id(child) for layer in layers for child in layer.modules()}
        # Layers that predict further tokens stand after the others and are not run.
        self.layers = layers[: getattr(getattr(self.module, "config", None), "num_hidden_layers", len(layers))]
        self._outside = [m for m in self.module.modules() if m._parameters and id(m) not in inside]
        self._names = {id(m): name for name, m in self.module.named_modules()}
        self._halves: dict[int, Halves | None] = {}
        self._early: dict[int, list[Any]] = {}

    def _arithmetic(self) -> AbstractContextManager[None]:
        return float64_throughout() if self.dtype == torch.float64 else nullcontext()

    def _check_tied(self) -> None:
        stored, placed = self._files, self.module.state_dict()
        # What is fused in a way that is not known has other names; nothing can be said of those.
        plain = all(
            any(n in stored.shapes for n in self._alias.get(name, (name,)))
            for name, _ in self.module.named_parameters()
        )
        odd = [name for name in stored.shapes if name not in placed and not name.endswith("inv_freq")]
        self.unused = sorted(odd) if plain else []
        for names in set(self._alias.values()):
            held = [name for name in names if name in stored.shapes]
            if len(held) > 1:
                first = stored.read(held[0])
                for other in held[1:]:
                    if not torch.equal(first, stored.read(other)):
                        raise BadInput(
                            f"config.json ties `{held[0]}` and `{other}`, and the tensors differ",
                            where=str(self.directory),
                            hint="set `tie_word_embeddings` to false if both are meant",
                        )

    def _load_buffers(self) -> None:
        for name, buffer in self.module.named_buffers():
            owner, _, leaf = name.rpartition(".")
            stored = self._weights.read(name) if name in self._weights.shapes else buffer
            kind = self._kind(name, buffer.dtype) if buffer.dtype.is_floating_point else stored.dtype
            self.module.get_submodule(owner)._buffers[leaf] = stored.to(self.device, kind)

    def _kind(self, name: str, otherwise: torch.dtype) -> torch.dtype:
        """What a tensor is held in: float32 where the class insists on it (routers' biases)."""
        wide: set[str] = set(getattr(self.module, "_keep_in_fp32_modules_strict", None) or ())
        if self.dtype == torch.float16:
            wide |= set(getattr(self.module, "_keep_in_fp32_modules", None) or ())
        insists = self.dtype in (torch.float16, torch.bfloat16) and any(f".{part}." in f".{name}." for part in wide)
        return torch.float32 if insists else otherwise

    def tensors_of(self, module: nn.Module) -> list[str]:
        """The stored tensors' names behind a module's parameters, and behind its buffers where they are stored."""
        prefix = self._names[id(module)]
        names = [name for name, _ in module.named_parameters(prefix, remove_duplicate=False)]
        names += [name for name, _ in module.named_buffers(prefix) if name in self._files.shapes]
        return list(dict.fromkeys(origin for name in names for origin in self._files.stored(self._stored(name))))

    def part_tensors(self, index: int, part: str) -> list[str]:
        """The stored tensors behind a part of a layer, named within it; "" is all of it, `.../7` an expert."""
        layer = self.layers[index]
        if "/" in part:
            experts, _, number = part.partition("/")
            return self._files.expert_tensors(self._names[id(layer.get_submodule(experts))], int(number))
        return self.tensors_of(layer.get_submodule(part) if part else layer)

    def _stored(self, name: str) -> str:
        return next((n for n in self._alias.get(name, (name,)) if n in self._weights.shapes), name)

    @contextmanager
    def _held(self, *modules: nn.Module) -> Iterator[None]:
        """Give modules their weights for a while."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        read: dict[str, nn.Parameter] = {}
        try:
            for module in modules:
                prefix = self._names[id(module)]
                for path, child in module.named_modules(prefix=prefix):
                    if id(child) in self._experts:
                        continue  # they read for themselves
                    for leaf, parameter in child._parameters.items():
                        if parameter is None or parameter.device.type != "meta":
                            continue
                        name = self._stored(f"{path}.{leaf}" if path else leaf)
                        if name not in read:
                            read[name] = self._read(name)
                        before.append((child._parameters, leaf, parameter))
                        child._parameters[leaf] = read[name]
            yield
        finally:
            for parameters, leaf, parameter in before:
                parameters[leaf] = parameter
            for module in modules:
                for child in module.modules():
                    if id(child) in self._experts:
                        self._experts[id(child)][1].release()

    def _expert(self, path: str, number: int) -> Matrices:
        """An expert's matrices, as parameters are."""
        with torch._C.DisableTorchFunction():
            if self.whole:
                pair = (self._weights.read(f"{path}.{part}")[number] for part in ("gate_up_proj", "down_proj"))
                gate_up, down = (matrix.to(self.device, self.dtype) for matrix in pair)
                return gate_up, down
            read = self._files.expert(path, number, lambda name: self._read(name, self._files.files).data)
            return read[0].to(self.device, self.dtype), read[1].to(self.device, self.dtype)

    def _read(self, name: str, weights: Weights | None = None) -> nn.Parameter:
        with torch._C.DisableTorchFunction():  # a file's float32 is float32 whatever the arithmetic
            tensor = (weights or self._weights).read(name).to(self.device, self._kind(name, self.dtype))
        (name,) = self._files.stored(name) if len(self._files.stored(name)) == 1 else (name,)
        if name not in self.norms:
            # In pieces: torch widens what it is given before it sums.
            flat = tensor.flatten()
            pieces = (flat[low : low + _PIECE] for low in range(0, len(flat), _PIECE))
            squares = (float(piece.double().square().sum()) for piece in pieces)
            self.norms[name] = math.sqrt(sum(squares))
        if name in self._rounded:
            tensor = disturb(tensor, self._rounded[name], sum(name.encode()))
        return nn.Parameter(tensor, requires_grad=False)

    def block(self, index: int) -> AbstractContextManager[None]:
        """A context in which layer `index` has its weights."""
        return self._held(self.layers[index])

    def _inputs(self, probe: Probe) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": probe.input_ids.to(self.device),
            "attention_mask": probe.attention_mask.to(self.device),
            "position_ids": probe.position_ids.to(self.device),
        }
        return inputs | ({"use_cache": False} if hasattr(self.module, "config") else {})

    @torch.no_grad()
    def begin(self, probes: Sequence[Probe]) -> list[Tensor]:
        """Embed the probes.

        Returns:
            The residual stream before the first layer, [batch, tokens, hidden] a probe.
        """
        self._probes = list(probes)
        self._given: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.layers]
        self._early = {}
        streams: list[Tensor] = []
        last = len(self.layers) - 1
        first = self.layers[0].forward

        def record(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest, named = split_hidden(args, kwargs)
                self._given[index].append((rest, named))
                if index == 0:
                    streams.append(hidden)
                    out = first(hidden, *rest, **named)
                    self._tuple = isinstance(out, tuple)
                if index == last:
                    raise _Stop
                return self._shape(hidden)

            return forward

        def early(module: nn.Module) -> Callable[..., Any]:
            original = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                with self._held(module):
                    out = original(*args, **kwargs)
                self._early.setdefault(id(module), []).append(out)
                return out

            return forward

        replaced = {m: early(m) for m in self._outside} | {m: record(i) for i, m in enumerate(self.layers)}
        with replaced_forwards(replaced), self.block(0), self._arithmetic():
            for probe in self._probes:
                try:
                    self.module(**self._inputs(probe))
                except _Stop:
                    continue
                raise Refused(
                    "its layers are not run in order, so it cannot be run by layers", where=str(self.directory)
                )
        return streams

    def _shape(self, hidden: Tensor) -> Any:
        # Before transformers 4.5x layers returned tuples, and some models still do.
        return (hidden,) if self._tuple else hidden

    @torch.no_grad()
    def layer(
        self, index: int, streams: Sequence[Tensor], middles: Sequence[Tensor | None] | None = None
    ) -> list[Seen]:
        """Run one layer, within `block`.

        Args:
            index: of the layer.
            streams: its input for each probe.
            middles: where given, what the stream between the halves is replaced with, so that the second half is run
                on it whatever the first has made.
        """
        layer, results = self.layers[index], []
        for probe, stream in enumerate(streams):
            args, kwargs = self._given[index][probe]
            middle = middles[probe] if middles else None
            watch = _Watch(layer, self._halves.get(index), middle, self._experts)
            with watch, self._arithmetic():
                out = layer(stream, *args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            if index not in self._halves:
                self._halves[index] = watch.halves(stream)
            halves = self._halves[index]
            results.append(
                Seen(out, watch.middle(halves), watch.calls, watch.routed, watch.num_experts, watch.expert_outputs())
            )
        return results

    def halves(self, index: int) -> Halves | None:
        """The halves of a layer that has been run, or None where it has not two."""
        return self._halves.get(index)

    @torch.no_grad()
    def end(self, streams: Sequence[Tensor], normed: Sequence[Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Norm and head.

        Args:
            streams: the last layer's output for each probe.
            normed: where given, what the head is given in place of what the norm makes.

        Yields:
            For each probe the head's input, [batch, tokens, hidden], and the logits, [batch, tokens, vocabulary].
        """
        late = [m for m in self._outside if id(m) not in self._early]
        head: list[Tensor] = []
        turn = 0

        def replay(module: nn.Module) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._early[id(module)][turn]

        def skip(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._shape(streams[turn] if index == len(self.layers) - 1 else split_hidden(args, kwargs)[0])

            return forward

        replaced = {m: skip(i) for i, m in enumerate(self.layers)}
        replaced |= {m: replay(m) for m in self._outside if id(m) in self._early}
        with ExitStack() as stack:
            stack.enter_context(replaced_forwards(replaced))
            stack.enter_context(self._held(*late))
            for module in late:
                matrix = any(parameter.ndim > 1 for parameter in module.parameters())

                def see(module: nn.Module, args: tuple[Any, ...], matrix: bool = matrix) -> Any:
                    head.append(args[0])
                    return (normed[turn], *args[1:]) if normed is not None and matrix else None

                stack.callback(module.register_forward_pre_hook(see).remove)
            for turn, probe in enumerate(self._probes):  # noqa: B007  # the closures read it
                head.clear()
                with self._arithmetic():
                    out = self.module(**self._inputs(probe))
                yield head[-1], getattr(out, "logits", out)

    def late_tensors(self) -> tuple[list[str], list[str]]:
        """The stored tensors used after the layers: the norm's, and the head's."""
        late = [m for m in self._outside if id(m) not in self._early]
        norms = [n for m in late if all(p.ndim < 2 for p in m.parameters()) for n in self.tensors_of(m)]
        heads = [n for m in late if any(p.ndim > 1 for p in m.parameters()) for n in self.tensors_of(m)]
        return norms, heads

    def early_tensors(self) -> list[str]:
        """The stored tensors used before the layers."""
        return [n for m in self._outside if id(m) in self._early for n in self.tensors_of(m)]

    def forward(self, probes: Sequence[Probe]) -> list[Tensor]:
        """Logits [batch, tokens, vocabulary] of each probe."""
        streams = self.begin(probes)
        for index in range(len(self.layers)):
            with self.block(index):
                streams = [seen.out for seen in self.layer(index, streams)]
        return [logits for _, logits in self.end(streams)]


def disturb(tensor: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Move each number by up to half a unit in the last place of `dtype`, and all of them together by as much again.

    Rounding does the first; a constant that was itself rounded before it was multiplied in does the second.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.finfo(dtype).eps / 2
    shape = tensor.shape
    each = torch.rand(shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1).to(tensor)
    sign = 1 if seed % 2 else -1
    smallest = float(torch.finfo(dtype).smallest_normal) * half
    return tensor * (1 + half * sign) + each * (tensor.abs() * half).clamp_(min=smallest)


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The residual stream among a layer's arguments, and the others."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


@contextmanager
def replaced_forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules other `forward`s for a while; one a module had of its own, such as accelerate's, comes back."""
    own = {module: module.__dict__["forward"] for module in replaced if "forward" in module.__dict__}
    for module, forward in replaced.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)
        for module, forward in own.items():
            module.__dict__["forward"] = forward


def _fuses(module: nn.Module, known: Mapping[str, nn.Module]) -> bool:
    return any(p.ndim > 2 and name.rpartition(".")[0] not in known for name, p in module.named_parameters())


def find_layers(module: nn.Module, where: str) -> tuple[str, list[nn.Module]]:
    """The decoder's list of layers: the list of modules with parameters that is nearest to the root."""
    lists = [
        (name.count("."), name, list(child))
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) and any(True for _ in child.parameters())
    ]
    if not lists:
        raise Refused("the model has no list of layers", where=where)
    _, name, layers = min(lists, key=lambda entry: entry[:2])
    return name, layers


class _Watch:
    """Sees a layer's children and matrices at work; may replace the stream between its halves."""

    def __init__(
        self, layer: nn.Module, halves: Halves | None, middle: Tensor | None,
        experts: Mapping[int, tuple[str, StreamedExperts]],
    ) -> None:  # fmt: skip
        self.calls: list[Call] = []
        self.routed: Tensor | None = None
        self.num_experts = 0
        self._routed_modules, self._experts = routed_modules(layer), experts
        self._children: list[tuple[str, bool, Tensor, Tensor]] = []
        self._layer, self._given = layer, middle
        self._middle_child = halves.middle if halves else None
        self._middle: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watch:
        for name, child in self._layer.named_children():
            matrices = any(parameter.ndim > 1 for parameter in child.parameters())
            if name == self._middle_child:
                self._hooks.append(child.register_forward_pre_hook(self._see_middle, with_kwargs=True))
            self._hooks.append(child.register_forward_hook(self._child_hook(name, matrices), with_kwargs=True))
        for module in self._routed_modules:
            self._hooks.append(module.register_forward_pre_hook(self._see_routed, with_kwargs=True))
        for name, module in self._layer.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 2:
                self._hooks.append(module.register_forward_hook(self._call_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see_routed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.routed = index_of(args, kwargs)
        self.num_experts = int(getattr(module, "num_experts", 0))

    def expert_outputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What each expert gave, by its place in the layer."""
        names = {id(module): name for name, module in self._layer.named_modules()}
        return {
            f"{names[key]}/{number}": output
            for key, (_, experts) in self._experts.items()
            if key in names
            for number, output in experts.outputs.items()
        }

    def _see_middle(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = split_hidden(args, kwargs)[0]
        if self._given is None:
            self._middle = stream
        else:
            self._middle = stream.clone()
            # In place: the residual connection that follows holds the same tensor.
            stream.copy_(self._given)

    def _child_hook(self, name: str, matrices: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            given = split_hidden(args, kwargs)[0] if args or "hidden_states" in kwargs else None
            if given is not None:
                self._children.append((name, matrices, given, out[0] if isinstance(out, tuple) else out))

        return hook

    def _call_hook(self, name: str) -> Callable[..., None]:
        return lambda module, args, out: self.calls.append(Call(name, args[0], out)) if args else None

    def halves(self, stream: Tensor) -> Halves | None:
        """What the children's calls say about the layer's build."""
        owners = [k for k, (_, matrices, _, _) in enumerate(self._children) if matrices]
        if len(owners) < 2:
            return None
        first, second = owners[:2]
        attention, (mlp, _, given, _) = self._children[first], self._children[second]
        before, _, before_given, before_gave = self._children[second - 1]
        if second - 1 > first and before_gave is given:
            middle, tensor = before, before_given
        else:
            middle, tensor = mlp, given
        parallel = tensor is stream or given is attention[2] or tensor is attention[3]
        parallel = parallel or tensor.shape != stream.shape  # some flatten batch and tokens in between
        return Halves(attention[0], mlp, None if parallel else middle)

    def middle(self, halves: Halves | None) -> Tensor | None:
        """The stream between the halves, as the layer made it."""
        if self._middle is not None or halves is None or halves.middle is None:
            return self._middle
        return next(given for name, _, given, _ in self._children if name == halves.middle)
