"""Megatron to Hugging Face: put the shards together, lower to a target's dialect, write its checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import llmconvert
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel, traits
from llmconvert.canonical.step import Step
from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.checkpoint.dtypes import FROM_NAME, TO_NAME
from llmconvert.converters.megatron import arguments
from llmconvert.converters.megatron.opening import Opened, beside_home, open_model
from llmconvert.converters.megatron.parts import parts
from llmconvert.converters.megatron.replicas import refuse_differing
from llmconvert.converters.megatron.shards import Shard, assembled, split, where
from llmconvert.converters.planning import (
    checked_away,
    code_texts,
    config_for,
    json_text,
    lower_home,
    lowered_in,
    target_for,
)
from llmconvert.converters.proofs import LOGITS, Proving, prove_written, refuse_unprovable
from llmconvert.converters.returning import rounding_floors, unlowered
from llmconvert.converters.running import Progress, Report, run
from llmconvert.converters.tokenizer import keep_tokenizer
from llmconvert.engine.plan import Plan, index_texts, lay_out, parse_size
from llmconvert.engine.publish import check_destination
from llmconvert.errors import Refused, Usage
from llmconvert.spec.dialect import emit, keys_read, lift, read_config
from llmconvert.spec.disagreements import refuse_disagreements
from llmconvert.spec.keys import carried
from llmconvert.spec.language import Spec
from llmconvert.spec.registry import Registry, registry
from llmconvert.tensors.expressions import Expression, cast, rows
from llmconvert.verify.ledger import Ledger, account
from llmconvert.verify.roundtrip import BITWISE, ROUNDED, Pair, failing


def _target(known: Registry, to: str | None, opened: Opened) -> Spec:
    """The target asked for; else what it was split from; else the plainest that holds it."""
    origin = known.specs.get(opened.origin.spec) if opened.origin else None
    if to is None and origin and origin.target:
        return origin
    return target_for(known, to or _plainest(traits(opened.config)), opened.origin)


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
    path, code = opened.checkpoint.path, FROM_NAME[dtype] if dtype else None
    source = CanonicalModel(opened.config, opened.joined.tensors)
    try:
        model, steps = lowered_in(code, source, lambda source: lower_home(source, target, known, opened.origin))
    except Refused as error:
        raise Refused(error.what, where=str(path), hint=error.hint) from None
    faults = failing(model.checks)
    if faults:
        raise Refused("; ".join(faults[:3]), where=str(path), hint="choose another `--to`")
    main = Counter(e.dtype for e in model.tensors.values()).most_common(1)[0][0]
    origin, home = opened.origin, opened.home
    known_origin = origin is not None and origin.spec in known.specs
    kept = carried(origin.config, keys_read(known.specs[origin.spec])) if origin and known_origin else {}
    config, came_back, notes = config_for(target, model.config, main, kept, origin, home)
    notes += tuple(note.text for note in target.notes if note.written and note.concerns(config) and not came_back)
    tensors = emit(target, model, config)
    if not came_back:
        try:
            notes += refuse_disagreements(target, model.config, model.tensors, config, trained=True)
        except Refused as error:
            raise Refused(error.what, where=str(path), hint=error.hint) from None
    outputs, files = lay_out(tensors, parse_size(max_shard_size))
    texts = {"config.json": json_text(config)} | index_texts(outputs, files) | code_texts(target)
    extra = beside_home(opened).beside(texts)
    if home is not None:
        extra, _ = keep_tokenizer(extra, home, origin.config if origin else {}, config)
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
    identity_text = json.dumps(identity, default=str) + "\n"
    plan = Plan(path, outputs, files, texts, extra.copies, model.checks, identity_text, summary)
    ledger = account(plan, everything, opened.dropped | checked_away(model), opened.rows_used)
    notes += extra.notes + opened.notes + arguments.departures(opened.config)
    if opened.checkpoint.left_out:
        notes += (f"{opened.checkpoint.left_out / 1e9:.2f} GB of optimizer and random state are left out",)
    padding = opened.cut.padded_vocab_size - opened.config.vocab_size
    if padding:
        notes += (f"{padding} rows of vocabulary padding are cut off",)
    ranks = "weights, which the ranks hold"
    left = {name: ranks if name.endswith((".safetensors", ".bin")) else why for name, why in extra.left.items()}
    return MergeConversion(opened, target, model, steps, plan, ledger, notes, left)


def _pairs(conversion: MergeConversion, written: Path) -> list[Pair]:
    """Each shard, and the same cut out of the checkpoint written."""
    output = open_checkpoint(written)
    model = lift(conversion.target, output, read_config(conversion.target, output.config, output.tensors)).model
    opened = conversion.opened
    before = CanonicalModel(opened.config, opened.joined.tensors)
    back, lossy = unlowered(model, before, conversion.steps)
    assert not lossy, "nothing Megatron holds is folded one way"
    return shard_pairs(opened, back.tensors, rounding_floors(conversion.model))


def shard_pairs(
    opened: Opened, tensors: Mapping[str, Expression], floors: Mapping[str, float] | None = None
) -> list[Pair]:
    """Pairs of each shard of a checkpoint, without padding, and the same cut out of a model.

    A shard that is a copy, and differs from what was taken for it, is compared by that.

    Args:
        opened: the checkpoint.
        tensors: canonical tensors of the model, by name.
        floors: canonical tensors that were rounded; see `rounding_floors`.
    """
    again = split(tensors, opened.config, opened.cut)
    taken = split(opened.joined.tensors, opened.config, opened.cut) if opened.joined.differing else {}
    rounded = _rounded_parts(opened, floors or {})
    pairs = []
    for place, named in assembled(opened.checkpoint).items():
        for name, source in named.items():
            returned = again[place][name]
            if (place, name) in opened.joined.differing:
                source = taken[place][name]
            count = opened.joined.rows_used.get((place, name))
            if count is not None:
                source, returned = rows(source, 0, count), rows(returned, 0, count)
            source, floor = cast(source, returned.dtype), rounded.get((place, name))
            if source.rows:
                promise = BITWISE if floor is None else ROUNDED
                pairs.append(Pair(f"{name} of {where(place)}", source, returned, promise, floor or 0.0))
    return pairs


def _rounded_parts(opened: Opened, floors: Mapping[str, float]) -> dict[Shard, float]:
    """The shards that hold what rewrites rounded."""
    found: dict[Shard, float] = {}
    for chunk in opened.cut.chunks if floors else ():
        for part in parts(opened.config, opened.cut, chunk):
            floor = max((floors[name] for name in part.sources if name in floors), default=None)
            if floor is not None:
                found |= {(place, part.name): floor for places in part.places for place in places}
    return found


def merge_checkpoint(
    source: Path,
    destination: Path,
    *,
    to: str | None = None,
    iteration: int | None = None,
    vocab_size: int | None = None,
    config: Path | None = None,
    trust_pickle: bool = False,
    replica: str | None = None,
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
    opened = open_model(
        source, iteration=iteration, vocab_size=vocab_size, config=config, trust_pickle=trust_pickle, replica=replica,
        spec_file=spec_file,
    )  # fmt: skip
    conversion = plan_merge(opened, to=to, dtype=dtype, max_shard_size=max_shard_size, spec_file=spec_file)
    report = _report(conversion, str(destination))
    if dry_run:
        return report
    refuse_unprovable(proving, [("source", source)])
    if proving.verify == LOGITS:
        arguments.refuse_departures(conversion.model.config)
        refuse_differing(opened.joined)
    return run(
        conversion.plan, source, destination, report, proving, workers, overwrite, resume, sync, progress,
        pairs=lambda written: _pairs(conversion, written),
        prove=lambda written, shown: prove_written(
            source, written, conversion.plan, proving, shown, told=({}, conversion.target.told)
        ),
        tokenizer=opened.home,
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
