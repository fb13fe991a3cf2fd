"""Whether two directories hold one tokenizer, by what transformers makes of them: ids, texts, special tokens, templates.

The files alone do not tell: transformers picks a tokenizer's class by config.json as well. Code of a checkpoint's own is
never run; where a tokenizer needs it, its files are compared byte for byte.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.files import check_inside

TEXTS: tuple[str, ...] = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure you're right; it's WE'LL, they'd've DON'T",
    " one  two   three    four ",
    "    indented\n\tby tab\r\n\r\nand\n\n\nblank lines\n ",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F ½ ² ٣ 五",
    'def f(x, *, y=None):\n    """Docs."""\n    return x ** 2 if x >= 0 else {"k": [x, -1]}  # why\n',
    "for (int i = 0; i < n; ++i) { a[i] += b->c; }\t// done",
    "Straße, naïve café, œuvre, İstanbul, ǅ, ﬁne",
    "e\u0301 \u00e9 \u1e9b\u0323 \u212b \uff21\uff22\uff23 \ufb01 \u0130",
    "Привет, мир! Ещё раз: съешь же этих мягких булок.",
    "Γειά σου Κόσμε, τι κάνεις;",
    "你好，世界！今天天气很好，我们去公园散步吧。",
    "繁體中文與㐀𠀀𪚥罕用字",
    "こんにちは世界。カタカナ、ﾊﾝｶｸ、漢字。",
    "안녕하세요 세계 \u1112\u1161\u11ab",
    "שלום עולם مرحبا بالعالم ١٢٣ \u202bRTL\u202c",
    "नमस्ते दुनिया। สวัสดีชาวโลก ክብር Բարև გამარჯობა",
    "🙂 👩‍👩‍👧‍👦 🇪🇺 👍🏽 ❤️ \U0001f9d1\u200d\U0001f680",
    "\u0000\u0001\u0007\u001b[0m\u007f\u0085\u00a0\u00ad\u200b\u2028\u3000\ufeff\ufffd",
    "\u2581under\u2581score \u0120space \u010anewline ## @@ </w> <0x0A>",
    "https://example.com/a?b=c&d=%20#e user@example.org C:\\path\\file",
    "∑∫√∞≠≤ x² + y² = z² \\frac{a}{b} $\\alpha$",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!????....----____",
    "<s> </s> <unk> <pad> <|endoftext|> <|im_start|>user\n[INST] <<SYS>> [/INST]",
)
"""Scripts, spaces, digits, code, control characters, normal forms, and what other tokenizers treat apart."""

_SETTINGS = "tokenizer_config.json"
_OURS = "tokenization_llmconvert."
_FILES = (
    "tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt",
    "merges.txt", _SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_OTHERS, _TEMPLATES = ("*.tiktoken", "tokenization_*.py"), "additional_chat_templates"
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BEHAVIOUR = (
    "model_max_length", "truncation_side", "model_input_names", "clean_up_tokenization_spaces", "split_special_tokens",
)  # fmt: skip
_PER_TEXT = 50
_IDS_PER_RUN, _RUNS = 64, 64


@dataclass(frozen=True)
class SameTokenizer:
    """What a comparison of two tokenizers found.

    Attributes:
        verdict: whether they are one; None where that could not be told.
        reason: the same in words.
        texts: how many texts were put through both.
        classes: the classes transformers took, the first's and the second's.
        version: of transformers.
        notes: what differs without changing a text's tokens.
    """

    verdict: bool | None
    reason: str
    texts: int = 0
    classes: tuple[str, ...] = ()
    version: str = ""
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def is_told_from_files(left: Path) -> bool:
    """Whether `compare_tokenizers` loads nothing: there is no tokenizer, nothing to load it, or it has code of its own."""
    home = _home(left)
    return not _holds_tokenizer(home) or find_spec("transformers") is None or needs_code(home)


def files_of(directory: Path) -> list[Path]:
    """The files a directory's tokenizer is read from."""
    home = _home(directory)
    patterns = (*_FILES, *_OTHERS, f"{_TEMPLATES}/*.jinja")
    return sorted({path for pattern in patterns for path in home.glob(pattern) if path.is_file()})


