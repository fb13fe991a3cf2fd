"""Parameters that continuous integration runs apart (`-m slow`): more of what their neighbours show already."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slowly(values: Iterable[Any]) -> list[Any]:
    """Values of one parameter, or tuples of several, whose tests are slow ones."""
    return [
        pytest.param(*value, marks=pytest.mark.slow) if isinstance(value, tuple) else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]
