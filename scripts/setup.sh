# Sourced by the other scripts: makes the virtual environment once and puts its tools first on PATH.
#
#   LLMCONVERT_VENV   where the environment is (default: .venv in the checkout)
#   PYTHON            the interpreter that makes it (default: python3)
#
# Set-up runs again only when pyproject.toml or the torch pin changes.

# The pin comes first and alone: left to itself pip takes the newest torch, with gigabytes of CUDA libraries. This
# version has a CPU build (2.13.0+cpu), which pip prefers when an index offers it; where none does, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
TORCH="torch==2.13.0"

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${LLMCONVERT_VENV:-$ROOT/.venv}"

if [ ! -x "$VENV/bin/python" ]; then
    echo "setup: creating $VENV" >&2
    "${PYTHON:-python3}" -m venv "$VENV"
fi
export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1

_key="$ROOT $TORCH $("$VENV/bin/python" -c 'import hashlib, sys
print(sys.version_info[:2], hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$ROOT/pyproject.toml")"
_stamp="$VENV/.llmconvert-setup"
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_key" ]; then
    _started=$SECONDS
    echo "setup: installing $TORCH, then llmconvert and its tools" >&2
    rm -f "$_stamp"
    "$VENV/bin/python" -m pip install -q "$TORCH"
    "$VENV/bin/python" -m pip install -q -e "$ROOT[dev]"
    printf '%s\n' "$_key" > "$_stamp"
    echo "setup: done in $((SECONDS - _started)) s" >&2
fi
unset _key _stamp _started
