"""Other engines as readers: the exchange with them, by scripts that play the engine; the real ones where there are any."""

import json
import math
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from children import vllm_python

from llmconvert.errors import BadInput, LlmconvertError, Refused, Usage
from llmconvert.verify import readers
from llmconvert.verify.models import load_model
from llmconvert.verify.readers import ReaderReport, compare_reader, read_log_probs

PROMPTS = [[5, 3, 9, 7], [1, 2]]
ANSWER = {"version": "1.2", "log_probs": [[-1.0, -2.0, -3.0], [-0.5]]}
CHILDREN = Path(readers.__file__).with_name("reading")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a script answer in vLLM's place; `request` and `answer` are the two paths."""

    def use(code: str) -> None:
        folder = tmp_path / "children"
        folder.mkdir()
        head = "import json, os, subprocess, sys, time\nfrom pathlib import Path\nrequest, answer = map(Path, sys.argv[1:])\n"
        (folder / "vllm_child.py").write_text(head + textwrap.dedent(code))
        monkeypatch.setattr(readers, "_CHILDREN", folder)

    for variable in ("LLMCONVERT_VLLM_PYTHON", "LLMCONVERT_LLAMA_CPP_PYTHON", "LLMCONVERT_GGUF_CONVERTER"):
        monkeypatch.delenv(variable, raising=False)
    return use


def test_what_is_asked_and_answered(play: Any, directory: Path, tmp_path: Path) -> None:
    play(f"""
        Path({str(tmp_path / "seen")!r}).write_text(request.read_text())
        print("a banner, which is no answer")
        answer.write_text(json.dumps({ANSWER}))
    """)
    assert read_log_probs("vllm", directory, PROMPTS) == ANSWER["log_probs"]
    assert json.loads((tmp_path / "seen").read_text()) == {"directory": str(directory), "prompts": PROMPTS}


