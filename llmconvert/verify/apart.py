"""Tokenizers compared in a process of their own, which may take only so much memory and time.

Their files come from anybody, and are programs of a kind: a normaliser that puts a thousand characters for one, thrice, or
a regular expression that tries everything, ends the process that reads it, and the libraries that do have no bounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmconvert.engine.interpreters import environment, import_path
from llmconvert.errors import BadInput
from llmconvert.verify.tokenizers import SameTokenizer, check_links, compare_tokenizers, files_of, is_told_from_files

SECONDS = 300
_MEMORY, _PER_BYTE = 1 << 30, 50
"""Of a process that reads two tokenizers, beside so much for each byte of their files: a vocabulary of 17 MB takes 400 MB."""

# Only `sys` is there before the path is set. Without torch, transformers loads tokenizers all the same, in half the time.
_BOOT = """
import sys
left, right, memory = sys.argv[1:4]
sys.path[:] = sys.argv[4:]
import json, os, resource
answer = os.dup(1)
os.dup2(2, 1)
try:
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
except (OSError, ValueError):
    pass
sys.modules["torch"] = None
from pathlib import Path
from llmconvert.verify.tokenizers import compare_tokenizers
found = compare_tokenizers(Path(left), Path(right))
os.write(answer, json.dumps(found.to_dict()).encode())
os._exit(0)
"""


def compare_tokenizers_apart(left: Path, right: Path) -> SameTokenizer:
    """What `compare_tokenizers` finds, within bounds.

    Args:
        left: a directory with config.json.
        right: another.

    Raises:
        BadInput: a file is a link out of its directory; reading takes more memory or time than such files should, or
            ends the process that reads them.
    """
    check_links(left, right)
    if is_told_from_files(left):
        return compare_tokenizers(left, right)
    memory = _MEMORY + _PER_BYTE * sum(path.stat().st_size for path in (*files_of(left), *files_of(right)))
    isolated = ["-I"] if sys.flags.isolated else []
    paths = [str(path.absolute()) for path in (left, right)]
    command = [sys.executable, *isolated, "-c", _BOOT, *paths, str(memory), *import_path()]
    try:
        done = subprocess.run(
            command, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False,
            timeout=SECONDS, env=environment({"TOKENIZERS_PARALLELISM": "false"}, {}),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _unbounded(left, f"takes more than {SECONDS} s") from None
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise _unbounded(left, f"takes more than {memory / 1e9:.1f} GB of memory, or ends it (code {done.returncode})") from None
    return SameTokenizer(**{**found, "classes": tuple(found["classes"]), "notes": tuple(found["notes"])})


def _unbounded(directory: Path, what: str) -> BadInput:
    return BadInput(
        f"the tokenizer's files are not such as to be read: transformers {what}", where=str(directory),
        hint="fetch them again; `--verify none` copies them unread",
    )  # fmt: skip
