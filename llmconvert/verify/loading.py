"""Whether a directory's own class loads it.

Transformers builds the model without memory, and its tensors are compared with the files', by name and shape; no data are
read. Only classes of transformers are run, and the canonical class, which is llmconvert's own: never code of a
checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmconvert.engine.plan import Plan
from llmconvert.errors import ProofFailed

if TYPE_CHECKING:
    from torch import nn

_Shapes = Mapping[str, tuple[int, ...]]
_CODE = "modeling_canonical.py"
_CLASSIFIERS = ("ForSequenceClassification", "CanonicalForRewardModel")
_GENERATION = "generation_config.json"
_NUMBERED = re.compile(r"(?P<stem>.+?)\.(?P<layer>\d+)\.(?P<rest>.+)")
_VALUE_HEAD = "v_head."  # of TRL, which wraps the model and loads it by itself
# Buffers that older releases stored, and that every class leaves out when it loads.
_STALE = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids)$")
_HINT = "`--verify none` writes it all the same"


def prove_loads(directory: Path, shapes: _Shapes | None = None) -> str:
    """Build the model a directory's config.json describes, on the meta device, and hold the files against it.

    Experts that transformers fuses while loading go through its own loader, one layer of each kind: layers whose tensors
    have the same names and shapes, in the files and in the class, are loaded alike. The canonical model is built of such
    layers alone.

    Args:
        directory: a Hugging Face directory.
        shapes: of its tensors, by name; read from its files if None.

    Returns:
        What was found, for the report: that its class loads it, or why that was not tried.

    Raises:
        ProofFailed: config.json or generation_config.json cannot be used, or tensors are missing, too many or of other
            shapes than the class has.
        BadInput: the files cannot be read.
    """
    config = _read_json(directory, "config.json")
    for name in ("config.json", _GENERATION):
        _check_ids(directory, name, config if name == "config.json" else _read_json(directory, name))
    absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if absent:
        return f"not loaded: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
    from llmconvert.verify.models import FileWeights, quiet, release

    if release() < (4, 57):
        return "not loaded: transformers is older than 4.57"
    with quiet():
        return _load(directory, config, FileWeights(directory).shapes if shapes is None else shapes)


def prove_plan(plan: Plan) -> None:
    """The same of what is planned, before it is written.

    Raises:
        ProofFailed: see `prove_loads`.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", _GENERATION, _CODE):
            if name in plan.texts:
                (Path(folder) / name).write_bytes(plan.texts[name])
            elif name in plan.copies:
                shutil.copyfile(plan.copies[name], Path(folder) / name)
        shapes = {output.name: output.expression.shape for output in plan.tensors}
        try:
            prove_loads(Path(folder), shapes)
        except ProofFailed as error:
            raise ProofFailed(error.what, where="nothing was written", hint=error.hint) from None


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object of a directory; an empty one where there is no such file.

    Raises:
        ProofFailed: it is no JSON object.
    """
    if not (directory / name).is_file():
        return {}
    try:
        found = json.loads((directory / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProofFailed(f"{name} is not JSON: {error}", where=str(directory), hint=_HINT) from None
    if not isinstance(found, dict):
        raise ProofFailed(f"{name} is not a JSON object", where=str(directory), hint=_HINT)
    return found


def _check_ids(directory: Path, name: str, config: Mapping[str, Any]) -> None:
    """Check that token ids are integers; of ends there may be several.

    Raises:
        ProofFailed: one is something else, which transformers' classes do not load.
    """
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [] if value is None else [value]
        if any(type(one) is not int for one in ids):
            raise ProofFailed(f"`{key}` in {name} is {json.dumps(value)}", where=str(directory), hint=_HINT)


class _Unloadable(Exception):
    """What transformers says of a directory it does not load."""


@contextmanager
def _asking() -> Iterator[None]:
    """A call of transformers, whose configs and classes check themselves with errors of several libraries.

    Raises:
        _Unloadable: with an error's first line, and the next where the first only announces it.
    """
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise _Unloadable(" ".join(lines[: 2 if lines[0].endswith(":") else 1])) from error


def _load(directory: Path, config: dict[str, Any], shapes: _Shapes) -> str:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    ours = kind == "llmconvert"
    if ours:
        _check_code(directory)
        from llmconvert.models import register

        register()
    if not isinstance(kind, str) or not (ours or kind in CONFIG_MAPPING):
        return f"not loaded: this transformers has no class for `{kind}`"
    auto: Any = transformers.AutoModelForCausalLM
    if str((config.get("architectures") or [""])[0]).endswith(_CLASSIFIERS):
        auto = transformers.AutoModelForSequenceClassification
    try:
        with _asking():
            if (directory / _GENERATION).is_file():
                transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
            known = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if type(known) not in auto._model_mapping:
            return f"not loaded: this transformers has no {auto.__name__} for `{kind}`"
        name, faults, left = _compare(auto, known, shapes)
    except _Unloadable as error:
        faults = [str(error)]
    if not faults:
        more = f"; it leaves out {left} tensors of layers that predict further tokens" if left else ""
        return f"its class loads it: `{name}`{more}"
    listed = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
    if not ours and auto.__name__ in (config.get("auto_map") or {}):
        return f"not loaded: the code it names is not run here, and transformers' own class does not load it: {listed}"
    raise ProofFailed(f"its class does not load it: {listed}", where=str(directory), hint=_HINT)


def _check_code(directory: Path) -> None:
    """Check that the file beside the weights is the one whose classes are tried.

    Raises:
        ProofFailed: it is another, or none.
    """
    own = Path(__file__).parent.parent / "models" / _CODE
    written = directory / _CODE
    if not written.is_file() or written.read_bytes() != own.read_bytes():
        raise ProofFailed(f"{_CODE} is not llmconvert's", where=str(directory), hint=_HINT)


@dataclass(frozen=True)
class _Differences:
    """What keeps a class from loading tensors: names they lack, names it lacks, and shapes, theirs and its own."""

    missing: list[str]
    surplus: list[str]
    misshapen: list[tuple[str, Sequence[int], Sequence[int]]]
    errors: list[str] = field(default_factory=list)


def _compare(auto: Any, known: Any, shapes: _Shapes) -> tuple[str, list[str], int]:
    """The class's name, what is wrong with the tensors, and how many of further layers it leaves out."""
    import torch

    from llmconvert.verify.models import release

    if hasattr(known, "quantization_config"):  # scales belong to the tensors they scale, which the round trip compares
        del known.quantization_config
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("_scale_inv")}
    known._attn_implementation = "eager"  # there everywhere, and without parameters like the others
    stem, numbers = "", list[int]()
    if hasattr(known, "with_layers"):
        known, shapes, stem, numbers = _fewer_layers(known, shapes)
    five = release() >= (5, 0)
    with _asking(), torch.device("meta"), nullcontext() if five else _uninitialised():
        model: nn.Module = auto.from_config(known, trust_remote_code=False)
        model.tie_weights()  # type: ignore[operator]
    found = _differences(model, shapes)
    if (found.missing or found.surplus) and five:
        found = _through_the_loader(model, known, shapes)
    first = known.num_hidden_layers
    further = range(first, first + (getattr(known, "num_nextn_predict_layers", 0) or 0))
    left = {name for name in found.surplus if (layer := _layer(name)) and layer[1] in further}

    def own(name: str) -> str:
        """A tensor's name among all layers."""
        layer = _layer(name)
        if layer is None or layer[0] != stem or layer[1] >= len(numbers):
            return name
        return f"{stem}.{numbers[layer[1]]}.{name.removeprefix(f'{stem}.{layer[1]}.')}"

    faults = [f"no tensor `{own(name)}`" for name in found.missing]
    faults += [f"`{own(name)}` is {list(has)}, not {list(wanted)}" for name, has, wanted in found.misshapen]
    faults += [f"`{own(name)}` has no place in it" for name in found.surplus if name not in left] + found.errors
    return type(model).__name__, faults, len(left)


