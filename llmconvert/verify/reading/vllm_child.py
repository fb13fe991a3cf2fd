"""Run by path under the interpreter that has vLLM: log-probabilities of given tokens. Imports nothing of llmconvert.

    python vllm_child.py REQUEST.json ANSWER.json

The request holds `directory` and `prompts`, lists of token ids. The answer holds `version` and `log_probs`, or one of
`missing` (the engine is not there) and `refused` (it does not take the model), a message.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def read(directory: str, prompts: list[list[int]]) -> dict[str, Any]:
    """The log-probability vLLM gives each token of each prompt but the first."""
    # In this process, so that a failure arrives here as an exception; nothing is fetched; 1 GiB is plenty.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        vllm: Any = importlib.import_module("vllm")
    except ImportError as error:
        return {"missing": str(error)}
    try:
        engine = vllm.LLM(
            directory,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=max(map(len, prompts)) + 1,  # it insists on sampling one token more
        )
        sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        found = [
            [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, prompts, strict=True)
        ]
    except Exception as error:  # whatever the engine raises is its refusal
        # Its settings are checked by pydantic, whose own text begins with a count.
        faults = error.errors() if hasattr(error, "errors") else []
        return {"refused": faults[0]["msg"] if faults else f"{type(error).__name__}: {error}"}
    return {"version": vllm.__version__, "log_probs": found}


if __name__ == "__main__":  # vLLM may start processes that import this file
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(read(**request)), encoding="utf-8")
