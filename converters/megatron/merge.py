"""Megatron to Hugging Face: put the shards together, lower to a target's dialect, write its checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import llmconvert
from llmconvert.canonical.bounds import check_attributes, check_extent
from llmconvert.canonical.lowerings import lower
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel, traits
from llmconvert.canonical.step import Step
from llmconvert.checkpoint.directory import Checkpoint, open_checkpoint, read_json
from llmconvert.checkpoint.dtypes import FROM_NAME, TO_NAME
from llmconvert.checkpoint.megatron import MegatronCheckpoint, open_megatron
from llmconvert.converters.companions import Companions, companions
from llmconvert.converters.megatron import arguments
from llmconvert.converters.megatron.grid import Grid, chunks
from llmconvert.converters.megatron.layout import dist_cut
from llmconvert.converters.megatron.parts import IMPLEMENTATIONS, Cut
from llmconvert.converters.megatron.shards import Joined, assembled, find_implementation, join, split, where
from llmconvert.converters.megatron.split import HF_FOLDER
from llmconvert.converters.planning import code_texts
from llmconvert.converters.proofs import LOGITS, Proving, prove_written, refuse_unprovable
from llmconvert.converters.returning import unlowered
from llmconvert.converters.running import Progress, Report, run
from llmconvert.converters.tokenizer import keep_tokenizer
from llmconvert.engine import manifest
from llmconvert.engine.plan import Plan, index_texts, lay_out, parse_size
from llmconvert.engine.publish import check_destination
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.spec.dialect import emit, keys_read, lift, read_config, write_config
from llmconvert.spec.keys import carried
from llmconvert.spec.language import Spec
from llmconvert.spec.registry import Registry, registry
from llmconvert.tensors.expressions import Expression, cast, rows
from llmconvert.verify.ledger import Ledger, account
from llmconvert.verify.roundtrip import BITWISE, Pair, failing


@dataclass(frozen=True)
class Opened:
    """A Megatron checkpoint as one model.

    Attributes:
        checkpoint: as stored.
        config: what its arguments describe.
        cut: how it is cut.
        joined: its tensors, put together.
        origin: the spec's name and config.json it was split from, as recorded; or None.
    """

    checkpoint: MegatronCheckpoint
    config: CanonicalConfig
    cut: Cut
    joined: Joined
    origin: tuple[str, dict[str, Any]] | None

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
    trust_pickle: bool = False,
) -> Opened:  # fmt: skip
    """Open a Megatron checkpoint as one model.

    Args:
        source: its directory.
        iteration: which; the latest if None.
        vocab_size: the true vocabulary, where nothing else says it.
        config: a config.json, or a Hugging Face directory, for what the arguments lack.
        trust_pickle: read past unknown names in the pickle.

    Raises:
        LlmconvertError: of the kind that fits.
    """
    checkpoint = open_megatron(source, iteration=iteration, trust_pickle=trust_pickle)
    args = dict(checkpoint.args)
    origin = None
    recorded = (manifest.read(source) or {}).get("source") or {}
    if isinstance(recorded.get("config"), dict) and isinstance(recorded.get("spec"), str):
        origin = (recorded["spec"], recorded["config"])
    if config is not None:
        args = _completed(args, config, checkpoint)
        vocab_size = vocab_size or args.get("vocab_size")
    model = arguments.from_arguments(args, vocab_size)
    check_attributes(vars(model), "args")
    check_extent(vars(model), "args", checkpoint.stored)
    shards = assembled(checkpoint)
    padded = args.get("padded_vocab_size") or _padded(shards, checkpoint.tp)
    if padded < model.vocab_size or padded % checkpoint.tp:
        raise BadInput(f"padded_vocab_size {padded} does not fit a vocabulary of {model.vocab_size}", where="args")
    cut = find_implementation(shards, model, _cuts(checkpoint, args, model, padded))
    try:
        joined = join(shards, model, cut)
    except BadInput as error:
        raise BadInput(error.what, where=str(checkpoint.release), hint=error.hint) from None
    faults = failing(joined.checks)
    if faults:
        raise BadInput("; ".join(faults[:3]), where=str(checkpoint.release))
    return Opened(checkpoint, model, cut, joined, origin)


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


def _completed(args: dict[str, Any], path: Path, checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """Arguments with what they lack taken from a config.json."""
    source = read_json(path / "config.json" if path.is_dir() else path)
    config = read_config(registry().detect(source), source)
    described = arguments.to_arguments(config, Grid(), config.vocab_size, 1, "float32")
    # Where the args know of no experts, what they say of them are defaults.
    idle = () if args.get("num_experts") else ("moe_", "expert_")
    own = {key: value for key, value in args.items() if value is not None and not key.startswith(idle)}
    further = {name.split(".")[2] for named in checkpoint.tensors.values() for name in named if name.startswith("mtp.")}
    return {**described, "mtp_num_layers": len(further), **own, "vocab_size": config.vocab_size}


def _target(known: Registry, to: str | None, opened: Opened) -> Spec:
    """The target asked for; else what it was split from; else the plainest that holds it."""
    if to is None and opened.origin and opened.origin[0] in known.specs and known.specs[opened.origin[0]].target:
        return known.specs[opened.origin[0]]
    if to is None:
        to = _plainest(traits(opened.config))
    spec = known.specs.get(to) or next((s for s in known.families.get(to, []) if s.target and s.default_target), None)
    spec = spec or known.get(to)
    if not spec.target:
        raise Refused(f"{spec.name} is read but not written: {spec.not_target}", hint="choose another `--to`")
    return spec


def _plainest(held: frozenset[str]) -> str:
    """The target that says no more than a model's traits ask for."""
    if "mla" in held:
        return "deepseek_v3" if "sigmoid_router" in held else "deepseek_v2"
    if "moe" in held and "sigmoid_router" in held:
        return "glm4_moe"
    if "moe" in held:
        shared = "qwen2_moe" if "shared_expert_gate" in held else "deepseek_moe"
        return "qwen3_moe" if "qk_norm" in held else shared if "shared_experts" in held else "mixtral"
    return "qwen3" if "qk_norm" in held else "qwen2" if "qkv_bias" in held and "o_bias" not in held else "llama"


