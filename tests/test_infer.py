"""Batch inference: answers equal those of plain `generate`; every row is answered once, whoever is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch
from infer_runs import (
    ECHO,
    ROOT,
    TRACED,
    VOCABULARY,
    echo,
    expected_bytes,
    gone,
    logged,
    make_place,
    orders,
    read_rows,
    run_main,
    start,
    traced,
    until,
    words,
    workers_of,
    write_rows,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from slowly import slowly

from llmconvert.errors import BadInput, LlmconvertError, Refused, Usage
from llmconvert.infer import Infer
from llmconvert.infer.batches import WINDOW, batches
from llmconvert.infer.engines import Copy, choose
from llmconvert.infer.engines.hf import HuggingFace, _load
from llmconvert.infer.rows import open_source
from llmconvert.infer.run import share_devices
from llmconvert.infer.sampling import Sampling, uniforms
from llmconvert.infer.store import work_directory

place = pytest.fixture(make_place)
CHAT = "{% for m in messages %}w3 {{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"


def write_tokenizer(directory: Path, size: int) -> None:
    """A tokenizer with a word for each id of the model, so that no two answers look alike."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, size))]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose every tensor matters; a penalty on repetition, and a dozen tokens that end an answer."""
    directory = tiny.make("llama", tmp_path_factory.mktemp("infer") / "model")
    write_tokenizer(directory, VOCABULARY)
    generation = json.loads((directory / "generation_config.json").read_text())
    # `do_sample` and `top_p` as publishers have it; the run's options count instead.
    ends = [2, *range(5, 120, 10)]
    generation |= {"repetition_penalty": 1.3, "do_sample": True, "top_p": 0.7, "eos_token_id": ends}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture(scope="module")
