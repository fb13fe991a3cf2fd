"""Generation by transformers: left-padded batches of like length, as large as memory holds, smaller after running out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmconvert.checkpoint.directory import listing
from llmconvert.errors import BadInput, LlmconvertError, Refused, Usage
from llmconvert.infer.engines import Copy, first_line, refuse_own_options
from llmconvert.infer.engines.decoding import Draw, Halt, cut_at_stop, decode
from llmconvert.infer.engines.encode import context_length, encode, load_tokenizer
from llmconvert.infer.engines.memory import token_budget
from llmconvert.infer.rows import BadRow, Prompt
from llmconvert.infer.store import Answer
from llmconvert.models import register

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Encoded:
    row: int
    ids: list[int]


class HuggingFace:
    """A copy of the model in transformers' own class, or in the canonical one where that is registered.

    Attributes:
        model: the model; it may be replaced.
        budget: most tokens of a batch, padded prompts and answers together; None for no bound.
    """

    def __init__(self, copy: Copy) -> None:
        """Load the model onto its devices.

        Raises:
            Refused: transformers does not know it.
            BadInput: it cannot be loaded.
        """
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(copy.model)
        self.model = _load(copy)
        self._sampling, self._rows = copy.sampling, copy.batch_rows
        context = context_length(self.model.config)
        self._room = None if context is None else context - copy.sampling.max_new_tokens
        stops = getattr(self.model.generation_config, "stop_strings", None) or ()
        self._stop = (*copy.sampling.stop, *((stops,) if isinstance(stops, str) else stops))
        self._config = self._generation_config()
        # `generate` fills what is None here from the model's own.
        self.model.generation_config = self._config
        self._switch = _context_of_short_factors(self.model.config)
        # Penalties on repeated n-grams would see the padding: then only rows of one length share a batch.
        self._even = bool(getattr(self._config, "no_repeat_ngram_size", None))
        # A penalty that grows with the answer would start anew with every continuation.
        self._shrinks = getattr(self._config, "exponential_decay_length_penalty", None) is None
        self.budget: int | None = None
        if copy.batch_rows is None:
            self.budget = token_budget(self.model, copy.devices, copy.copies)

    def _generation_config(self) -> Any:
        """The checkpoint's own, without what only sampling by transformers would use."""
        import copy

        config = copy.deepcopy(self.model.generation_config)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if ends == [None]:
            ends = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        self._ends = {int(end) for end in ends}
        # Rows that have ended are filled up with it; nobody reads that.
        config.update(
            do_sample=False, num_beams=1, max_length=None, min_new_tokens=None, max_new_tokens=self._sampling.max_new_tokens,
            eos_token_id=sorted(self._ends) or None, pad_token_id=min(self._ends, default=0), return_dict_in_generate=True,
            output_scores=False, output_logits=False, num_return_sequences=1, stop_strings=None, max_time=None,
            **{name: None for name in _WARPERS if hasattr(config, name)},
        )  # fmt: skip
        return config

    def answer(self, items: Sequence[tuple[int, Prompt]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows; see `Engine`."""
        encoded, bad = [], []
        for row, prompt in items:
            try:
                encoded.append(_Encoded(row, encode(self.tokenizer, prompt, self._room)))
            except BadRow as error:
                bad.append(Answer(row, error=str(error)))
        bad = [answer for answer in bad if answer.row not in done]
        if bad:
            yield bad
        waiting = sorted(encoded, key=lambda one: (-len(one.ids), one.row))
        while waiting:
            batch = self._next_batch(waiting)
            waiting = waiting[len(batch) :]
            if any(one.row not in done for one in batch):
                for answers in self._within_memory(batch):
                    fresh = [answer for answer in answers if answer.row not in done]
                    if fresh:
                        yield fresh

    def _next_batch(self, waiting: list[_Encoded]) -> list[_Encoded]:
        """As many of the first rows as fit; the first is the longest."""
        rows = len(waiting) if self._rows is None else self._rows
        if self.budget is not None:
            rows = min(rows, max(1, self.budget // self._tokens(waiting[:1])))
        if self._switch is not None and len(waiting[0].ids) + self._sampling.max_new_tokens > self._switch:
            return waiting[:1]  # the longest row of a batch decides for all
        if self._even:
            rows = min(rows, sum(len(one.ids) == len(waiting[0].ids) for one in waiting))
        return waiting[:rows]

    def _tokens(self, batch: list[_Encoded]) -> int:
        return len(batch) * (max(len(one.ids) for one in batch) + self._sampling.max_new_tokens)

    def _within_memory(self, batch: list[_Encoded]) -> Iterator[list[Answer]]:
        """Generate, in halves of halves where memory does not suffice; what did not fit is not tried again."""
        try:
            answers = self._generate(batch)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            answers = None
        if answers is not None:
            yield answers
            return
        _free()
        if len(batch) == 1:
            yield [Answer(batch[0].row, error=f"out of memory with one row of {len(batch[0].ids)} tokens")]
            return
        self.budget = self._tokens(batch) // 2
        middle = (len(batch) + 1) // 2
        yield from self._within_memory(batch[:middle])
        yield from self._within_memory(batch[middle:])

    def _generate(self, batch: list[_Encoded]) -> list[Answer]:
        import torch

        width = max(len(one.ids) for one in batch)
        # Padding is masked from the model, but penalties on repetition look at ids: a row is padded with a token it has.
        ids = torch.tensor([[one.ids[0]] * (width - len(one.ids)) + one.ids for one in batch])
        mask = torch.tensor([[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in batch])
        device = self.model.get_input_embeddings().weight.device
        made = self._rounds([one.row for one in batch], ids.to(device), mask.to(device))
        return [self._finished(one.row, made[one.row]) for one in batch]

    def _rounds(self, rows: list[int], ids: Tensor, mask: Tensor) -> dict[int, list[int]]:
        """Generate for some rows until half are finished, then for the rest, and so on.

        Args:
            rows: their numbers.
            ids: padded prompts, [rows, width].
            mask: 1 where they are not padding, [rows, width].

        Returns:
            Tokens generated by row, with whatever follows an end.
        """
        import torch

        width, made, cache = ids.shape[1], {}, None
        most = width + self._sampling.max_new_tokens
        while True:
            halt = Halt(self.tokenizer, self._ends, self._stop, width, early=self._shrinks)
            extra: dict[str, Any] = {"stopping_criteria": [halt]}
            if self._sampling.temperature > 0:
                extra["logits_processor"] = [Draw(self._sampling, rows, width)]
            if cache is not None:
                extra["past_key_values"] = cache
            with torch.inference_mode():
                result = self.model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=self._config,
                    max_new_tokens=most - ids.shape[1], **extra,
                )  # fmt: skip
            ids, cache, finished = result.sequences, result.past_key_values, halt.finished
            assert finished is not None
            for row, tokens in zip(rows, ids[:, width:].tolist(), strict=True):
                made[row] = tokens
            left = (~finished).nonzero()[:, 0]
            if ids.shape[1] == most or not len(left):
                return made
            if not _can_lose_rows(cache):  # begin anew, with all of them to the end
                self._shrinks, cache, ids = False, None, ids[:, :width]
                continue
            cache.batch_select_indices(left)
            ids, mask, rows = ids[left], mask[left], [rows[index] for index in left.tolist()]
            mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)

    def _finished(self, row: int, ids: list[int]) -> Answer:
        """The answer in generated ids: up to the end of the text, or to a stop string, or all."""
        end = next((place + 1 for place, token in enumerate(ids) if token in self._ends), len(ids))
        ids = ids[:end]
        text = decode(self.tokenizer, ids)
        cut = cut_at_stop(text, self._stop)
        if len(cut) < len(text):
            # A batch goes on while any row does: count what was generated up to the string.
            low = next(n for n in range(1, end + 1) if self._stops(ids[:n]))
            return Answer(row, cut, tokens=low)
        return Answer(row, text, tokens=end)

    def _stops(self, ids: list[int]) -> bool:
        text = decode(self.tokenizer, ids)
        return cut_at_stop(text, self._stop) != text


# Unset, or transformers warns that greedy search has no use for them.
_WARPERS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


_OWN = {
    "dtype": "use `--dtype`",
    "torch_dtype": "use `--dtype`",
    "device_map": "use `--devices` and `--num-workers`",
    "max_memory": "use `--devices` and `--num-workers`",
    "trust_remote_code": "code of a checkpoint is never run",
    "weights_only": "code of a checkpoint is never run",
    "local_files_only": "the model is on this machine by then",
}


def _load(copy: Copy) -> Any:
    import torch
    import transformers

    refuse_own_options(copy, _OWN)
    register()  # the canonical class
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype: Any = "auto" if copy.dtype == "auto" else getattr(torch, copy.dtype)
    options: dict[str, Any] = {"dtype" if release >= (4, 56) else "torch_dtype": dtype}
    if len(copy.devices) > 1:
        # Layers are spread over the copy's own devices.
        numbers = [torch.device(device).index for device in copy.devices]
        free = {number: torch.cuda.mem_get_info(number)[0] for number in numbers}
        options |= {"device_map": "balanced", "max_memory": {number: int(0.9 * free[number]) for number in numbers}}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            copy.model, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options, **copy.options
        )
        if info["missing_keys"]:  # transformers draws them at random
            raise BadInput(
                f"the checkpoint has no weights for {listing(sorted(info['missing_keys']))}",
                where=copy.model,
                hint="copy the whole checkpoint again",
            )
        if len(copy.devices) == 1:
            model = model.to(copy.devices[0])
    except TypeError as error:
        if not copy.options:
            raise BadInput(f"the model cannot be loaded: {first_line(error)}", where=copy.model) from None
        raise Usage(
            f"transformers does not take these options: {first_line(error)}", hint="leave out `--engine-arg`, or correct it"
        ) from None
    except (ValueError, KeyError, ImportError) as error:
        raise Refused(
            f"transformers cannot load the model: {first_line(error)}",
            where=copy.model,
            hint="if it needs code of its own, convert it first: `llmconvert convert SRC DST --to llama`",
        ) from None
    except LlmconvertError:
        raise
    except Exception as error:
        if _out_of_memory(error):
            hint = "give each copy more devices: fewer `--num-workers`, or more `--devices`"
            raise Refused("the model does not fit its devices", where=", ".join(copy.devices), hint=hint) from None
        raise BadInput(f"the model cannot be loaded: {first_line(error)}", where=copy.model) from None
    return model.eval()


def _context_of_short_factors(config: Any) -> int | None:
    """How many tokens a model takes before its rotary frequencies change with the length; None where they never do."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su", "dynamic"):
        return None
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(original or config.max_position_embeddings)


def _can_lose_rows(cache: Any) -> bool:
    """Whether all a cache holds is keys and values by row; other kinds of layers keep states that would stay behind."""
    layers = getattr(cache, "layers", None)  # transformers before 4.54 has but one kind
    kinds = {type(layer).__name__ for layer in layers} if layers is not None else {type(cache).__name__}
    return kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer", "DynamicCache"}


def _out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The processor's allocator raises RuntimeError only.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
