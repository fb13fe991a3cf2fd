"""Plan a conversion: lift, lower, emit, lay out; everything that can go wrong is found here."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import llmconvert
from llmconvert.canonical.lowerings import check_representable, lower
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel, traits
from llmconvert.canonical.step import Step
from llmconvert.checkpoint.directory import Checkpoint, open_checkpoint
from llmconvert.checkpoint.dtypes import FLOATS, FROM_NAME, ITEMSIZE, TO_NAME
from llmconvert.converters.companions import companions
from llmconvert.converters.tokenizer import keep_tokenizer
from llmconvert.engine import manifest
from llmconvert.engine.plan import Plan, index_texts, lay_out, parse_size
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.spec.dialect import Lifted, emit, keys_read, lift, read_config, write_config
from llmconvert.spec.disagreements import refuse_disagreements
from llmconvert.spec.expand import bind
from llmconvert.spec.fused import unfused
from llmconvert.spec.keys import carried
from llmconvert.spec.language import Spec
from llmconvert.spec.quantised import BLOCK, FP8, SCALE, check_kept, quantisation, quantised, settings
from llmconvert.spec.registry import Registry, registry
from llmconvert.tensors.expressions import Check, Expression, Fill, cast, sources
from llmconvert.verify.ledger import Ledger, account
from llmconvert.verify.roundtrip import failing


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: the plan and what is needed to prove it.

    Attributes:
        checkpoint, source_spec, lifted: what is read.
        target: the dialect written.
        model: the lowered model; `steps` the rewrites that led to it, each with the config before.
        dtype: the dtype code asked for, or None to keep each tensor's own.
        keep_fp8: FP8 weights are moved as they are.
        plan: what will be written.
        ledger: the account of the plan.
        notes: what a user should know.
        not_carried: files of the source that are left behind, and why.
    """

    checkpoint: Checkpoint
    source_spec: Spec
    lifted: Lifted
    target: Spec
    model: CanonicalModel
    steps: list[tuple[Step, CanonicalConfig]]
    dtype: str | None
    keep_fp8: bool
    plan: Plan
    ledger: Ledger
    notes: tuple[str, ...]
    not_carried: dict[str, str]


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was made from.

    Attributes:
        spec: its dialect's name.
        config: its config.json.
    """

    spec: str
    config: dict[str, Any]


def recorded_origin(directory: Path) -> Origin | None:
    """What a directory was made from, if llmconvert made it and says so."""
    made = (manifest.read(directory) or {}).get("source") or {}
    spec, config = made.get("spec"), made.get("config")
    return Origin(spec, config) if isinstance(spec, str) and isinstance(config, dict) else None


def target_for(known: Registry, name: str, origin: Origin | None) -> Spec:
    """The target called `name`: a spec, or a family, whose member is the one the checkpoint came from, else its default.

    Raises:
        Refused: there is none, or it is never written.
    """
    spec: Spec | None = known.specs.get(name)
    family = known.families.get(name, [])
    if family:
        members = [s for s in family if s.target]
        spec = next((s for s in members if origin and s.name == origin.spec), None) or next(
            (s for s in members if s.default_target), spec
        )
    spec = spec or known.get(name)
    if not spec.target:
        raise Refused(
            f"{spec.name} is read but not written: {spec.not_target}", hint="`llmconvert specs` lists the targets"
        )
    return spec


FP8_BLOCKS = "fp8-block128"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _dominant(tensors: Mapping[str, Expression]) -> str:
    weight: Counter[str] = Counter()
    for name, expression in tensors.items():
        if expression.dtype in FLOATS and not name.endswith(SCALE):
            weight[expression.dtype] += expression.nbytes
    return weight.most_common(1)[0][0]


def _widened(model: CanonicalModel, dtype: str) -> CanonicalModel:
    """Numbers no wider than those asked for, in float32: what rewrites compute is then rounded once, at the end."""
    tensors = {
        n: cast(e, "F32") if e.dtype in FLOATS and e.dtype != dtype and ITEMSIZE[e.dtype] <= ITEMSIZE[dtype] else e
        for n, e in model.tensors.items()
    }
    return replace(model, tensors=tensors, dtype=dtype)


Lowered = tuple[CanonicalModel, list[tuple[Step, CanonicalConfig]]]
"""A model rewritten, and the rewrites, each with the config before it."""


def lowered_in(dtype: str | None, model: CanonicalModel, rewrite: Callable[[CanonicalModel], Lowered]) -> Lowered:
    """Rewrite a model, and round every number once, to the dtype asked for.

    Args:
        dtype: its code; None keeps each tensor's own.
        model: as it is stored.
        rewrite: the rewrites that lead to the target.
    """
    if dtype is None:
        return rewrite(model)
    model, steps = rewrite(_widened(model, dtype))
    return replace(model, tensors={name: cast(e, dtype) for name, e in model.tensors.items()}), steps


def plan_conversion(
    source: str | os.PathLike[str],
    to: str,
    *,
    source_name: str | None = None,
    spec_file: Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    keep_fp8: bool = False,
    accept: Callable[[Registry, Spec], None] = lambda known, spec: None,
    opened: Checkpoint | None = None,
) -> Conversion:
    """Plan a conversion from headers alone.

    Args:
        source: a directory or a hub id.
        to: the target spec or family.
        source_name: the source's spec; detected from config.json if None.
        spec_file: a spec from outside the package.
        dtype: float32, bfloat16, float16, or fp8-block128 (the matrices of attention and MLPs in block-wise FP8);
            None keeps each tensor's own, and dequantises FP8 to bfloat16.
        max_shard_size: such as `5GB`.
        keep_fp8: move FP8 weights and their scales as they are.
        accept: called with the detected spec, to refuse it.
        opened: the source, opened and seen to already; opened here if None.

    Raises:
        LlmconvertError: of the kind that fits; nothing has been written.
    """
    known = registry(spec_file)
    if dtype not in (None, "float32", "bfloat16", "float16", FP8_BLOCKS):
        raise Usage(f"`{dtype}` is not a dtype to write", hint=f"choose float32, bfloat16, float16 or {FP8_BLOCKS}")
    if keep_fp8 and dtype is not None:
        raise Usage("`--keep-fp8` keeps every tensor's dtype: leave out `--dtype`")
    code = FROM_NAME[dtype] if dtype and dtype != FP8_BLOCKS else None
    checkpoint = unfused(opened or open_checkpoint(source))
    spec = known.identify(checkpoint, source_name)
    block = quantisation(checkpoint)
    if keep_fp8 and block is None:
        raise Usage("`--keep-fp8`: the checkpoint is not FP8", hint="leave it out")
    accept(known, spec)
    origin = recorded_origin(checkpoint.path)
    target = target_for(known, to, origin)
    config = read_config(spec, checkpoint.config, checkpoint.tensors)
    _refuse_early(config, target, known)
    lifted = lift(spec, checkpoint, config, dtype=code or "BF16", keep_fp8=keep_fp8)
    try:
        model, steps = lowered_in(code, lifted.model, lambda lifted: lower_home(lifted, target, known, origin))
    except Refused as error:
        raise Refused(error.what, where=str(checkpoint.path), hint=error.hint or elsewhere(checkpoint)) from None
    written_dtype = code or _dominant(model.tensors)
    if keep_fp8:
        check_kept(lifted.model.tensors, model.tensors)
    elif dtype == FP8_BLOCKS:
        block, model = BLOCK, replace(model, tensors=quantised(model.tensors, model.config))
    try:
        eight = block if keep_fp8 or dtype == FP8_BLOCKS else None
        kept = carried(checkpoint.config, keys_read(spec))
        way_back = origin if spec.name != target.name else None
        written, came_back, notes = config_for(target, model.config, written_dtype, kept, way_back, checkpoint.path)
        if spec.name != target.name:
            notes += tuple(note.text for note in target.notes if note.written and note.concerns(written))
    except Refused as error:
        raise Refused(error.what, where=str(checkpoint.path), hint=error.hint or elsewhere(checkpoint)) from None
    tensors = emit(target, model, written)
    if target.name != spec.name:
        try:
            notes += refuse_disagreements(spec, config, lifted.model.tensors, checkpoint.config)
            if not came_back:
                refuse_disagreements(target, model.config, model.tensors, written)
        except Refused as error:
            raise Refused(error.what, where=str(checkpoint.path), hint=error.hint) from None
    outputs, files = lay_out(tensors, parse_size(max_shard_size))
    texts = {"config.json": json_text(written | ({"quantization_config": settings(eight)} if eight else {}))}
    texts |= index_texts(outputs, files) | code_texts(target)
    extra, recorded = keep_tokenizer(companions(checkpoint).beside(texts), checkpoint.path, checkpoint.config, written)
    own_file = known.files[spec.name]
    summary = {
        "source": {
            "path": checkpoint.path.resolve().name, "spec": spec.name, "spec_sha256": _digest(own_file),
            "architectures": checkpoint.config.get("architectures"), "config": checkpoint.config,
            **recorded,
        },
        "target": {"spec": target.name, "spec_sha256": _digest(known.files[target.name])},
        "dtype": dtype,
        "steps": [{"name": step.name, "exactness": step.exactness, "why": step.why} for step, _ in steps],
        "dropped": lifted.dropped,
    }  # fmt: skip
    plan = Plan(
        checkpoint.path, outputs, files, {**texts, **extra.texts}, extra.copies, model.checks,
        _identity(checkpoint, files, summary), summary,
    )  # fmt: skip
    ledger = account(plan, checkpoint.tensors, lifted.dropped | checked_away(model))
    all_notes = lifted.notes + notes + extra.notes + _dtype_notes(checkpoint, tensors, code)
    return Conversion(
        checkpoint, spec, lifted, target, model, steps, code, keep_fp8, plan, ledger, all_notes, extra.left
    )


def code_texts(target: Spec) -> dict[str, bytes]:
    """The modelling files that go with a target, by name."""
    folder = resources.files("llmconvert") / "models"
    return {name: (folder / name).read_bytes() for name in target.code}


def elsewhere(checkpoint: Checkpoint) -> str:
    """The hint for a target that cannot hold this checkpoint."""
    return f"`llmconvert inspect {checkpoint.path}` lists the targets that can hold it"


def lower_home(model: CanonicalModel, target: Spec, known: Registry, origin: Origin | None) -> Lowered:
    """Lower to a target; on the way back to where a checkpoint came from, without biases it did not have.

    Raises:
        Refused: the target cannot hold it.
    """
    original = _config_of(target, origin)
    added = (frozenset({"qkv_bias", "o_bias", "mlp_bias"}) - traits(original) if original else frozenset()) & traits(
        model.config
    )
    if added:
        lean, steps = lower(model, target.name, target.holds - added, target.always - added, (), known.holders)
        if not failing(lean.checks):
            return lean, steps
    return lower(model, target.name, target.holds, target.always, target.coupled, known.holders)


def _config_of(target: Spec, origin: Origin | None) -> CanonicalConfig | None:
    """What a checkpoint was converted from, if that was in the target's dialect."""
    if origin is None or origin.spec != target.name:
        return None
    try:
        return read_config(target, origin.config)
    except (BadInput, Refused):
        return None


