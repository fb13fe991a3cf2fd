"""The way back: each source tensor as it comes out of the output again, for the round trip."""

from __future__ import annotations

from llmconvert.canonical.model import CanonicalConfig, CanonicalModel
from llmconvert.canonical.step import Step
from llmconvert.checkpoint.directory import Checkpoint
from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.converters.planning import Conversion
from llmconvert.spec.dialect import lift, read_config
from llmconvert.spec.expand import bind
from llmconvert.spec.language import Spec
from llmconvert.spec.quantised import FP8, SCALE, quantisation
from llmconvert.tensors.expressions import Expression, Scale, Shift, cast, quantize, stored, walk
from llmconvert.verify.roundtrip import BITWISE, ONE_WAY, QUANTISED, ROUNDED, Pair


def return_pairs(conversion: Conversion, output: Checkpoint) -> list[Pair]:
    """What the round trip compares: each source tensor, and the same read back out of the output.

    Args:
        conversion: the planned conversion.
        output: what was written, opened.
    """
    config = read_config(conversion.target, output.config, output.tensors)
    written = lift(conversion.target, output, config, keep_fp8=conversion.keep_fp8).model
    back, lossy = unlowered(written, conversion.lifted.model, conversion.steps)
    pairs = canonical_pairs(
        conversion.source_spec, conversion.checkpoint, conversion.lifted.model, conversion.model, back, lossy
    )
    planned = {tensor.name: tensor.expression for tensor in conversion.plan.tensors}
    for binding in bind(conversion.target, conversion.model.config, output.config):
        if set(binding.parts) & lossy:
            name = binding.stored
            pairs.append(Pair(name, planned[name], stored(output.tensors[name]), ONE_WAY))
    return pairs


def unlowered(
    written: CanonicalModel, lifted: CanonicalModel, steps: list[tuple[Step, CanonicalConfig]]
) -> tuple[CanonicalModel, set[str]]:
    """A written model with its rewrites undone, last first.

    Args:
        written: as read back.
        lifted: what was rewritten.
        steps: the rewrites, each with the config before it.

    Returns:
        The model, and the names of tensors that cannot come back (they are the lifted ones).
    """
    back, lossy = written, set[str]()
    for step, before in reversed(steps):
        if step.undo is None:
            back = CanonicalModel(before, {**lifted.tensors, **_known(back, step.lossy)})
            lossy |= {name for name in lifted.tensors if name.rpartition(".")[0] in step.lossy}
        else:
            back = step.undo(back, before)
    return back, lossy


def _known(model: CanonicalModel, lossy: tuple[str, ...]) -> dict[str, Expression]:
    return {name: e for name, e in model.tensors.items() if name.rpartition(".")[0] not in lossy}


def rounding_floors(lowered: CanonicalModel) -> dict[str, float]:
    """Canonical tensors that rewrites rounded, each with the least magnitude that rounding is measured against."""
    floors: dict[str, float] = {}
    for name, expression in lowered.tensors.items():
        for node in walk(expression):
            if isinstance(node, Scale | Shift):
                floors[name] = max(floors.get(name, 0.0), abs(node.offset) if isinstance(node, Shift) else 0.0)
    return floors


def canonical_pairs(
    spec: Spec, checkpoint: Checkpoint, lifted: CanonicalModel, lowered: CanonicalModel, back: CanonicalModel,
    lossy: set[str],
) -> list[Pair]:  # fmt: skip
    """Pairs of each source tensor and the same out of a canonical model.

    Args:
        spec: the source's dialect.
        checkpoint: the source.
        lifted: the source's canonical model.
        lowered: what was written; says where rounding is promised.
        back: what came back.
        lossy: canonical names that cannot come back.
    """
    floors, pairs = rounding_floors(lowered), []
    block = quantisation(checkpoint)
    for binding in bind(spec, lifted.config, checkpoint.config):
        if set(binding.parts) & lossy:
            continue
        source = stored(checkpoint.tensors[binding.stored])
        returned = binding.put_together(back.tensors, lifted.config)
        if source.dtype == FP8 and block is not None:
            # Numbers of 3 bits come back from 8 by division, whatever was lost on the way: a wrong scale shows.
            name = binding.stored + SCALE
            scale = stored(checkpoint.tensors[name])
            if returned.dtype == FP8:
                pairs.append(Pair(name, scale, back.tensors[binding.parts[0] + SCALE], BITWISE))
            else:
                returned = quantize(returned, scale, block)
            pairs.append(Pair(binding.stored, source, returned, BITWISE))
            continue
        if any(name + SCALE in lowered.tensors for name in binding.parts):
            pairs.append(Pair(binding.stored, cast(source, returned.dtype), returned, QUANTISED))
            continue
        rounded = [floors[name] for name in binding.parts if name in floors]
        promise = ROUNDED if rounded else BITWISE
        if returned.dtype != source.dtype:
            if ITEMSIZE[returned.dtype] > ITEMSIZE[source.dtype]:
                returned = cast(returned, source.dtype)
            else:
                source = cast(source, returned.dtype)
        pairs.append(Pair(binding.stored, source, returned, promise, max(rounded, default=0.0)))
    return pairs
