"""Which of several specs a checkpoint is of, where they share one class name: told by its keys, its code, its tensors.

Baichuan published four models under two class names, which compute different things from configs alike. Nothing is
guessed: a checkpoint that fits none of the specs, or several, is refused, and the user says which it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.files import read_bytes
from llmconvert.errors import Refused
from llmconvert.spec.keys import same
from llmconvert.spec.language import Sign, Spec

_LONGEST_CODE = 1 << 20


def tell(
    candidates: Sequence[Spec], config: Mapping[str, Any], names: Iterable[str] = (), directory: Path | None = None
) -> Spec:
    """The one of several specs a checkpoint is of.

    Args:
        candidates: specs that claim the config's `model_type` and `architectures`.
        config: config.json.
        names: of the checkpoint's tensors.
        directory: of the checkpoint; its modelling file is read as text, never run.

    Raises:
        Refused: none of them fits alone.
    """
    stated = [spec for spec in candidates if spec.told and set(spec.told) <= set(config)]
    if stated:
        fitting = [spec for spec in stated if all(same(config[key], value) for key, value in spec.told.items())]
    else:
        code, present = _code(config, directory), set(names)
        fitting = [
            spec for spec in candidates
            if all(_speaks(question, config, present, code) for question in spec.signs)
        ]  # fmt: skip
    if len(fitting) == 1:
        return fitting[0]
    offered = fitting or candidates
    ways = " or ".join(f"`--from {spec.name}`" for spec in offered)
    keys = "; ".join(
        f"{spec.name}: " + ", ".join(f'"{key}": {_json(value)}' for key, value in spec.told.items()) for spec in offered
    )
    raise Refused(
        f"the checkpoint may be {' or '.join(f'{spec.name} ({spec.title})' for spec in offered)}, which have one class "
        "name and compute different things: its config.json does not tell which",
        where="config.json",
        hint=f"say which: {ways}; or put the keys that tell them apart into a copy of config.json ({keys})",
    )


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'


def _speaks(question: Sequence[Sign], config: Mapping[str, Any], names: set[str], code: str | None) -> bool:
    """Whether one sign of a question holds; the modelling file, where it is there, has the last word."""
    if code is not None and any(sign.code or sign.no_code for sign in question):
        return any(
            sign.code in code and not (sign.no_code and sign.no_code in code)
            for sign in question if sign.code or sign.no_code
        )  # fmt: skip
    return any(_holds(sign, config, names) for sign in question if not sign.code and not sign.no_code)


def _holds(sign: Sign, config: Mapping[str, Any], names: set[str]) -> bool:
    return (
        all(config.get(key) is not None for key in sign.present)
        and all(config.get(key) is None for key in sign.absent)
        and all(same(config.get(key), value) for key, value in sign.values.items())
        and not any(all(same(config.get(key), value) for key, value in other.items()) for other in sign.unlike)
        and all(name in names for name in sign.stored)
    )


def _code(config: Mapping[str, Any], directory: Path | None) -> str | None:
    """The text of the modelling file beside the weights that config.json names, or None."""
    auto_map = config.get("auto_map")
    reference = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if directory is None or not isinstance(reference, str) or "--" in reference or "/" in reference:
        return None
    file = directory / f"{reference.split('.')[0]}.py"
    if not file.is_file():
        return None
    return read_bytes(file, _LONGEST_CODE, inside=directory).decode(errors="replace")