def _refuse_early(config: CanonicalConfig, target: Spec, known: Registry) -> None:
    """Refuse by the config's traits before the tensors are matched: a better message than a list of odd names."""
    check_representable(config, target.name, target.holds | target.always, known.holders)


def check_data(checkpoint: Checkpoint, own: Sequence[Check], everything: Sequence[Check], *, hint: str) -> None:
    """Test what a plan takes for granted: aliases that should be equal, biases that should be zero.

    Args:
        checkpoint: the source.
        own: what it says of itself.
        everything: that, and what the target asks for.
        hint: what to do where it is not as the target asks.

    Raises:
        BadInput: the source contradicts itself.
        Refused: the target cannot hold it.
    """
    where = str(checkpoint.path)
    faults = failing(own)
    if faults:
        raise BadInput("; ".join(faults), where=where)
    faults = failing([check for check in everything if check not in own])
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more tensors" if len(faults) > 3 else "")
        raise Refused(shown, where=where, hint=hint)


def checked_away(model: CanonicalModel) -> dict[str, str]:
    """Stored tensors that a check allows to leave out whole (zero biases, copies)."""
    used = {tensor.name for e in model.tensors.values() for tensor in sources(e)} if model.checks else set()
    return {
        tensor.name: "checked to be zero" if isinstance(check.right, Fill) else "checked to be a copy"
        for check in model.checks
        for tensor in sources(check.left)
        if tensor.name not in used
    }


