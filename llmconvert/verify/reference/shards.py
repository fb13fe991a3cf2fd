"""Megatron shards by place: which ranks there are, their tensors, and copies that must be equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmconvert.errors import BadInput

Read = Callable[[int, int, int, int, str], Tensor]
"""Gives a tensor by (pipeline rank, virtual chunk, tensor rank, expert rank, name); KeyError where the shard has none."""


class Chunk(NamedTuple):
    """Consecutive layers that one pipeline rank holds under names counted from 0.

    Attributes:
        pp_rank: the pipeline rank.
        vpp_chunk: which of its virtual chunks; 0 where there is one.
        num_layers: may be 0, for a chunk that holds the embedding or the head alone.
    """

    pp_rank: int
    vpp_chunk: int
    num_layers: int


class Shards:
    """Reads tensors by role, checks their shapes, and remembers which were read.

    Attributes:
        tp, ep, etp: numbers of tensor ranks, expert ranks, and tensor ranks of an expert.
        read: every (pipeline rank, chunk, tensor rank, expert rank, name) read so far.
    """

    def __init__(self, tensor: Read, tp: int, ep: int, etp: int, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing is read yet."""
        self.tensor, self.tp, self.ep, self.etp, self.dtype, self.device = tensor, tp, ep, etp, dtype, device
        # Rank r of a pipeline stage is tensor rank r mod tp, and tensor rank r mod etp of expert rank r div etp.
        self._ranks = (
            [(r % tp, r // etp) for r in range(ep * etp)] if ep > 1 or etp != tp else [(t, 0) for t in range(tp)]
        )
        self.read: set[tuple[int, int, int, int, str]] = set()

    def _one(
        self, chunk: Chunk, tp_rank: int, ep_rank: int, shapes: tuple[tuple[int, ...], ...], *spellings: str
    ) -> Tensor:
        for name in spellings:
            place = (chunk.pp_rank, chunk.vpp_chunk, tp_rank, ep_rank, name)
            try:
                found = self.tensor(*place)
            except KeyError:
                continue
            self.read.add(place)
            if tuple(found.shape) not in shapes:
                wanted = " or ".join(str(shape) for shape in shapes)
                raise BadInput(f"`{name}` is {tuple(found.shape)}, not {wanted}", where=_where(chunk, tp_rank, ep_rank))
            # The routing bias of DeepSeek-V3 stays as it is: it decides by differences 16 bits do not hold.
            wide = name.endswith("expert_bias") and self.dtype in (torch.bfloat16, torch.float16)
            return found.to(self.device, found.dtype if wide else self.dtype)
        raise BadInput(f"the shard has no `{spellings[0]}`", where=_where(chunk, tp_rank, ep_rank))

    def _copies(
        self, chunk: Chunk, ranks: list[tuple[int, int]], shapes: tuple[tuple[int, ...], ...], *names: str
    ) -> Tensor:
        first = self._one(chunk, *ranks[0], shapes, *names)
        for t, e in ranks[1:]:
            if not torch.equal(first, self._one(chunk, t, e, shapes, *names)):
                raise BadInput(
                    f"`{names[0]}` differs from the copy of tensor rank {ranks[0][0]}", where=_where(chunk, t, e)
                )
        return first

    def part(self, chunk: Chunk, rank: int, shape: tuple[int, ...], *spellings: str) -> Tensor:
        """One tensor rank's tensor under the first of its spellings the shard has; expert ranks have copies."""
        return self._copies(chunk, [place for place in self._ranks if place[0] == rank], (shape,), *spellings)

    def copy(self, chunk: Chunk, shape: tuple[int, ...], *spellings: str) -> Tensor:
        """A tensor every rank has a copy of; all are read and must be equal."""
        return self._copies(chunk, self._ranks, (shape,), *spellings)

    def rows(self, chunk: Chunk, shape: tuple[int, int], name: str) -> Tensor:
        """A matrix that ranks have copies of (Transformer Engine), or of which each has its share of rows (local layers)."""
        share = (shape[0] // self.tp, shape[1])
        first = self._one(chunk, *self._ranks[0], (shape, share), name)
        if tuple(first.shape) == shape:
            return self.copy(chunk, shape, name)
        return torch.cat([self.part(chunk, rank, share, name) for rank in range(self.tp)])

    def expert(self, chunk: Chunk, ep_rank: int, etp_rank: int, shape: tuple[int, ...], *spellings: str) -> Tensor:
        """A tensor rank's share of an expert's tensor."""
        return self._one(chunk, *self._ranks[ep_rank * self.etp + etp_rank], (shape,), *spellings)


def _where(chunk: Chunk, tp_rank: int, ep_rank: int) -> str:
    place = f"pipeline rank {chunk.pp_rank}, chunk {chunk.vpp_chunk}, tensor rank {tp_rank}"
    return place + (f", expert rank {ep_rank}" if ep_rank else "")
