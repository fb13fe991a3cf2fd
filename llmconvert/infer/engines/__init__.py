"""What generates: transformers, vLLM, or a class of one's own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmconvert.errors import Usage
from llmconvert.infer.rows import Prompt
from llmconvert.infer.sampling import Sampling
from llmconvert.infer.store import Answer

_ENGINES = {
    "hf": ("llmconvert.infer.engines.hf", "HuggingFace"),
    "vllm": ("llmconvert.infer.engines.vllm", "Vllm"),
}


@dataclass(frozen=True)
class Copy:
    """What one copy of the model is to be.

    Attributes:
        engine: `hf`, `vllm`, or `module:Class` for a class of one's own.
        model: the checkpoint's directory.
        devices: what it may use, such as `cuda:0`, or `cpu`.
        copies: how many copies there are on this machine, who share its memory.
        dtype: what it computes in, as torch names it; `auto` for as stored.
        batch_rows: most rows of a batch; None for as many as memory holds.
        sampling: how tokens are chosen.
    """

    engine: str
    model: str
    devices: tuple[str, ...]
    copies: int
    dtype: str
    batch_rows: int | None
    sampling: Sampling


class Engine(Protocol):
    """A copy of the model; made by calling its class with a `Copy`."""

    def answer(self, items: Sequence[tuple[int, Prompt]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows.

        Args:
            items: rows' numbers and prompts.
            done: rows that need no answer; an engine whose results depend on the shape of a batch computes them all
                the same where they share a batch with others.

        Yields:
            Answers as they are ready, a batch at a time; each row once, but for those done.
        """
        ...


def build(copy: Copy) -> Engine:
    """Load one copy of the model.

    Raises:
        LlmconvertError: it cannot be loaded, or what is needed is not installed.
    """
    module, name = _ENGINES.get(copy.engine) or copy.engine.split(":", 1)
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Usage(f"the engine `{copy.engine}` cannot be imported: {error}") from None
    engine: Engine = made(copy)
    return engine


def choose(wanted: str, *, accelerators: bool) -> tuple[str, str]:
    """Which engine to use.

    Args:
        wanted: `auto`, `hf`, `vllm` or `module:Class`.
        accelerators: whether copies run on something else than the processor.

    Returns:
        Its name, and why it.

    Raises:
        Usage: there is no such engine, or it is not installed.
    """
    vllm = importlib.util.find_spec("vllm") is not None
    if wanted == "auto":
        if vllm and accelerators:
            return "vllm", "vLLM is installed"
        return "hf", "vLLM is not installed" if not vllm else "vLLM needs an accelerator"
    if wanted not in _ENGINES and ":" not in wanted:
        raise Usage(f"there is no engine `{wanted}`", hint="auto, vllm, hf, ray, or module:Class")
    if wanted == "vllm" and not vllm:
        raise Usage("vLLM is not installed", hint="pip install vllm, or use `--engine hf`")
    if wanted == "hf" and (not importlib.util.find_spec("torch") or not importlib.util.find_spec("transformers")):
        raise Usage("transformers is not installed", hint="pip install 'llmconvert[verify]'")
    return wanted, "asked for"