def compare_tokenizers(left: Path, right: Path) -> SameTokenizer:
    """Load the tokenizers of two directories and compare all they do.

    Compared are the vocabulary, merges, special and added tokens, ids with and without special tokens, offsets, pairs,
    texts from ids, and the chat templates. The network is not touched.

    Args:
        left: a directory with config.json.
        right: another.

    Raises:
        BadInput: a file is a link out of its directory.
    """
    check_links(left, right)
    left, right = _home(left), _home(right)
    if not _holds_tokenizer(left):
        return SameTokenizer(None, "there is no tokenizer")
    if find_spec("transformers") is None:
        return SameTokenizer(None, "not compared: transformers is not installed")
    if needs_code(left):
        return _compare_files(left, right)
    try:
        with _quiet():
            return _compare(left, right)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of several libraries, down to panics of Rust, which are no `Exception`
        return SameTokenizer(None, f"not compared: {_first_line(error)}")


def _compare(left: Path, right: Path) -> SameTokenizer:
    import transformers

    version = str(transformers.__version__)
    try:
        first = _load(left)
    except Exception as error:
        return SameTokenizer(
            None, f"not compared: transformers cannot read the source's: {_first_line(error)}", version=version
        )
    try:
        second = _load(right)
    except Exception as error:
        if _is_newer(right):
            return SameTokenizer(None, f"not compared: it is for transformers 5: {_first_line(error)}", version=version)
        return SameTokenizer(False, f"transformers cannot read it: {_first_line(error)}", version=version)
    classes = (type(first).__name__, type(second).__name__)
    texts, one = _texts(first), _one_engine(first, second)
    checks = [check for check in _CHECKS if not (one and check in _OF_ENGINES)]
    found = next(filter(None, (check(first, second, texts) for check in checks)), None)
    notes = _notes(first, second)
    if found is not None:
        how = f"{classes[0]} and {classes[1]}" if classes[0] != classes[1] else f"both {classes[0]}"
        return SameTokenizer(False, f"{found} ({how})", len(texts), classes, version, notes)
    template = "the chat template" if getattr(first, "chat_template", None) else "no chat template"
    reason = f"the same: {len(first):,} tokens, {len(texts)} texts, {template}"
    return SameTokenizer(True, reason, len(texts), classes, version, notes)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def needs_code(directory: Path) -> bool:
    """Whether a directory's tokenizer is a class of the checkpoint's own."""
    entries = []
    for name in (_SETTINGS, "config.json"):
        auto_map = _object(directory / name).get("auto_map")
        entries.append(auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map)
    named = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry])]
    return any(isinstance(one, str) and not one.startswith(_OURS) for one in named)


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    except (ValueError, RecursionError, OSError):
        return {}  # whoever loads it will say so
    return found if isinstance(found, dict) else {}


def _holds_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _VOCABULARIES) or bool(list(directory.glob("*.tiktoken")))


def check_links(left: Path, right: Path) -> None:
    """Refuse files that transformers would open although a link leads to them, out of the checkpoint.

    Raises:
        BadInput: naming the first, where there is a tokenizer at all.
    """
    for root in (left, right) if _holds_tokenizer(_home(left)) else ():
        home = _home(root)
        paths = [home / name for name in _FILES] + [home / _TEMPLATES]
        for pattern in (*_OTHERS, "*.model", "vocab*", f"{_TEMPLATES}/*"):
            paths += sorted(home.glob(pattern))
        for path in paths:
            if path.exists():
                check_inside(root, path)


def _home(directory: Path) -> Path:
    """Where a checkpoint's tokenizer is: a Megatron checkpoint that `split` wrote has it in a folder."""
    inner = directory / "hf"
    return inner if not _holds_tokenizer(directory) and _holds_tokenizer(inner) else directory


