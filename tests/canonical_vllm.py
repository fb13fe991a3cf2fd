"""Run by path under the interpreter that has vLLM: what it makes of a canonical directory with the code beside it.

python canonical_vllm.py DIRECTORY PROMPTS.json ANSWER.json
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def main() -> None:
    import vllm

    directory, prompts, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    try:
        engine = vllm.LLM(
            directory, model_impl="transformers", trust_remote_code=True, skip_tokenizer_init=True, dtype="float32",
            enforce_eager=True, enable_prefix_caching=False, max_model_len=64, max_num_seqs=4,
        )  # fmt: skip
        sampling = vllm.SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    except Exception as error:
        answer.write_text(json.dumps({"refused": f"{type(error).__name__}: {error}"}))
        return
    found = [
        [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        for output, ids in zip(outputs, prompts, strict=True)
    ]
    made = [list(output.outputs[0].token_ids) for output in outputs]
    answer.write_text(json.dumps({"log_probs": found, "made": made}))


if __name__ == "__main__":
    main()
