"""Change a JSON value in one or a few places, into what nobody expects there."""

from __future__ import annotations

import copy
import math
from typing import Any

from hypothesis import strategies as st

NASTY: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 7, 64, 1 << 31, 1 << 63, -(1 << 63), 10**7, 10**30, 10**63, 0.0, 0.5, -0.5, 1e-30,
    1e30, 1e300, math.nan, math.inf, -math.inf, "", "x", "10000", "1e999", "../x", "a\0b", "\x1b[31m", "x" * 300, "float32",
    [], [0], [1], [1, 2, 3], ["x"], [None], [[1]], [True, False, True], [{}], {}, {"a": 1}, {"a": {"b": None}},
    {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0}, {"type": "longrope", "short_factor": [1], "long_factor": []},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value within a JSON value but itself, of at most six in a list."""
    keys = (
        list(value) if isinstance(value, dict) else list(range(min(6, len(value)))) if isinstance(value, list) else []
    )
    return [path for key in keys for path in ((*at, key), *places(value[key], (*at, key)))]


@st.composite
def mutated(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """`value` with one to `most` places replaced, removed, renamed or given company."""
    made = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        found = places(made)
        if not found:
            break
        *upper, key = draw(st.sampled_from(found))
        holder = made
        for step in upper:
            holder = holder[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap"]))
        if kind == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif kind == "remove":
            del holder[key]
        elif kind == "swap":
            other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
            holder[key], holder[other] = holder[other], holder[key]
        elif isinstance(holder, dict):
            name = draw(st.sampled_from(["x", "", "weight", "../x", "\x1b[2J"]))
            holder[name] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        else:
            holder.append(copy.deepcopy(draw(st.sampled_from(NASTY))))
    return made
