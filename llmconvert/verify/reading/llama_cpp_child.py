"""Run by path under the interpreter that has llama.cpp: log-probabilities of given tokens. Imports nothing of llmconvert.

    python llama_cpp_child.py REQUEST.json ANSWER.json

The request holds `directory` and `prompts`, lists of token ids. The answer holds `version` and `log_probs`, or one of
`missing` (the engine or its converter is not there) and `refused` (it does not take the model), a message.

llama.cpp reads its own format only: its converter, named by LLMCONVERT_GGUF_CONVERTER, writes the model beside
REQUEST.json in float32 first.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

_ERROR = 4  # ggml_log_level
_HELD: list[Any] = []  # llama.cpp has bare pointers to these


def convert(converter: Path, directory: str, target: Path) -> None:
    """Write a GGUF file by llama.cpp's convert_hf_to_gguf.py, without a tokenizer: the prompts are ids."""
    sys.path.insert(0, str(converter.parent))
    module: Any = importlib.import_module(converter.stem)
    # Newer converters keep their classes in a package beside the script.
    base = module.TextModel if hasattr(module, "TextModel") else importlib.import_module("conversion.base").TextModel
    prepare = base.prepare_metadata

    def no_vocabulary(model: Any) -> None:
        model.gguf_writer.add_tokenizer_model("none")
        model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])

    def prepare_without_tokenizer(model: Any, *args: Any, **kwargs: Any) -> None:
        type(model).set_vocab = no_vocabulary
        prepare(model, *args, **kwargs)

    base.prepare_metadata = prepare_without_tokenizer
    sys.argv = [str(converter), directory, "--outtype", "f32", "--outfile", str(target)]
    module.main()


def listen(llama_cpp: Any) -> list[str]:
    """Collect what llama.cpp logs as errors: its exceptions do not name the cause."""
    said: list[str] = []

    def hear(level: int, text: bytes, _: object) -> None:
        line = text.decode(errors="replace")
        sys.stderr.write(line)
        if level == _ERROR:
            said.append(line)

    _HELD.append(llama_cpp.llama_log_callback(hear))
    llama_cpp.llama_log_set(_HELD[-1], None)
    return said


def score(engine: Any, ids: list[int]) -> list[float]:
    """The log-probability of each token but the first; the softmax is taken in float64."""
    import numpy

    engine.reset()
    engine.eval(ids)
    logits = engine.scores[: len(ids) - 1].astype(numpy.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    given = logits[numpy.arange(len(ids) - 1), ids[1:]]
    found: list[float] = (given - numpy.log(numpy.exp(logits).sum(axis=-1))).tolist()
    return found


def read(directory: str, prompts: list[list[int]], scratch: Path) -> dict[str, Any]:
    """The log-probability llama.cpp gives each token of each prompt but the first."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    converter = Path(os.environ.get("LLMCONVERT_GGUF_CONVERTER", ""))
    if not converter.is_file():
        return {"missing": "LLMCONVERT_GGUF_CONVERTER names no file"}
    target = scratch / "model.gguf"
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")
        convert(converter, directory, target)
    except ImportError as error:
        return {"missing": str(error)}
    except Exception as error:  # whatever the converter raises is its refusal
        return {"refused": f"{type(error).__name__}: {error}"}
    said = listen(llama_cpp)
    longest = max(map(len, prompts))
    try:
        engine = llama_cpp.Llama(
            str(target),
            n_ctx=longest,
            n_batch=longest,
            n_ubatch=longest,
            n_gpu_layers=0,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,  # the cache is float16 unless told
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=True,  # else a crash is silent
        )
        found = [score(engine, ids) for ids in prompts]
    except Exception as error:  # it names the cause in its log only
        return {"refused": said[0] if said else f"{type(error).__name__}: {error}"}
    return {"version": f"llama-cpp-python {llama_cpp.__version__}", "log_probs": found}


if __name__ == "__main__":
    source = Path(sys.argv[1])
    request = json.loads(source.read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(read(**request, scratch=source.parent)), encoding="utf-8")