def _identity(checkpoint: Checkpoint, files: Any, summary: Mapping[str, Any]) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    layout = [(f.name, f.size, f.digest) for f in files]
    value = [llmconvert.__version__, str(checkpoint.path.resolve()), stats, layout, summary]
    return json.dumps(value, sort_keys=True, default=str) + "\n"


def config_for(
    target: Spec, config: CanonicalConfig, dtype: str, kept: Mapping[str, Any], origin: Origin | None, home: Path | None
) -> tuple[dict[str, Any], bool, tuple[str, ...]]:
    """config.json: the original one where it still describes the model, else a new one; which it is; and remarks.

    Args:
        target: the dialect written.
        config: the model.
        dtype: the weights' dtype code.
        kept: keys of the source's config.json that come along into a new one.
        origin: what the checkpoint was made from.
        home: the directory whose files come along.
    """
    written = write_config(target, config, kept, dtype)
    if origin is None or origin.spec != target.name or not _describes(origin.config, target, config, written):
        return written, False, ()
    notes = ["config.json is the original one, which still describes the model"]
    code = sorted(
        {str(v).split("--")[-1].split(".")[0] + ".py" for v in (origin.config.get("auto_map") or {}).values()}
    )
    absent = [name for name in code if home is None or not (home / name).is_file()]
    if absent:
        notes.append(f"its `auto_map` needs {', '.join(absent)}: copy them from the original repository")
    named: dict[str, Any] = {key: TO_NAME[dtype] for key in ("torch_dtype", "dtype") if key in origin.config}
    plain = {key: value for key, value in origin.config.items() if key != "quantization_config"}
    return {**plain, **named}, True, tuple(notes)


