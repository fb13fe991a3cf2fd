"""Streamed generation against `generate` itself: tokens, text, stop strings, ends of rows, cancellation, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
)

from llmconvert.errors import Usage
from llmconvert.models.detokenize import TextPieces
from llmconvert.models.streaming import StreamEvent, stream_generate

TEXT = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind at all",
    "大语言模型把文字切成词元，再一个一个地预测下一个词元", "敏捷的棕色狐狸跳过了懒狗，懒狗并不在意",
    "tokens 词元 and characters 字符 are not the same: 一个字符 may be three tokens", "emoji 🦊 take four bytes 🐕",
]  # fmt: skip
PROMPTS = ["the quick 狐狸", "大语言", "emoji 🦊 are characters of four bytes"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so small that most Chinese characters are two or three tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model.eval()


SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "vocab_size": 330,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    assert len(tokenizer) == SIZES["vocab_size"]
    return randomised(LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16, attention_bias=True)))


class Speaks(LogitsProcessor):
    """Makes a random model say sentences of the training text, each row its own, and what it chooses between them."""

    def __init__(self, rows: Iterable[list[int]], prompt: int) -> None:
        self.rows, self.prompt = list(rows), prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt
        for row, said in enumerate(self.rows):
            if step < len(said):
                scores[row, said[step]] += 1e4
        return scores


def encoded(tokenizer: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)


def speaking(tokenizer: Any, said: list[str], prompts: list[str]) -> dict[str, Any]:
    width = encoded(tokenizer, prompts)["input_ids"].shape[1]
    return {"logits_processor": LogitsProcessorList([Speaks([tokenizer.encode(text) for text in said], width)])}


def collected(events: Iterator[StreamEvent], rows: int) -> tuple[list[list[int]], list[str]]:
    """Tokens and text of each row."""
    tokens: list[list[int]] = [[] for _ in range(rows)]
    pieces = [""] * rows
    for event in events:
        tokens[event.row] += event.token_ids
        pieces[event.row] += event.text
    return tokens, pieces


def generated(model: Any, tokenizer: Any, prompts: list[str], **kwargs: Any) -> list[list[int]]:
    """What `generate` returns behind the prompts."""
    inputs = encoded(tokenizer, prompts)
    found = model.generate(**inputs, tokenizer=tokenizer, **kwargs)[:, inputs["input_ids"].shape[1] :]
    return found.tolist()


def text(tokenizer: Any, tokens: list[int], skip: bool = True) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "batch"])
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "sampled", "penalised"],
)
def test_tokens_and_text_are_those_of_generate(
    model: Any, tokenizer: Any, how: dict[str, Any], prompts: list[str]
) -> None:
    torch.manual_seed(5)
    expected = generated(model, tokenizer, prompts, max_new_tokens=40, **how)
    torch.manual_seed(5)
    tokens, pieces = collected(stream_generate(model, tokenizer, prompts, max_new_tokens=40, **how), len(prompts))
    assert tokens == expected and len(tokens[0]) == 40
    assert pieces == [text(tokenizer, row) for row in expected]


def test_any_causal_model_and_ways_to_give_a_prompt(tokenizer: Any) -> None:
    model = randomised(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    inputs = encoded(tokenizer, PROMPTS)
    expected = generated(model, tokenizer, PROMPTS, max_new_tokens=9, do_sample=False)
    how = {"max_new_tokens": 9, "do_sample": False}
    mask = {"attention_mask": inputs["attention_mask"]}
    assert collected(stream_generate(model, tokenizer, inputs["input_ids"], **mask, **how), 3)[0] == expected
    alone = generated(model, tokenizer, PROMPTS[:1], **how)
    ids = torch.tensor(tokenizer.encode(PROMPTS[0]))
    for prompt in (PROMPTS[0], ids, ids[None]):
        assert collected(stream_generate(model, tokenizer, prompt, **how), 1)[0] == alone
    returned = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 9}
    torch.manual_seed(1)
    expected = generated(model, tokenizer, PROMPTS, **returned)
    torch.manual_seed(1)
    assert collected(stream_generate(model, tokenizer, PROMPTS, **returned), 6)[0] == expected


def test_a_piece_never_holds_part_of_a_character(model: Any, tokenizer: Any) -> None:
    said = [TEXT[1], TEXT[4], TEXT[3]]
    lengths = [len(tokenizer.encode(sentence)) for sentence in said]
    assert lengths[0] > len(said[0])  # characters in parts
    how = {"do_sample": False, "max_new_tokens": min(lengths), **speaking(tokenizer, said, PROMPTS)}
    events = list(stream_generate(model, tokenizer, PROMPTS, **how))
    tokens, pieces = collected(iter(events), 3)
    assert pieces == [text(tokenizer, row) for row in tokens]
    whole = [event for event in events if event.token_ids]
    assert any(event.text == "" for event in whole) and not any("\ufffd" in event.text for event in whole)
    # What is cut inside a character is decoded as `decode` does, at the very end.
    cut = next(n for n in range(lengths[0]) if text(tokenizer, tokens[0][:n]).endswith("\ufffd"))
    how["max_new_tokens"] = cut
    events = list(stream_generate(model, tokenizer, PROMPTS, **how))
    assert collected(iter(events), 3)[1][0] == text(tokenizer, tokens[0][:cut])
    assert StreamEvent(0, (), "\ufffd") in events


def test_rows_end_one_by_one(model: Any, tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": end}
    how |= {"pad_token_id": tokenizer.pad_token_id}
    how |= speaking(tokenizer, ["the lazy dog</s>", "狐狸跳过了</s>the", "the quick brown fox</s>"], PROMPTS)
    rows = generated(model, tokenizer, PROMPTS, **how)
    expected = [row[: row.index(end) + 1] for row in rows]
    assert len({len(row) for row in expected}) > 1 and any(len(row) < len(rows[0]) for row in expected)
    tokens, pieces = collected(stream_generate(model, tokenizer, PROMPTS, **how), 3)
    assert tokens == expected
    assert pieces == ["the lazy dog", "狐狸跳过了", "the quick brown fox"]
    shown = collected(stream_generate(model, tokenizer, PROMPTS, skip_special_tokens=False, **how), 3)[1]
    assert shown == ["the lazy dog</s>", "狐狸跳过了</s>", "the quick brown fox</s>"]
    # The same from the model's own settings, and switched off for one call.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [end, 5], 2
    try:
        own = {key: how[key] for key in ("do_sample", "max_new_tokens", "logits_processor")}
        assert collected(stream_generate(model, tokenizer, PROMPTS, **own), 3)[0] == expected
        endless = collected(stream_generate(model, tokenizer, PROMPTS, eos_token_id=None, **own), 3)[0]
        assert [len(row) for row in endless] == [60] * 3
    finally:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None


def up_to_stop(tokenizer: Any, row: list[int], stops: list[str]) -> list[int]:
    """The shortest beginning of a row whose text has a stop string."""
    return next((row[:n] for n in range(len(row) + 1) if any(s in text(tokenizer, row[:n]) for s in stops)), row)


SAID = [
    "the quick brown fox jumps over the lazy dog",
    "敏捷的棕色狐狸跳过了懒狗，懒狗",
    "tokens and characters are not the same",
]
STOPS = {
    "inside a token": ["ox j"], "across tokens": ["brown fox", "懒狗，"], "half of a word": ["char", "棕色"],
    "never": ["zebra"], "beginnings of one": ["jumps over a", "the lazy dogs", "quick"], "one character": ["z", "狐", "k"],
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_stop_strings_end_rows_as_generate_does(model: Any, tokenizer: Any, case: str) -> None:
    stops = STOPS[case]
    how = {"do_sample": False, "max_new_tokens": 30, **speaking(tokenizer, SAID, PROMPTS)}
    endless = generated(model, tokenizer, PROMPTS, **how)
    expected = [up_to_stop(tokenizer, row, stops) for row in endless]
    # The row that ends last is as long as all that `generate` returns.
    assert max(map(len, expected)) == len(generated(model, tokenizer, PROMPTS, stop_strings=stops, **how)[0])
    tokens, pieces = collected(stream_generate(model, tokenizer, PROMPTS, stop=stops, **how), 3)
    assert tokens == expected
    assert pieces == [text(tokenizer, row) for row in expected]
    tokens, pieces = collected(stream_generate(model, tokenizer, PROMPTS, stop=stops, include_stop=False, **how), 3)
    assert tokens == expected
    for row, piece in zip(expected, pieces, strict=True):
        whole = text(tokenizer, row)
        assert piece == whole[: min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))]
    assert (case == "never") == (expected == endless)


def test_stop_strings_and_the_end_of_sequence_pad_alike(model: Any, tokenizer: Any) -> None:
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": 1, "pad_token_id": 2}
    how |= speaking(tokenizer, [SAID[0], "狐狸</s>", SAID[2]], PROMPTS)
    rows = generated(model, tokenizer, PROMPTS, stop_strings=["fox"], **how)
    expected = [[token for token in row if token != 2] for row in rows]
    for stop in ({"stop": "fox"}, {"stop_strings": ["fox"]}, {"stop": "fox", "stop_strings": "zebra"}):
        tokens, pieces = collected(stream_generate(model, tokenizer, PROMPTS, **stop, **how), 3)
        assert tokens == expected and pieces[:2] == ["the quick brown fox", "狐狸"]


def test_a_stop_string_may_begin_in_the_prompt(model: Any, tokenizer: Any) -> None:
    prompts = ["the quick br"]
    how = {"do_sample": False, "max_new_tokens": 12, **speaking(tokenizer, ["own fox jumps"], prompts)}
    expected = generated(model, tokenizer, prompts, stop_strings=["brown f"], **how)
    for include, shown in ((True, text(tokenizer, expected[0])), (False, "")):
        found = stream_generate(model, tokenizer, prompts, stop=["brown f"], include_stop=include, **how)
        assert collected(found, 1) == (expected, [shown])
    # One that lies in the prompt altogether ends nothing.
    found = stream_generate(model, tokenizer, prompts, stop=["quick", "x ju"], include_stop=False, **how)
    assert collected(found, 1)[1] == ["own fo"]


def test_nothing_of_a_stop_string_is_seen_before_it_is_known(model: Any, tokenizer: Any) -> None:
    prompts = ["大语言"]
    how = {"do_sample": False, "max_new_tokens": 25, **speaking(tokenizer, [TEXT[0]], prompts)}
    seen = ""
    for event in stream_generate(
        model, tokenizer, prompts, stop=["fox jumps over it", "lazy dog"], include_stop=False, **how
    ):
        seen += event.text
        assert TEXT[0].startswith(seen)
        assert not seen.endswith(("fox", "jumps", "lazy")), "part of what may be a stop string"
    assert seen == TEXT[0][: TEXT[0].index("lazy dog")] or "lazy dog" not in text(
        tokenizer, tokenizer.encode(TEXT[0])[:25]
    )


def test_a_stop_string_known_only_afterwards(tokenizer: Any) -> None:
    """With an assistant it is: until then the text behind it is held, and given out if the row goes on after all."""
    for stopped, shown in ((True, "the "), (False, "the quick brown fox")):
        pieces = TextPieces(tokenizer, True, ["quick"], [])
        assert pieces.add(tokenizer.encode("the quick brown")) == "the "
        last = pieces.add([] if stopped else tokenizer.encode(" fox"), last=True, stopped=stopped)
        assert "the " + last == shown


class Third(StoppingCriteria):
    """Ends each row of a batch at its third new token but for the first, which never ends."""

    def __init__(self, prompt: int) -> None:
        self.length = prompt + 3

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)
        done[0] = False
        return done


def test_stopping_criteria_of_ones_own(model: Any, tokenizer: Any) -> None:
    width = encoded(tokenizer, PROMPTS)["input_ids"].shape[1]
    how = {"do_sample": False, "max_new_tokens": 8}
    rows = generated(model, tokenizer, PROMPTS, stopping_criteria=[Third(width)], **how)
    tokens, _ = collected(stream_generate(model, tokenizer, PROMPTS, stopping_criteria=[Third(width)], **how), 3)
    assert tokens == [rows[0], rows[1][:3], rows[2][:3]]


def test_drafted_tokens(model: Any, tokenizer: Any) -> None:
    """An assistant's tokens are handed over several at a time."""
    prompts = ["the quick brown fox the quick brown fox the quick"]
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "prompt_lookup_num_tokens": 3}
    how |= speaking(tokenizer, [" brown fox the quick brown fox the quick brown"], prompts)
    expected = generated(model, tokenizer, prompts, **how)
    events = list(stream_generate(model, tokenizer, prompts, **how))
    assert collected(iter(events), 1) == (expected, [text(tokenizer, expected[0])])
    assert max(len(event.token_ids) for event in events) > 1
    cut = stream_generate(model, tokenizer, prompts, stop=["fox the qu"], include_stop=False, **how)
    assert collected(cut, 1)[1] == [" brown "]


