"""How tokens are chosen, and the random numbers they are chosen by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmconvert.errors import Usage


@dataclass(frozen=True)
class Sampling:
    """Options of generation.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: logits are divided by it; 0 is greedy, and what follows is then without effect.
        top_p: the smallest set of tokens with this probability is kept; 1 keeps all.
        top_k: as many of the most probable tokens are kept; 0 keeps all.
        stop: an answer ends before the first of these strings.
        seed: of the random numbers.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def check(self) -> None:
        """Check the ranges.

        Raises:
            Usage: an option is out of its range.
        """
        for name, value, fine, should in (
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0, and at most 1"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("stop", self.stop, all(self.stop), "not empty"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
        ):
            if not fine:
                raise Usage(f"--{name} is {value!r}", hint=f"it must be {should}")


def row_seed(seed: int, row: int) -> int:
    """A seed for one row, below 2^63, that depends on nothing but the run's seed and the row's number."""
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def uniforms(seed: int, rows: list[int], count: int) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1): for each row its own stream, whatever rows it is batched with; [rows, count]."""
    return np.stack([np.random.Generator(np.random.Philox(row_seed(seed, row))).random(count) for row in rows])
