"""Additions to transformers' `generate`: a random number generator for each row, and stop strings in what is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmconvert.infer.sampling import Sampling, uniforms

if TYPE_CHECKING:
    from torch import Tensor


class Draw:
    """Samples a token for each row by a random number of that row's own, and leaves only that token possible.

    It draws by inverting the cumulative distribution, so a row's token depends on its own logits and its own stream of
    random numbers only, and not on what it is batched with.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int], width: int) -> None:
        """Prepare the random numbers.

        Args:
            sampling: with a temperature above 0.
            rows: the rows' numbers, in the batch's order.
            width: tokens of the padded prompts.
        """
        import transformers

        self._warpers: list[Any] = [transformers.TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k:
            self._warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(transformers.TopPLogitsWarper(float(sampling.top_p)))
        self._uniforms = uniforms(sampling.seed, list(rows), sampling.max_new_tokens)
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] in which but one token of each row is finite."""
        import torch

        for warper in self._warpers:
            scores = warper(input_ids, scores)
        step = input_ids.shape[1] - self._width
        point = torch.from_numpy(self._uniforms[:, step : step + 1]).to(scores.device)
        heights = scores.double().softmax(-1).cumsum(-1)
        # The first token whose cumulative probability lies above the point; rounding may put the last one below 1.
        chosen = torch.searchsorted(heights, point * heights[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)


class Halt:
    """Says which rows are finished: by an end token, or by a stop string in what was generated; prompts are not searched.

    Once half of the rows are finished it halts them all, so that the others can go on without them.
    """

    def __init__(self, tokenizer: Any, ends: set[int], stop: Sequence[str], width: int, *, early: bool) -> None:
        """Prepare.

        Args:
            tokenizer: of transformers.
            ends: tokens that end a text.
            stop: the strings.
            width: tokens of the padded prompts.
            early: halt all rows once half are finished.
        """
        self._tokenizer, self._ends, self._stop, self._width = tokenizer, sorted(ends), tuple(stop), width
        self._early = early
        # A token has a byte at the least: a string that ended just now began within as many tokens.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 4
        self.finished: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows are finished, or true for all; [rows], boolean."""
        import torch

        ends = torch.tensor(self._ends, device=input_ids.device)
        finished = torch.isin(input_ids[:, -1], ends)
        if self._stop:
            finished |= torch.tensor([self._stops(ids) for ids in input_ids[:, self._width :].tolist()]).to(ends.device)
        if self.finished is not None:
            finished |= self.finished
        self.finished = finished
        rows = len(finished)
        if self._early and rows >= _FEW and int(finished.sum()) * 2 >= rows:
            return torch.ones_like(finished)
        return finished

    def _stops(self, ids: list[int]) -> bool:
        tail = decode(self._tokenizer, ids[-self._tail :])
        return has_stop(tail, self._stop) and has_stop(decode(self._tokenizer, ids), self._stop)


_FEW = 4
"""Fewer rows than these go on together to the end: another start would cost more than it saves."""


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of generated tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def has_stop(text: str, stop: Sequence[str]) -> bool:
    """Whether one of the strings is in the text."""
    return any(one in text for one in stop)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]