class Counts(StoppingCriteria):
    """Counts steps and ends nothing; waits a little, as a larger model would."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        time.sleep(0.005)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stream_generate"]


LONG: dict[str, Any] = {"do_sample": False, "max_new_tokens": 400}


@pytest.mark.parametrize("how", ["break", "close", "exception"])
def test_whoever_leaves_ends_the_generation(model: Any, tokenizer: Any, how: str) -> None:
    counts = Counts()
    events = stream_generate(model, tokenizer, PROMPTS, stopping_criteria=[counts], **LONG)
    assert not running() and counts.steps == 0  # it begins with the first `next`
    if how == "close":
        next(events)
        assert running()
        events.close()
    elif how == "exception":
        with pytest.raises(KeyError):
            events.throw(KeyError) if next(events) else None
    else:
        for _ in events:
            break
        del events
    assert not running() and 0 < counts.steps < 100


def test_cancelling_from_another_thread(model: Any, tokenizer: Any) -> None:
    counts, cancel = Counts(), threading.Event()
    events = stream_generate(model, tokenizer, PROMPTS, stopping_criteria=[counts], cancel=cancel, **LONG)
    found = [next(events) for _ in range(6)]
    timer = threading.Timer(0.05, cancel.set)
    timer.start()
    found += list(events)
    timer.join()
    tokens, pieces = collected(iter(found), 3)
    assert not running() and counts.steps < 200
    # What came until then has been yielded whole, and is what `generate` gives.
    assert {len(row) for row in tokens} == {counts.steps}
    expected = generated(model, tokenizer, PROMPTS, **{**LONG, "max_new_tokens": counts.steps})
    assert tokens == expected and pieces == [text(tokenizer, row) for row in expected]
    assert not list(stream_generate(model, tokenizer, PROMPTS, cancel=cancel, **LONG)), "cancelled before it began"


class Breaks(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] > 20:
            raise RuntimeError("broke")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_an_exception_reaches_the_consumer(model: Any, tokenizer: Any) -> None:
    found = []
    with pytest.raises(RuntimeError, match="broke"):
        for event in stream_generate(model, tokenizer, PROMPTS[0], stopping_criteria=[Breaks()], **LONG):
            found.append(event)
    assert found and not running()
    with pytest.raises(ValueError, match="beam"):
        list(stream_generate(model, tokenizer, PROMPTS, num_beams=2, max_new_tokens=3))
    assert not running()


def test_autocast_of_the_caller_holds(model: Any, tokenizer: Any) -> None:
    seen = []

    class Sees(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return scores

    how = {"max_new_tokens": 12, "do_sample": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = generated(model, tokenizer, PROMPTS, **how)
        events = stream_generate(model, tokenizer, PROMPTS, logits_processor=[Sees()], **how)
    assert collected(events, 3)[0] == expected
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ("", {}, "no tokens"),
        (torch.zeros(2, 0, dtype=torch.long), {}, "not .batch, length."),
        ("the", {"streamer": object()}, "streamer of its own"),
        ("the", {"stop": ["dog", ""]}, "stop string is empty"),
    ],
)
def test_misuse_is_named_at_once(model: Any, tokenizer: Any, prompts: Any, options: Any, message: str) -> None:
    with pytest.raises(Usage, match=message):
        stream_generate(model, tokenizer, prompts, **options)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces as in SentencePiece, the first one dropped, and unknown characters as bytes."""
    bytes_ = {f"<0x{k:02X}>": k for k in range(256)}
    pieces = ["▁the", "▁fox", "▁", "x", "狐", "</s>", *"abcdefghijklmnopqrstuvwyz"]
    vocabulary = bytes_ | {piece: 256 + k for k, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="</s>"))
    replace = decoders.Replace("▁", " ")
    bpe.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["▁the", "▁fox", "▁", "x", "狐", "</s>", "词", "🦊", "é"]), max_size=14), st.booleans())
