"""The same tokenizer beside another model: what tokenizer_config.json must say so that transformers reads it as before.

tokenizer.json does not settle how a tokenizer is read; its class does. transformers 4.57 takes the class that
tokenizer_config.json names. transformers 5.23 has a class for a type of model as well: for some types it takes that one
whatever is named, for others tokenizer.json as it stands (`AutoTokenizer.from_pretrained`, models/auto/
tokenization_auto.py: `TOKENIZER_MAPPING_NAMES`, `MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`). So the same files may be
another tokenizer under another `model_type`. Where they would be, the class the source is read with is named, and where
the name alone is not believed, an `auto_map` stands beside it, with which it is.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.files import MAX_JSON_BYTES, read_bytes, read_json
from llmconvert.converters.companions import Companions
from llmconvert.engine import manifest

SETTINGS = "tokenizer_config.json"
CODE = "tokenization_llmconvert.py"
_OURS = ["tokenization_llmconvert.NamedTokenizer", "tokenization_llmconvert.NamedTokenizerFast"]

AS_IT_STANDS = "TokenizersBackend"
"""The class, by the name transformers 5 has for it, that takes all of tokenizer.json and adds nothing."""
_PLAIN = "PreTrainedTokenizerFast"
"""The same by a name 4.57 knows too."""
_PLAIN_NAMES = (AS_IT_STANDS, _PLAIN, "PreTrainedTokenizer")

_OWN = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2"), "GemmaTokenizer"),
    **dict.fromkeys(
        ("ernie4_5", "glm", "glm4", "glm4_moe", "granite", "internlm2", "mistral", "mixtral", "phi3"), AS_IT_STANDS
    ),
}
"""The class transformers 5.23 has for a type of model; the other types that specs write have none."""
_INSISTS = ("qwen2",)
"""Types whose own class is taken whatever is named."""
_OWN_IN_FOUR = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "phi3", "ernie4_5", "deepseek_v2", "deepseek_v3"), "LlamaTokenizer"
    ),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2"), "GemmaTokenizer"),
    **dict.fromkeys(("glm", "glm4", "glm4_moe"), _PLAIN),
    "granite": "GPT2Tokenizer",
}
"""The class 4.57 takes where none is named."""


def keep_tokenizer(
    found: Companions, directory: Path, source: Mapping[str, Any], written: Mapping[str, Any]
) -> tuple[Companions, dict[str, Any]]:
    """Companions whose tokenizer is read beside the written model as it was beside the source's.

    Args:
        found: the files that go with the weights.
        directory: where they come from.
        source: the config.json they lie beside there.
        written: the config.json they will lie beside.

    Returns:
        The companions, and what the manifest's `source` records of tokenizer_config.json where it is not copied as it
        is: `tokenizer_config`, with the `original` text (None where there was no such file) and the SHA-256 of the one
        `written`.

    Raises:
        BadInput: tokenizer_config.json cannot be read.
    """
    kept = _kept(found, directory, source, written)
    if SETTINGS not in kept.texts:
        return kept, {}
    path = directory / SETTINGS
    known = SETTINGS in {**found.copies, **found.texts} and path.is_file()
    original = read_bytes(path, MAX_JSON_BYTES).decode() if known else None
    record = {"original": original, "written": hashlib.sha256(kept.texts[SETTINGS]).hexdigest()}
    return kept, {"tokenizer_config": record}


def _kept(found: Companions, directory: Path, source: Mapping[str, Any], written: Mapping[str, Any]) -> Companions:
    before, after = source.get("model_type"), written.get("model_type")
    if before == after or not _has_tokenizer(found):
        return found
    record = _record(directory, found, after)
    if record is not None:
        return _restored(found, record["original"])
    text = found.texts.get(SETTINGS)
    path = found.copies.get(SETTINGS)
    held = json.loads(text) if text is not None else read_json(path) if path is not None else {}
    settings = dict(held)
    code = _code_named(settings)
    ours = code == _OURS
    if ours:
        settings["auto_map"] = {k: v for k, v in settings["auto_map"].items() if k != "AutoTokenizer"}
        if not settings["auto_map"]:
            del settings["auto_map"]
    elif code:
        return _of_its_own_code(found, _name(settings), code, before, after)
    levels = _is_byte_level(found)
    named = _name(settings) or _name(source)
    wanted = _class_named(named) if ours else _read_as(named, before, levels)
    in_four = named or _OWN_IN_FOUR.get(str(before))
    as_is = _name(settings) or _name(written)
    same_in_four = as_is is not None or _OWN_IN_FOUR.get(str(after)) == in_four
    if _read_as(as_is, after, levels) == wanted and same_in_four:
        return found if settings == held else _with(found, settings, needs_code=False)
    name = _PLAIN if wanted == AS_IT_STANDS else wanted
    if in_four and wanted in (_read_as(in_four, after, levels), _class_named(in_four)):
        name = _PLAIN if in_four == AS_IT_STANDS else in_four  # then 4.57 reads it as before, too
    needs_code = _read_as(name, after, levels) != wanted
    settings["tokenizer_class"] = name
    if name == _PLAIN and in_four != _PLAIN:
        # What 5's has, and 4.57's classes of language models; 4.57's of this name adds `token_type_ids`, which they refuse.
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if needs_code:
        settings["auto_map"] = {**settings.get("auto_map", {}), "AutoTokenizer": _OURS}
    return _with(found, settings, needs_code=needs_code, note=_note(found, in_four, name, after, needs_code))


def _read_as(named: str | None, model_type: Any, levels: bool) -> str:
    """The class transformers 5.23 reads a tokenizer with, where there is no `auto_map`.

    Args:
        named: `tokenizer_class`.
        model_type: of config.json.
        levels: tokenizer.json speaks of byte levels, which a LlamaTokenizer is not believed to have.
    """
    own = _OWN.get(model_type) if isinstance(model_type, str) else None
    if own is not None and (own == AS_IT_STANDS or named is None or model_type in _INSISTS):
        return own
    found = _class_named(named)
    return AS_IT_STANDS if found == "LlamaTokenizer" and levels else found


def _class_named(named: str | None) -> str:
    """The class a name alone stands for in transformers 5."""
    return AS_IT_STANDS if named is None or named in _PLAIN_NAMES else named.removesuffix("Fast")


def _name(config: Mapping[str, Any]) -> str | None:
    found = config.get("tokenizer_class")
    return found if isinstance(found, str) else None


def _code_named(settings: Mapping[str, Any]) -> list[str]:
    """The classes of the checkpoint's own that an `auto_map` names for the tokenizer."""
    auto_map = settings.get("auto_map")
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    return [one for one in (entry if isinstance(entry, list) else [entry]) if isinstance(one, str)]