def stock(model: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    """Lengths between 1 and 40, every fourth a chat."""
    texts: list[Any] = [words(1 + seed * 7 % 40, seed) for seed in range(48)]
    return [[{"role": "user", "content": text}] if seed % 4 == 3 else text for seed, text in enumerate(texts)]


def plain(model: Path, stock: Any, prompt: Any, tokens: int) -> str:
    """One row through transformers' own `generate`, as anybody would write it."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs.pop("token_type_ids", None)
    made = stock.generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def engine(model: Path, batch_rows: int | None = None, **sampling: Any) -> HuggingFace:
    return HuggingFace(Copy("hf", str(model), ("cpu",), 1, "float32", batch_rows, Sampling(**sampling)))


def outputs(made: HuggingFace, prompts: list[Any], done: frozenset[int] = frozenset()) -> list[str | None]:
    answers = [answer for group in made.answer(list(enumerate(prompts)), set(done)) for answer in group]
    assert len({answer.row for answer in answers}) == len(answers) == len(prompts) - len(done)
    return [answer.output for answer in sorted(answers, key=lambda answer: answer.row)]


# -- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [1, 5, None])
def test_answers_equal_plain_generate_row_for_row(model: Path, stock: Any, prompts: list[Any], batch_rows: int) -> None:
    expected = [plain(model, stock, prompt, 12) for prompt in prompts]
    assert len(set(expected)) > 35 and len({len(text.split()) for text in expected}) > 8, (
        "the model must be interesting"
    )
    made = engine(model, batch_rows, max_new_tokens=12)
    generate, sizes = made.model.generate, []

    def counted(**options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        return generate(**options)

    made.model.generate = counted
    assert outputs(made, prompts) == expected
    # Rows that are finished leave the batch.
    assert (
        sizes == [1] * 48
        if batch_rows == 1
        else min(sizes) <= max(sizes) // 2 and len(sizes) > 48 // (batch_rows or 48)
    )


def test_rows_do_not_choose_each_others_rotary_frequencies(prompts: list[Any], tmp_path: Path) -> None:
    """Models whose frequencies change with the length of the longest row (LongRoPE) are not batched across the change."""
    import transformers

    directory = tiny.make(
        "phi3", tmp_path / "phi", original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 9.0, 16.0]},
    )  # fmt: skip
    write_tokenizer(directory, VOCABULARY)
    stock = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = prompts[:20]
    assert outputs(engine(directory, 8, max_new_tokens=6), asked) == [plain(directory, stock, p, 6) for p in asked]


def test_stop_strings_of_the_checkpoint_end_answers(model: Path, prompts: list[Any], tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/generation_config.json").read_text())
    whole = outputs(engine(model, 4, max_new_tokens=8), prompts[:12])
    stop = next(text.split()[1] for text in whole if text and len(text.split()) > 2)
    (tmp_path / "model/generation_config.json").write_text(json.dumps(config | {"stop_strings": [stop]}))
    cut = outputs(engine(tmp_path / "model", 4, max_new_tokens=8), prompts[:12])
    assert cut != whole and all(stop not in (text or "") for text in cut)


def test_null_columns_and_numbers_json_has_no_word_for() -> None:
    from llmconvert.infer.rows import Fields, Row, to_line

    chat = [{"role": "user", "content": "hi"}]
    assert Fields().prompt_of(Row(0, {"prompt": None, "messages": chat})) == chat
    assert Fields().prompt_of(Row(0, {"prompt": "hi", "messages": None})) == "hi"
    line = to_line({"x": float("nan"), "y": [float("-inf"), 1.5]})
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {"x": "NaN", "y": ["-Infinity", 1.5]}


def test_the_canonical_class_answers_alike(model: Path, prompts: list[Any], tmp_path: Path) -> None:
    from llmconvert.converters.huggingface import convert

    convert(model, tmp_path / "canonical", to="canonical", verify="weights")
    made = engine(tmp_path / "canonical", 7, max_new_tokens=8)
    assert type(made.model).__name__ == "CanonicalForCausalLM"
    assert outputs(made, prompts[:16]) == outputs(engine(model, 7, max_new_tokens=8), prompts[:16])


def test_sampling_depends_on_the_row_and_the_seed_only(model: Path, prompts: list[Any]) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 3}
    alone = outputs(engine(model, 1, **options), prompts)
    assert outputs(engine(model, 7, **options), prompts) == alone
    assert outputs(engine(model, 7, **{**options, "seed": 4}), prompts) != alone
    same = outputs(engine(model, 9, **options), [prompts[0]] * 9)
    assert len(set(same)) > 5, "equal prompts in different rows draw different numbers"


def test_sampling_follows_the_models_distribution() -> None:
    from llmconvert.infer.engines.decoding import Draw

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0]).log_softmax(0)
    rows = 20_000
    draw = Draw(Sampling(1, temperature=0.8, seed=1), range(rows), 4)
    chosen = draw(torch.zeros(rows, 4, dtype=torch.long), logits.repeat(rows, 1)).argmax(-1)
    found = torch.bincount(chosen, minlength=5) / rows
    assert torch.allclose(found, (logits / 0.8).softmax(0), atol=0.015)
    narrow = Draw(Sampling(1, temperature=1.0, top_k=2, seed=1), range(100), 4)
    assert set(narrow(torch.zeros(100, 4, dtype=torch.long), logits.repeat(100, 1)).argmax(-1).tolist()) == {0, 1}


def test_random_numbers_of_a_row_are_its_own() -> None:
    both = uniforms(7, [3, 5], 4)
    assert (uniforms(7, [5], 6)[0, :4] == both[1]).all() and (both[0] != both[1]).all()


def test_a_stop_string_ends_a_row_and_only_that_row(model: Path, prompts: list[Any]) -> None:
    whole = outputs(engine(model, 8, max_new_tokens=12), prompts)
    long = [row for row, text in enumerate(whole) if len((text or "").split()) > 6]
    first, second = ((whole[row] or "").split() for row in long[:2])
    stop = [f"{first[3]} {first[4]}", second[5]]  # one over two tokens
    made = engine(model, 8, max_new_tokens=12, stop=tuple(stop))
    answers = {a.row: a for group in made.answer(list(enumerate(prompts)), set()) for a in group}
    expected = [min((text.split(one)[0] for one in stop), key=len) for text in whole if text is not None]
    assert [answers[row].output for row in range(len(prompts))] == expected
    assert answers[long[0]].tokens <= 5 and expected != whole
    # A stop string within a prompt stops nothing.
    again = outputs(engine(model, 8, max_new_tokens=12, stop=("w3 user",)), prompts)
    assert again == whole


def test_what_is_too_long_or_has_no_template_is_recorded(model: Path, prompts: list[Any]) -> None:
    made = engine(model, 4, max_new_tokens=200)
    rows = [(0, words(57, 1)), (1, words(56, 2))]
    answers = {a.row: a for group in made.answer(rows, set()) for a in group}
    assert answers[0].error == "too long: 57 tokens, where the model's context leaves 56 for a prompt"
    assert answers[1].error is None and answers[1].output
    made.tokenizer.chat_template = None
    (group,) = made.answer([(0, prompts[3])], set())
    assert group[0].output is None and "no chat template" in str(group[0].error)
    made.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    (group,) = made.answer([(0, prompts[3])], set())
    assert "roles must alternate" in str(group[0].error)


@pytest.mark.slow
def test_running_out_of_memory_halves_batches(model: Path, prompts: list[Any]) -> None:
    expected = outputs(engine(model, 48, max_new_tokens=6), prompts)
    made = engine(model, 48, max_new_tokens=6)
    forward, sizes = made.model.forward, []

    def short_of_memory(*args: Any, **kwargs: Any) -> Any:
        rows = kwargs["input_ids"].shape[0]
        sizes.append(rows)
        if rows > 7:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **kwargs)

    made.model.forward = short_of_memory
    assert outputs(made, prompts) == expected
    assert sizes[:4] == [48, 24, 12, 6] and max(sizes[4:]) <= 24
    tried = len([size for size in sizes if size > 7])
    assert outputs(made, prompts) == expected
    assert len([size for size in sizes if size > 7]) - tried <= 2, "it remembers what did not fit"

    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    made.model.forward = no_memory
    answers = [answer for group in made.answer(list(enumerate(prompts[:3])), set()) for answer in group]
    assert len(answers) == 3 and all("out of memory with one row" in str(answer.error) for answer in answers)


def test_a_cache_that_cannot_lose_rows_does_not_matter(
    model: Path, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    from llmconvert.infer.engines import hf

    class LinearAttentionLayer:
        """Holds a state for each row that selecting rows would not reach."""

    assert not hf._can_lose_rows(types.SimpleNamespace(layers=[LinearAttentionLayer()]))
    expected = outputs(engine(model, 16, max_new_tokens=12), prompts)
    made = engine(model, 16, max_new_tokens=12)
    monkeypatch.setattr(hf, "_can_lose_rows", lambda cache: False)
    assert outputs(made, prompts) == expected
    assert not made._shrinks


def test_a_sliding_window_loses_rows_as_well(tmp_path: Path, prompts: list[Any]) -> None:
    import transformers

    directory = tiny.make("mistral_sliding", tmp_path / "model", shards=False)
    write_tokenizer(directory, VOCABULARY)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 130, 6))}))
    stock = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = [plain(directory, stock, prompt, 24) for prompt in prompts[:12]]
    assert max(len(text.split()) for text in expected) > 12
    made = engine(directory, 12, max_new_tokens=24)
    assert outputs(made, prompts[:12]) == expected and made._shrinks


def test_batches_without_an_open_row_are_not_computed(model: Path, prompts: list[Any]) -> None:
    made = engine(model, 4, max_new_tokens=6)
    expected = outputs(made, prompts[:8])
    order = sorted(range(8), key=lambda row: (-len(made.tokenizer(str(prompts[row]))["input_ids"]), row))
    done = frozenset(order[:6])
    calls: list[int] = []
    generate = made._generate

    def counted(batch: list[Any]) -> Any:
        calls.append(len(batch))
        return generate(batch)

    made._generate = counted  # type: ignore[method-assign]
    rest = outputs(made, prompts[:8], done)
    assert rest == [expected[row] for row in sorted(order[6:])] and sum(calls) < 9


# -- batches and rows -----------------------------------------------------------------------------


def test_batches_depend_on_the_data_only() -> None:
    data = [(row, "x" * (row * 37 % 100)) for row in range(WINDOW * 4 + 11)]
    every = [[row for row, _ in batch.items] for batch in batches(data, 4)]
    assert sorted(row for batch in every for row in batch) == list(range(len(data)))
    done = {row for batch in every[::2] for row in batch} | {every[1][0]}
    rest = list(batches(data, 4, done.__contains__))
    assert [[row for row, _ in batch.items] for batch in rest] == every[1::2]
    assert rest[0].done == {every[1][0]} and rest[0].left() == every[1][1:]
    lengths = [[len(prompt) for _, prompt in batch.items] for batch in batches(data, 4)]
    assert max(max(batch) - min(batch) for batch in lengths[:WINDOW]) < 5


def test_parquet_and_datasets_read_as_jsonl(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"prompt": words(3, seed), "n": seed, "sub": {"a": [seed]}} for seed in range(7)]
    write_rows(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "parts").mkdir()
    for part in range(2):
        parquet.write_table(
            pyarrow.Table.from_pylist(rows[part * 4 : part * 4 + 4]), tmp_path / f"parts/{part}.parquet"
        )
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "splits"))
    for name, split in (("rows.jsonl", ""), ("rows.parquet", ""), ("parts", ""), ("saved", ""), ("splits", "test")):
        source = open_source(str(tmp_path / name), split or "train")
        assert [row.fields for row in source] == rows and source.count() == 7 and source.files, name
        assert [row.number for row in source] == list(range(7))
    with pytest.raises(Usage, match="no split `train`"):
        open_source(str(tmp_path / "splits"))


# -- runs, without a model ------------------------------------------------------------------------


def test_a_killed_worker_is_started_again_and_no_row_is_lost(place: Path) -> None:
    orders(place, die={"17": 1, "40": 1, "55": 1}, sleep=0.002)
    summary = echo(place)
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place)
    assert summary.rows == 60 and summary.errors == 0 and sum(t.rows for t in summary.workers) == 60
    assert sum(tally.starts for tally in summary.workers) == 2 + 3
    assert max(Counter(traced(place)).values()) == 1
    assert not work_directory(place / "out.jsonl").exists()


def test_a_row_that_kills_workers_is_recorded_and_the_rest_is_answered(place: Path) -> None:
    orders(place, die={"17": 99}, **{"raise": {"40": 99, "5": 1}})
    summary = echo(place)
    rows = read_rows(place / "out.jsonl")
    assert [row["id"] for row in rows] == list(range(60))
    assert {row["id"] for row in rows if "error" in row} == {17, 40} and summary.errors == 2
    assert rows[17]["output"] is None and "died of it" in rows[17]["error"]
    assert rows[40]["error"].endswith("ValueError: row 40 is cursed")


def test_a_model_that_never_loads_ends_the_run_with_its_last_words(place: Path) -> None:
    orders(place, broken=True)
    with pytest.raises(Refused, match="died 4 times.*RuntimeError: no such kernel") as caught:
        echo(place, workers=1)
    assert "no such kernel" not in str(caught.value.where) and Path(str(caught.value.where)).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("victims", ["parent", *slowly(["both"])])
def test_a_run_killed_again_and_again_resumes_to_the_same_bytes(place: Path, victims: str) -> None:
    orders(place, sleep=0.01)
    lost: set[int] = set()
    computed: list[int] = []
    for share in (1, 20, 45):
        run = start(place, "--num-workers", "2", "--resume")
        until(lambda: len(logged(place)) >= share)  # noqa: B023
        assert run.poll() is None
        workers = workers_of(place)
        if victims == "both":
            for pid in [pid for pid in workers if not gone(pid)]:
                os.kill(pid, signal.SIGKILL)
        # The first time somebody presses Ctrl-C.
        run.send_signal(signal.SIGINT if share == 1 and victims == "parent" else signal.SIGKILL)
        _, said = run.communicate(timeout=20)
        if share == 1 and victims == "parent":
            assert run.returncode == 130 and b"--resume" in said
        until(lambda: all(gone(pid) for pid in workers))  # noqa: B023
        assert not (place / "out.jsonl").exists()
        kept = set(logged(place))
        again = [row for row in traced(place)[len(computed) :] if row in set(computed) - lost]
        assert not again, "a row that was written down was computed again"
        computed = traced(place)
        lost = set(computed) - kept
    # A line without its end is no answer.
    log = sorted(work_directory(place / "out.jsonl").glob("answers-*.jsonl"))[-1]
    with log.open("ab") as file:
        file.write(b'{"row": 59, "output": "cut o')
    run = start(place, "--num-workers", "3", "--resume", "--json")
    _, noise = run.communicate(timeout=60)
    assert run.returncode == 0, noise
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place)
    assert not set(traced(place)[len(computed) :]) & kept


def test_a_run_killed_at_its_very_end_is_finished_by_resume(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmconvert.infer.store import Store

    with monkeypatch.context() as patched:
        patched.setattr(Store, "discard", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            echo(place)
    before = traced(place)
    summary = echo(place, resume=True)
    assert traced(place) == before and summary.resumed == summary.rows == 60
    assert (place / "out.jsonl").read_bytes() == expected_bytes(place)
    assert not work_directory(place / "out.jsonl").exists()


def test_two_runs_to_one_output_do_not_meet(place: Path) -> None:
    orders(place, sleep=0.05)
    run = start(place)
    until(lambda: logged(place))
    with pytest.raises(Usage, match="another llmconvert run is writing"):
        echo(place, resume=True)
    run.kill()
    run.communicate()


def test_another_run_is_not_resumed_and_nothing_is_overwritten_unasked(place: Path) -> None:
    orders(place, broken=True)
    for _ in range(2):  # a run without any answer is not in the way
        with pytest.raises(LlmconvertError, match="no such kernel"):
            echo(place, workers=1)
    orders(place, sleep=0.01)
    run = start(place, "--num-workers", "2")
    until(lambda: logged(place))
    run.kill()
    run.communicate()
    with pytest.raises(Usage, match="unfinished run"):
        echo(place)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("sampling", {"max_new_tokens": 3}), ("sampling", {"seed": 1}),
        ("fields", {"output_field": "answer"}), ("dtype", {"dtype": "float32"}), ("batch size", {"batch_size": 5}),
    ]  # fmt: skip
    for word, options in changes:
        with pytest.raises(Usage, match=f"it differs in {word}$|it differs in {word} \\("):
            echo(place, resume=True, **options)
    (place / "model/chat_template.jinja").write_text("another")
    with pytest.raises(Usage, match="it differs in model"):
        echo(place, resume=True)
    (place / "model/chat_template.jinja").unlink()
    data = (place / "data.jsonl").read_text()
    (place / "data.jsonl").write_text(data.replace('"id": 30', '"id": 31'))
    with pytest.raises(Usage, match="it differs in data"):
        echo(place, resume=True)
    (place / "data.jsonl").write_text(data)
    orders(place)
    echo(place, resume=True)
    (place / "model/config.json").write_text("{ }")
    with pytest.raises(Usage, match="the output exists"):
        echo(place)
    echo(place, overwrite=True)
    before = (place / "out.jsonl").read_bytes()
    with pytest.raises(Usage, match="the output exists"):
        echo(place)
    assert (place / "out.jsonl").read_bytes() == before == expected_bytes(place)


def test_bad_rows_are_recorded_in_their_places(place: Path) -> None:
    good = {"prompt": "w5", "extra": {"ü": [1.5, None]}}
    bad: list[tuple[Any, str]] = [
        ({"prompt": None}, "`prompt` is null"), ({"prompt": 5}, "`prompt` is of type int"), ({"text": "x"}, "no field `prompt` or"),
        ("{not json", "line 4 is not JSON"), ("[1]", "line 5 is not a JSON object"), ({"prompt": ""}, "`prompt` is empty"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"), ({"messages": []}, "`messages` is empty"),
        ({"messages": [{"role": 1, "content": "x"}]}, "not a list of messages"), ({"prompt": "x", "output": "mine"}, "of its own"),
        ({"prompt": "x", "error": "mine"}, "of its own"),
    ]  # fmt: skip
    rows: list[Any] = [row for row, _ in bad]
    write_rows(place / "data.jsonl", [good, *rows[:4], "", *rows[4:], good])
    with (place / "data.jsonl").open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n{"prompt": "no newline at the end"}')
    summary = echo(place, workers=1)
    made = read_rows(place / "out.jsonl")
    assert made[0] == made[len(bad) + 1] == {**good, "output": '"5w"'}
    assert made[-1]["output"] and "not UTF-8" in made[-2]["error"] and "\\xff" in made[-2]["raw"]
    for row, (fields, _) in zip(made[1:], bad, strict=False):
        assert ("raw" in row) == (isinstance(fields, str) and "ud800" not in fields)
        assert row["output"] is None or row["output"] == "mine"
    errors = [row.get("llmconvert_error") or row["error"] for row in made[1 : len(bad) + 1]]
    wanted = [text.replace("line 4", "line 5").replace("line 5 is not a", "line 7 is not a") for _, text in bad]
    assert [text for text, part in zip(errors, wanted, strict=True) if part not in text] == []
    assert made[len(bad)]["error"] == "mine" and summary.rows == len(bad) + 4
    assert (
        summary.errors == len(bad) + 1 and summary.first_error == "row 1: `prompt` is null: neither text nor messages"
    )


def test_names_of_fields(place: Path) -> None:
    rows = [{"prompt": "w7", "messages": [{"role": "user", "content": "w8"}], "q": "w9", "output": "kept"}]
    write_rows(place / "data.jsonl", rows)
    with pytest.raises(Usage, match="a field `output` of its own"):
        echo(place)
    named: list[tuple[dict[str, str], str]] = [
        ({}, '"w7"'), ({"prompt_field": "q"}, '"w9"'), ({"messages_field": "messages"}, '[{"role"'),
    ]  # fmt: skip
    for names, asked in named:
        echo(place, workers=1, output_field="answer", overwrite=True, **names)
        (row,) = read_rows(place / "out.jsonl")
        assert row["answer"][::-1].startswith(asked) and {**row, **rows[0]} == row


# -- runs with a model ----------------------------------------------------------------------------


def test_the_command_answers_as_plain_generate(
    model: Path, stock: Any, prompts: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [
        {"messages" if isinstance(one, list) else "prompt": one, "id": i} for i, one in enumerate(prompts)
    ]
    rows[9:9] = [{"id": "long", "prompt": words(300, 1)}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    options = ["--devices", "cpu", "--dtype", "float32", "--max-new-tokens", "10", "--num-workers", "2"]
    assert run_main(str(model), str(data), str(tmp_path / "out.jsonl"), *options, "--batch-size", "6", "--json") == 0
    said = capfd.readouterr()
    summary, made = json.loads(said.out), read_rows(tmp_path / "out.jsonl")
    expected: list[dict[str, Any]] = [
        {**row, "output": plain(model, stock, row.get("prompt") or row["messages"], 10)}
        for row in rows
        if row["id"] != "long"
    ]
    assert "too long: 300 tokens" in made[9].pop("error")
    assert made == [*expected[:9], {**rows[9], "output": None}, *expected[9:]]
    assert said.err == "" and summary["rows"] == 49 and summary["errors"] == 1 and summary["engine"] == "hf"
    assert summary["tokens"] == summary["new_tokens"] > 200 and summary["seconds"] > 0 < summary["tokens_per_second"]
    assert len(summary["workers"]) == 2 and sum(worker["rows"] for worker in summary["workers"]) == 49


@pytest.mark.slow
def test_10000_rows_through_4_workers_are_each_answered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    config = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 4}  # fmt: skip
    orders(tmp_path, gather=4)
    small = tiny.make("llama", tmp_path / "model", shards=False, **config)
    write_tokenizer(small, VOCABULARY)
    chosen = random.Random(5)
    rows = [{"prompt": words(chosen.randrange(1, 9), seed), "id": seed} for seed in range(10_000)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    options: dict[str, Any] = {"engine": TRACED, "max_new_tokens": 1, "devices": ["cpu"]}
    summary = Infer(small, data, tmp_path / "out.jsonl", 4, dtype="float32", batch_size=100, **options).run()
    made = read_rows(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "output"} for row in made] == rows
    assert Counter(traced(tmp_path)) == Counter(range(10_000))
    assert summary.rows == 10_000 and summary.errors == 0
    assert len(workers_of(tmp_path)) == 4 and min(tally.rows for tally in summary.workers) > 0
    alone = outputs(engine(small, 1000, max_new_tokens=1), [row["prompt"] for row in rows])
    assert [row["output"] for row in made] == alone and len(set(alone)) > 20


# -- Ray ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray, whose workers find the tests' modules."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.slow
def test_two_copies_on_ray_write_the_same_bytes(cluster: None, model: Path, prompts: list[Any], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": prompt, "id": seed} for seed, prompt in enumerate(prompts)])
    options: dict[str, Any] = {"dtype": "float32", "batch_size": 6, "max_new_tokens": 10}
    summary = Infer(model, data, tmp_path / "ray.jsonl", 2, engine="ray:hf", **options).run()
    expected = outputs(engine(model, 6, max_new_tokens=10), prompts)
    assert [row["output"] for row in read_rows(tmp_path / "ray.jsonl")] == expected
    assert summary.engine == "ray:hf" and summary.rows == 48 and summary.errors == 0


@pytest.mark.slow
def test_four_copies_on_ray_survive_a_death_and_a_cursed_row(cluster: None, place: Path) -> None:
    (place / "trace").touch()
    orders(place, die={"17": 1}, sleep=0.02, **{"raise": {"40": 99}})
    summary = echo(place, workers=4, engine=f"ray:{ECHO}", batch_size=2)
    made, expected = read_rows(place / "out.jsonl"), [json.loads(line) for line in expected_bytes(place).splitlines()]
    assert made[40].pop("error") == "failed 2 times: ValueError: row 40 is cursed" and summary.errors == 1
    assert made == [*expected[:40], {**expected[40], "output": None}, *expected[41:]]
    assert len(workers_of(place)) >= 4


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_what_cannot_be_done_is_said_before_anything_is_loaded(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = [str(place / "model"), str(place / "data.jsonl"), str(place / "out.jsonl")]
    for arguments, words_ in (
        (["--batch-size", "0"], "at least 1"), (["--batch-size", "many"], "a number of rows"), (["--temperature", "-1"], "greedy"),
        (["--top-p", "0"], "above 0"), (["--max-new-tokens", "0"], "at least 1"), (["--stop", ""], "not empty"),
        (["--num-workers", "0"], "at least 1"), (["--dtype", "int8"], "no dtype"), (["--engine", "tpu"], "no engine"),
        (["--devices", "7"], "no device `cuda:7`"), (["--devices", "cpu,0"], "no device|cannot be mixed"),
        (["--error-field", "output"], "one field"),
    ):  # fmt: skip
        code = run_main(*names, *arguments)
        assert code == 2 and re.search(words_, capfd.readouterr().err), arguments
    assert run_main(names[0], names[1], names[1]) == 2 and "the output is the data" in capfd.readouterr().err
    assert run_main(names[0], str(place / "none.jsonl"), names[2]) == 2 and "no such data" in capfd.readouterr().err
    assert run_main(names[0], names[1], str(place / "x.parquet")) == 2 and "as JSONL only" in capfd.readouterr().err
    assert run_main(*names, "--engine", "no_such:Thing", "--devices", "cpu") == 2
    assert "cannot be imported: No module named 'no_such'" in capfd.readouterr().err
    if importlib.util.find_spec("vllm") is None:
        assert run_main(*names, "--engine", "vllm") == 2 and "pip install vllm" in capfd.readouterr().err
    assert {path.name for path in place.iterdir()} == {"model", "data.jsonl"}


def test_progress_says_rows_rates_and_time_left(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from llmconvert.infer import progress
    from llmconvert.infer.pool import Tally

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress(enabled=True)
    shown.start(total=1000, before=200)
    tallies = [
        Tally(rows=60, errors=2, tokens=600, seconds=15.0, starts=2),
        Tally(rows=38, tokens=400, seconds=20.0, starts=1),
    ]
    now[0] += 9
    shown.update(tallies, 2)
    assert capfd.readouterr().err == ""
    now[0] += 11
    shown.update(tallies, 2)
    assert capfd.readouterr().err == "rows: 300 of 1000, 5.0 rows/s, 50 tokens/s, 0:02:20 left\n"
    console = Console(width=100)
    with console.capture() as captured:
        console.print(shown._table(tallies, 2))
    table = [line.split() for line in captured.get().splitlines()]
    assert ["0", "60", "2", "40", "1"] in table and ["1", "38", "0", "20", "0"] in table
    silent = progress.Progress(enabled=False)
    silent.start(1, 0)
    now[0] += 99
    silent.update(tallies, 0)
    silent.say("hello")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("key", ["num_labels", "transformers_weights"])
def test_a_config_is_looked_at_before_libraries_are(place: Path, key: str) -> None:
    config = {key: 10**9 if key == "num_labels" else "other.safetensors"}
    (place / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=key):
        echo(place)


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "model", shards=1)
    held = load_file(source / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="layers.1.mlp.up_proj"):
        _load(Copy("hf", str(source), ("cpu",), 1, "float32", None, Sampling(), {}))


def test_only_errors_end_in_exit_code_4(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(place / "data.jsonl", ["nonsense", {"question": "x"}])
    names = [str(place / "model"), str(place / "data.jsonl"), str(place / "out.jsonl")]
    assert run_main(*names, "--engine", ECHO, "--devices", "cpu") == 4
    said = capfd.readouterr()
    assert "errors" in said.out and "no row has an answer; row 0: line 1 is not JSON" in said.err
    assert len(read_rows(place / "out.jsonl")) == 2


def test_the_choice_of_an_engine_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    assert choose("auto", accelerators=True) == ("hf", "vLLM is not installed")
    with pytest.raises(Usage, match="vLLM is not installed"):
        choose("vllm", accelerators=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose("auto", accelerators=True) == ("vllm", "vLLM is installed")
    assert choose("auto", accelerators=False) == ("hf", "vLLM needs an accelerator")


@pytest.mark.parametrize(
    ("workers", "named", "shares"),
    [
        (4, None, [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3"), ("cuda:4", "cuda:5"), ("cuda:6", "cuda:7")]),
        (None, ["2", "cuda:5"], [("cuda:2",), ("cuda:5",)]),
        (1, ["0", "1", "2"], [("cuda:0", "cuda:1", "cuda:2")]),
        (3, ["cpu"], [("cpu",), ("cpu",), ("cpu",)]),
    ],
)
def test_devices_are_shared_out(
    workers: int, named: list[str], shares: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert share_devices(workers, named) == shares
    with pytest.raises(Usage, match="cannot be shared out evenly"):
        share_devices(3, None)
    with pytest.raises(Usage, match="no device `cuda:8`"):
        share_devices(1, ["8"])


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "GemmaTokenizer"}])
def test_a_directory_without_a_tokenizer_is_refused(settings: dict[str, str] | None, tmp_path: Path) -> None:
    """Transformers 5 makes one of nothing for Gemma, to which every text is one unknown token."""
    from llmconvert.debug.prompts import read_tokenizer
    from llmconvert.infer.engines.encode import load_tokenizer

    source = checkpoints.make("gemma2", tmp_path / "src")
    if settings:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match="tokenizer"):
        load_tokenizer(str(source))
    assert read_tokenizer(str(source)) is None


def test_a_pointer_is_no_model_to_run(tmp_path: Path) -> None:
    source = checkpoints.make("gemma2", tmp_path / "src")
    (source / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "one"}\n')
    with pytest.raises(BadInput, match="`tokenizer.model` is a Git LFS pointer"):
        Infer(source, data, tmp_path / "out.jsonl", devices="cpu").run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "src"]