def test_pieces_of_a_tokenizer_with_byte_fallback(words: list[str], skip: bool) -> None:
    tokenizer = sentencepiece_like()
    tokens: list[int] = []
    for word in words:
        known = tokenizer.get_vocab().get(word)
        tokens += [known] if known is not None else list(word.encode())
    pieces = TextPieces(tokenizer, skip, (), ())
    found = [pieces.add([token], last=k == len(tokens) - 1) for k, token in enumerate(tokens)]
    assert "".join(found) == text(tokenizer, tokens, skip)
    assert not any("\ufffd" in piece for piece in found)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_bytes(tokenizer: Any, data: st.DataObject) -> None:
    """Random tokens, whole characters or not: the pieces make up what `decode` makes of all of them."""
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    skip = data.draw(st.booleans())
    pieces = TextPieces(tokenizer, skip, (), ())
    found = "".join(pieces.add([token], last=k == len(tokens) - 1) for k, token in enumerate(tokens))
    assert found == text(tokenizer, tokens, skip)


@settings(max_examples=150, deadline=None)
@given(
    said=st.text(alphabet="ab狐", max_size=20),
    stops=st.lists(st.text(alphabet="ab狐", min_size=1, max_size=4), min_size=1, max_size=3),
    prompt=st.text(alphabet="ab狐", max_size=4),
)
def test_text_before_stop_strings(tokenizer: Any, said: str, stops: list[str], prompt: str) -> None:
    """Token by token, against a search in the whole text: what ends first ends the row."""
    tokens = tokenizer.encode(said)
    pieces = TextPieces(tokenizer, True, stops, tokenizer.encode(prompt))
    found = ""
    for n in range(1, len(tokens) + 1):
        so_far = text(tokenizer, tokens[:n])
        whole = prompt + so_far.rstrip("\ufffd")
        # Of those that do not lie in the prompt altogether.
        starts = [whole.find(stop, max(len(prompt) - len(stop) + 1, 0)) for stop in stops]
        stopped = any(start >= 0 for start in starts)
        found += pieces.add([tokens[n - 1]], last=stopped or n == len(tokens), stopped=stopped)
        if stopped:
            first = min(start for start in starts if start >= 0)
            assert found == whole[len(prompt) : max(first, len(prompt))]
            return
    assert found == said
