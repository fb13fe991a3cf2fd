"""Giving rows a channel, and showing the curves of a log."""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from llmconvert.cli.app import app
from llmconvert.errors import BadInput, LlmconvertError, Refused, Usage
from llmconvert.training.channels import Rule, assign
from llmconvert.training.curves import TOTAL, Curve, plot, read_curves, sparkline, summary

ROWS = [{"prompt": f"p{i}", "meta": {"source": "web" if i % 3 else "code"}, "n": i, "x": 1e-9} for i in range(60)]


def jsonl(path: Path, rows: list[dict[str, object]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Spaces and escapes as other writers have them: they are to stay.
    path.write_text("".join(json.dumps(row, separators=(", ", " : ")) + "\n" for row in rows) + "\n")
    return path


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def test_random_channels_depend_on_the_seed_alone(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl")
    found = [assign(source, tmp_path / f"{i}.jsonl", Rule(("a", "b", "c"), seed=s)) for i, s in enumerate((0, 0, 1))]
    first, again, other = (read(tmp_path / f"{i}.jsonl") for i in range(3))
    assert first == again != other and found[0].rows == dict(Counter(r["channel"] for r in first).most_common())
    assert sum(found[0].rows.values()) == 60 and min(found[0].rows.values()) > 8
    assert [{k: v for k, v in row.items() if k != "channel"} for row in first] == ROWS
    # Behind the others, and all before it byte for byte.
    for before, after in zip(
        source.read_text().splitlines(), (tmp_path / "0.jsonl").read_text().splitlines(), strict=True
    ):
        assert after.startswith(before[:-1])


def test_channels_from_a_field_or_the_file(tmp_path: Path) -> None:
    assign(jsonl(tmp_path / "a.jsonl"), tmp_path / "b.jsonl", Rule(field="meta.source"), column="kind")
    assert all(row["kind"] == row["meta"]["source"] for row in read(tmp_path / "b.jsonl"))  # type: ignore[index]
    for name in ("web", "deep/code"):
        jsonl(tmp_path / f"data/{name}.jsonl")
    found = assign(tmp_path / "data", tmp_path / "out", Rule(by_file=True))
    assert found.files == 2 and found.rows == {"deep/code": 60, "web": 60}
    assert {row["channel"] for row in read(tmp_path / "out/deep/code.jsonl")} == {"deep/code"}


def test_parquet_keeps_types_and_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(ROWS).set_column(2, "n", pyarrow.array(range(60), pyarrow.int16()))
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=25)
    assign(tmp_path / "a.parquet", tmp_path / "b.parquet", Rule(field="meta.source"))
    found = parquet.read_table(tmp_path / "b.parquet")
    assert found.drop(["channel"]).equals(table)
    assert found["channel"].to_pylist() == [row["meta"]["source"] for row in ROWS]  # type: ignore[index]
    assert parquet.ParquetFile(tmp_path / "b.parquet").num_row_groups == 3


@pytest.mark.parametrize("described", [b"{", b"[1]", b'{"info": 5}', b'{"info": {"features": []}}', b"[" * 100_000])
def test_a_description_of_columns_that_is_none_is_left_alone(described: bytes, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    def assigned(text: bytes) -> bytes:
        table = pyarrow.table({"text": ["a"]}).replace_schema_metadata({b"huggingface": text})
        parquet.write_table(table, tmp_path / "a.parquet")
        assign(tmp_path / "a.parquet", tmp_path / "b.parquet", Rule(("x",)), overwrite=True)
        found = parquet.read_table(tmp_path / "b.parquet")
        assert found["channel"].to_pylist() == ["x"]
        return found.schema.metadata[b"huggingface"]

    assert assigned(described) == described
    assert "channel" in json.loads(assigned(b'{"info": {"features": {}}}'))["info"]["features"]


@pytest.mark.parametrize(("rule", "rows", "error", "match"), [
    (lambda: Rule(), ROWS, Usage, "not clear"), (lambda: Rule(("a",), by_file=True), ROWS, Usage, "not clear"),
    (lambda: Rule(("a", "")), ROWS, Usage, "no name"), (lambda: Rule(field="source"), ROWS, BadInput, "no text or number"),
    (lambda: Rule(("a",)), [{"channel": "x"}], BadInput, "already"),
])  # fmt: skip
def test_what_cannot_be_assigned_is_said(
    rule: object, rows: object, error: type[LlmconvertError], match: str, tmp_path: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", rows)  # type: ignore[arg-type]
    with pytest.raises(error, match=match):
        assign(source, tmp_path / "b.jsonl", rule())  # type: ignore[operator]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"], "nothing half-written is left"


def test_broken_lines_and_outputs_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": \n')
    with pytest.raises(BadInput, match="not JSON") as caught:
        assign(tmp_path / "a.jsonl", tmp_path / "b.jsonl", Rule(("a",)))
    assert caught.value.where is not None and caught.value.where.endswith("a.jsonl:2")
    jsonl(tmp_path / "c.jsonl")
    with pytest.raises(Usage, match="there already"):
        assign(tmp_path / "c.jsonl", tmp_path / "a.jsonl", Rule(("a",)))
    assign(tmp_path / "c.jsonl", tmp_path / "a.jsonl", Rule(("a",)), overwrite=True)
    assert len(read(tmp_path / "a.jsonl")) == 60
    with pytest.raises(Usage, match="format"):
        assign(tmp_path / "c.jsonl", tmp_path / "d.parquet", Rule(("a",)))


def test_nothing_but_an_earlier_output_is_replaced(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "proj/data/a.jsonl").parent
    other = tmp_path / "proj/notes.txt"
    other.write_text("precious")
    for output in (tmp_path / "proj", data, data / "out", data / "a.jsonl"):
        with pytest.raises(Usage, match="in one another"):
            assign(data, output, Rule(("a",)), overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "proj")
    with pytest.raises(Usage, match="link"):
        assign(jsonl(tmp_path / "b.jsonl").parent / "b.jsonl", tmp_path / "link", Rule(("a",)), overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/keep.txt").write_text("precious")
    with pytest.raises(Usage, match="other things"):
        assign(data, tmp_path / "full", Rule(("a",)), overwrite=True)
    assert other.read_text() == "precious" and (data / "a.jsonl").is_file() and (tmp_path / "full/keep.txt").is_file()
    for _ in range(2):  # what it made itself it replaces
        assign(data, tmp_path / "out", Rule(("a",)), overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jsonl"]


def test_line_endings_and_odd_text_stay(tmp_path: Path) -> None:
    source = b'{"x": "\\ud800"}\r\n\r\n{"x": "b"}'
    (tmp_path / "a.jsonl").write_bytes(source)
    assign(tmp_path / "a.jsonl", tmp_path / "b.jsonl", Rule(field="x"))
    expected = b'{"x": "\\ud800", "channel": "\\ud800"}\r\n\r\n{"x": "b", "channel": "b"}'
    assert (tmp_path / "b.jsonl").read_bytes() == expected


# Curves.


def state(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = [
        {
            "step": s,
            "loss": 3.0 / s,
            "loss/web": 4.0 / s,
            "loss/code": 2.0 / s,
            "tokens/web": 10,
            "tokens/code": 30,
            "learning_rate": 1,
        }
        for s in range(1, 21)
    ]
    log.append({"step": 20, "eval_loss": 0.5, "eval_loss/web": 0.6, "eval_runtime": 1.0})
    log.append({"step": 20, "train_loss": 1.0, "train_runtime": 1.0})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": log}))
    return folder


def test_curves_are_read_from_a_trainers_state(tmp_path: Path) -> None:
    found = {(curve.split, curve.channel): curve for curve in read_curves(state(tmp_path / "run/checkpoint-20"))}
    assert list(found) == [("train", TOTAL), ("train", "code"), ("train", "web"), ("eval", TOTAL), ("eval", "web")]
    assert found["train", "web"].losses[3] == 1.0 and found["train", "web"].tokens == 200
    assert found["eval", "web"].steps == (20,)


def test_event_files_of_a_run_and_its_continuation_are_one(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    for start, value in ((0, 5.0), (6, 7.0)):
        writer = tensorboard.SummaryWriter(tmp_path)
        for step in range(start, 10):
            writer.add_scalar("train/loss/web", value, step)
        writer.close()
    (curve,) = read_curves(tmp_path)
    assert curve.losses == (5.0,) * 6 + (7.0,) * 4


def test_channels_may_be_called_anything(tmp_path: Path) -> None:
    entry = {"step": 1, "loss": 1.0, "loss/total": 2.0, "loss/my_loss": 3.0, "tokens/my_loss": 5, "learning_rate": 1}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": [entry]}))
    found = {curve.channel: curve for curve in read_curves(tmp_path)}
    assert {name: curve.losses for name, curve in found.items()} == {TOTAL: (1.0,), "total": (2.0,), "my_loss": (3.0,)}
    assert found["my_loss"].tokens == 5


def test_smoothing_starts_at_the_first_value_and_passes_over_nan() -> None:
    curve = Curve("a", "train", (1, 2, 3, 4), (4.0, math.nan, 2.0, 2.0))
    smooth = curve.smoothed(0.5)
    assert smooth[0] == smooth[1] == 4.0 and smooth[2] == pytest.approx((0.25 * 4 / 0.5 * 0.5 + 0.5 * 2) / 0.75)
    assert curve.smoothed(0.0)[2:] == [2.0, 2.0]
    assert sparkline([0.0, 1.0, math.nan], 0.0, 1.0) == "▁█ "
    assert summary([curve], 0.0)[0]["losses"][1] is None


def test_plots_and_what_cannot_be_read(tmp_path: Path) -> None:
    curves = read_curves(state(tmp_path / "run"))
    plot(curves, tmp_path / "loss.png", 0.9)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    cases: list[tuple[object, type[LlmconvertError], str]] = [
        (lambda: plot(curves, tmp_path / "loss.bmpx", 0.9), Usage, "kind of image"),
        (lambda: plot(curves, tmp_path / "no/loss.png", 0.9), Usage, "does not exist"),
        (lambda: read_curves(tmp_path / "none"), BadInput, "no such"),
    ]
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/trainer_state.json").write_text('{"global_step": 1, "log_history": [{"step": 1, "loss": 2.0}]}')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/trainer_state.json").write_text("[]")
    cases += [
        (lambda: read_curves(tmp_path / "empty"), BadInput, "no logs"),
        (lambda: read_curves(tmp_path / "plain"), BadInput, "no `loss/<channel>`"),
        (lambda: read_curves(tmp_path / "bad"), BadInput, "not a JSON object"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()  # type: ignore[operator]
    assert Refused.exit_code == 3


def test_the_commands(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl")
    run = CliRunner().invoke(
        app, ["channel-loss", "assign", str(source), "-o", str(tmp_path / "b.jsonl"), "--channels", "a,b", "--json"]
    )
    assert run.exit_code == 0 and sum(json.loads(run.stdout)["rows"].values()) == 60
    log = state(tmp_path / "run")
    run = CliRunner().invoke(app, ["channel-loss", "plot", str(log), "-o", str(tmp_path / "l.png")])
    assert run.exit_code == 0 and "web" in run.stdout and "▁" in run.stdout and (tmp_path / "l.png").is_file()
    run = CliRunner().invoke(app, ["channel-loss", "plot", str(log), "--json", "--smooth", "0"])
    assert json.loads(run.stdout)["curves"][1]["channel"] == "code"
    run = CliRunner().invoke(app, ["channel-loss", "plot", str(log), "--smooth", "1"])
    assert isinstance(run.exception, Usage)


# The example of the documentation.


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "scripts/channel_loss_example.py"
    found = importlib.util.spec_from_file_location("channel_loss_example", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_channels_of_different_difficulty_separate_and_add_up(example: ModuleType, tmp_path: Path) -> None:
    log = example.train(60, tmp_path)
    assert example.largest_difference(log) < 1e-6
    last = example.last_losses(log)
    assert last["counting"] + 0.5 < last["grammar"] < last["noise"] - 0.5
    assert {curve.channel for curve in read_curves(tmp_path)} == {TOTAL, *example.FLOORS}
