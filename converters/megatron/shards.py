"""Canonical tensors as Megatron shards, and back, by the table in `parts`."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.megatron import MegatronCheckpoint, Place
from llmconvert.converters.megatron.parts import (
    COLUMNS,
    GATED,
    IMPLEMENTATIONS,
    QKV,
    VOCABULARY,
    WHOLE,
    Cut,
    Part,
    parts,
)
from llmconvert.errors import BadInput, Refused
from llmconvert.tensors.expressions import (
    Check,
    Expression,
    Shape,
    beside,
    columns,
    concat,
    fill,
    gather,
    interleave,
    mean,
    rows,
)
from llmconvert.tensors.tiles import assemble

Shards = dict[Place, dict[str, Expression]]


def assembled(checkpoint: MegatronCheckpoint) -> Shards:
    """A checkpoint's tensors as expressions."""
    return {
        place: {name: assemble(name, tiles) for name, tiles in named.items()}
        for place, named in checkpoint.tensors.items()
    }


def _chunks(config: CanonicalConfig) -> tuple[int, int, int]:
    """Rows of a group's query heads, key and value."""
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    return group * d, d, d


def _padded(expression: Expression, size: int) -> Expression:
    missing = size - expression.rows
    return concat([expression, fill((missing, *expression.shape[1:]), expression.dtype)]) if missing else expression


def _share(expression: Expression, k: int, n: int) -> Expression:
    size = expression.rows // n
    return rows(expression, k * size, (k + 1) * size)


def _pieces(part: Part, sources: Sequence[Expression], config: CanonicalConfig, cut: Cut) -> list[Expression]:
    """What each rank holds of a tensor."""
    n = len(part.places)
    if part.how == GATED:
        return [concat([_share(source, k, n) for source in sources]) for k in range(n)]
    if part.how == QKV:
        fused = interleave(sources, _chunks(config))
        return [_share(fused, k, n) for k in range(n)]
    (whole,) = sources
    if part.how == COLUMNS:
        width = whole.shape[1] // n
        return [columns(whole, k * width, (k + 1) * width) for k in range(n)]
    if part.how == VOCABULARY:
        whole = _padded(whole, cut.padded_vocab_size)
    return [_share(whole, k, n) for k in range(n)]


def split(tensors: Mapping[str, Expression], config: CanonicalConfig, cut: Cut) -> Shards:
    """The shards of a model.

    Args:
        tensors: canonical tensors, by name.
        config: of the model.
        cut: how to cut it.
    """
    result: Shards = {}
    for chunk in cut.chunks:
        result |= {place: {} for place in cut.places(chunk)}
        for part in parts(config, cut, chunk):
            pieces = _pieces(part, [tensors[name] for name in part.sources], config, cut)
            for piece, places in zip(pieces, part.places, strict=True):
                for place in places:
                    result[place][part.name] = piece
    return result


Shard = tuple[Place, str]
"""A tensor of a rank."""


@dataclass(frozen=True)
class Replica:
    """A copy of a tensor, or of a piece of one.

    Attributes:
        group: the same for all copies of one thing.
        shards: the copy: one, or all pieces of it.
        first: likewise what it is a copy of.
        check: that the two are equal.
    """

    group: str
    shards: tuple[Shard, ...]
    first: tuple[Shard, ...]
    check: Check


@dataclass(frozen=True)
class Joined:
    """A model put together.

    Attributes:
        tensors: canonical tensors, by name.
        replicas: copies that should be equal.
        copies: (place, name) of shards that are copies of others, and are checked and left out.
        rows_used: (place, name) of shards of the vocabulary to how many of their rows are no padding.
        differing: (place, name) of shards that are not what stands for them in `tensors`.
    """

    tensors: dict[str, Expression]
    replicas: tuple[Replica, ...]
    copies: dict[Shard, str]
    rows_used: dict[Shard, int]
    differing: frozenset[Shard] = frozenset()

    @property
    def checks(self) -> tuple[Check, ...]:
        """That copies are equal."""
        return tuple(replica.check for replica in self.replicas)


