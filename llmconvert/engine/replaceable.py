"""What `--overwrite` may replace: a directory in which every file is one that llmconvert or transformers writes.

llmconvert's own outputs say so themselves, file by file, in `llmconvert.json`. Elsewhere names decide: those that
`save_pretrained` of transformers' models, tokenizers and processors gives, and the README and licence a repository
brings along. Training state, logs and Megatron-LM's own saves are neither, and are left to their owner.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from typing import Any

from llmconvert.engine.manifest import MANIFEST
from llmconvert.engine.tree import Tree

_WRITTEN = re.compile(
    r"""
    llmconvert(-report)?\.json
    | (config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template
      |preprocessor_config|video_preprocessor_config|processor_config|adapter_config)\.json
    | [^.][^/]*\.(safetensors|bin)(\.index\.json)?
    | [^.][^/]*\.(model|tiktoken|jinja)
    | vocab\.txt | merges\.txt | vocab\.bpe
    | (modeling|configuration|tokenization|processing|image_processing|video_processing|feature_extraction)_\w+\.py
    | (README|LICENSE|LICENCE|NOTICE|USE_POLICY)([._-][\w.-]+)? | \.gitattributes
    | additional_chat_templates/[^./][^/]*\.jinja
    """,
    re.VERBOSE,
)
_BESIDE_SHARDS = re.compile(r"megatron-args\.sh|latest_checkpointed_iteration\.txt")
_IN_SHARDS = re.compile(r"\.metadata|metadata\.json|common\.pt")
_HF = "hf/"


def foreign_file(tree: Tree) -> str | None:
    """The first file in a directory that is neither llmconvert's nor transformers'; links and devices never are.

    Raises:
        OSError: the system refuses.
    """
    listed = set(_listed(tree))
    folders = {name.rpartition("/")[0] for name in listed if "/" in name}
    for name, found in tree.files():
        folder, _, last = name.rpartition("/")
        known = (
            name in listed
            or _WRITTEN.fullmatch(name)
            or (listed and _BESIDE_SHARDS.fullmatch(name))
            or (folder in folders and _IN_SHARDS.fullmatch(last))
            or (folders and name.startswith(_HF) and _WRITTEN.fullmatch(name.removeprefix(_HF)))
        )
        if not known or not stat.S_ISREG(found.st_mode):
            return name
    return None


def is_checkpoint(tree: Tree) -> bool:
    """Whether there is a checkpoint at all.

    Raises:
        OSError: the system refuses.
    """
    return any(
        (found := tree.stat(name)) is not None and stat.S_ISREG(found.st_mode) for name in ("config.json", MANIFEST)
    )


def _listed(tree: Tree) -> Iterator[str]:
    """The files an output's own record names."""
    try:
        record: Any = json.loads(tree.read(MANIFEST))
    except (OSError, ValueError, RecursionError):
        return
    record = record if isinstance(record, dict) else {}
    files, tensors = record.get("files"), record.get("tensors")
    yield from files if isinstance(files, dict) else ()
    for entry in tensors.values() if isinstance(tensors, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            yield entry["file"]