def _describes(
    original: Mapping[str, Any], target: Spec, config: CanonicalConfig, written: Mapping[str, Any]
) -> bool:
    """Whether an original config.json describes a model that is to be written, its tensors seen, as a new one would."""
    try:
        before, after = (
            replace(read_config(target, said, [binding.stored for binding in bind(target, config, said)]), dtype=None)
            for said in (original, written)
        )
    except (BadInput, Refused):
        return False
    return before in (after, replace(config, dtype=None))


def json_text(value: Mapping[str, Any]) -> bytes:
    """A JSON file as transformers writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _dtype_notes(checkpoint: Checkpoint, tensors: Mapping[str, Expression], dtype: str | None) -> tuple[str, ...]:
    notes = []
    stored = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    main = stored.most_common(1)[0][0]
    eight = stored[FP8]
    if eight and any(e.dtype == FP8 for e in tensors.values()):
        notes.append(f"{eight} FP8 tensors are moved as they are, with their scales")
    elif eight:
        notes.append(f"{eight} FP8 tensors are dequantised in float32 and rounded once")
    elif isinstance(named, str) and FROM_NAME.get(named) not in stored:
        notes.append(f"config.json says {named}, the tensors are {TO_NAME.get(main, main)}: the tensors are believed")
    if dtype is not None:
        narrowed = sum(
            ITEMSIZE[t.dtype] > ITEMSIZE[dtype] or (t.dtype == "BF16" and dtype == "F16")
            for t in checkpoint.tensors.values()
        )
        if narrowed:
            notes.append(f"{narrowed} tensors are rounded to {TO_NAME[dtype]}")
    return tuple(notes)
