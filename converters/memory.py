"""What a checkpoint takes in memory, whole and on each rank, for inference and for training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any

from llmconvert.canonical import memory
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel
from llmconvert.checkpoint.dtypes import ITEMSIZE, TO_NAME
from llmconvert.converters.megatron.grid import Grid, padded_vocabulary
from llmconvert.converters.megatron.occupancy import Stage, stages
from llmconvert.converters.megatron.parts import TRANSFORMER_ENGINE, check_cut
from llmconvert.errors import Refused, Usage
from llmconvert.tensors.expressions import Expression

_TOKENS = 1024


@dataclass(frozen=True)
class Parallelism:
    """How a model is shared out, to count what a rank holds.

    Attributes:
        grid: tensor, pipeline and expert ranks.
        dp: data-parallel ranks; None for as few as the expert ranks need.
        zero: the stage of ZeRO, 0 to 3.
        gradients: the dtype gradients are kept in, bfloat16 or float32.
        divisible_by: make_vocab_size_divisible_by, where the grid cuts the model.
    """

    grid: Grid = Grid()
    dp: int | None = None
    zero: int = 0
    gradients: str = "bfloat16"
    divisible_by: int = 128

    def __post_init__(self) -> None:
        if self.gradients not in memory.GRADIENT_BYTES:
            raise Usage(
                f"`{self.gradients}` is not a dtype of gradients", hint=f"choose {' or '.join(memory.GRADIENT_BYTES)}"
            )
        if self.zero not in range(4):
            raise Usage(f"there is no ZeRO stage {self.zero}", hint="choose 0, 1, 2 or 3")
        if self.divisible_by < 1:
            raise Usage("`--make-vocab-size-divisible-by` must be at least 1")
        if self.dp is not None and self.dp < 1:
            raise Usage("`--dp` must be at least 1")
        grid, step = self.grid, _fewest_replicas(self.grid)
        if self.dp is not None and self.dp % step:
            raise Usage(
                f"{self.dp} data-parallel ranks of {grid.tp} tensor ranks are no multiple of the {grid.ep} expert ranks "
                f"of {grid.expert_tp} tensor ranks each",
                hint=f"`--dp` must be a multiple of {step}: expert ranks are taken from tensor and data-parallel ranks",
            )

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.dp or _fewest_replicas(self.grid)

    @property
    def expert_replicas(self) -> int:
        """Ranks with the same experts: of the tensor and data-parallel ranks of a stage, those an expert leaves over."""
        return self.grid.tp * self.replicas // (self.grid.ep * self.grid.expert_tp)


def _fewest_replicas(grid: Grid) -> int:
    """The data-parallel ranks whose tensor ranks just hold the expert ranks, as megatron-core's `parallel_state` asks."""
    expert_ranks = grid.ep * grid.expert_tp
    return expert_ranks // gcd(grid.tp, expert_ranks)


@dataclass(frozen=True)
class Written:
    """The cut of a checkpoint that is cut already.

    Attributes:
        grid: its ranks.
        padded_vocab_size: rows of its embedding.
        implementation: whose names it has.
    """

    grid: Grid
    padded_vocab_size: int
    implementation: str


