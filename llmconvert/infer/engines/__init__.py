"""What generates: transformers, vLLM, or a class of one's own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmconvert.errors import Usage
from llmconvert.infer.rows import Prompt
from llmconvert.infer.sampling import Sampling
from llmconvert.infer.store import Answer

_ENGINES = {
    "hf": ("llmconvert.infer.engines.hf", "HuggingFace"),
    "vllm": ("llmconvert.infer.engines.vllm", "Vllm"),
}
CHECKED = frozenset({"vllm"})
"""Engines whose class has a static method `check(copy)`, which says early what their slow loading would say late."""


@dataclass(frozen=True)
class Copy:
    """What one copy of the model is to be.

    Attributes:
        engine: `hf`, `vllm`, or `module:Class` for a class of one's own.
        model: the checkpoint's directory.
        devices: what it may use, such as `cuda:0`, or `cpu`.
        copies: how many copies there are on this machine, who share its memory.
        dtype: what it computes in, as torch names it; `auto` where the checkpoint does not say what it is stored in.
        batch_rows: most rows of a batch; None for as many as memory holds.
        sampling: how tokens are chosen.
        options: of the engine's own, as the user named them.
    """

    engine: str
    model: str
    devices: tuple[str, ...]
    copies: int
    dtype: str
    batch_rows: int | None
    sampling: Sampling
    options: Mapping[str, Any] = field(default_factory=dict)


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


class Streaming(Engine, Protocol):
    """An engine that can be given rows while it is at work on others.

    Attributes:
        ahead: most rows it can make use of at a time.
        busy: whether it is at work on any.
    """

    ahead: int

    @property
    def busy(self) -> bool:
        """Whether rows have no answer yet."""
        ...

    def add(self, items: Sequence[tuple[int, Prompt]]) -> list[Answer]:
        """Take rows up; returned are answers that need no work."""
        ...

    def step(self) -> list[Answer]:
        """Work for a moment; returned are answers to rows that are finished now."""
        ...


def _class_of(copy: Copy) -> Any:
    module, name = _ENGINES.get(copy.engine) or copy.engine.split(":", 1)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        hint = None if copy.engine in _ENGINES else "name the directory of its module in PYTHONPATH"
        raise Usage(f"the engine `{copy.engine}` cannot be imported: {error}", hint=hint) from None


def build(copy: Copy) -> Engine:
    """Load one copy of the model.

    Raises:
        LlmconvertError: it cannot be loaded, or what is needed is not installed.
    """
    engine: Engine = _class_of(copy)(copy)
    return engine


def check(copy: Copy) -> None:
    """Find out, without loading the model, what keeps a copy of one of the `CHECKED` engines from being loaded.

    Raises:
        LlmconvertError: something does.
    """
    _class_of(copy).check(copy)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refuse_own_options(copy: Copy, own: Mapping[str, str]) -> None:
    """Refuse options that are decided elsewhere.

    Args:
        copy: what the user wants.
        own: for each such option, where it is decided.

    Raises:
        Usage: the user named one.
    """
    for name in copy.options:
        if name in own:
            raise Usage(f"`{name}` is no option to set by --engine-arg", hint=own[name])



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
