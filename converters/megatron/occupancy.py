"""How much of a model each pipeline rank of a grid holds: counted from the table of parts, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from llmconvert.canonical.memory import ROUTER_BIAS, Held, part_of
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.checkpoint.megatron import Place
from llmconvert.converters.megatron.grid import Chunk, Grid, chunks
from llmconvert.converters.megatron.parts import EXPERTS, VOCABULARY, Cut, Part, parts
from llmconvert.tensors.expressions import Expression


@dataclass(frozen=True)
class Stage:
    """One pipeline rank's share; all tensor and expert ranks of it hold as much.

    Attributes:
        pp_rank: its number.
        layers: numbers of its layers in the whole model; those that predict further tokens are not among them.
        held: elements a rank holds, padding of the vocabulary and copies of the embedding included.
        nbytes: of them, in the dtypes they are stored in.
    """

    pp_rank: int
    layers: tuple[int, ...]
    held: Held
    nbytes: int


def stages(
    tensors: Mapping[str, Expression], config: CanonicalConfig, grid: Grid, padded_vocab_size: int, implementation: str
) -> list[Stage]:
    """Each pipeline rank's share of a model, as `split` would write it.

    Args:
        tensors: canonical tensors by name, of a model lowered to what megatron-core holds; only headers are looked at.
        config: of the model; it passes `check_cut`.
        grid: how it is cut.
        padded_vocab_size: rows of the embedding over all tensor ranks.
        implementation: of the layers; see `parts`.

    Raises:
        Usage: the layers cannot be dealt so.
    """
    dealt = chunks(config.num_hidden_layers, grid, config.num_nextn_predict_layers)
    etp = grid.expert_tp
    # Experts lie on a grid of their own, so that the two need not fit into one another.
    dense = Cut(dealt, grid.tp, 1, grid.tp, padded_vocab_size, implementation)
    experts = Cut(dealt, etp, grid.ep, etp, padded_vocab_size, implementation)
    return [_stage(tensors, config, [c for c in dealt if c.pp_rank == p], dense, experts) for p in range(grid.pp)]


def _stage(
    tensors: Mapping[str, Expression], config: CanonicalConfig, own: list[Chunk], dense: Cut, experts: Cut
) -> Stage:
    counts, nbytes = {"dense": 0, "experts": 0, "untrained": 0}, 0
    for cut in (dense, experts) if config.num_experts else (dense,):
        for chunk in own:
            first = Place(chunk.pp_rank, chunk.vpp_chunk, 0, 0)
            for part in parts(config, cut, chunk):
                routed = EXPERTS in part.name
                if routed != (cut is experts) or not any(first in places for places in part.places):
                    continue
                size = _piece(part, tensors, cut)
                untrained = part_of(part.sources[0], config) == ROUTER_BIAS
                counts["untrained" if untrained else "experts" if routed else "dense"] += size
                nbytes += size * ITEMSIZE[tensors[part.sources[0]].dtype]
    layers = tuple(layer for chunk in own for layer in chunk.layers)
    return Stage(own[0].pp_rank, layers, Held(**counts), nbytes)


def _piece(part: Part, tensors: Mapping[str, Expression], cut: Cut) -> int:
    """Elements of one rank's piece."""
    shapes = [tensors[name].shape for name in part.sources]
    if part.how == VOCABULARY:
        shapes = [(cut.padded_vocab_size, *shapes[0][1:])]
    return sum(map(prod, shapes)) // len(part.places)
