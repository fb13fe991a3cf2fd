"""vLLM in batch inference: the real engine on a processor, in an environment of its own; what it is told, without it.

The oracle is transformers: its own `generate`, one row at a time, in float32.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from children import popen_interruptible, vllm_python
from infer_runs import ROOT, VOCABULARY, echo, logged, make_place, read_rows, run_main, until, words, write_rows
from test_infer import plain, write_tokenizer

from llmconvert.errors import LlmconvertError, Refused, Usage
from llmconvert.infer.dtypes import stored_dtype
from llmconvert.infer.engines import Copy
from llmconvert.infer.engines import vllm as engine
from llmconvert.infer.engines.memory import share_of_host
from llmconvert.infer.sampling import Sampling
from llmconvert.infer.store import work_directory

place = pytest.fixture(make_place)
# Heads of a size that vLLM's attention on a processor takes.
_SHAPES = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
_ENDS = [2, *range(5, 120, 10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32 with a penalty on repetition, ends of its own and a stop string."""
    directory = tiny.make("llama", tmp_path_factory.mktemp("vllm") / "model", **_SHAPES)
    write_tokenizer(directory, VOCABULARY)
    # Among the ends is not the tokenizer's own: who adds it stops where the checkpoint does not.
    generation = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.3, "top_p": 0.7, "eos_token_id": _ENDS[1:]}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


# -- the real one ---------------------------------------------------------------------------------


def infer(python: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "llmconvert", "infer", *map(str, arguments), "--engine", "vllm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, **options)


def parting(model: Path, stock: Any, row: dict[str, Any], found: str, expected: str) -> float:
    """By how much logits differ, of the two tokens at which two answers part."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    one, other = found.split(), expected.split()
    same = next(i for i, (a, b) in enumerate(zip([*one, None], [*other, None], strict=False)) if a != b)
    prompt = row.get("prompt") or tokenizer.apply_chat_template(
        row["messages"], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(" ".join([prompt, *one[:same]]), return_tensors="pt")["input_ids"]
    logits = stock(ids).logits[0, -1]
    pair = [tokenizer.convert_tokens_to_ids(words_[same]) if len(words_) > same else _ENDS[1] for words_ in (one, other)]
    return float((logits[pair[0]] - logits[pair[1]]).abs())


@pytest.mark.slow
def test_vllm_answers_as_transformers_in_the_dtype_stored(model: Path, tmp_path: Path) -> None:
    import transformers

    python = vllm_python()
    stock = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts: list[Any] = [words(1 + seed * 7 % 40, seed) for seed in range(60)]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": text}], "id": seed} if seed % 4 == 3 else {"prompt": text, "id": seed}
        for seed, text in enumerate(prompts)
    ]
    expected = [plain(model, stock, row.get("prompt") or row["messages"], 12) for row in rows]
    whole = next(text for text in expected if len(text.split()) > 6)
    stop = " ".join(whole.split()[3:5])
    expected = [text.split(stop)[0] for text in expected]
    assert len(set(expected)) > 40 and len({len(text.split()) for text in expected}) > 8
    rows[9:9] = [{"prompt": words(150, 1), "id": "long"}, {"prompt": "", "id": "empty"}]
    data, out = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    options = [
        "--max-new-tokens", "12", "--json", "--stop", stop, "--num-workers", "2",
        "--engine-arg", "max_model_len=128", "--engine-arg", "enforce_eager=true",
    ]  # fmt: skip
    done = infer(python, model, data, out, *options)
    assert done.returncode == 0, done.stderr
    summary, made = json.loads(done.stdout), read_rows(out)
    assert summary["dtype"] == "float32" and summary["engine"] == "vllm" and summary["errors"] == 2
    assert [row["id"] for row in made] == [row["id"] for row in rows]
    assert "too long: 150 tokens, where the model's context leaves 116" in made.pop(9)["error"]
    assert "is empty" in made.pop(9)["error"]
    for row, wanted in zip(made, expected, strict=True):
        if row["output"] != wanted:  # two tokens may be within rounding of each other
            assert parting(model, stock, row, row["output"], wanted) < 1e-3, row
    assert sum(row["output"] == wanted for row, wanted in zip(made, expected, strict=True)) >= 57
    assert not work_directory(out).exists()
    # The control: in bfloat16 it is another function, and this would have been seen.
    done = infer(python, model, data, out, *options[:-6], *options[-4:], "--dtype", "bfloat16", "--overwrite")
    assert done.returncode == 0, done.stderr
    other = [row for row in read_rows(out) if "error" not in row]
    assert sum(row["output"] == wanted for row, wanted in zip(other, expected, strict=True)) < 50
    # And a run that is finished is not run again: it takes less than loading the model would.
    again = infer(python, model, data, out, *options[:-6], *options[-4:], "--dtype", "bfloat16", "--resume")
    assert again.returncode == 0 and json.loads(again.stdout)["already_finished"], again.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_run_of_vllm_that_is_killed_resumes(model: Path, tmp_path: Path) -> None:
    python = vllm_python()
    rows = [{"prompt": words(5, seed // 2), "id": seed} for seed in range(400)]  # each prompt twice
    data, out = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
    options = [
        "--max-new-tokens", "60", "--temperature", "1", "--seed", "7", "--engine-arg", "enforce_eager=true",
        "--engine-arg", "max_num_seqs=8",
    ]  # fmt: skip
    command = [python, "-m", "llmconvert", "infer", str(model), str(data), str(out), "--engine", "vllm", *options]
    run = popen_interruptible(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    until(lambda: len(logged(tmp_path)) > 30 or run.poll() is not None, seconds=300)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    kept = len(logged(tmp_path))
    assert 30 < kept < 400 and not out.exists()
    done = infer(python, model, data, out, *options, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    summary, made = json.loads(done.stdout), read_rows(out)
    assert kept <= summary["resumed"] < 400 and summary["rows"] == 400 and summary["errors"] == 0
    assert [row["id"] for row in made] == list(range(400))
    # Rows draw numbers of their own, so that one prompt has two answers.
    same = sum(one["output"] == other["output"] for one, other in zip(made[::2], made[1::2], strict=True))
    assert same < 100 and len(Counter(row["output"] for row in made)) > 250


@pytest.mark.slow
def test_what_vllm_cannot_run_is_refused_before_any_worker_starts(model: Path, tmp_path: Path) -> None:
    python = vllm_python()
    data, out = write_rows(tmp_path / "data.jsonl", [{"prompt": "w5"}]), tmp_path / "out.jsonl"
    odd = tiny.make("llama", tmp_path / "odd", shards=False, **_SHAPES)
    write_tokenizer(odd, VOCABULARY)
    (odd / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "no_repeat_ngram_size": 3}))
    cases: list[tuple[Path, list[str], int, str]] = [
        (model, ["--engine-arg", "no_such_option=1"], 2, "unexpected keyword argument 'no_such_option'"),
        (model, ["--engine-arg", "max_model_len=many"], 2, "max_model_len: "),
        (model, ["--engine-arg", "max_model_len=4096"], 3, "max_model_len"),
        (model, ["--temperature", "3"], 2, "temperature must be in"),
        (model, ["--dtype", "float64"], 3, "does not compute in float64"),
        (odd, [], 3, "no_repeat_ngram_size"),
    ]
    for directory, options, code, said in cases:
        done = infer(python, directory, data, out, *options)
        assert done.returncode == code, (options, done.stderr)
        assert said in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "odd"}


# -- what it is told ------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, *, runs_on: str, takes_devices: bool = True) -> None:
    """Modules with the part of vLLM's interface that decides before anything is loaded."""
    names = ["model", *(["device_ids"] if takes_devices else [])]
    vllm: Any = types.ModuleType("vllm")
    vllm.__version__, vllm.EngineArgs = "0.0", dataclasses.make_dataclass("EngineArgs", names)
    platforms: Any = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(device_type=runs_on)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)


