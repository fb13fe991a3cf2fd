"""A Megatron checkpoint as one model: what its arguments describe, how it is cut, where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.canonical.bounds import check_attributes, check_extent
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.config import check_config
from llmconvert.checkpoint.directory import Checkpoint
from llmconvert.checkpoint.files import read_json
from llmconvert.checkpoint.megatron import MegatronCheckpoint, open_megatron
from llmconvert.converters.companions import Companions, companions
from llmconvert.converters.megatron import arguments
from llmconvert.converters.megatron.described import from_arguments
from llmconvert.converters.megatron.grid import Grid, chunks
from llmconvert.converters.megatron.layout import dist_cut
from llmconvert.converters.megatron.parts import IMPLEMENTATIONS, Cut
from llmconvert.converters.megatron.replicas import check_policy, settle
from llmconvert.converters.megatron.shards import Joined, assembled, find_implementation, join
from llmconvert.converters.planning import Origin, recorded_origin
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.spec.dialect import read_config
from llmconvert.spec.registry import Registry, registry
from llmconvert.tensors.expressions import Expression

HF_FOLDER, CONFIG = "hf", "config.json"
"""Where tokenizer files and the original config.json lie in a Megatron checkpoint, for the way back; and its name."""


@dataclass(frozen=True)
class Opened:
    """A Megatron checkpoint as one model.

    Attributes:
        checkpoint: as stored.
        config: what its arguments describe.
        cut: how it is cut.
        joined: its tensors, put together.
        origin: what it was split from, as recorded or as the user says; or None.
        home: the directory with the files that lay beside its config.json: tokenizer, generation_config.json; or None.
        notes: what a user should know.
    """

    checkpoint: MegatronCheckpoint
    config: CanonicalConfig
    cut: Cut
    joined: Joined
    origin: Origin | None
    home: Path | None
    notes: tuple[str, ...] = ()

    @property
    def transformer_impl(self) -> str:
        """Whose names it has."""
        return self.cut.implementation

    @property
    def dropped(self) -> dict[str, str]:
        """Stored tensors that are copies of others, and why they are left out."""
        named = self.checkpoint.tensors
        copies = self.joined.copies.items()
        return {tile.stored.name: why for (place, name), why in copies for tile in named[place][name]}

    @property
    def rows_used(self) -> dict[str, int]:
        """Stored tensors that end in padding, with the rows that do not."""
        named = self.checkpoint.tensors
        return {
            tile.stored.name: min(max(count - tile.row, 0), tile.stored.shape[0])
            for (place, name), count in self.joined.rows_used.items()
            for tile in named[place][name]
        }


def open_model(
    source: Path, *, iteration: int | None = None, vocab_size: int | None = None, config: Path | None = None,
    trust_pickle: bool = False, replica: str | None = None, spec_file: Path | None = None,
) -> Opened:  # fmt: skip
    """Open a Megatron checkpoint as one model.

    Args:
        source: its directory.
        iteration: which; the latest if None.
        vocab_size: the true vocabulary, where nothing else says it.
        config: a Hugging Face directory, or its config.json: for what the arguments lack, and for what lies beside it.
            The `hf` folder of the source if None.
        trust_pickle: read past unknown names in the pickle.
        replica: what stands for a tensor of which ranks have copies that differ: `first`, `mean`; None refuses it.
        spec_file: a spec from outside the package.

    Raises:
        LlmconvertError: of the kind that fits.
    """
    check_policy(replica)
    known = registry(spec_file)
    checkpoint = open_megatron(source, iteration=iteration, trust_pickle=trust_pickle)
    args, origin = dict(checkpoint.args), recorded_origin(source)
    file = _config_file(source, config)
    if config is not None or origin is None:
        origin = _origin(known, file, asked=config is not None)
        args = _completed(args, origin, known, checkpoint) if origin else args
    model = from_arguments(args, vocab_size or args.get("vocab_size"))
    check_attributes(vars(model), "args")
    check_extent(vars(model), "args", checkpoint.stored)
    shards = assembled(checkpoint)
    padded = args.get("padded_vocab_size") or _padded(shards, checkpoint.tp)
    if padded < model.vocab_size or padded % checkpoint.tp:
        raise BadInput(f"padded_vocab_size {padded} does not fit a vocabulary of {model.vocab_size}", where="args")
    cut = find_implementation(shards, model, _cuts(checkpoint, args, model, padded))
    try:
        joined, notes = settle(join(shards, model, cut), replica, lambda averaged: join(shards, model, cut, averaged))
    except BadInput as error:
        raise BadInput(error.what, where=str(checkpoint.release), hint=error.hint) from None
    home = file.parent if file.name == CONFIG and file.parent.is_dir() else None
    return Opened(checkpoint, model, cut, joined, origin, home, notes)


def _config_file(source: Path, config: Path | None) -> Path:
    """The config.json of the model a checkpoint came from, which need not be there."""
    if config is None:
        return source / HF_FOLDER / CONFIG
    return config / CONFIG if config.is_dir() else config


def _origin(known: Registry, file: Path, *, asked: bool) -> Origin | None:
    """What a config.json says a checkpoint came from; None where nobody asked for one and there is none to understand."""
    if not asked and not file.is_file():
        return None
    config = read_json(file, anywhere=asked)
    check_config(config, str(file))
    try:
        return Origin(known.detect(config, None, file.parent).name, config)
    except (BadInput, Refused):
        if asked:
            raise
        return None


def beside_home(opened: Opened) -> Companions:
    """What lay beside the config.json of the model a checkpoint came from."""
    if opened.home is None:
        return Companions({}, {})
    own = opened.home == opened.checkpoint.path / HF_FOLDER
    within = opened.checkpoint.path if own else None
    return companions(Checkpoint(opened.home, opened.origin.config if opened.origin else {}, {}), within=within)


def _cuts(checkpoint: MegatronCheckpoint, args: Mapping[str, Any], model: CanonicalConfig, padded: int) -> list[Cut]:
    """The ways a checkpoint may have been named."""
    if checkpoint.format == "torch_dist":
        return [dist_cut(model, padded, implementation) for implementation in IMPLEMENTATIONS]
    c = checkpoint
    try:
        grid = arguments.grid_of(args, c.tp, c.pp, c.vpp, c.ep, c.etp)
        dealt = chunks(model.num_hidden_layers, grid, model.num_nextn_predict_layers)
    except Usage as error:
        raise BadInput(f"args contradict each other: {error.what}", where=str(c.release)) from None
    if model.num_experts % c.ep:
        raise BadInput(f"args say {model.num_experts} experts over {c.ep} expert ranks", where=str(c.release))
    return [
        Cut(dealt, c.tp, c.ep, c.etp, padded, implementation, grouped)
        for implementation in IMPLEMENTATIONS
        for grouped in ((False, True) if model.num_experts else (False,))
    ]


def _padded(shards: Mapping[Any, Mapping[str, Expression]], tp: int) -> int:
    embeddings = [e for named in shards.values() for name, e in named.items() if name.startswith("embedding.word")]
    return embeddings[0].rows * tp if embeddings else 0


_NONE_IS_OFF = frozenset({"moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"})
"""Arguments that say something by being None, where the args know of experts; no tensor would contradict a config."""


def _completed(args: dict[str, Any], origin: Origin, known: Registry, checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """Arguments with what they lack taken from a config.json."""
    config = read_config(known.get(origin.spec), origin.config)
    described = arguments.to_arguments(config, Grid(), config.vocab_size, 1, "float32")
    # Where the args know of no experts, what they say of them are defaults.
    idle = () if args.get("num_experts") else ("moe_", "expert_")
    own = {
        key: value for key, value in args.items()
        if (value is not None or (key in _NONE_IS_OFF and args.get("num_experts"))) and not key.startswith(idle)
    }  # fmt: skip
    further = {name.split(".")[2] for named in checkpoint.tensors.values() for name in named if name.startswith("mtp.")}
    return {**described, "mtp_num_layers": len(further), **own, "vocab_size": config.vocab_size}
