"""Generation, token by token while it runs, for any causal language model of transformers and any batch.

`generate` runs in a thread of its own; what it hands to a streamer comes out of a generator here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from llmconvert.errors import Usage
from llmconvert.models.detokenize import TextPieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StreamEvent:
    """What a step of generation adds to one row.

    Attributes:
        row: of the batch.
        token_ids: new tokens; one, or several where an assistant drafts them. None in an event that only hands over
            text held back to the end.
        text: new text, of whole characters. It may be "" where a character, or perhaps a stop string, has begun.
    """

    row: int
    token_ids: tuple[int, ...]
    text: str


def stream_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str] | Tensor,
    *,
    stop: str | Sequence[str] = (),
    include_stop: bool = True,
    skip_special_tokens: bool = True,
    cancel: threading.Event | None = None,
    **generate_kwargs: Any,
) -> Generator[StreamEvent, None, None]:
    """Generate, and yield tokens and text of all rows as they come.

    The tokens of a row are those `model.generate` returns for it, up to where the row ends: at an end-of-sequence token,
    with the token that completes a stop string, where a `stopping_criteria` says, or with the generation. Sampling gives
    what `generate` gives under the same seed, if nobody draws from torch's generator meanwhile. The pieces of a row's
    text make up `tokenizer.decode(tokens, clean_up_tokenization_spaces=False)`. (One exception: a SentencePiece
    tokenizer decodes bytes that stop inside a character to one replacement sign for every byte of the run, including
    those of characters that were whole before, which have been yielded by then.)

    Generation starts with the first `next()`. Closing the generator (leaving the loop, `.close()`, an exception in the
    consumer) ends it at the next token, and waits for that.

    Args:
        model: any causal language model of transformers.
        tokenizer: its tokenizer.
        prompts: texts, which are padded on the left; or input ids, [batch, length] or [length], with `attention_mask`
            [batch, length] among `generate_kwargs` where they are padded.
        stop: strings that end a row, as `stop_strings` of `generate`: with the token that completes one.
        include_stop: yield the text of all tokens, as `generate` returns them, which ends in the stop string or in what
            its last token adds to it. If False, a row's text ends before its first stop string: nothing that may turn
            out to belong to one is yielded until it is known.
        skip_special_tokens: leave special tokens out of the text.
        cancel: setting it, from any thread, ends the generation at the next token, like max_new_tokens would.
        generate_kwargs: for `generate`.

    Raises:
        Usage: there is nothing to continue, or a streamer is given. What `generate` raises is raised by the generator.
    """
    if "streamer" in generate_kwargs:
        raise Usage("`stream_generate` has a streamer of its own", hint="call `model.generate` to use another")
    inputs = _inputs(tokenizer, prompts)
    config = generate_kwargs.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        """As `generate` settles it: by argument, by the config given, by the model's."""
        if name in generate_kwargs:
            return generate_kwargs[name]
        found = getattr(config, name, None)
        return getattr(model.generation_config, name, None) if found is None else found

    stops = tuple(dict.fromkeys(_strings(stop) + _strings(setting("stop_strings") or ())))
    eos = setting("eos_token_id")
    criteria = StoppingCriteriaList(generate_kwargs.pop("stopping_criteria", None) or [])
    if eos is not None:
        criteria.append(EosTokenCriteria(eos))
    matcher = StopStringCriteria(tokenizer, list(stops)) if stops else None
    ends = _Ends(criteria, matcher, cancel)
    generate_kwargs.pop("stop_strings", None)
    kwargs = {key: value.to(model.device) for key, value in inputs.items()} | generate_kwargs
    kwargs |= {"stopping_criteria": StoppingCriteriaList([ends]), "tokenizer": tokenizer}
    steps = _Steps(ends)
    thread = threading.Thread(
        target=_run, args=(model, kwargs, steps, _surroundings(model)), name="stream_generate", daemon=True
    )

    def text_of(prompt: Sequence[int]) -> TextPieces:
        return TextPieces(tokenizer, skip_special_tokens, () if include_stop else stops, prompt)

    return _events(thread, steps, ends, text_of)


def _strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise Usage("a stop string is empty", hint="leave it out")
    return stops


