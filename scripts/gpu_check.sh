#!/usr/bin/env bash
# The proofs on CUDA, as a table; skips cleanly where there is no GPU. Arguments go to tests/gpu.py: --match qwen2
# Uses the interpreter in LLMCONVERT_PYTHON (one whose torch sees CUDA), else .venv, set up when needed.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${LLMCONVERT_PYTHON:-}" ]; then
    source scripts/setup.sh
    LLMCONVERT_PYTHON=python
fi
export PYTHONPATH="$PWD:$PWD/tests" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
"$LLMCONVERT_PYTHON" tests/gpu.py "$@"