def _compare_files(left: Path, right: Path) -> SameTokenizer:
    """By their bytes, where running them would run code of the checkpoint's."""
    names = [name for name in _FILES if (left / name).is_file() and name != _SETTINGS]
    patterns = (*_OTHERS, f"{_TEMPLATES}/*.jinja")
    names += sorted(
        str(path.relative_to(left)) for pattern in patterns for path in left.glob(pattern) if path.is_file()
    )
    for name in names:
        if not (right / name).is_file():
            return SameTokenizer(False, f"`{name}` is missing")
        if (left / name).read_bytes() != (right / name).read_bytes():
            return SameTokenizer(
                False, f"`{name}` differs, and the tokenizer needs code of its own, which is not run here"
            )
    before, after = ({**_object(path / _SETTINGS), "auto_map": None} for path in (left, right))
    key = next((key for key in {**before, **after} if before.get(key) != after.get(key)), None)
    if key is not None:
        return SameTokenizer(False, f"`{key}` in {_SETTINGS} differs")
    own = "it has code of its own, which is not run here"
    return SameTokenizer(True, f"the same files, byte for byte ({len(names)} of them); {own}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers without its warnings: what matters is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)


def _load(directory: Path) -> Any:
    """A directory's tokenizer.

    Raises:
        Exception: of whatever kind a library chose.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(directory.resolve()), local_files_only=True, trust_remote_code=False)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust
        raise ValueError(str(error)) from None
    if not callable(found):
        raise ValueError("it has no form that transformers reads")
    return found


def _is_newer(directory: Path) -> bool:
    """Whether a tokenizer names a class that only transformers 5 has, and this is not it."""
    import transformers

    named = _object(directory / _SETTINGS).get("tokenizer_class")
    return named == "TokenizersBackend" and not hasattr(transformers, "TokenizersBackend")


def _texts(tokenizer: Any) -> tuple[str, ...]:
    """The texts, and every added token in the middle of one."""
    added = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().get)
    runs = (added[start : start + _PER_TEXT] for start in range(0, len(added), _PER_TEXT))
    return (*TEXTS, *("".join(f"x{token}  y {token}" for token in run) + "\n" for run in runs))


def _engine(tokenizer: Any) -> str | None:
    """What does the work below a fast tokenizer, as text: vocabulary, merges, normal form, splitting and all."""
    write = getattr(getattr(tokenizer, "backend_tokenizer", None), "to_str", None)
    return None if write is None else str(write())


def _one_engine(first: Any, second: Any) -> bool:
    left = _engine(first)
    return left is not None and left == _engine(second)


def _vocabulary(first: Any, second: Any, texts: Sequence[str]) -> str | None:
    before, after = first.get_vocab(), second.get_vocab()
    if before != after:
        token = next(t for t in (*before, *after) if before.get(t) != after.get(t))
        return f"the token {token!r} has the id {after.get(token)}, in the source {before.get(token)}"
    return None


def _merges(first: Any, second: Any, texts: Sequence[str]) -> str | None:
    left, right = _engine(first), _engine(second)
    if left is None or right is None:
        return None
    before, after = (json.loads(one)["model"].get("merges") or [] for one in (left, right))
    if before != after:
        rank = next(
            (k for k, (b, a) in enumerate(zip(before, after, strict=False)) if b != a), min(len(before), len(after))
        )
        return f"the merges differ from the {rank + 1:,}th on"
    return None


def _special(first: Any, second: Any, texts: Sequence[str]) -> str | None:
    for name in _SPECIAL:
        before, after = ((_text(getattr(t, name, None)), getattr(t, f"{name}_id", None)) for t in (first, second))
        if before != after:
            return f"`{name}` is {after[0]!r} (id {after[1]}), in the source {before[0]!r} (id {before[1]})"
    for name in ("all_special_tokens", "all_special_ids"):
        left, right = (sorted(getattr(tokenizer, name)) for tokenizer in (first, second))
        if left != right:
            odd = sorted(set(left) ^ set(right))
            return f"the special tokens differ: {odd[:4]}"
    left_added, right_added = (
        {
            i: (str(t), t.special, t.lstrip, t.rstrip, t.normalized, t.single_word)
            for i, t in of.added_tokens_decoder.items()
        }
        for of in (first, second)
    )
    if left_added != right_added:
        odd_id = next(i for i in (*left_added, *right_added) if left_added.get(i) != right_added.get(i))
        return f"the added token {odd_id} is {right_added.get(odd_id)}, in the source {left_added.get(odd_id)}"
    return None


def _behaviour(first: Any, second: Any, texts: Sequence[str]) -> str | None:
    for name in _BEHAVIOUR:
        before, after = (getattr(tokenizer, name, None) for tokenizer in (first, second))
        if before != after:
            return f"`{name}` is {after!r}, in the source {before!r}"
    return None


def _ids(first: Any, second: Any, texts: Sequence[str]) -> str | None:
    for text in texts:
        for special in (False, True):
            before, after = (_encoded(tokenizer, text, special=special) for tokenizer in (first, second))
            if before != after:
                if not isinstance(before, dict) or not isinstance(after, dict):
                    return f"{_shown(text)}: {after}, in the source {before}"
                key = next(k for k in (*before, *after) if before.get(k) != after.get(k))
                return f"{_shown(text)} has the {key} {_around(before, after, key)}"
        # Both encode alike from here on: one set of ids serves both.
        ids = _encoded(first, text, special=True)
        if isinstance(ids, dict):
            found = _decoded(first, second, ids["input_ids"])
            if found is not None:
                return found
    pairs = [_guarded(partial(_pair, of)) for of in (first, second)]
    return None if pairs[0] == pairs[1] else f"a pair of texts has the ids {pairs[1]}, in the source {pairs[0]}"


def _pair(tokenizer: Any) -> list[int]:
    return list(tokenizer(TEXTS[1], TEXTS[3])["input_ids"])


def _texts_of_ids(first: Any, second: Any, texts: Sequence[str]) -> str | None:
    """Runs of ids from all over the vocabulary: what no text made of words reaches."""
    step = max(1, len(first) // (_RUNS * _IDS_PER_RUN))
    for run in range(_RUNS):
        ids = [(run + _RUNS * k) * step % len(first) for k in range(_IDS_PER_RUN)]
        found = _decoded(first, second, ids)
        if found is not None:
            return found
    return None


def _decoded(first: Any, second: Any, ids: list[int]) -> str | None:
    for skip in (False, True):
        before, after = (_guarded(partial(of.decode, ids, skip_special_tokens=skip)) for of in (first, second))
        if before != after:
            return f"the ids {ids[:16]} are the text {_shown(after)}, in the source {_shown(before)}"
    return None


def _templates(first: Any, second: Any, texts: Sequence[str]) -> str | None:
    """Templates are compared, not run: a program of the checkpoint's may take for ever, or all memory.

    What one writes depends on its text, on the special tokens by name, and on the method that runs it.
    """
    before, after = (getattr(tokenizer, "chat_template", None) for tokenizer in (first, second))
    if before != after:
        return "the chat template differs" if before and after else f"there is {'no' if before else 'a'} chat template"
    if not before:
        return None
    given = [{name: str(token) for name, token in of.special_tokens_map.items()} for of in (first, second)]
    if given[0] != given[1]:
        return f"the chat template is given {_shown(given[1])}, in the source {_shown(given[0])}"
    ways = [getattr(type(of), "apply_chat_template", None) for of in (first, second)]
    return None if ways[0] is ways[1] else "the two classes write chats each in a way of its own"


_CHECKS: tuple[Callable[[Any, Any, Sequence[str]], str | None], ...] = (
    _vocabulary, _special, _ids, _texts_of_ids, _merges, _templates, _behaviour,
)  # fmt: skip
_OF_ENGINES = (_vocabulary, _merges)
"""What two engines that are one need not be asked."""


def _notes(first: Any, second: Any) -> tuple[str, ...]:
    sides = [getattr(tokenizer, "padding_side", None) for tokenizer in (first, second)]
    if sides[0] == sides[1]:
        return ()
    return (f"batches are padded on the {sides[1]} unless told otherwise, with the source on the {sides[0]}",)


def _encoded(tokenizer: Any, text: str, *, special: bool) -> Any:
    """What a tokenizer returns for a text, as plain lists; its error where it raises one."""
    offsets = bool(getattr(tokenizer, "is_fast", False))

    def encode() -> dict[str, Any]:
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=offsets, return_token_type_ids=True)
        return {key: [tuple(v) if isinstance(v, list | tuple) else v for v in value] for key, value in found.items()}

    return _guarded(encode)


def _guarded(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust, too; both are to raise alike
        return f"{type(error).__name__}: {error}"


def _text(token: Any) -> str | None:
    return None if token is None else str(token)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…" + text[0]


def _around(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    left, right = before.get(key), after.get(key)
    if not isinstance(left, list) or not isinstance(right, list):
        return f"{right}, in the source {left}"
    start = next((k for k, (b, a) in enumerate(zip(left, right, strict=False)) if b != a), min(len(left), len(right)))
    begin = max(0, start - 2)
    return f"{right[begin : begin + 8]} from number {begin} on, in the source {left[begin : begin + 8]}"