def _inputs(tokenizer: PreTrainedTokenizerBase, prompts: str | Sequence[str] | Tensor) -> dict[str, Tensor]:
    """Input ids [batch, length], and the attention mask of texts."""
    if isinstance(prompts, Tensor):
        ids = prompts[None] if prompts.ndim == 1 else prompts
        if ids.ndim != 2 or not ids.numel():
            raise Usage(f"input ids of shape {list(prompts.shape)} are not [batch, length]")
        return {"input_ids": ids}
    rows = [tokenizer(text)["input_ids"] for text in ([prompts] if isinstance(prompts, str) else prompts)]
    if not rows or not all(rows):
        raise Usage("a prompt has no tokens" if rows else "there are no prompts", hint="give some text to continue")
    # Any id will do as padding: it is masked.
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class _Ends(StoppingCriteria):
    """Ends rows, and keeps at which length each one ended.

    Attributes:
        lengths: of rows that have ended, with the prompt, in tokens.
        stopped: rows that have come to a stop string.
        closed: whether all rows are to end.
    """

    def __init__(
        self, criteria: StoppingCriteriaList, stop: StopStringCriteria | None, cancel: threading.Event | None
    ) -> None:
        self.lengths: dict[int, int] = {}
        self.stopped: set[int] = set()
        self.closed = threading.Event()
        self._criteria, self._stop, self._cancel = criteria, stop, cancel

    def cancelled(self) -> bool:
        """Whether all rows are to end."""
        return self.closed.is_set() or (self._cancel is not None and self._cancel.is_set())

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """For input ids [batch, length], which rows are done: [batch], boolean."""
        done: Tensor = self._criteria(input_ids, scores, **kwargs)
        if self._stop is not None:
            matched = self._stop(input_ids, scores)
            self.stopped |= set(_rows(matched))
            done = done | matched
        for row in _rows(done):
            self.lengths.setdefault(row, input_ids.shape[1])
        return torch.ones_like(done) if self.cancelled() else done


def _rows(marked: Tensor) -> list[int]:
    found: list[int] = marked.nonzero().flatten().tolist()
    return found


@dataclass(frozen=True)
class _Step:
    """What `generate` handed over at once: the new tokens of each row that has any, and which rows have ended."""

    tokens: dict[int, list[int]]
    ended: frozenset[int]


class _Steps(BaseStreamer):
    """The streamer: prompts first, [batch, length], then steps of [batch], or of [1, tokens] where they are drafted.

    Its queue has the prompts' ids, a `_Step` each, and at the end None or the exception that ended it.
    """

    def __init__(self, ends: _Ends) -> None:
        self.queue: SimpleQueue[list[list[int]] | _Step | BaseException | None] = SimpleQueue()
        self._ends, self._rows, self._length = ends, 0, 0

    def put(self, value: Tensor) -> None:
        """Take the prompts or a step."""
        if not self._rows:
            self._rows, self._length = value.shape
            self.queue.put(value.tolist())
            return
        step = value.view(self._rows, -1)
        lengths, before, self._length = self._ends.lengths, self._length, self._length + step.shape[1]
        # A row that has ended is padded, or goes on where there is no end-of-sequence token.
        kept = {row: ids[: lengths.get(row, self._length) - before] for row, ids in enumerate(step.tolist())
                if lengths.get(row, self._length) > before}  # fmt: skip
        self.queue.put(
            _Step(kept, frozenset(row for row in kept if lengths.get(row, self._length + 1) <= self._length))
        )

    def end(self) -> None:
        """Nothing: that `generate` returns says it too."""


def _surroundings(model: PreTrainedModel) -> list[AbstractContextManager[Any]]:
    """What is set for the calling thread alone and a new thread must be told: the CUDA device, and autocast."""
    kind = model.device.type
    found: list[AbstractContextManager[Any]] = []
    if kind == "cuda":
        found.append(torch.cuda.device(torch.cuda.current_device()))
    if torch.is_autocast_enabled(kind):
        found.append(torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)))
    return found


def _run(
    model: PreTrainedModel, kwargs: dict[str, Any], steps: _Steps, surroundings: list[AbstractContextManager[Any]]
) -> None:
    try:
        with ExitStack() as stack:
            for each in surroundings:
                stack.enter_context(each)
            model.generate(streamer=steps, **kwargs)
        steps.queue.put(None)
    except BaseException as error:  # whatever it is, the consumer is to see it
        steps.queue.put(error)


def _events(
    thread: threading.Thread, steps: _Steps, ends: _Ends, text_of: Callable[[Sequence[int]], TextPieces]
) -> Generator[StreamEvent, None, None]:
    if ends.cancelled():
        return
    texts: list[TextPieces] = []
    open_rows: set[int] = set()
    thread.start()
    try:
        while (item := steps.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if not isinstance(item, _Step):
                texts = [text_of(prompt) for prompt in item]
                open_rows = set(range(len(texts)))
                continue
            for row, ids in item.tokens.items():
                last = row in item.ended
                text = texts[row].add(ids, last=last, stopped=last and row in ends.stopped)
                open_rows -= {row} if last else set()
                yield StreamEvent(row, tuple(ids), text)
        for row in sorted(open_rows):
            rest = texts[row].add([], last=True, stopped=row in ends.stopped)
            if rest:
                yield StreamEvent(row, (), rest)
    finally:
        ends.closed.set()
        thread.join()
