"""Spec rows, written out for one model: every stored name, the canonical tensors in it, and how to get from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.errors import Refused
from llmconvert.spec.language import Row, Spec
from llmconvert.tensors.expressions import Expression, Shape, concat, gather, interleave, rows


@dataclass(frozen=True)
class Binding:
    """One stored tensor and the canonical tensors it holds.

    Attributes:
        stored: the stored name.
        pack: how the parts lie in it; see `Row`.
        parts: the canonical names, in order; `shapes` their shapes.
    """

    stored: str
    pack: str
    parts: tuple[str, ...]
    shapes: tuple[Shape, ...]

    @property
    def shape(self) -> Shape:
        """The stored tensor's shape: the parts stacked."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def take_apart(self, stored: Expression, config: CanonicalConfig) -> dict[str, Expression]:
        """The canonical tensors as expressions over the stored one."""
        if self.pack == "grouped":
            return self._ungroup(stored, config)
        result, start = {}, 0
        for name, shape in zip(self.parts, self.shapes, strict=True):
            result[name] = rows(stored, start, start + shape[0]) if len(self.parts) > 1 else stored
            start += shape[0]
        return result

    def _chunks(self, config: CanonicalConfig) -> tuple[int, ...]:
        return tuple(shape[0] // config.num_key_value_heads for shape in self.shapes)

    def _ungroup(self, stored: Expression, config: CanonicalConfig) -> dict[str, Expression]:
        chunks = self._chunks(config)
        result, start = {}, 0
        for name, chunk in zip(self.parts, chunks, strict=True):
            result[name] = gather(stored, range(start, start + chunk), sum(chunks))
            start += chunk
        return result

    def put_together(self, tensors: Mapping[str, Expression], config: CanonicalConfig) -> Expression:
        """The stored tensor as an expression over the canonical ones.

        Raises:
            Refused: they are of different dtypes and cannot be packed into one tensor as they are.
        """
        parts = [tensors[name] for name in self.parts]
        if len({part.dtype for part in parts}) > 1:
            kinds = ", ".join(f"`{n}` {TO_NAME.get(p.dtype, p.dtype)}" for n, p in zip(self.parts, parts, strict=True))
            raise Refused(
                f"`{self.stored}` would pack tensors of different dtypes ({kinds})",
                hint="choose one for all with `--dtype float32` or `--dtype bfloat16`",
            )
        if len(parts) == 1:
            return parts[0]
        return interleave(parts, self._chunks(config)) if self.pack == "grouped" else concat(parts)


def all_rows(spec: Spec) -> tuple[Row, ...]:
    """The spec's rows, and Llama's own names for every module it does not mention."""
    covered = {module for row in spec.weights for module in row.modules}
    return spec.weights + tuple(Row(m + ".{p}", (m,)) for m in canonical.MODULES if m not in covered)


def bind(spec: Spec, config: CanonicalConfig, stated: Mapping[str, Any]) -> list[Binding]:
    """Every stored tensor a model has in the spec's architecture, in the order of the model's layers.

    Args:
        spec: the architecture.
        config: the model.
        stated: its config.json, which may say how tensors are packed.
    """
    shapes = canonical.shapes(config)
    expected = {row.modules[0]: row for row in all_rows(spec)}
    bindings: list[Binding] = []
    for module, name, i in canonical.placed(config):
        row = expected.get(module)
        if row is None:
            continue
        j = name.removeprefix(f"model.layers.{i}.mlp.experts.").partition(".")[0]
        for param in canonical.PARAMS if "{p}" in row.stored else ("weight",):
            if f"{name}.{param}" in shapes:
                parts = tuple(f"{_placed(m, i, j)}.{param}" for m in row.modules)
                stored = _placed(row.stored, i, j).replace("{p}", param)
                bindings.append(Binding(stored, row.pack_in(stated), parts, tuple(shapes[part] for part in parts)))
    return bindings


def _placed(template: str, i: int, j: str) -> str:
    return template.replace("{i}", str(i)).replace("{j}", j)
