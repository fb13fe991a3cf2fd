"""What a canonical config may hold: values of the types it declares, and sizes that can be written out in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.config import (
    AMOUNT,
    COUNT,
    EXPERTS,
    FLAG,
    FURTHER,
    LAYERS,
    POSITIVE,
    ROTARY,
    SIZE,
    TEXT,
    Kind,
    faults,
)
from llmconvert.errors import BadInput

MAX_MODULES = 1 << 18
"""Layers times experts: five times those of any model published, and seconds to write out."""

_SPARE, _PER_TENSOR = 4096, 64

_FLAGS = Kind("a list of true and false", lambda value: all(map(FLAG.fits, value)))
_TEXTS = Kind("a list of texts", lambda value: all(map(TEXT.fits, value)))
_BY_ANNOTATION = {
    "int": COUNT, "int | None": COUNT, "float": POSITIVE, "float | None": POSITIVE, "bool": FLAG, "str": TEXT,
    "str | None": TEXT, "Mapping[str, Any] | None": ROTARY, "tuple[bool, ...]": _FLAGS, "tuple[str, ...] | None": _TEXTS,
}  # fmt: skip
_OWN = {
    "num_hidden_layers": LAYERS, "num_nextn_predict_layers": FURTHER, "num_experts": EXPERTS, "rms_norm_eps": AMOUNT,
}  # fmt: skip
_FIELDS = dataclasses.fields(CanonicalConfig)
_KINDS: dict[str, Kind] = {
    f.name: _OWN.get(f.name)
    or (SIZE if f.type == "int" and f.default is dataclasses.MISSING else _BY_ANNOTATION[str(f.type)])
    for f in _FIELDS
}
_NEVER_NONE = frozenset(f.name for f in _FIELDS if "None" not in str(f.type))


def check_attributes(values: Mapping[str, Any], where: str) -> None:
    """Check attributes of a canonical config, all of them or those known so far.

    Raises:
        BadInput: one is not of its type, or out of bounds; all are named.
    """
    wrong = [f"`{name}` is null" for name, value in values.items() if value is None and name in _NEVER_NONE]
    wrong += faults(values, {name: _KINDS[name] for name in values})
    if wrong:
        raise BadInput("; ".join(wrong), where=where)


def check_extent(values: Mapping[str, Any], where: str, names: Collection[str] | None = None) -> None:
    """Check that a model can be written out, tensor by tensor, before anybody tries.

    Args:
        values: attributes of a canonical config.
        where: where they come from.
        names: the tensors there are, where that is known. A model whose tensors are missing by the thousand is told so
            here, and not in a list of them.

    Raises:
        BadInput: it has too many layers and experts.
    """
    layers = values["num_hidden_layers"] + values.get("num_nextn_predict_layers", 0)
    modules = layers * max(1, values.get("num_experts", 0))
    size = f"{layers:,} layers" + (f" of {values['num_experts']:,} experts" if values.get("num_experts") else "")
    if modules > MAX_MODULES:
        raise BadInput(f"a model of {size} is not one that anybody has", where=where)
    if names is not None and modules > _SPARE + _PER_TENSOR * len(names):
        raise BadInput(f"it says {size}, and the checkpoint holds {len(names):,} tensors", where=where)
