"""Tiny tokenizers of the forms models are published with, trained here: tokenizer.json, settings, vocabularies.

Their pipelines are those of the published files, so that what a class of transformers builds instead differs from them
where it does for the models: digits in threes, a prefix at every special token, a normal form.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog's back, isn't it? It's 2024 and 12345678 people.",
    "def f(x):\n    return x**2  # comment\n\n\tif y: pass\n", "Привет, мир! Как дела? Это тест.", "你好，世界！今天天气很好。",
    "こんにちは世界。テストです。", "안녕하세요 세계", "مرحبا بالعالم", "Ünïcödé é ﬁ ½ Å", "😀🎉👍🏽", "hello   world  spaces   many",
    "1234567890 3.14159 1,000,000",
)  # fmt: skip
_THREES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ONES = _THREES.replace(r"\p{N}{1,3}", r"\p{N}")
_DEEPSEEK = r"[\r\n]|\s?\p{L}+|\s?\p{P}+|\p{N}"
TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def corpus() -> list[str]:
    """A few hundred shuffled sentences, always the same."""
    chance, found = random.Random(0), []
    for _ in range(300):
        words = chance.choice(_SENTENCES).split(" ")
        chance.shuffle(words)
        found.append(" ".join(words))
    return found


def _byte_level(regex: str | None, special: tuple[str, ...], *, nfc: bool = False, bos: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=bos))
    if nfc:
        made.normalizer = normalizers.NFC()
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    made.pre_tokenizer = (
        levels if regex is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), levels])
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        made.post_processor = _adding(made, special[0])
    return made


def _adding(made: Tokenizer, bos: str) -> processors.PostProcessor:
    identity = made.token_to_id(bos)
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, identity)]
    )


def _pieces(special: tuple[str, ...], bos: str, *, style: str) -> Tokenizer:
    """Byte-pair pieces with `▁` for spaces and bytes to fall back on, as sentencepiece makes them."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=420, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    names = [*first, *(token for token in learned["vocab"] if token not in first)]
    made = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    restore = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "gemma":
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif style == "legacy":  # Llama 2, Mistral 7B: a prefix after every special token
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        restore.append(decoders.Strip(" ", 1, 0))
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        restore.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(restore)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.post_processor = _adding(made, bos)
    return made


def _described(made: Tokenizer) -> dict[str, Any]:
    return {
        str(number): {"content": t.content, "lstrip": t.lstrip, "normalized": t.normalized, "rstrip": t.rstrip,
                      "single_word": t.single_word, "special": t.special}
        for number, t in sorted(made.get_added_tokens_decoder().items())
    }  # fmt: skip


def _llama3() -> tuple[Tokenizer, dict[str, Any]]:
    made = _byte_level(_THREES, ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), bos=True)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return made, {"added_tokens_decoder": _described(made), **names, "clean_up_tokenization_spaces": True}


def _qwen2() -> tuple[Tokenizer, dict[str, Any]]:
    made = _byte_level(_ONES, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), nfc=True)
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    more = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": False}
    return made, {"added_tokens_decoder": _described(made), **names, **more, "add_prefix_space": False}


def _deepseek() -> tuple[Tokenizer, dict[str, Any]]:
    made = _byte_level(_DEEPSEEK, ("<bos>", "<eos>"))
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {key: {**token, "content": f"<{key[:3]}>"} for key in ("bos_token", "eos_token")}
    return made, {**names, "pad_token": names["eos_token"], "unk_token": None, "add_bos_token": True, "legacy": True}


def _gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    return _byte_level(None, ("<|endoftext|>",)), {**names, "add_prefix_space": False}


def _qwen2_files() -> tuple[dict[str, bytes], dict[str, Any]]:
    """As saved by the slow class: no tokenizer.json."""
    made, settings = _qwen2()
    model = json.loads(made.to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    return {"vocab.json": vocabulary.encode(), "merges.txt": ("\n".join(merges) + "\n").encode()}, settings


def _pieces_file() -> tuple[dict[str, bytes], dict[str, Any]]:
    """A sentencepiece model alone."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.txt"
        text.write_text("\n".join(line.replace("\n", " ") for line in corpus()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/tokenizer", model_type="bpe", vocab_size=560, byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
            hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2,
        )  # fmt: skip
        file = (Path(folder) / "tokenizer.model").read_bytes()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
    return {"tokenizer.model": file}, {**names, "add_bos_token": True, "add_eos_token": False, "legacy": True}


def _llama2(style: str) -> tuple[Tokenizer, dict[str, Any]]:
    made = _pieces(("<unk>", "<s>", "</s>"), "<s>", style=style)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
    more = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return made, {"added_tokens_decoder": _described(made), **names, **more, "legacy": style == "legacy"}


def _gemma() -> tuple[Tokenizer, dict[str, Any]]:
    made = _pieces(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"), "<bos>", style="gemma")
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    return made, {"added_tokens_decoder": _described(made), **names, "add_bos_token": True, "add_eos_token": False}


FORMS: dict[str, Callable[[], tuple[Tokenizer | dict[str, bytes], dict[str, Any]]]] = {
    "llama3": _llama3,
    "qwen2": _qwen2,
    "deepseek": _deepseek,
    "gpt2": _gpt2,
    "llama2": lambda: _llama2("legacy"),
    "mistral": lambda: _llama2("metaspace"),
    "gemma": _gemma,
    "qwen2_files": _qwen2_files,
    "pieces": _pieces_file,
}


def write(form: str, directory: Path, named: str | None = None, **settings: Any) -> Path:
    """Put a tokenizer into a directory.

    Args:
        form: one of `FORMS`.
        directory: made if absent.
        named: the class its settings name; None for no name.
        settings: further settings, or others in place of the form's own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files, own = _made(form)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    names = {} if named is None else {"tokenizer_class": named}
    text = json.dumps({**own, "model_max_length": 256, "chat_template": TEMPLATE, **settings, **names}, indent=4)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return directory


_DONE: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {}


def _made(form: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    if form not in _DONE:
        made, settings = FORMS[form]()
        files = made if isinstance(made, dict) else {"tokenizer.json": made.to_str().encode()}
        _DONE[form] = files, settings
    return _DONE[form]