def describe_memory(
    model: CanonicalModel,
    asked: Parallelism | None,
    lowered: Callable[[], CanonicalModel],
    *,
    written: Written | None = None,
    quantised: int | None = None,
    unread: int | None = None,
) -> dict[str, Any]:
    """Parameters by part and memory, as a JSON-ready dictionary; sizes are in bytes.

    Args:
        model: of which headers are read.
        asked: how it is shared out; None for what `written` says, or else whole.
        lowered: the model as megatron-core holds it; called where a grid cuts it.
        written: how it is cut already, if it is.
        quantised: bytes of the weights as stored, where FP8 is among them.
        unread: bytes of the weights as stored, in a form that is not read.

    Raises:
        Usage: the grid does not fit the model.
    """
    config, dtype = model.config, _main_dtype(model.tensors)
    whole, gradients = memory.held(config), asked.gradients if asked else "bfloat16"
    convention = (
        f"AdamW in mixed precision (ZeRO, arXiv:1910.02054): bfloat16 weights {memory.WEIGHT_BYTES}, {gradients} gradients "
        f"{memory.GRADIENT_BYTES[gradients]}, float32 weights and two moments {memory.OPTIMIZER_BYTES} bytes a parameter; "
        "activations not counted"
    )
    found: dict[str, Any] = {
        "parts": memory.parameters_by_part(config),
        "active_parameters": memory.active_parameters(config) if config.num_experts else None,
        "inference": {
            "dtype": TO_NAME[dtype], "weights": sum(e.nbytes for e in model.tensors.values()),
            **({"weights_fp8": quantised} if quantised else {}), **({"weights_stored": unread} if unread else {}),
            **_kv_cache(config, config.num_hidden_layers, 1, dtype),
        },
        "training": {"convention": convention, **_states(whole, Parallelism(gradients=gradients))},
    }  # fmt: skip
    parallelism = asked or (Parallelism(written.grid) if written and written.grid != Grid() else None)
    if parallelism is None:
        return found
    try:
        held = _stages(model, parallelism, lowered, None if asked else written)
    except Refused as error:
        return {**found, "problem": f"no ranks of Megatron's: {error.what}"}
    grid = parallelism.grid
    found["ranks"] = {
        **{key: value for key, value in asdict(grid).items() if value is not None}, "etp": grid.expert_tp,
        "dp": parallelism.replicas, "expert_dp": parallelism.expert_replicas, "zero": parallelism.zero,
        "world_size": grid.tp * grid.pp * parallelism.replicas,
        "stages": [
            {
                "pp_rank": stage.pp_rank, "layers": list(stage.layers), "parameters": stage.held.total,
                "inference": {"weights": stage.nbytes, **_kv_cache(config, len(stage.layers), grid.tp, dtype)},
                "training": _states(stage.held, parallelism),
            }
            for stage in held
        ],
    }  # fmt: skip
    return found


def _stages(
    model: CanonicalModel, parallelism: Parallelism, lowered: Callable[[], CanonicalModel], written: Written | None
) -> list[Stage]:
    grid = parallelism.grid
    if written is not None:
        return stages(model.tensors, model.config, written.grid, written.padded_vocab_size, written.implementation)
    if grid == Grid():
        nbytes = sum(e.nbytes for e in model.tensors.values())
        return [Stage(0, tuple(range(model.config.num_hidden_layers)), memory.held(model.config), nbytes)]
    cut = lowered()
    # One rank's shares are asked for, not files of the `torch` format, whose names not all grids have.
    check_cut(cut.config, grid, "torch_dist", TRANSFORMER_ENGINE)
    padded = padded_vocabulary(cut.config.vocab_size, grid.tp, parallelism.divisible_by)
    return stages(cut.tensors, cut.config, grid, padded, TRANSFORMER_ENGINE)


def _main_dtype(tensors: Mapping[str, Expression]) -> str:
    """The dtype most bytes are in."""
    sizes = Counter[str]()
    for expression in tensors.values():
        sizes[expression.dtype] += expression.nbytes
    return sizes.most_common(1)[0][0]


def _kv_cache(config: CanonicalConfig, layers: int, tp: int, dtype: str) -> dict[str, Any]:
    """Bytes that so many layers cache for a token, and for 1,024, or the sliding window where that is shorter."""
    cache, width = memory.cache(config, tp), ITEMSIZE[dtype]
    tokens = min(config.sliding_window or _TOKENS, _TOKENS)
    found = {
        "kv_cache": "keys and values" if cache.latent is None else "latent",
        "kv_cache_tokens": tokens,
        "kv_cache_per_token": layers * cache.held * width,
        "kv_cache_per_1k_tokens": layers * cache.held * width * tokens,
    }
    if cache.latent is not None:
        found["kv_cache_per_token_expanded"] = layers * cache.expanded * width
    return found


def _states(held: memory.Held, parallelism: Parallelism) -> dict[str, int]:
    states = memory.model_states(
        held, zero=parallelism.zero, dp=parallelism.replicas, expert_dp=parallelism.expert_replicas,
        gradient_bytes=memory.GRADIENT_BYTES[parallelism.gradients],
    )  # fmt: skip
    return {**asdict(states), "total": states.total}