def copy(model: Path, *devices: str, **options: Any) -> Copy:
    rest: dict[str, Any] = {"dtype": "float32", "batch_rows": None, "sampling": Sampling(8)} | options
    return Copy("vllm", str(model), devices, 2, **rest)


def test_vllm_is_told_devices_and_options(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "") if name == "VLLM_CPU_KVCACHE_SPACE" else None
    stand_in(monkeypatch, runs_on="cuda")
    _, told = engine._prepare(copy(model, "cuda:2", "cuda:3", dtype="bfloat16", options={"enforce_eager": True}))
    assert told["device_ids"] == [2, 3] and told["tensor_parallel_size"] == 2 and told["dtype"] == "bfloat16"
    assert told["trust_remote_code"] is False and told["enforce_eager"] and "max_num_seqs" not in told
    _, told = engine._prepare(copy(model, "cuda:0", "cuda:1", batch_rows=8))
    assert told["device_ids"] == [0, 1] and told["max_num_seqs"] == 8 and "kv_cache_memory_bytes" not in told
    stand_in(monkeypatch, runs_on="cuda", takes_devices=False)
    with pytest.raises(Refused, match=r"vLLM 0.0 is too old"):
        engine._prepare(copy(model, "cuda:1"))
    stand_in(monkeypatch, runs_on="cpu")
    _, told = engine._prepare(copy(model, "cpu"))
    assert 0 < told["kv_cache_memory_bytes"] == share_of_host(engine._weights(model), 2) and "device_ids" not in told
    _, told = engine._prepare(copy(model, "cpu", options={"kv_cache_memory_bytes": 5}))
    assert told["kv_cache_memory_bytes"] == 5
    for own in engine._OWN:
        with pytest.raises(Usage, match=f"`{own}` is no option"):
            engine._prepare(copy(model, "cpu", options={own: 1}))
    for sampling in (Sampling(8, temperature=0.001),):
        with pytest.raises(Usage, match="no temperature between"):
            engine._prepare(copy(model, "cpu", sampling=sampling))
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("runs_on, device", [("", "cpu"), ("cuda", "cpu"), ("cpu", "cuda:0")])
def test_a_build_for_other_devices_is_refused(
    runs_on: str, device: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, runs_on=runs_on)
    with pytest.raises(Refused, match="nothing it knows here" if not runs_on else f"runs on {runs_on} here, not on"):
        engine._prepare(copy(model, device))


