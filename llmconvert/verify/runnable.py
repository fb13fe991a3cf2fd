"""What it takes to run a checkpoint layer by layer beside another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llmconvert.verify.probes import Probe


@dataclass(frozen=True)
class Call:
    """One use of a module that owns a matrix.

    Attributes:
        name: within the layer.
        given: its input.
        gave: its output.
    """

    name: str
    given: Tensor
    gave: Tensor


@dataclass(frozen=True)
class Halves:
    """The two halves of a layer.

    Attributes:
        attention, mlp: the children that own matrices, in the order they are called.
        middle: the child whose input is the residual stream between the halves; None where they run in parallel.
    """

    attention: str
    mlp: str
    middle: str | None


@dataclass
class Seen:
    """What a layer did to one probe.

    Attributes:
        out: the residual stream after it, [batch, tokens, hidden].
        middle: the stream between attention and MLP, or None where the two run in parallel.
        calls: the uses of its matrices, in order.
        routed: the experts each token was sent to, int64 [batch · tokens, chosen]; None in a dense layer.
        num_experts: how many there are to choose from; 0 where it is not known.
        experts: for each expert, by its name in the layer (`.../7`), its tokens' numbers and what it gave them before
            that was weighed, where it is known.
    """

    out: Tensor
    middle: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    routed: Tensor | None = None
    num_experts: int = 0
    experts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Runnable(Protocol):
    """A checkpoint that can be run one block at a time, all probes through each.

    Attributes:
        device: where it runs.
        norms: Frobenius norms of the stored tensors used so far.
    """

    device: torch.device
    norms: dict[str, float]

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder's layers, in order."""
        ...

    def begin(self, probes: Sequence[Probe]) -> list[Tensor]:
        """Embed the probes: the residual stream before the first layer, [batch, tokens, hidden] a probe."""
        ...

    def block(self, index: int) -> AbstractContextManager[None]:
        """A context in which layer `index` has its weights."""
        ...

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
        ...

    def halves(self, index: int) -> Halves | None:
        """The halves of a layer that has been run, or None where it has not two."""
        ...

    def end(self, streams: Sequence[Tensor], normed: Sequence[Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Norm and head: for each probe the head's input, [batch, tokens, hidden], and the logits.

        Args:
            streams: the last layer's output for each probe.
            normed: where given, what the head is given in place of what the norm makes.
        """
        ...

    def forward(self, probes: Sequence[Probe]) -> list[Tensor]:
        """Logits [batch, tokens, vocabulary] of each probe."""
        ...

    def part_tensors(self, index: int, part: str) -> list[str]:
        """The stored tensors behind a part of a layer, named within it; "" is all of it."""
        ...

    def early_tensors(self) -> list[str]:
        """The stored tensors used before the layers."""
        ...

    def late_tensors(self) -> tuple[list[str], list[str]]:
        """The stored tensors used after the layers: the norm's, and the head's."""
        ...