def _has_tokenizer(found: Companions) -> bool:
    names = {*found.copies, *found.texts}
    return any(name.startswith(("tokenizer", "vocab")) or name.endswith((".model", ".tiktoken")) for name in names)


def _is_byte_level(found: Companions) -> bool:
    """Whether tokenizer.json holds the word transformers looks for."""
    path = found.copies.get("tokenizer.json")
    if path is None or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b'"ByteLevel"') >= 0


def _with(found: Companions, settings: Mapping[str, Any], *, needs_code: bool, note: str | None = None) -> Companions:
    texts = {**found.texts, SETTINGS: _encoded(settings)}
    if needs_code:
        texts[CODE] = (resources.files("llmconvert") / "models" / CODE).read_bytes()
    copies = {name: path for name, path in found.copies.items() if name not in (SETTINGS, CODE)}
    return replace(found, copies=copies, texts=texts, notes=(*found.notes, *([note] if note else [])))


def _encoded(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _note(found: Companions, in_four: str | None, name: str, model_type: Any, needs_code: bool) -> str:
    with_code = f" and has an `auto_map` to {CODE}" if needs_code else ""
    note = (
        f"{SETTINGS} names the class `{name}`{with_code}: without, transformers would read it with another beside a "
        f"`{model_type}`"
    )
    if in_four is None or _class_named(in_four) == _class_named(name):
        return note
    if "tokenizer.json" not in found.copies:
        return f"{note}; transformers 4, which read it as `{in_four}`, needs a tokenizer.json to read the same"
    return (
        f"{note}; transformers 4, which read it as `{in_four}`, now adds to a text what tokenizer.json alone says, and pads "
        "on the right unless told otherwise"
    )


def _record(directory: Path, found: Companions, model_type: Any) -> dict[str, Any] | None:
    """What was recorded when this tokenizer_config.json was written, where this is the way back and it is still that one."""
    source = (manifest.read(directory) or {}).get("source")
    record = source.get("tokenizer_config") if isinstance(source, dict) else None
    config = source.get("config") if isinstance(source, dict) else None
    if not isinstance(record, dict) or not isinstance(config, dict) or config.get("model_type") != model_type:
        return None
    path = found.copies.get(SETTINGS)
    if path is None or hashlib.sha256(read_bytes(path, MAX_JSON_BYTES)).hexdigest() != record.get("written"):
        return None
    return record if isinstance(record.get("original"), str | None) else None


def _restored(found: Companions, original: str | None) -> Companions:
    copies = {name: path for name, path in found.copies.items() if name not in (SETTINGS, CODE)}
    texts = {**found.texts, **({} if original is None else {SETTINGS: original.encode()})}
    note = f"{SETTINGS} is the original one" if original is not None else f"{SETTINGS} is left out, as in the original"
    return replace(found, copies=copies, texts=texts, notes=(*found.notes, f"{note}, as recorded"))


def _of_its_own_code(found: Companions, named: str | None, code: list[str], before: Any, after: Any) -> Companions:
    """A tokenizer with code of its own: that counts, but left out it is missed beside some types of model only."""
    own = {reference.rpartition(".")[2].removesuffix("Fast") for reference in code}
    known = named is not None and named.removesuffix("Fast") not in own
    if known or _OWN.get(after) is None or _OWN.get(before) is not None:
        return found
    note = (
        "the tokenizer has code of its own: load it with `trust_remote_code=True`. Without, transformers 5 may read another "
        f"one beside a `{after}`, and does not say so"
    )
    return replace(found, notes=(*found.notes, note))