def test_without_cuda_no_worker_is_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a build for CUDA, in a process of its own as the real one would be."""
    (place / "model/config.json").write_text('{"torch_dtype": "float32"}')
    package = place / "path/vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.32'\n")
    (package / "platforms.py").write_text("class current_platform: device_type = ''\n")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(Refused, match="vLLM 0.32 runs on nothing it knows here, not on the processor") as caught:
        echo(place, engine="vllm")
    assert "--engine hf" in str(caught.value.hint)
    assert {path.name for path in place.iterdir()} == {"model", "data.jsonl", "path"}
    (package / "__init__.py").write_text("import os; os.abort()\n")
    with pytest.raises(Refused, match="the engine cannot run the model: .*(Abort|exit code -6)"):
        echo(place, engine="vllm")


def test_what_the_checkpoint_asks_for_is_done_or_refused() -> None:
    def told(tokenizer_end: int | None = 1, stop: tuple[str, ...] = (), **own: Any) -> dict[str, Any]:
        config = types.SimpleNamespace(try_get_generation_config=lambda: own)
        return engine._sampling(Sampling(9, stop=stop), config, types.SimpleNamespace(eos_token_id=tokenizer_end))

    assert told()["stop_token_ids"] == [1] and told(None)["stop_token_ids"] == []
    # Those of the checkpoint alone: the tokenizer's is no end then, as with transformers.
    assert told(eos_token_id=[7, 5])["stop_token_ids"] == [5, 7] and told(eos_token_id=7)["ignore_eos"]
    assert told(stop=("a",), stop_strings=["b"])["stop"] == ["a", "b"] and told(stop_strings="c")["stop"] == ["c"]
    assert told(repetition_penalty=1.3)["repetition_penalty"] == 1.3 and told()["repetition_penalty"] == 1.0
    for name in ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"):
        with pytest.raises(Refused, match=name):
            told(**{name: [[5]]})
        told(**{name: None})


# -- what a checkpoint is stored in ---------------------------------------------------------------


@pytest.mark.parametrize("stored, said, expected, how", [
    ("float32", "float32", "float32", "as stored"), ("bfloat16", "bfloat16", "bfloat16", "as stored"),
    ("float32", "bfloat16", "float32", "as the weights are stored; config.json says bfloat16"),
    ("float16", None, "float16", "as stored"),
])  # fmt: skip
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_auto_is_what_the_weights_are_stored_in(
    fmt: str, stored: str, said: str | None, expected: str, how: str, tmp_path: Path
) -> None:
    directory = tiny.make("llama", tmp_path / "model", dtype=stored, fmt=fmt)
    config = {**json.loads((directory / "config.json").read_text()), "torch_dtype": said}
    (directory / "config.json").write_text(json.dumps(config))
    assert stored_dtype(directory) == (expected, how)


@pytest.mark.parametrize("config, expected", [
    ({"torch_dtype": "bfloat16"}, "bfloat16"), ({"text_config": {"dtype": "float16"}}, "float16"), ({"dtype": "torch.float32"}, "float32"),
    ({"dtype": ["float32"]}, "auto"), ({}, "auto"), ({"dtype": "float8_e4m3fn"}, "auto"),
])  # fmt: skip
def test_without_weights_of_one_kind_the_config_says_it(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_dtype(tmp_path)[0] == expected
    weights = tiny.make("llama", tmp_path / "quantised")
    (weights / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    assert stored_dtype(weights)[0] == expected


def test_transformers_is_told_what_is_stored_and_not_left_to_the_config(tmp_path: Path) -> None:
    from llmconvert.infer.engines.hf import HuggingFace

    directory = tiny.make("llama", tmp_path / "model")
    write_tokenizer(directory, VOCABULARY)
    config = {**json.loads((directory / "config.json").read_text()), "torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(config))
    assert HuggingFace(copy(directory, "cpu", dtype=stored_dtype(directory)[0])).model.dtype == torch.float32
    assert HuggingFace(copy(directory, "cpu", dtype="auto")).model.dtype == torch.float16


# -- options of transformers ----------------------------------------------------------------------


def test_options_reach_transformers_or_are_refused(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from llmconvert.infer.engines.hf import HuggingFace

    made = HuggingFace(copy(model, "cpu", options={"attn_implementation": "eager"}))
    assert made.model.config._attn_implementation == "eager"
    for own in ("trust_remote_code", "dtype", "weights_only", "device_map"):
        with pytest.raises(Usage, match=f"`{own}` is no option"):
            HuggingFace(copy(model, "cpu", options={own: True}))
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "w5"}])
    names = [str(model), str(data), str(tmp_path / "out.jsonl"), "--devices", "cpu", "--engine", "hf"]
    assert run_main(*names, "--engine-arg", "no_such_option=1") == 2
    said = capfd.readouterr().err
    assert "unexpected keyword argument 'no_such_option'" in said and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}
    with pytest.raises(LlmconvertError, match="attn_implementation|nonesuch"):
        HuggingFace(copy(model, "cpu", options={"attn_implementation": "nonesuch"}))
