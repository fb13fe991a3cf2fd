"""Rewrites of what stands beside routed experts and beside the model: gates of shared experts, copies in MTP layers."""

from __future__ import annotations

from dataclasses import replace

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig, CanonicalModel
from llmconvert.canonical.step import EXACT, ROUNDED, Step, edit, rounded
from llmconvert.errors import Refused
from llmconvert.tensors.expressions import Check, Expression, fill, scale

# Shared experts: a gate of zero weight lets through half, sigmoid(0).


def _scale_shared(model: CanonicalModel, factor: float) -> dict[str, Expression]:
    return edit(model, (canonical.SHARED_DOWN,), rounded(lambda e: scale(e, factor)))


def _give_shared_gate(model: CanonicalModel) -> CanonicalModel:
    """Add the gate of zeros and double what it halves.

    Raises:
        Refused: there are no shared experts to gate.
    """
    c = model.config
    if not c.shared_expert_intermediate_size:
        raise Refused("the target always has a shared expert, and this model has none", hint="choose another target")
    config, scaled = replace(c, shared_expert_gate=True), _scale_shared(model, 2.0)
    tensors = {
        name: scaled[name] if name in scaled else fill(shape, scaled[name.replace("shared_expert_gate", "gate")].dtype)
        for name, shape in canonical.shapes(config).items()
    }
    return replace(model, config=config, tensors=tensors)


def _take_shared_gate(model: CanonicalModel) -> CanonicalModel:
    tensors, checks = _scale_shared(model, 0.5), []
    for name in canonical.names(model.config, canonical.SHARED_EXPERT_GATE):
        gate = tensors.pop(f"{name}.weight", None)
        if gate is not None:
            why = "the target cannot gate shared experts, and the gate is not zero"
            checks.append(Check(f"{name}.weight", gate, fill(gate.shape, gate.dtype), why))
    config = replace(model.config, shared_expert_gate=False)
    return replace(model, config=config, tensors=tensors, checks=model.checks + tuple(checks))


GIVE_SHARED_GATE = Step(
    "give shared experts a gate of zeros and double their down_proj",
    ROUNDED,
    "sigmoid(0) is one half; doubling a float is exact unless it overflows",
    _give_shared_gate,
    lambda m, before: _take_shared_gate(m),
)
TAKE_SHARED_GATE = Step(
    "leave out the zero gate of shared experts and halve their down_proj",
    ROUNDED,
    "the gate is checked to be zero, and sigmoid(0) is one half",
    _take_shared_gate,
    lambda m, before: _give_shared_gate(m),
)

# Copies in the layers that predict further tokens.


def _copies(config: CanonicalConfig) -> dict[str, str]:
    """Which tensor each of them is a copy of."""
    head = canonical.EMBED if config.tie_word_embeddings else canonical.HEAD
    return {
        f"{copy.replace('{i}', str(i))}.weight": f"{original}.weight"
        for copy, original in ((canonical.MTP_EMBED, canonical.EMBED), (canonical.MTP_HEAD, head))
        for i in config.layers[config.num_hidden_layers :]
    }


def _give_copies(model: CanonicalModel) -> CanonicalModel:
    config, copies = replace(model.config, mtp_copies=True), _copies(model.config)
    tensors = {name: model.tensors[copies.get(name, name)] for name in canonical.shapes(config)}
    return replace(model, config=config, tensors=tensors)


def _take_copies(model: CanonicalModel) -> CanonicalModel:
    copies = _copies(model.config)
    checks = []
    for copy, original in copies.items():
        left, right = model.tensors[copy], model.tensors[original]
        if left.dtype != right.dtype:
            raise Refused(f"`{copy}` should be a copy of `{original}`, and differs in dtype")
        checks.append(Check(copy, left, right, f"the target shares it with `{original}`, of which it is no copy"))
    tensors = {name: e for name, e in model.tensors.items() if name not in copies}
    config = replace(model.config, mtp_copies=False)
    return replace(model, config=config, tensors=tensors, checks=model.checks + tuple(checks))


GIVE_COPIES = Step(
    "give layers that predict further tokens copies of embedding and head", EXACT, "they are copies",
    _give_copies, lambda m, before: _take_copies(m),
)  # fmt: skip
TAKE_COPIES = Step(
    "leave out the copies of embedding and head in layers that predict further tokens", EXACT,
    "they are checked to be copies", _take_copies, lambda m, before: _give_copies(m),
)  # fmt: skip
