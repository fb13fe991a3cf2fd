"""Canonical tensors as Megatron shards, and back: the one table of how each tensor is cut over ranks.

Query, key and value are fused by group, [its query heads, its key, its value], group after group, and the rows are cut
in equal parts whatever the number of ranks; gate and up are each cut, and a rank holds [its gate; its up]; o_proj and
down_proj are cut by columns; embedding and head by rows of the padded vocabulary; norms and the biases of what is cut
by columns are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.megatron import MegatronCheckpoint, Place
from llmconvert.converters.megatron.grid import Chunk
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.tensors.expressions import (
    Check,
    Expression,
    beside,
    columns,
    concat,
    fill,
    gather,
    interleave,
    rows,
)
from llmconvert.tensors.tiles import assemble

TRANSFORMER_ENGINE, LOCAL = "transformer_engine", "local"
EMBEDDING, OUTPUT, FINAL_NORM = (
    "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight",
)  # fmt: skip
QKV, PROJ, FC1, FC2 = "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"
NORMS = {
    TRANSFORMER_ENGINE: (f"{QKV}.layer_norm_weight", f"{FC1}.layer_norm_weight"),
    LOCAL: ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
}
HEAD_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
EXTRA_STATES = tuple(f"{module}._extra_state" for module in (QKV, PROJ, FC1, FC2))

Shards = dict[Place, dict[str, Expression]]


@dataclass(frozen=True)
class Cut:
    """How a model is cut.

    Attributes:
        chunks: in order of depth.
        tp: tensor ranks.
        padded_vocab_size: rows of embedding and head over all ranks.
        norms: names of the two norms of a layer.
    """

    chunks: Sequence[Chunk]
    tp: int
    padded_vocab_size: int
    norms: tuple[str, str]

    @property
    def places(self) -> list[Place]:
        """Every chunk of every rank."""
        return [Place(c.pp_rank, c.vpp_chunk, t) for c in self.chunks for t in range(self.tp)]


def assembled(checkpoint: MegatronCheckpoint) -> Shards:
    """A checkpoint's tensors as expressions."""
    return {
        place: {name: assemble(name, tiles) for name, tiles in named.items()}
        for place, named in checkpoint.tensors.items()
    }


