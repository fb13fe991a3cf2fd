"""An engine for `infer` that needs no model: the same answer to the same prompt, always."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from llmconvert.infer.store import Answer


class Backwards:
    """Answers with the prompt, backwards, two rows at a time."""

    def __init__(self, copy: Any) -> None:
        """Nothing is loaded."""

    def answer(self, items: Sequence[tuple[int, Any]], done: set[int]) -> Iterator[list[Answer]]:
        """Answer rows."""
        left = [item for item in items if item[0] not in done]
        for start in range(0, len(left), 2):
            yield [Answer(row, json.dumps(prompt)[::-1], tokens=1) for row, prompt in left[start : start + 2]]