def join(
    shards: Mapping[Place, Mapping[str, Expression]], config: CanonicalConfig, cut: Cut,
    averaged: Container[str] = (),
) -> Joined:  # fmt: skip
    """Put a model together from its shards.

    Args:
        shards: of every place in `cut`.
        config: of the model.
        cut: how it was cut.
        averaged: groups of replicas for which the mean of all stands, not the first.

    Raises:
        BadInput: shards are missing, left over, or misshapen; all are named.
    """
    return _Join(shards, config, cut, averaged).run()


class _Join:
    def __init__(
        self, shards: Mapping[Place, Mapping[str, Expression]], config: CanonicalConfig, cut: Cut,
        averaged: Container[str],
    ) -> None:  # fmt: skip
        self.config, self.cut, self.averaged, self.shapes = config, cut, averaged, canonical.shapes(config)
        self.left = {place: dict(named) for place, named in shards.items()}
        self.tensors: dict[str, Expression] = {}
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.replicas: list[Replica] = []
        self.placed: dict[str, tuple[Shard, ...]] = {}
        self.further: dict[str, list[Expression]] = {}
        self.copies: dict[Shard, str] = {}
        self.rows_used: dict[Shard, int] = {}

    def run(self) -> Joined:
        for chunk in self.cut.chunks:
            for part in parts(self.config, self.cut, chunk):
                self._put(part)
        surplus = [f"`{name}` of {where(place)}" for place, named in self.left.items() for name in named]
        faults = [f"{len(faults)} {what}: {'; '.join(faults[:4])}" for what, faults in (
            ("missing", self.missing), ("misshapen", self.misshapen), ("unknown", surplus)) if faults]  # fmt: skip
        if faults:
            raise BadInput(f"the shards are not those of the model their args describe: {' | '.join(faults)}")
        ordered = {name: mean([self.tensors[name], *self.further.get(name, ())]) for name in self.shapes}
        return Joined(ordered, tuple(self.replicas), self.copies, self.rows_used)

    def _put(self, part: Part) -> None:
        n = len(part.places)
        shapes = [self.shapes[name] for name in part.sources]
        shape = self._shape(part, shapes, n)
        pieces = [self._same(places, part.name, shape) for places in part.places]
        if len({piece.dtype for piece in pieces}) > 1:
            self.misshapen.append(f"`{part.name}` differs in dtype between ranks")
            pieces = [fill(shape, pieces[0].dtype)] * n
        if part.how == VOCABULARY:
            for k, places in enumerate(part.places):
                used = min(max(self.config.vocab_size - k * shape[0], 0), shape[0])
                self.rows_used |= {(place, part.name): used for place in places}
        for name, expression in zip(part.sources, self._whole(part, shapes, pieces), strict=True):
            if name in self.tensors:
                self._copy(part, name, expression)
            else:
                self.tensors[name] = expression
                self.placed[name] = tuple((place, part.name) for places in part.places for place in places)

    def _shape(self, part: Part, shapes: Sequence[Shape], n: int) -> Shape:
        """Of one piece."""
        tail = shapes[0][1:]
        if part.how == COLUMNS:
            return (shapes[0][0], tail[0] // n)
        if part.how == VOCABULARY:
            return (self.cut.padded_vocab_size // n, *tail)
        return (sum(shape[0] for shape in shapes) // n, *tail)

    def _whole(self, part: Part, shapes: Sequence[Shape], pieces: list[Expression]) -> list[Expression]:
        """The tensors whose pieces these are."""
        if part.how == WHOLE:
            return pieces
        if part.how == COLUMNS:
            return [beside(pieces)]
        if part.how == GATED:
            half = pieces[0].rows // 2
            return [concat([rows(p, 0, half) for p in pieces]), concat([rows(p, half, 2 * half) for p in pieces])]
        joined = concat(pieces)
        if part.how == QKV:
            starts = (0, *_chunks(self.config))
            period = sum(starts)
            edges = [sum(starts[: k + 1]) for k in range(4)]
            return [gather(joined, range(edges[k], edges[k + 1]), period) for k in range(3)]
        return [rows(joined, 0, shapes[0][0])]

    def _take(self, place: Place, name: str, shape: Shape) -> Expression:
        found = self.left.get(place, {}).pop(name, None)
        if found is None:
            self.missing.append(f"`{name}` of {where(place)}")
            return fill(shape, "F32")
        if found.shape != shape:
            self.misshapen.append(f"`{name}` of {where(place)} is {list(found.shape)}, expected {list(shape)}")
            return fill(shape, found.dtype)
        return found

    def _same(self, places: Sequence[Place], name: str, shape: Shape) -> Expression:
        """A piece that several places have copies of."""
        first, *others = (self._take(place, name, shape) for place in places)
        group = f"{name} of {where(places[0])}"
        for place, other in zip(places[1:], others, strict=True):
            if other.dtype != first.dtype:
                self.misshapen.append(f"`{name}` differs in dtype between ranks")
                continue
            why = f"it should be a copy of {where(places[0])}'s, and differs ({where(place)})"
            check = Check(name, other, first, why)
            self.replicas.append(Replica(group, ((place, name),), ((places[0], name),), check))
            if group not in self.averaged:
                self.copies[place, name] = f"a copy of {where(places[0])}'s"
        return mean([first, *others]) if group in self.averaged else first

    def _copy(self, part: Part, name: str, expression: Expression) -> None:
        """Check a further copy of a tensor (a tied head, an embedding beside layers that predict) and leave it out."""
        shards = tuple((place, part.name) for places in part.places for place in places)
        if expression.dtype != self.tensors[name].dtype:
            self.misshapen.append(f"`{part.name}` differs in dtype from `{name}`, of which it is a copy")
            return
        why = f"it should be a copy of the embedding, `{name}`, to which args tie it"
        check = Check(part.name, expression, self.tensors[name], why)
        self.replicas.append(Replica(name, shards, self.placed[name], check))
        if name in self.averaged:
            self.further.setdefault(name, []).append(expression)
        else:
            self.copies |= dict.fromkeys(shards, "a copy of the embedding")


def where(place: Place) -> str:
    """A place in words."""
    expert = f", expert rank {place.ep_rank}" if place.ep_rank else ""
    return f"pipeline rank {place.pp_rank}, chunk {place.vpp_chunk}, tensor rank {place.tp_rank}{expert}"


def find_implementation(
    shards: Mapping[Place, Mapping[str, Expression]], config: CanonicalConfig, cuts: Sequence[Cut]
) -> Cut:
    """The one of several cuts whose names a checkpoint has.

    Raises:
        Refused: none fits so that the norms at least are there.
    """
    best, fewest = cuts[0], 1 << 60
    for cut in cuts:
        expected = {part.name for chunk in cut.chunks for part in parts(config, cut, chunk)}
        held = {name for named in shards.values() for name in named}
        wrong = len(expected ^ held)
        if wrong < fewest:
            best, fewest = cut, wrong
    if not fewest:
        return best
    names = {name for named in shards.values() for name in named}
    if any(name.endswith(("experts.weight1", "experts.weight2")) for name in names):
        raise Refused(
            "the experts are in the layout of the old grouped matrix product (`experts.weight1`, `weight2`)",
            hint="load and save it once with Megatron-LM and Transformer Engine, or as `torch_dist`",
        )
    if not any(name.endswith(("layer_norm_weight", "layernorm.weight")) for name in names):
        raise Refused(
            f"the layers' norms are named neither as those of {' nor of '.join(IMPLEMENTATIONS)} are",
            hint="other layer builds are not merged",
        )
    return best