def test_a_relative_directory_is_found(play: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(f"""
        assert (Path(json.loads(request.read_text())["directory"]) / "config.json").is_file()
        answer.write_text(json.dumps({ANSWER}))
    """)
    monkeypatch.chdir(directory.parent)
    assert read_log_probs("vllm", Path("model"), PROMPTS) == ANSWER["log_probs"]


def test_the_interpreter_is_the_one_named(play: Any, directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    play(f"answer.write_text(json.dumps({{**{ANSWER}, 'version': os.environ.get('NAMED', 'none')}}))")
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nNAMED=${{0##*/}} exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    expected = [[-1.0, -2.0, -3.0], [-0.5]]
    assert compare_reader("vllm", directory, PROMPTS, expected).version == "none"
    assert compare_reader("vllm", directory, PROMPTS, expected, python=str(other)).version == "python"
    monkeypatch.setenv("LLMCONVERT_VLLM_PYTHON", str(other))
    assert compare_reader("vllm", directory, PROMPTS, expected).version == "python"


def test_the_report(play: Any, directory: Path) -> None:
    play(f"answer.write_text(json.dumps({ANSWER}))")
    report = compare_reader("vllm", directory, PROMPTS, [[-1.0, -2.5, -3.0], [-0.25]])
    assert not report.verdict and "differ by 5.0e-01" in report.reason
    assert report.max_abs == 0.5 and report.mean_abs == 0.75 / 4 and report.num_tokens == 4
    assert report.worst == (0, 2) and (report.worst_expected, report.worst_found) == (-2.5, -2.0)
    assert (report.engine, report.version) == ("vllm", "1.2")
    found = json.loads(json.dumps(report.to_dict()))
    assert ReaderReport(**{**found, "worst": tuple(found["worst"])}) == report
    wide = compare_reader("vllm", directory, PROMPTS, [[-1.0, -2.5, -3.0], [-0.25]], tolerance=0.5)
    assert wide.verdict and "agree to 5.0e-01" in wide.reason


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_a_number_that_is_not_finite_is_seen(value: str, play: Any, directory: Path) -> None:
    play(f"""answer.write_text('{{"version": "1", "log_probs": [[-1.0, -2.0, {value}], [-9.0]]}}')""")
    report = compare_reader("vllm", directory, PROMPTS, ANSWER["log_probs"], tolerance=1e9)
    assert not report.verdict and "finite" in report.reason and report.worst == (0, 3)
    assert not math.isfinite(report.max_abs)


@pytest.mark.parametrize("code, message", [
    ("""answer.write_text(json.dumps({"missing": "No module named 'vllm'"}))""", "No module named 'vllm'"),
    ("""answer.write_text(json.dumps({"refused": "\\nno such model\\nand more"}))""",
     "does not take the model: no such model"),
    ("sys.exit('the last word')", "exit code 1: the last word"),
    ("print('one'); sys.stderr.write('two\\\\n\\\\n'); os._exit(3)", "exit code 3: two"),
    ("os._exit(0)", "exit code 0: without a word"),
    ("raise KeyError('inside')", "KeyError: 'inside'"),
    ("os.abort()", "exit code -6"),
    ("answer.write_text('no json')", "cannot be used"),
    ("answer.write_bytes(bytes([255, 254]))", "cannot be used"),
    ("answer.write_text('[]')", "cannot be used"),
    ("answer.write_text('{}')", "cannot be used"),
    ("""answer.write_text('{"version": "1", "log_probs": [[-1, -2, -3]]}')""", "cannot be used"),
    ("""answer.write_text('{"version": "1", "log_probs": [[-1, -2], [-3]]}')""", "cannot be used"),
    ("""answer.write_text('{"version": "1", "log_probs": [[-1, -2, "x"], [-3]]}')""", "cannot be used"),
    ("""answer.write_text('{"version": "1", "log_probs": [[-1, -2, true], [-3]]}')""", "cannot be used"),
    ("""answer.write_text('{"version": "1", "log_probs": 5}')""", "cannot be used"),
    ("""answer.write_text('{"log_probs": [[-1, -2, -3], [-3]]}')""", "cannot be used"),
])  # fmt: skip
def test_an_engine_that_gives_nothing_usable_is_refused(code: str, message: str, play: Any, directory: Path) -> None:
    play(code)
    with pytest.raises(Refused) as caught:
        read_log_probs("vllm", directory, PROMPTS)
    text = str(caught.value)
    assert message in text and len(text.splitlines()) == 1
    assert "pip install" in caught.value.hint and "LLMCONVERT_VLLM_PYTHON" in caught.value.hint


def test_an_engine_that_takes_too_long_is_stopped_with_what_it_started(
    play: Any, directory: Path, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    play(f"""
        other = subprocess.Popen(["sleep", "60"])
        Path({str(pids)!r}).write_text(f"{{other.pid}} {{os.getpid()}}")
        time.sleep(60)
    """)
    started = time.monotonic()
    with pytest.raises(Refused, match="within 3 s"):
        read_log_probs("vllm", directory, PROMPTS, timeout_s=3)
    assert time.monotonic() - started < 30
    _all_end(pids)


def test_nothing_is_left_running_after_an_answer(play: Any, directory: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    play(f"""
        other = subprocess.Popen(["sleep", "60"])
        Path({str(pids)!r}).write_text(str(other.pid))
        answer.write_text(json.dumps({ANSWER}))
    """)
    read_log_probs("vllm", directory, PROMPTS)
    _all_end(pids)


def _all_end(pids: Path) -> None:
    left = [int(pid) for pid in pids.read_text().split()]
    assert left
    for _ in range(100):
        left = [pid for pid in left if _runs(pid)]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {left}")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # an orphan nobody has buried yet has ended too
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_no_such_interpreter(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no interpreter") as caught:
        read_log_probs("vllm", directory, PROMPTS, python=str(tmp_path / "nowhere"))
    assert "LLMCONVERT_VLLM_PYTHON" in caught.value.hint


@pytest.mark.parametrize("engine", readers.READERS)
def test_the_scripts_say_that_the_engine_is_missing(
    engine: str, directory: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The scripts that are shipped, under an interpreter that has neither engine."""
    converter = tmp_path / "converter.py"
    converter.write_text("")
    monkeypatch.setenv("LLMCONVERT_GGUF_CONVERTER", str(converter))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(Refused, match=f"{engine} is not installed.*No module named") as caught:
        read_log_probs(engine, directory, PROMPTS, python=str(bare))
    assert "pip install" in caught.value.hint


def test_llama_cpp_says_that_its_converter_is_missing(directory: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("LLMCONVERT_GGUF_CONVERTER", raising=False)
    with pytest.raises(Refused, match="LLMCONVERT_GGUF_CONVERTER names no file"):
        read_log_probs("llama.cpp", directory, PROMPTS, python=sys.executable)


def test_what_cannot_be_asked_is_said(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(Usage, match="nonesuch"):
        read_log_probs("nonesuch", directory, PROMPTS)
    for prompts in ([], [[1, 2], [3]]):
        with pytest.raises(Usage, match="two token ids"):
            read_log_probs("vllm", directory, prompts)
    with pytest.raises(Usage, match="do not fit"):
        compare_reader("vllm", directory, PROMPTS, [[-1.0], [-2.0]])
    with pytest.raises(BadInput, match="config.json"):
        read_log_probs("vllm", tmp_path / "nowhere", PROMPTS)


_FAKE_VLLM = """
__version__ = "9.9"
class Rank:
    def __init__(self, logprob): self.logprob = logprob
class Output:
    def __init__(self, ids):  # the first token is not scored; each place holds the likeliest one as well
        self.prompt_logprobs = [None] + [{t: Rank(-float(t)), 999: Rank(0.0)} for t in ids[1:]]
class SamplingParams:
    def __init__(self, **options): self.options = options
class LLM:
    def __init__(self, directory, *, dtype, max_model_len, skip_tokenizer_init, **options):
        assert dtype == "float32" and skip_tokenizer_init and max_model_len == 5
    def generate(self, requests, sampling, use_tqdm):
        assert sampling.options["prompt_logprobs"] == 1
        return [Output(request["prompt_token_ids"]) for request in requests]
"""
_FAKE_LLAMA_CPP = """
import math, numpy
__version__, GGML_TYPE_F32 = "9.9", 0
llama_log_callback = lambda function: function
llama_log_set = lambda function, data: None
class Llama:
    def __init__(self, path, *, n_ctx, logits_all, type_k, type_v, **options):
        assert open(path).read() == "none 16 f32" and logits_all and type_k == type_v == 0
        self.scores = numpy.zeros((n_ctx, 16), dtype=numpy.float32)
    def reset(self): self.scores[:] = 0
    def eval(self, ids):
        for place, token in enumerate(ids[1:]): self.scores[place, token] = math.log(15.0)  # one half
"""
_FAKE_CONVERTER = """
import sys
class Writer:
    def add_tokenizer_model(self, name): self.name = name
    def add_vocab_size(self, size): self.size = size
class TextModel:
    def __init__(self): self.gguf_writer, self.hparams = Writer(), {"vocab_size": 16}
    def prepare_metadata(self, vocab_only): self.set_vocab()
class Model(TextModel):
    def set_vocab(self): raise FileNotFoundError("no tokenizer")
def main():
    (_, directory, _, kind, _, target), model = sys.argv, Model()
    model.prepare_metadata(vocab_only=False)
    open(target, "w").write(f"{model.gguf_writer.name} {model.gguf_writer.size} {kind}")
"""


@pytest.mark.parametrize("engine, expected", [
    ("vllm", [[-3.0, -9.0, -7.0], [-2.0]]), ("llama.cpp", [[math.log(0.5)] * 3, [math.log(0.5)]]),
])  # fmt: skip
def test_the_scripts_ask_for_the_right_numbers(
    engine: str, expected: list[list[float]], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scripts that are shipped, with modules that stand in for the engines."""
    (tmp_path / "vllm.py").write_text(_FAKE_VLLM)
    (tmp_path / "llama_cpp.py").write_text(_FAKE_LLAMA_CPP)
    (tmp_path / "converter.py").write_text(_FAKE_CONVERTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMCONVERT_GGUF_CONVERTER", "converter.py")
    report = compare_reader(engine, directory, PROMPTS, expected, python=sys.executable, tolerance=1e-6)
    assert report.verdict and report.version.endswith("9.9"), report


def test_the_scripts_import_nothing_of_llmconvert() -> None:
    scripts = sorted(CHILDREN.glob("*.py"))
    assert [path.name for path in scripts] == ["llama_cpp_child.py", "vllm_child.py"]
    for path in scripts:
        assert "import llmconvert" not in path.read_text() and "from llmconvert" not in path.read_text()


# Heads of a size that vLLM's attention on a CPU takes.
_SHAPES = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 32}
_LLAMA_CPP = ("LLMCONVERT_LLAMA_CPP_PYTHON", "LLMCONVERT_GGUF_CONVERTER")
_REAL = [
    pytest.param("vllm", marks=pytest.mark.slow),
    pytest.param(
        "llama.cpp",
        marks=pytest.mark.skipif(
            not all(map(os.environ.get, _LLAMA_CPP)), reason=f"llama.cpp is not named by {', '.join(_LLAMA_CPP)}"
        ),
    ),
]


def _python(engine: str) -> str | None:
    return vllm_python() if engine == "vllm" else None


def _expected(directory: Path, prompts: list[list[int]]) -> list[list[float]]:
    model = load_model(directory, torch.float32, "cpu")
    found = []
    for ids in prompts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist())
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("engine", _REAL)
def test_a_real_engine_reads_what_transformers_reads(engine: str, arch: str, tmp_path: Path) -> None:
    shapes = _SHAPES if arch == "llama" else {key: _SHAPES[key] for key in ("hidden_size", "intermediate_size")}
    directory = tiny.make(arch, tmp_path / "model", **shapes)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(0, 131, (length,), generator=generator).tolist() for length in (34, 5, 2)]
    expected = _expected(directory, prompts)
    report = compare_reader(engine, directory, prompts, expected, python=_python(engine), tolerance=2e-4)
    assert report.verdict, report
    assert report.num_tokens == 33 + 4 + 1
    other = _expected(tiny.make(arch, tmp_path / "other", seed=1, **shapes), prompts)
    assert not readers._compare(
        engine, report.version, other, expected, 2e-4
    ).verdict  # the tolerance tells models apart


@pytest.mark.parametrize("engine", _REAL)
def test_a_real_engine_refuses_what_it_does_not_know(engine: str, tmp_path: Path) -> None:
    directory = tiny.make("llama", tmp_path / "model", **_SHAPES)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({**config, "architectures": ["Nonesuch"], "model_type": "nonesuch"})
    )
    with pytest.raises(LlmconvertError) as caught:
        read_log_probs(engine, directory, PROMPTS, python=_python(engine))
    assert isinstance(caught.value, Refused) and len(str(caught.value).splitlines()) == 1
