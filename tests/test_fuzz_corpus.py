"""What fuzzing found worth keeping is read or refused, as it was when it was kept; `scripts/fuzz` looks for more."""

from __future__ import annotations

from pathlib import Path

import bounded
import pytest
from fuzz import targets

CORPUS = Path(__file__).parent / "fuzz/corpus"


@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_input_kept_is_read_or_refused(target: str) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert inputs

    def read() -> None:
        for data in inputs:
            targets.TARGETS[target](data)

    assert bounded.run(read) == ("returned", "")


@pytest.mark.parametrize("target", targets.TARGETS)
def test_what_fuzzing_begins_with_is_valid(target: str) -> None:
    """A reader that refuses everything would have nothing to be found."""
    reading = targets.TARGETS[target]
    for data in targets.seeds(target):
        reading.read(data) if isinstance(reading, targets.Reading) else reading(data)


def test_the_corpus_is_small_and_each_target_has_its_own() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(targets.TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000