@dataclass(frozen=True)
class MergeConversion:
    """A planned merge."""

    opened: Opened
    target: Spec
    model: CanonicalModel
    steps: list[tuple[Step, CanonicalConfig]]
    plan: Plan
    ledger: Ledger
    notes: tuple[str, ...]
    not_carried: dict[str, str]


def plan_merge(
    opened: Opened, *, to: str | None = None, dtype: str | None = None, max_shard_size: str = "5GB",
    spec_file: Path | None = None,
) -> MergeConversion:  # fmt: skip
    """Plan a merge.

    Args:
        opened: the checkpoint.
        to: target spec or family; None for what it was split from, else what its arguments describe.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        max_shard_size: such as `5GB`.
        spec_file: a spec from outside the package.

    Raises:
        LlmconvertError: of the kind that fits.
    """
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise Usage(f"`{dtype}` is not a dtype to write", hint="choose float32, bfloat16 or float16")
    known = registry(spec_file)
    target = _target(known, to, opened)
    path = opened.checkpoint.path
    source = CanonicalModel(opened.config, opened.joined.tensors)
    held, always = target.holds, target.always
    if opened.origin and opened.origin[0] == target.name:
        # Biases the first conversion added are left out again where they are still zero.
        original = read_config(target, opened.origin[1])
        added = (frozenset({"qkv_bias", "o_bias", "mlp_bias"}) - traits(original)) & traits(opened.config)
        held, always = held - added, always - added
    try:
        model, steps = lower(source, target.name, held, always, target.coupled, known.holders)
    except Refused as error:
        raise Refused(error.what, where=str(path), hint=error.hint) from None
    faults = failing(model.checks)
    if faults:
        raise Refused("; ".join(faults[:3]), where=str(path), hint="choose another `--to`")
    if dtype:
        model = replace(model, tensors={name: cast(e, FROM_NAME[dtype]) for name, e in model.tensors.items()})
    main = Counter(e.dtype for e in model.tensors.values()).most_common(1)[0][0]
    config, notes = _config(opened, target, model.config, main)
    tensors = emit(target, model, config)
    outputs, files = lay_out(tensors, parse_size(max_shard_size))
    texts = {"config.json": (json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()}
    texts |= index_texts(outputs, files) | code_texts(target)
    extra = Companions({}, {})
    if (path / HF_FOLDER).is_dir():
        beside = Checkpoint(path / HF_FOLDER, opened.origin[1] if opened.origin else {}, {})
        extra = companions(beside, within=path).beside(texts)
        extra, _ = keep_tokenizer(extra, beside.path, beside.config, config)
        notes += extra.notes
        texts = {**extra.texts, **texts}
    old = opened.checkpoint
    summary = {
        "source": {
            "path": path.resolve().name,
            "megatron": {"tp": old.tp, "pp": old.pp, "vpp": old.vpp, "ep": old.ep, "etp": old.etp, "format": old.format},
            "transformer_impl": opened.transformer_impl, "args": old.args,
        },
        "target": {"spec": target.name},
        "dtype": dtype,
        "steps": [{"name": step.name, "exactness": step.exactness, "why": step.why} for step, _ in steps],
        "dropped": opened.dropped,
    }  # fmt: skip
    everything = opened.checkpoint.stored
    stats = sorted({(str(t.path), t.path.stat().st_size, t.path.stat().st_mtime_ns) for t in everything.values()})
    identity = [llmconvert.__version__, stats, [(f.name, f.size, f.digest) for f in files], summary]
    plan = Plan(path, outputs, files, texts, extra.copies, model.checks, json.dumps(identity, default=str) + "\n", summary)
    ledger = account(plan, everything, opened.dropped, opened.rows_used)
    notes += arguments.departures(opened.config)
    if opened.checkpoint.left_out:
        notes += (f"{opened.checkpoint.left_out / 1e9:.2f} GB of optimizer and random state are left out",)
    padding = opened.cut.padded_vocab_size - opened.config.vocab_size
    if padding:
        notes += (f"{padding} rows of vocabulary padding are cut off",)
    return MergeConversion(opened, target, model, steps, plan, ledger, notes, extra.left)


def _config(
    opened: Opened, target: Spec, config: CanonicalConfig, dtype: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json: the original one if it still describes the model, else a new one."""
    known = registry()
    source: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    if opened.origin and opened.origin[0] in known.specs:
        source = opened.origin[1]
        kept = carried(source, keys_read(known.specs[opened.origin[0]]))
    written = write_config(target, config, kept, dtype)
    if opened.origin and opened.origin[0] == target.name:
        bare = {"torch_dtype": None, "dtype": None}
        try:
            same = read_config(target, {**source, **bare}) == read_config(target, {**written, **bare})
        except (BadInput, Refused):
            same = False
        if same:
            named: dict[str, Any] = {key: TO_NAME[dtype] for key in ("torch_dtype", "dtype") if key in source}
            return {**source, **named}, ("config.json is the original one, as recorded when this checkpoint was split",)
    return written, ()


def _pairs(conversion: MergeConversion, written: Path) -> list[Pair]:
    """Each shard, and the same cut out of the checkpoint written."""
    output = open_checkpoint(written)
    model = lift(conversion.target, output, read_config(conversion.target, output.config, output.tensors)).model
    opened = conversion.opened
    before = CanonicalModel(opened.config, opened.joined.tensors)
    back, lossy = unlowered(model, before, conversion.steps)
    assert not lossy, "nothing Megatron holds is folded one way"
    return shard_pairs(opened, back.tensors)


def shard_pairs(opened: Opened, tensors: Mapping[str, Expression]) -> list[Pair]:
    """Pairs of each shard of a checkpoint, without padding, and the same cut out of a model.

    Args:
        opened: the checkpoint.
        tensors: canonical tensors of the model, by name.
    """
    again = split(tensors, opened.config, opened.cut)
    pairs = []
    for place, named in assembled(opened.checkpoint).items():
        for name, source in named.items():
            returned = again[place][name]
            count = opened.joined.rows_used.get((place, name))
            if count is not None:
                source, returned = rows(source, 0, count), rows(returned, 0, count)
            if returned.dtype != source.dtype:
                source = cast(source, returned.dtype)
            if source.rows:
                pairs.append(Pair(f"{name} of {where(place)}", source, returned, BITWISE))
    return pairs


def merge_checkpoint(
    source: Path,
    destination: Path,
    *,
    to: str | None = None,
    iteration: int | None = None,
    vocab_size: int | None = None,
    config: Path | None = None,
    trust_pickle: bool = False,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    spec_file: Path | None = None,
    verify: str = "logits",
    device: str = "auto",
    load: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    sync: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Write a Megatron checkpoint as a Hugging Face one; see `convert`, `open_model`, `plan_merge`.

    Raises:
        LlmconvertError: of the kind that fits; the source is untouched and `destination` is not made.
    """
    proving = Proving(verify, device, load)
    if workers is not None and workers < 1:
        raise Usage("`--workers` must be at least 1")
    if not dry_run:
        for path in (source, *([config] if config else [])):
            check_destination(path, destination, overwrite=overwrite, resume=resume)
    opened = open_model(source, iteration=iteration, vocab_size=vocab_size, config=config, trust_pickle=trust_pickle)
    conversion = plan_merge(opened, to=to, dtype=dtype, max_shard_size=max_shard_size, spec_file=spec_file)
    report = _report(conversion, str(destination))
    if dry_run:
        return report
    refuse_unprovable(proving, [("source", source)])
    if proving.verify == LOGITS:
        arguments.refuse_departures(conversion.model.config)
    return run(
        conversion.plan, source, destination, report, proving, workers, overwrite, resume, sync, progress,
        pairs=lambda written: _pairs(conversion, written),
        prove=lambda written, shown: prove_written(source, written, conversion.plan, proving, shown),
        tokenizer=source / HF_FOLDER,
    )  # fmt: skip


def shape_of(opened: Opened) -> str:
    """What a Megatron checkpoint is, in a phrase."""
    c = opened.checkpoint
    ranks = f"TP {c.tp}, PP {c.pp}, " + (f"VPP {c.vpp}, " if c.vpp > 1 else "") if c.format == "torch" else ""
    ranks += f"EP {c.ep}, ETP {c.etp}, " if c.ep > 1 else ""
    return f"Megatron ({ranks}{c.format}, {opened.transformer_impl} names)"


def _report(conversion: MergeConversion, destination: str) -> Report:
    plan, opened = conversion.plan, conversion.opened
    dtypes = Counter(TO_NAME[output.expression.dtype] for output in plan.tensors)
    return Report(
        source=str(opened.checkpoint.path),
        destination=destination,
        source_architecture=shape_of(opened),
        target_architecture=conversion.target.name,
        tensors_read=len(opened.checkpoint.stored),
        tensors_written=len(plan.tensors),
        bytes_written=plan.nbytes,
        steps=plan.summary["steps"],
        dropped=conversion.ledger.dropped,
        notes=conversion.notes,
        not_carried=conversion.not_carried,
        dtype=dict(dtypes),
        ledger=asdict(conversion.ledger),
        disk_needed=plan.nbytes,
        config=json.loads(plan.texts["config.json"]),
    )
