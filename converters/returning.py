"""The way back: each source tensor as it comes out of the output again, for the round trip."""

from __future__ import annotations

from llmconvert.canonical.model import CanonicalModel
from llmconvert.checkpoint.directory import Checkpoint
from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.converters.planning import Conversion
from llmconvert.spec.dialect import lift, read_config
from llmconvert.spec.expand import bind
from llmconvert.tensors.expressions import Expression, Scale, Shift, cast, stored, walk
from llmconvert.verify.roundtrip import BITWISE, ONE_WAY, ROUNDED, Pair


def return_pairs(conversion: Conversion, output: Checkpoint) -> list[Pair]:
    """What the round trip compares: each source tensor, and the same read back out of the output.

    Args:
        conversion: the planned conversion.
        output: what was written, opened.
    """
    back = lift(conversion.target, output, read_config(conversion.target, output.config, output.tensors)).model
    lossy: set[str] = set()
    for step, before in reversed(conversion.steps):
        if step.undo is None:
            back = CanonicalModel(before, {**conversion.lifted.model.tensors, **_known(back, step.lossy)})
            lossy |= {name for name in conversion.lifted.model.tensors if name.rpartition(".")[0] in step.lossy}
        else:
            back = step.undo(back, before)
    floors: dict[str, float] = {}
    for name, expression in conversion.model.tensors.items():
        for node in walk(expression):
            if isinstance(node, Scale | Shift):
                floors[name] = max(floors.get(name, 0.0), abs(node.offset) if isinstance(node, Shift) else 0.0)
    return _pair(conversion, back, output, lossy, floors)


def _known(model: CanonicalModel, lossy: tuple[str, ...]) -> dict[str, Expression]:
    return {name: e for name, e in model.tensors.items() if name.rpartition(".")[0] not in lossy}


def _pair(
    conversion: Conversion, back: CanonicalModel, output: Checkpoint, lossy: set[str], floors: dict[str, float]
) -> list[Pair]:
    config = conversion.lifted.model.config
    pairs = []
    for binding in bind(conversion.source_spec, config):
        if set(binding.parts) & lossy:
            continue
        source = stored(conversion.checkpoint.tensors[binding.stored])
        returned = binding.put_together(back.tensors, config)
        rounded = [floors[name] for name in binding.parts if name in floors]
        promise = ROUNDED if rounded else BITWISE
        if returned.dtype != source.dtype:
            if ITEMSIZE[returned.dtype] > ITEMSIZE[source.dtype]:
                returned = cast(returned, source.dtype)
            else:
                source = cast(source, returned.dtype)
        pairs.append(Pair(binding.stored, source, returned, promise, max(rounded, default=0.0)))
    planned = {tensor.name: tensor.expression for tensor in conversion.plan.tensors}
    for binding in bind(conversion.target, conversion.model.config):
        if set(binding.parts) & lossy:
            name = binding.stored
            pairs.append(Pair(name, planned[name], stored(output.tensors[name]), ONE_WAY))
    return pairs
