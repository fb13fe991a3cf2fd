"""Which layers lie on which pipeline rank, by Megatron-LM's own rules.

From megatron-core's `transformer_block.get_num_layers_to_build` and `pipeline_parallel_layer_layout`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmconvert.errors import Usage


@dataclass(frozen=True)
class Grid:
    """A way to cut a model; attributes are named after Megatron-LM's options.

    Attributes:
        tp: tensor_model_parallel_size.
        pp: pipeline_model_parallel_size.
        vpp: virtual chunks a pipeline rank; 1 for none.
        first: num_layers_in_first_pipeline_stage, or None.
        last: num_layers_in_last_pipeline_stage, or None.
        embedding_counts: account_for_embedding_in_pipeline_split.
        loss_counts: account_for_loss_in_pipeline_split.
        layout: pipeline_model_parallel_layout, such as `Et*3|(tt|)*2tL`, or None.
        ep: expert_model_parallel_size.
        etp: expert_tensor_parallel_size, or None for `tp`.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    first: int | None = None
    last: int | None = None
    embedding_counts: bool = False
    loss_counts: bool = False
    layout: str | None = None
    ep: int = 1
    etp: int | None = None

    @property
    def expert_tp(self) -> int:
        """Tensor ranks of an expert."""
        return self.etp or self.tp

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep", "etp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Usage(f"`--{name}` must be at least 1")
        if self.vpp > 1 and self.pp < 2:
            raise Usage("virtual stages need `--pp` of at least 2")
        uneven = self.first is not None or self.last is not None
        if uneven and (self.embedding_counts or self.loss_counts):
            raise Usage(
                "layers in the first or last stage are either given or counted with embedding and loss, not both"
            )
        if self.layout and (uneven or self.embedding_counts or self.loss_counts):
            raise Usage("`--pipeline-model-parallel-layout` says all by itself: leave the other options out")


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that lie together.

    Attributes:
        pp_rank, vpp_chunk: where.
        layers: their numbers in the whole model.
        embedding: whether the embedding lies here.
        head: whether the final norm and the head do.
    """

    pp_rank: int
    vpp_chunk: int
    layers: tuple[int, ...]
    embedding: bool
    head: bool


def chunks(num_layers: int, grid: Grid, further: int = 0) -> list[Chunk]:
    """All chunks in order of depth: virtual chunks are dealt to ranks in turn.

    Args:
        num_layers: of the decoder.
        grid: how to deal them.
        further: layers that predict further tokens. They lie with the head, whatever the grid.

    Raises:
        Usage: the layers cannot be cut so.
    """
    counts = _by_layout(num_layers, grid, further) if grid.layout else _counts(num_layers, grid)
    result, start = [], 0
    for k, count in enumerate(counts):
        layers = tuple(range(start, start + count))
        result.append(Chunk(k % grid.pp, k // grid.pp, layers, k == 0, k == len(counts) - 1))
        start += count
    return result


def _counts(num_layers: int, grid: Grid) -> list[int]:
    stages = grid.pp * grid.vpp
    if grid.first is not None or grid.last is not None:
        return _uneven(num_layers, grid)
    total = num_layers + grid.embedding_counts + grid.loss_counts
    if total % stages:
        counted = " with embedding and loss counted" if total > num_layers else ""
        raise Usage(
            f"{total} layers{counted} cannot be shared evenly by {grid.pp} pipeline ranks of {grid.vpp} chunks",
            hint="try `--num-layers-in-first-pipeline-stage`, `--num-layers-in-last-pipeline-stage`, or "
            "`--account-for-embedding-in-pipeline-split`",
        )
    counts = [total // stages] * stages
    counts[0] -= grid.embedding_counts
    counts[-1] -= grid.loss_counts
    return counts


def _uneven(num_layers: int, grid: Grid) -> list[int]:
    given = {0: grid.first, grid.pp - 1: grid.last} if grid.pp > 1 else {0: grid.first}
    fixed = {rank: count for rank, count in given.items() if count is not None}
    middle, rest = grid.pp - len(fixed), num_layers - sum(fixed.values())
    if rest < 0 or (middle == 0 and rest) or (middle and rest % middle):
        raise Usage(f"{rest} layers are left for {middle} pipeline ranks, which cannot share them evenly")
    by_rank = [fixed.get(rank, rest // middle if middle else 0) for rank in range(grid.pp)]
    if any(count % grid.vpp for count in by_rank):
        raise Usage(f"ranks of {by_rank} layers cannot be cut in {grid.vpp} virtual chunks each")
    return [by_rank[k % grid.pp] // grid.vpp for k in range(grid.pp * grid.vpp)]


_MAX_LAYOUT = 100_000


def _by_layout(num_layers: int, grid: Grid, further: int) -> list[int]:
    assert grid.layout is not None
    text = grid.layout.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]*)\)\*(\d+)", r"([A-Za-z])\*(\d+)"):
        while (match := re.search(pattern, text)) is not None:
            if len(match[1]) * int(match[2]) > _MAX_LAYOUT:
                raise Usage(f"the layout has more than {_MAX_LAYOUT:,} layers")
            text = text[: match.start()] + match[1] * int(match[2]) + text[match.end() :]
    stages = text.split("|")
    # megatron-core refuses a layout without an m for each (`validate_layer_layout`).
    end = "m" * further + "L"
    decoder = text.removesuffix(end) + "L"
    if (
        not text.endswith(end)
        or re.search(r"[^EtL|]", decoder)
        or text[:1] != "E"
        or text[-1:] != "L"
        or text.count("E") + text.count("L") != 2
    ):
        last = f", then m for each of {further} layers that predict further tokens" if further else ""
        raise Usage(f"`{grid.layout}` is not a layout: E, then t for each layer{last}, then L, with | between stages")
    if len(stages) != grid.pp * grid.vpp:
        raise Usage(f"the layout has {len(stages)} stages, --pp {grid.pp} --vpp {grid.vpp} make {grid.pp * grid.vpp}")
    counts = [stage.count("t") for stage in stages]
    if further and not counts[-1]:
        # megatron-core leaves the final norm with the decoder's last layer then, away from the head.
        raise Usage("the last stage needs a layer of the decoder beside those that predict further tokens")
    if sum(counts) != num_layers:
        raise Usage(f"the layout has {sum(counts)} layers, the model {num_layers}")
    return counts


def padded_vocabulary(vocab_size: int, tp: int, divisible_by: int) -> int:
    """The vocabulary's size, rounded up to a multiple of make_vocab_size_divisible_by × tensor ranks."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple
