"""Are two checkpoints' weights equal, whatever their architectures? Both are brought to one form and compared.

That is Llama's, and the canonical layout for what Llama cannot hold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.checkpoint.megatron import is_megatron
from llmconvert.converters.megatron.merge import plan_merge
from llmconvert.converters.megatron.opening import open_model
from llmconvert.converters.planning import plan_conversion
from llmconvert.errors import LlmconvertError, ProofFailed, Refused
from llmconvert.tensors.expressions import Expression
from llmconvert.verify.roundtrip import BITWISE, Pair, compare

EQUAL, DIFFERENT, NOT_COMPARED = "equal", "different", "not compared"
_SHOWN = 8


@dataclass(frozen=True)
class WeightsReport:
    """How two checkpoints' weights compare.

    Attributes:
        kind: equal (bit for bit, in Llama's form), different, or not compared.
        reason: the same in words.
        tensors: how many were compared.
        different: names, in Llama's form, of those that differ.
    """

    kind: str
    reason: str
    tensors: int = 0
    different: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def compare_weights(left: Path, right: Path, *, spec_file: Path | None = None, workers: int = 2) -> WeightsReport:
    """Compare weights bit for bit, through the specs of both architectures.

    Unlike logits this shares code with the conversions it judges; it names tensors exactly.

    Args:
        left: a checkpoint directory.
        right: another.
        spec_file: a spec from outside the package.
        workers: threads.
    """
    try:
        try:
            first, second = (_in_form(path, "llama", spec_file) for path in (left, right))
            form = "Llama's form"
        except Refused:
            first, second = (_in_form(path, "canonical", spec_file) for path in (left, right))
            form = "the canonical form"
    except LlmconvertError as error:
        return WeightsReport(NOT_COMPARED, f"not both can be brought to one form: {error.what}")
    if first.keys() != second.keys():
        apart = sorted(first.keys() ^ second.keys())
        return WeightsReport(DIFFERENT, f"only one of them has {_list(apart)}", 0, tuple(apart))
    casts = [name for name, e in first.items() if e.dtype != second[name].dtype]
    if casts:
        kinds = f"{TO_NAME[first[casts[0]].dtype]} in one and {TO_NAME[second[casts[0]].dtype]} in the other"
        return WeightsReport(DIFFERENT, f"{_list(casts)} are {kinds}", len(first), tuple(casts))
    wrong = []
    for name, expression in first.items():
        try:
            compare([Pair(name, expression, second[name], BITWISE)], workers)
        except ProofFailed:
            wrong.append(name)
    if wrong:
        return WeightsReport(DIFFERENT, f"{_list(wrong)} differ", len(first), tuple(wrong))
    return WeightsReport(EQUAL, f"all {len(first)} tensors are equal bit for bit in {form}", len(first))


def _in_form(path: Path, form: str, spec_file: Path | None) -> dict[str, Expression]:
    if is_megatron(path):
        plan = plan_merge(open_model(path, trust_pickle=True), to=form, spec_file=spec_file).plan
    else:
        plan = plan_conversion(path, form, spec_file=spec_file).plan
    return {tensor.name: tensor.expression for tensor in plan.tensors}


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:_SHOWN]) + more
