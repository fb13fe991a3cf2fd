"""Mixtures of experts whose matrices transformers holds as one tensor a layer, run with one expert in memory at a time.

transformers 5 fuses the experts of a layer as it loads them: `experts.gate_up_proj` [experts, 2·intermediate, hidden] and
`experts.down_proj` [experts, hidden, intermediate]. On disk they lie one by one, or fused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmconvert.verify.models import FileWeights

_SPELLINGS = (("mlp", ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2")))
"""What the parent of `experts` and an expert's gate, up and down matrices are called on disk."""

_CACHED = 1 << 30
"""Bytes of a layer's experts kept while the layer runs."""

Matrices = tuple[Tensor, Tensor]
"""An expert's gate over its up projection, [2·intermediate, hidden], and its down projection, [hidden, intermediate]."""


def routed_modules(module: nn.Module) -> list[nn.Module]:
    """The modules that are told which experts each token goes to."""
    return [m for m in module.modules() if "top_k_index" in inspect.signature(type(m).forward).parameters]


def fused_experts(module: nn.Module) -> dict[str, nn.Module]:
    """Modules of fused experts by name, as far as `StreamedExperts` computes what they do."""
    return {name: m for name, m in module.named_modules() if _is_fused(m) and _understood(m)}


def _is_fused(module: nn.Module) -> bool:
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    if shapes.keys() != {"gate_up_proj", "down_proj"} or module._modules.keys() - {"act_fn"}:
        return False
    first, second = shapes["gate_up_proj"], shapes["down_proj"]
    if len(first) != 3 or len(second) != 3 or not hasattr(module, "act_fn"):
        return False
    return first[0] == second[0] == getattr(module, "num_experts", None) and first[1:] == (2 * second[2], second[1])


