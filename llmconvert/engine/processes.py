"""One run in many processes: `torchrun … -m llmconvert …` shares the work, over nodes with a common filesystem."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from llmconvert.errors import LlmconvertError

_Result = TypeVar("_Result")
_PATIENCE = timedelta(days=7)
"""The others wait while the first proves the result; a process that dies is noticed by torchrun, which ends them all."""


class Elsewhere(LlmconvertError):
    """Another process failed and has said why."""


def rank() -> int:
    """This process's number; 0 when there is but one."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes torchrun has started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _start() -> None:
    import torch.distributed as distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_PATIENCE)


def together(work: Callable[[], _Result]) -> list[_Result]:
    """Do one's share, wait for the others, and give everybody what all have done, in order of rank.

    Raises:
        Exception: what failed here.
        Elsewhere: what failed in another process.
    """
    failure: BaseException | None = None
    mine: list[_Result] = []
    try:
        mine.append(work())
    except Exception as error:
        failure = error
    if size() == 1:
        if failure is not None:
            raise failure
        return mine
    import torch.distributed as distributed

    _start()
    gathered: list[tuple[list[_Result], tuple[int, str] | None]] = [([], None)] * size()
    said = None if failure is None else (getattr(failure, "exit_code", 1), str(failure))
    distributed.all_gather_object(gathered, (mine, said))
    if failure is not None:
        raise failure
    for number, (_, fault) in enumerate(gathered):
        if fault is not None:
            other = Elsewhere(f"process {number} failed: {fault[1]}")
            other.exit_code = fault[0]
            raise other
    return [results[0] for results, _ in gathered]


def leave() -> None:
    """Part from the other processes; what torch's threads still hold would end this one with an abort."""
    if size() > 1:
        import torch.distributed as distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
