"""Generation by vLLM, offline: one `LLM` a copy, tensor parallel over the copy's devices.

vLLM schedules rows itself, so batches are large, and what it computes depends on which rows happen to run together.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.infer.engines import Copy
from llmconvert.infer.engines.encode import encode
from llmconvert.infer.rows import BadRow, Prompt
from llmconvert.infer.sampling import row_seed
from llmconvert.infer.store import Answer


class Vllm:
    """A copy of the model in vLLM."""

    def __init__(self, copy: Copy) -> None:
        """Load the model onto its devices.

        Raises:
            Usage: vLLM is not installed.
            Refused: the version installed cannot be told which devices to use.
            BadInput: vLLM cannot load the model.
        """
        try:
            vllm: Any = importlib.import_module("vllm")
        except ImportError:
            raise Usage("vLLM is not installed", hint="pip install vllm, or use `--engine hf`") from None
        self._sampling = copy.sampling
        self._params: Any = vllm.SamplingParams
        options: dict[str, Any] = {
            "model": copy.model, "tensor_parallel_size": len(copy.devices), "dtype": copy.dtype, "trust_remote_code": False,
            "seed": copy.sampling.seed % 2**32, "disable_log_stats": True,
        }  # fmt: skip
        if copy.batch_rows is not None:
            options["max_num_seqs"] = copy.batch_rows
        numbers = [int(device.removeprefix("cuda:")) for device in copy.devices]
        if numbers != list(range(len(numbers))):
            known = {entry.name for entry in dataclasses.fields(vllm.EngineArgs)}
            if "device_ids" not in known:
                raise Refused(
                    f"vLLM {vllm.__version__} cannot be told to use the devices {numbers}",
                    hint="pip install 'vllm>=0.32', or use `--engine hf`, or one worker on the first devices",
                )
            options["device_ids"] = numbers
        try:
            self.llm: Any = vllm.LLM(**options)
        except (ValueError, OSError, RuntimeError) as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise BadInput(f"vLLM cannot load the model: {first}", where=copy.model) from None
        self._prompt: Any = importlib.import_module("vllm.inputs").TokensPrompt
        # The checkpoint's generation_config counts for penalties, as in transformers; sampling is the run's own.
        self._penalty = self.llm.get_default_sampling_params().repetition_penalty
        self._tokenizer = self.llm.get_tokenizer()
        context = int(self.llm.llm_engine.model_config.max_model_len)
        self._room = context - copy.sampling.max_new_tokens

    def _of_row(self, row: int) -> Any:
        sampling = self._sampling
        return self._params(
            max_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
            top_k=sampling.top_k or -1, stop=list(sampling.stop), seed=row_seed(sampling.seed, row),
            repetition_penalty=self._penalty,
        )  # fmt: skip

    def answer(self, items: Sequence[tuple[int, Prompt]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows; see `Engine`."""
        rows, prompts, bad = [], [], []
        for row, prompt in items:
            if row in done:
                continue
            try:
                prompts.append(self._prompt(prompt_token_ids=encode(self._tokenizer, prompt, self._room)))
                rows.append(row)
            except BadRow as error:
                bad.append(Answer(row, error=str(error)))
        if bad:
            yield bad
        if rows:
            made = self.llm.generate(prompts, [self._of_row(row) for row in rows], use_tqdm=False)
            pairs = zip(rows, (one.outputs[0] for one in made), strict=True)
            yield [Answer(row, one.text, tokens=len(one.token_ids)) for row, one in pairs]