def _uninitialised() -> AbstractContextManager[None]:
    """Transformers 4 draws weights on the meta device too, which takes most of the time where experts are many."""
    from transformers.modeling_utils import no_init_weights

    found: AbstractContextManager[None] = no_init_weights()
    return found


def _differences(model: nn.Module, shapes: _Shapes) -> _Differences:
    """By the names the class itself has."""
    from llmconvert.verify.models import tied_names

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = {name: names for names in tied_names(model).values() for name in names}
    missing = [name for name in expected if not any(other in shapes for other in groups.get(name, (name,)))]
    return _Differences(
        _without(missing, getattr(model, "_keys_to_ignore_on_load_missing", None)),
        _without(shapes.keys() - expected.keys(), getattr(model, "_keys_to_ignore_on_load_unexpected", None)),
        [(n, shape, expected[n]) for n, shape in shapes.items() if n in expected and tuple(shape) != expected[n]],
    )


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    """Names that no pattern is found in; nor are they of buffers no longer stored, or of TRL's value head."""
    ignored = [re.compile(pattern) for pattern in patterns or ()] + [_STALE]
    return sorted(
        name for name in names if not name.startswith(_VALUE_HEAD) and not any(one.search(name) for one in ignored)
    )


def _through_the_loader(model: nn.Module, known: Any, shapes: _Shapes) -> _Differences:
    """By the names transformers makes of the files' when it loads them, on the meta device: some are renamed, or fused."""
    import torch

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored, built = _by_layer(shapes), _by_layer(expected)
    chosen = _one_of_each_kind({layer: (stored.get(layer), built.get(layer)) for layer in {**stored, **built}})
    given = {name: shape for name, shape in shapes.items() if _layer(name) is None or _layer(name) in chosen}
    # Layers like those that are tried are given as the class has them, so that nothing of them is missing.
    given |= {name: shape for name, shape in expected.items() if _layer(name) not in {None, *chosen}}
    state = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in given.items()}
    try:
        with _asking(), torch.device("meta"):
            _, info = type(model).from_pretrained(  # type: ignore[attr-defined]
                None, config=known, state_dict=state, device_map={"": "meta"}, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except _Unloadable as error:  # it says that experts cannot be fused, and not which
        gaps = _gaps(shapes)
        return _Differences(gaps, [], [], [] if gaps else [str(error)])
    return _Differences(
        sorted(info["missing_keys"]), _without(info["unexpected_keys"], None), list(info["mismatched_keys"]),
        [str(message) for message in info["error_msgs"]],
    )  # fmt: skip


def _gaps(shapes: _Shapes) -> list[str]:
    """Tensors that members of a list within a layer lack and others have: of an expert, its up_proj."""
    lists: dict[str, dict[int, set[str]]] = {}
    for name in shapes:
        outer = _NUMBERED.fullmatch(name)
        inner = _NUMBERED.fullmatch(outer["rest"]) if outer else None
        if outer and inner:
            stem = f"{outer['stem']}.{outer['layer']}.{inner['stem']}"
            lists.setdefault(stem, {}).setdefault(int(inner["layer"]), set()).add(inner["rest"])
    return [
        f"{stem}.{number}.{rest}"
        for stem, members in lists.items()
        for number in range(max(members) + 1)
        for rest in sorted(set[str]().union(*members.values()) - members.get(number, set()))
    ]


_Layer = tuple[str, int]


def _layer(name: str) -> _Layer | None:
    """The list a tensor's layer is in and the layer's number, or None beside all layers."""
    found = _NUMBERED.fullmatch(name)
    return (found["stem"], int(found["layer"])) if found else None


def _by_layer(shapes: _Shapes) -> dict[_Layer, frozenset[tuple[str, tuple[int, ...]]]]:
    """For every layer, the names within it and their shapes."""
    found: dict[_Layer, set[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        match = _NUMBERED.fullmatch(name)
        if match:
            found.setdefault((match["stem"], int(match["layer"])), set()).add((match["rest"], tuple(shape)))
    return {layer: frozenset(tensors) for layer, tensors in found.items()}


def _one_of_each_kind(kinds: Mapping[_Layer, Any]) -> set[_Layer]:
    """The first layer of every kind."""
    first: dict[Any, _Layer] = {}
    for layer in sorted(kinds):
        first.setdefault((layer[0], kinds[layer]), layer)
    return set(first.values())


def _fewer_layers(known: Any, shapes: _Shapes) -> tuple[Any, _Shapes, str, list[int]]:
    """A canonical model of one layer of each kind, their tensors, and the list the layers are in, with their numbers.

    A layer's kind is what the files have of it and what the config says of it.
    """
    stored = _by_layer(shapes)
    stem = next((layer[0] for layer in stored if layer[0].endswith("layers")), "model.layers")
    last, total = known.num_hidden_layers - 1, known.num_hidden_layers + known.num_nextn_predict_layers

    def said(number: int) -> str:
        return json.dumps(known.with_layers([number]).to_dict(), sort_keys=True, default=str)

    kinds = {(stem, number): (stored.get((stem, number)), said(number)) for number in range(total)}
    # Layers that predict further tokens are made like the last of the others.
    chosen = sorted({number for _, number in _one_of_each_kind(kinds)} | ({last} if total > last + 1 else set()))
    place = {number: new for new, number in enumerate(chosen)}
    kept: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer = _layer(name)
        if layer is None or layer[0] != stem or layer[1] >= total:
            kept[name] = shape
        elif layer[1] in place:
            kept[f"{stem}.{place[layer[1]]}.{name.removeprefix(f'{stem}.{layer[1]}.')}"] = shape
    return known.with_layers(chosen), kept, stem, chosen
