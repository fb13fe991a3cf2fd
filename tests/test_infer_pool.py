"""Workers of batch inference: who gets which rows when, what engines may do wrong, and what is said meanwhile."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from infer_runs import (
    STREAM,
    WRONG,
    echo,
    expected_bytes,
    make_place,
    orders,
    read_rows,
    run_main,
    traced,
    words,
    write_rows,
)  # fmt: skip

from llmconvert.errors import Refused, Usage
from llmconvert.infer import progress
from llmconvert.infer.batches import Batch
from llmconvert.infer.pool import Tally, _Worker
from llmconvert.infer.run import _portion

place = pytest.fixture(make_place)


def flights(place: Path) -> dict[int, list[int]]:
    """How many rows each worker was at work on, step by step."""
    found: dict[int, list[int]] = {}
    for line in (place / "flight").read_text().splitlines():
        pid, rows = map(int, line.split())
        found.setdefault(pid, []).append(rows)
    return found


# -- engines that take more rows while they are at work -------------------------------------------


def test_an_engine_is_kept_supplied_and_every_row_is_answered_once(place: Path) -> None:
    orders(place, sleep=0.02)
    summary = echo(place, engine=STREAM, workers=1, batch_size=4)
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place)
    assert Counter(traced(place)) == Counter(range(60)) and summary.tokens == 60
    (flight,) = flights(place).values()
    # It wants 10 rows: with 4 at a time it has 10 to 13 until there are no more, and is never left to run dry.
    assert max(flight) <= 13 and min(flight[8:-14]) >= 8


def test_a_small_file_is_shared_out(place: Path) -> None:
    orders(place, gather=3, sleep=0.01)
    write_rows(place / "data.jsonl", [{"prompt": words(3, seed)} for seed in range(12)])
    summary = echo(place, engine=STREAM, workers=3, batch_size=_portion(12, 3, 64))
    assert sorted(tally.rows for tally in summary.workers)[0] >= 2
    assert all(max(flight) <= 5 for flight in flights(place).values()), "nobody took what others could have"


def test_portions_go_by_rows_and_workers() -> None:
    assert [_portion(rows, workers, 64) for rows, workers in ((0, 1), (3, 8), (60, 2), (10_000, 8), (512, 1))] == [
        1, 1, 8, 64, 64,
    ]  # fmt: skip


def test_answers_are_written_as_they_are_finished(place: Path) -> None:
    """A row that is refused, one that is lost and one that kills: all others have their answers."""
    rows = read_rows(place / "data.jsonl")
    rows[7]["prompt"] = "refuse me"
    write_rows(place / "data.jsonl", rows)
    orders(place, die={"20": 99, "50": 1}, forget={"33": 1, "34": 99})
    summary = echo(place, engine=STREAM, workers=2, batch_size=4)
    made = read_rows(place / "out.jsonl")
    errors = {row["id"]: row["error"] for row in made if "error" in row}
    assert set(errors) == {7, 20, 34} and summary.errors == 3
    assert errors[7] == "no" and "died of it" in errors[20] and "no answer came" in errors[34]
    # What one worker had answered when it died is not answered again.
    assert max(Counter(traced(place)).values()) == 1 and len(traced(place)) == 57
    for row in made:
        assert row["id"] in errors or row["output"] == json.dumps(row["prompt"])[::-1]


def test_what_failed_is_tried_alone() -> None:
    worker = _Worker(copy=None, ahead=10)  # type: ignore[arg-type]
    assert not worker.takes(99)
    worker.tally.loaded = True
    assert worker.takes(99)
    worker.batches[1] = Batch([(row, "") for row in range(4)])
    assert worker.takes(99) and worker.takes(5) and not worker.takes(4)
    worker.batches[1].deaths = 1
    assert not worker.takes(99)
    worker.batches, worker.ahead = {2: Batch([(0, "")])}, 0
    assert not worker.takes(99)


# -- engines that are wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("how, said", [
    ("own numbers", "row 1000 cannot be used: it was not asked for"), ("no text", "neither or both"),
    ("nothing", "neither or both"), ("tuples", "it is not an `Answer`"),
])  # fmt: skip
def test_an_engine_whose_answers_cannot_be_used_ends_the_run(how: str, said: str, place: Path) -> None:
    orders(place, wrong=how)
    with pytest.raises(Refused, match=said):
        echo(place, engine=WRONG)
    assert not (place / "out.jsonl").exists()


def test_an_engine_that_answers_twice_or_not_at_all_loses_and_doubles_no_row(place: Path) -> None:
    orders(place, wrong="twice")
    echo(place, engine=WRONG)
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place)
    orders(place, wrong="not all", forget={"17": 2, "40": 99})
    assert echo(place, engine=WRONG, overwrite=True).errors == 1
    made, expected = read_rows(place / "out.jsonl"), [json.loads(line) for line in expected_bytes(place).splitlines()]
    assert "no answer came" in made[40].pop("error") and made[40].pop("output") is None
    assert made[:40] == expected[:40] and made[41:] == expected[41:]


# -- options of an engine's own -------------------------------------------------------------------


def test_options_are_json_or_text_and_each_is_named_once(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from llmconvert.cli.infer import _engine_args

    given = ["a=5", "b=true", "c=[1, {}]", "d=text", "e=", "f=a=b", 'g="5"', "h=null"]
    assert _engine_args(given) == {
        "a": 5, "b": True, "c": [1, {}], "d": "text", "e": "", "f": "a=b", "g": "5", "h": None,
    }  # fmt: skip
    names = [str(place / "model"), str(place / "data.jsonl"), str(place / "out.jsonl"), "--devices", "cpu"]
    for wrong, said in ((["a"], "NAME=VALUE"), (["=5"], "NAME=VALUE"), (["a-b=5"], "NAME=VALUE"), (["a=1", "a=2"], "twice")):
        assert run_main(*names, *(f"--engine-arg={one}" for one in wrong)) == 2
        assert said in capfd.readouterr().err


def test_options_make_another_run(place: Path) -> None:
    orders(place, sleep=0.01)
    echo(place)
    with pytest.raises(Usage, match="differs in engine options"):
        echo(place, resume=True, engine_args={"a": 1})


# -- what is said ---------------------------------------------------------------------------------


def test_progress_says_that_copies_are_loading(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress(enabled=True)
    shown.start(total=1000, before=0)
    now[0] += 1
    tallies = [Tally(starts=1), Tally(starts=1)]
    shown.update(tallies, 0)
    now[0] += 4
    shown.update(tallies, 0)
    now[0] += 6
    shown.update(tallies, 0)
    tallies[0].loaded = True
    shown.update(tallies, 0)
    now[0] += 10
    tallies[0].rows, tallies[0].tokens, tallies[0].seconds = 50, 500, 10.0
    shown.update(tallies, 0)
    tallies[1].loaded = True
    now[0] += 10
    shown.update(tallies, 0)
    assert capfd.readouterr().err.splitlines() == [
        "loading: 2 of 2 copies, 1 s so far",
        "loading: 2 of 2 copies, 11 s so far",
        # Rates count from the first copy's being loaded.
        "rows: 50 of 1000, 5.0 rows/s, 50 tokens/s, 0:03:10 left, 1 of 2 copies still loading",
        "rows: 50 of 1000, 2.5 rows/s, 25 tokens/s, 0:06:20 left",
    ]


def test_a_run_says_what_it_computes_in(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "model/config.json").write_text('{"torch_dtype": "bfloat16"}')
    summary = echo(place, progress=progress.Progress(enabled=True))
    said = capfd.readouterr().err.splitlines()
    assert said[0].endswith("2 copies, each on cpu, dtype bfloat16 (as config.json says)")
    assert said[1].startswith("loading: 2 of 2 copies") and summary.dtype == "bfloat16"