def _understood(module: nn.Module) -> bool:
    """Whether the class computes on a tiny example what `StreamedExperts` does, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    gate_up, down, x = (torch.randn(shape, generator=generator) for shape in ((3, 8, 6), (3, 6, 4), (5, 6)))
    index, weights = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]]), torch.rand(5, 2, generator=generator)
    tiny = copy.copy(module)
    tiny.__dict__ = {**module.__dict__, "_parameters": {"gate_up_proj": gate_up, "down_proj": down}, "num_experts": 3}
    try:
        with torch.no_grad():
            theirs = type(module).forward(tiny, x, index, weights)
            ours = StreamedExperts(tiny, lambda expert: (gate_up[expert], down[expert])).forward(x, index, weights)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False
    return torch.equal(theirs, ours)


class StreamedExperts:
    """What a module of fused experts computes, with matrices read as they are needed.

    Attributes:
        outputs: for each expert chosen in the last call its tokens' numbers, and what it gave them before that is
            weighed, [its tokens, hidden].
    """

    def __init__(self, module: nn.Module, read: Callable[[int], Matrices]) -> None:
        """Stand in for `module`; `read` gives an expert's matrices."""
        self.read, self.act_fn = read, module.act_fn
        self.num_experts = int(module.num_experts)  # type: ignore[arg-type]
        self.outputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache: dict[int, Matrices] = {}
        self._cached = 0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs: [tokens, hidden] for [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, chosen], the experts' numbers.
            top_k_weights: [tokens, chosen].
        """
        result = torch.zeros_like(hidden_states)
        self.outputs = {}
        for expert in sorted(set(top_k_index.flatten().tolist())):
            slots, tokens = torch.where(expert == top_k_index.T)
            gate_up, down = self._matrices(expert)
            gate, up = functional.linear(hidden_states[tokens], gate_up).chunk(2, dim=-1)
            output = functional.linear(self.act_fn(gate) * up, down)  # type: ignore[operator]
            self.outputs[expert] = tokens, output
            result.index_add_(0, tokens, (output * top_k_weights[tokens, slots, None]).to(result.dtype))
        return result

    def _matrices(self, expert: int) -> Matrices:
        if expert in self._cache:
            return self._cache[expert]
        found = self.read(expert)
        size = sum(matrix.nbytes for matrix in found)
        if self._cached + size <= _CACHED:
            self._cache[expert] = found
            self._cached += size
        return found

    def release(self) -> None:
        """Let go of what is kept."""
        self._cache, self._cached, self.outputs = {}, 0, {}


class ModelWeights:
    """A directory's tensors under the names a model of transformers 5 has for them; experts stay apart.

    Attributes:
        shapes: by the model's names; those of fused experts where all of their parts are there.
        origins: the stored tensors' names behind a name of the model that is not stored.
    """

    def __init__(self, files: FileWeights, experts: dict[str, nn.Module]) -> None:
        """Look at names and shapes; no data is read."""
        self.files, self.shapes = files, dict(files.shapes)
        self.origins: dict[str, tuple[str, ...]] = {}
        for path, module in experts.items():
            if f"{path}.gate_up_proj" not in files.shapes:
                self._name(path, module)

    def _name(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        owner, _, own = parent.rpartition(".")
        for spelling, parts in _SPELLINGS:
            stem = f"{owner}.{spelling}."
            names = [[f"{stem}{leaf}.{j}.{part}.weight" for part in parts] for j in range(int(module.num_experts))]  # type: ignore[arg-type]
            if not all(name in self.shapes for each in names for name in each):
                continue
            first, last = self.shapes[names[0][0]], self.shapes[names[0][2]]
            if any([self.shapes[n] for n in each] != [first, first, last] for each in names):
                return  # misshapen: the model's name stays missing
            self.origins[f"{path}.gate_up_proj"] = tuple(name for each in names for name in each[:2])
            self.origins[f"{path}.down_proj"] = tuple(each[2] for each in names)
            for each in names:
                for name in each:
                    del self.shapes[name]
            self.shapes[f"{path}.gate_up_proj"] = (len(names), 2 * first[0], first[1])
            self.shapes[f"{path}.down_proj"] = (len(names), *last)
            for name in [name for name in self.shapes if spelling != own and name.startswith(stem)]:
                renamed = f"{owner}.{own}.{name.removeprefix(stem)}"
                self.origins[renamed] = (name,)
                self.shapes[renamed] = self.shapes.pop(name)
            return

    def stored(self, name: str) -> tuple[str, ...]:
        """The stored tensors behind a name of the model."""
        return self.origins.get(name, (name,))

    def read(self, name: str) -> Tensor:
        """One tensor, as stored.

        Raises:
            ValueError: it is fused, and its parts are apart.
        """
        (origin,) = self.stored(name)
        return self.files.read(origin)

    def expert(self, path: str, number: int, read: Callable[[str], Tensor]) -> Matrices:
        """An expert's matrices.

        Args:
            path: of the module of experts.
            number: of the expert.
            read: reads a stored tensor.
        """
        pair, down = (self.origins.get(f"{path}.{part}") for part in ("gate_up_proj", "down_proj"))
        if pair is None or down is None:
            return self.files.part(f"{path}.gate_up_proj", number), self.files.part(f"{path}.down_proj", number)
        # Copied, as a fused tensor's part is: how a product is summed depends on where in memory its factors begin.
        return torch.cat([read(pair[2 * number]), read(pair[2 * number + 1])]), read(down[number]).clone()

    def expert_tensors(self, path: str, number: int) -> list[str]:
        """The stored tensors' names behind an expert."""
        pair, down = (self.origins.get(f"{path}.{part}") for part in ("gate_up_proj", "down_proj"))
        if pair is None or down is None:
            return [f"{path}.gate_up_proj", f"{path}.down_proj"]
        return [pair[2 * number], pair[2 * number + 1], down[number]]


def index_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Which experts each token goes to, among the arguments of a module of experts: [tokens, chosen]."""
    found: Tensor = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
    return found