def check_cut(config: CanonicalConfig, tp: int) -> None:
    """Check that a model can be shared by `tp` ranks.

    Raises:
        Usage: a size is not a multiple.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    wrong = [f"{name} {size}" for name, size in (
        ("num_attention_heads", heads), ("intermediate_size", config.intermediate_size)) if size % tp]  # fmt: skip
    if groups % tp and tp % groups:
        wrong.append(f"num_key_value_heads {groups}")
    if wrong:
        raise Usage(f"{tp} tensor ranks cannot share {' and '.join(wrong)} evenly", hint="choose another `--tp`")


def _part(expression: Expression, rank: int, tp: int) -> Expression:
    size = expression.rows // tp
    return rows(expression, rank * size, (rank + 1) * size)


def _padded(expression: Expression, size: int) -> Expression:
    missing = size - expression.rows
    return concat([expression, fill((missing, *expression.shape[1:]), expression.dtype)]) if missing else expression


def split(tensors: Mapping[str, Expression], config: CanonicalConfig, cut: Cut) -> Shards:
    """The shards of a model.

    Args:
        tensors: canonical tensors, by name.
        config: of the model.
        cut: how to cut it.
    """
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    embedding = _padded(tensors[f"{canonical.EMBED}.weight"], cut.padded_vocab_size)
    # Tied, a last stage that is not the first carries a copy of the embedding as its head.
    head = tensors.get(f"{canonical.HEAD}.weight", tensors[f"{canonical.EMBED}.weight"])
    head = _padded(head, cut.padded_vocab_size)
    result: Shards = {}
    for chunk in cut.chunks:
        for t in range(cut.tp):
            shard = result[Place(chunk.pp_rank, chunk.vpp_chunk, t)] = {}
            if chunk.embedding:
                shard[EMBEDDING] = _part(embedding, t, cut.tp)
            for local, i in enumerate(chunk.layers):

                def own(module: str, kind: str = "weight", i: int = i) -> Expression | None:
                    return tensors.get(f"{module.replace('{i}', str(i))}.{kind}")

                prefix = f"decoder.layers.{local}."
                for name, module in zip(cut.norms, (canonical.INPUT_NORM, canonical.POST_NORM), strict=True):
                    shard[prefix + name] = _there(own(module), module)
                for name, module in zip(HEAD_NORMS, (canonical.Q_NORM, canonical.K_NORM), strict=True):
                    if (norm := own(module)) is not None:
                        shard[prefix + name] = norm
                for kind in ("weight", "bias"):
                    q, k, v = (own(module, kind) for module in (canonical.Q, canonical.K, canonical.V))
                    if q is not None and k is not None and v is not None:
                        fused = interleave([q, k, v], [group * d, d, d])
                        shard[f"{prefix}{QKV}.{kind}"] = _part(fused, t, cut.tp)
                    gate, up = own(canonical.GATE, kind), own(canonical.UP, kind)
                    if gate is not None and up is not None:
                        shard[f"{prefix}{FC1}.{kind}"] = concat([_part(gate, t, cut.tp), _part(up, t, cut.tp)])
                    for name, module in ((PROJ, canonical.O), (FC2, canonical.DOWN)):
                        if (whole := own(module, kind)) is not None:
                            size = whole.shape[-1] // cut.tp
                            part = columns(whole, t * size, (t + 1) * size) if kind == "weight" else whole
                            shard[f"{prefix}{name}.{kind}"] = part
            if chunk.head:
                shard[FINAL_NORM] = tensors[f"{canonical.NORM}.weight"]
                if not config.tie_word_embeddings or len(cut.chunks) > 1:
                    shard[OUTPUT] = _part(head, t, cut.tp)
    return result


def _there(expression: Expression | None, name: str) -> Expression:
    assert expression is not None, name
    return expression


@dataclass(frozen=True)
class Joined:
    """A model put together.

    Attributes:
        tensors: canonical tensors, by name.
        checks: copies that must be equal.
        copies: (place, name) of shards that are copies of others, and are checked and left out.
        rows_used: (place, name) of shards of the vocabulary to how many of their rows are no padding.
    """

    tensors: dict[str, Expression]
    checks: tuple[Check, ...]
    copies: dict[tuple[Place, str], str]
    rows_used: dict[tuple[Place, str], int]


def join(shards: Mapping[Place, Mapping[str, Expression]], config: CanonicalConfig, cut: Cut) -> Joined:
    """Put a model together from its shards.

    Args:
        shards: of every place in `cut`.
        config: of the model.
        cut: how it was cut.

    Raises:
        BadInput: shards are missing, left over, or misshapen; all are named.
    """
    return _Join(shards, config, cut).run()


class _Join:
    def __init__(self, shards: Mapping[Place, Mapping[str, Expression]], config: CanonicalConfig, cut: Cut) -> None:
        self.config, self.cut = config, cut
        self.left = {place: dict(named) for place, named in shards.items()}
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.checks: list[Check] = []
        self.copies: dict[tuple[Place, str], str] = {}
        self.rows_used: dict[tuple[Place, str], int] = {}

    def run(self) -> Joined:
        c, tensors = self.config, dict[str, Expression]()
        expected = canonical.shapes(c)
        for chunk in self.cut.chunks:
            if chunk.embedding:
                tensors[f"{canonical.EMBED}.weight"] = self._vocabulary(chunk, EMBEDDING)
            for local, i in enumerate(chunk.layers):
                self._layer(chunk, f"decoder.layers.{local}.", i, tensors)
            if chunk.head:
                tensors[f"{canonical.NORM}.weight"] = self._same(chunk, FINAL_NORM, (c.hidden_size,))
                if not c.tie_word_embeddings:
                    tensors[f"{canonical.HEAD}.weight"] = self._vocabulary(chunk, OUTPUT)
                elif len(self.cut.chunks) > 1:
                    self._tied(chunk, tensors[f"{canonical.EMBED}.weight"])
        surplus = [f"`{name}` of {where(place)}" for place, named in self.left.items() for name in named]
        faults = [f"{len(faults)} {what}: {'; '.join(faults[:4])}" for what, faults in (
            ("missing", self.missing), ("misshapen", self.misshapen), ("unknown", surplus)) if faults]  # fmt: skip
        if faults:
            raise BadInput(f"the shards are not those of the model their args describe: {' | '.join(faults)}")
        ordered = {name: tensors[name] for name in expected}
        return Joined(ordered, tuple(self.checks), self.copies, self.rows_used)

    def _take(self, place: Place, name: str, shape: tuple[int, ...]) -> Expression:
        found = self.left.get(place, {}).pop(name, None)
        if found is None:
            self.missing.append(f"`{name}` of {where(place)}")
            return fill(shape, "F32")
        if found.shape != shape:
            self.misshapen.append(f"`{name}` of {where(place)} is {list(found.shape)}, expected {list(shape)}")
            return fill(shape, found.dtype)
        return found

    def _all(self, chunk: Chunk, name: str, shape: tuple[int, ...]) -> list[Expression]:
        """One shard of every tensor rank."""
        parts = [self._take(Place(chunk.pp_rank, chunk.vpp_chunk, t), name, shape) for t in range(self.cut.tp)]
        if len({part.dtype for part in parts}) > 1:
            self.misshapen.append(f"`{name}` differs in dtype between tensor ranks")
            parts = [fill(part.shape, parts[0].dtype) for part in parts]
        return parts

    def _same(self, chunk: Chunk, name: str, shape: tuple[int, ...]) -> Expression:
        """A tensor every tensor rank has a copy of."""
        first, *others = self._all(chunk, name, shape)
        for t, other in enumerate(others, 1):
            place = Place(chunk.pp_rank, chunk.vpp_chunk, t)
            self.copies[place, name] = "a copy of tensor rank 0's"
            why = f"it should be a copy of tensor rank 0's, and differs ({where(place)})"
            self.checks.append(Check(name, other, first, why))
        return first

    def _vocabulary(self, chunk: Chunk, name: str) -> Expression:
        size, c = self.cut.padded_vocab_size // self.cut.tp, self.config
        parts = self._all(chunk, name, (size, c.hidden_size))
        for t in range(self.cut.tp):
            place = Place(chunk.pp_rank, chunk.vpp_chunk, t)
            self.rows_used[place, name] = min(max(c.vocab_size - t * size, 0), size)
        return rows(concat(parts), 0, c.vocab_size)

    def _tied(self, chunk: Chunk, embedding: Expression) -> None:
        """Check the last stage's copy of the embedding and leave it out."""
        copy = self._vocabulary(chunk, OUTPUT)
        if copy.dtype == embedding.dtype:
            why = "the head should be a copy of the embedding, to which args tie it"
            self.checks.append(Check(OUTPUT, copy, embedding, why))
        else:
            self.misshapen.append(f"`{OUTPUT}` differs in dtype from the embedding it is tied to")
        for t in range(self.cut.tp):
            place = Place(chunk.pp_rank, chunk.vpp_chunk, t)
            self.copies[place, OUTPUT] = "a copy of the embedding"
            del self.rows_used[place, OUTPUT]

    def _layer(self, chunk: Chunk, prefix: str, i: int, tensors: dict[str, Expression]) -> None:
        c, tp = self.config, self.cut.tp
        d, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads

        def put(module: str, expression: Expression, kind: str = "weight") -> None:
            tensors[f"{module.replace('{i}', str(i))}.{kind}"] = expression

        for name, module in zip(self.cut.norms, (canonical.INPUT_NORM, canonical.POST_NORM), strict=True):
            put(module, self._same(chunk, prefix + name, (c.hidden_size,)))
        if c.qk_norm:
            for name, module in zip(HEAD_NORMS, (canonical.Q_NORM, canonical.K_NORM), strict=True):
                put(module, self._same(chunk, prefix + name, (d,)))
        fused_rows, width = (group + 2) * d * c.num_key_value_heads // tp, c.intermediate_size // tp
        for kind, tail in (("weight", (c.hidden_size,)), ("bias", ())):
            if kind == "weight" or c.qkv_bias:
                fused = concat(self._all(chunk, f"{prefix}{QKV}.{kind}", (fused_rows, *tail)))
                period = (group + 2) * d
                put(canonical.Q, gather(fused, range(group * d), period), kind)
                put(canonical.K, gather(fused, range(group * d, (group + 1) * d), period), kind)
                put(canonical.V, gather(fused, range((group + 1) * d, period), period), kind)
            if kind == "weight" or c.mlp_bias:
                parts = self._all(chunk, f"{prefix}{FC1}.{kind}", (2 * width, *tail))
                put(canonical.GATE, concat([rows(part, 0, width) for part in parts]), kind)
                put(canonical.UP, concat([rows(part, width, 2 * width) for part in parts]), kind)
        heads = c.num_attention_heads * d
        for name, module, inputs, biased in (
            (PROJ, canonical.O, heads, c.o_bias), (FC2, canonical.DOWN, c.intermediate_size, c.mlp_bias),
        ):  # fmt: skip
            put(module, beside(self._all(chunk, f"{prefix}{name}.weight", (c.hidden_size, inputs // tp))))
            if biased:
                put(module, self._same(chunk, f"{prefix}{name}.bias", (c.hidden_size,)), "bias")


def where(place: Place) -> str:
    """A place in words."""
    return f"pipeline rank {place.pp_rank}, chunk {place.vpp_chunk}, tensor rank {place.tp_rank}"


def find_norms(shards: Mapping[Place, Mapping[str, Expression]]) -> tuple[str, tuple[str, str]]:
    """Which implementation's names a checkpoint has: Transformer Engine's or the local one's.

    Raises:
        Refused: neither.
    """
    names = {name.partition("decoder.layers.0.")[2] for named in shards.values() for name in named}
    for implementation, norms in NORMS.items():
        if norms[0] in names and norms[1] in names:
            return implementation, norms
    raise Refused(
        "the layers' norms are named neither as Transformer Engine's nor as the local layers",
        hint="mixtures of experts and other layer builds are not merged",
    )
