"""Run model code in float64 all the way, though it asks for float32 inside: the function itself, without its rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Widen(TorchFunctionMode):
    """Reads float32 as float64 wherever torch is asked for it by name: `x.float()`, `x.to(torch.float32)`, `dtype=`.

    Models take norms, softmax and rotary angles in float32 whatever the dtype of the rest; under this mode those too
    are float64, from the inverse frequencies on if the model is built under it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Within it, models are built and run in float64 only. Not for use from several threads at once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(before)
