"""Checkpoints by hub id, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path

from llmconvert.errors import InputOutput, Usage

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

_PATTERNS = [
    "*.json",
    "*.safetensors",
    "*.bin",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "*.md",
    "*.jinja",
    "LICENSE*",
]


def download(identifier: str) -> Path:
    """Fetch `owner/name` or `owner/name@revision` and return the local snapshot directory.

    Safetensors are preferred: `.bin` files are fetched only where a repository has nothing else.

    Raises:
        Usage: `identifier` is neither an existing path nor of that form.
        InputOutput: the hub cannot be reached, or has no such repository or revision.
    """
    if not _HUB_ID.fullmatch(identifier):
        raise Usage(
            "no such directory", where=identifier, hint="give a directory or a hub id such as `Qwen/Qwen2.5-7B`"
        )
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = identifier.partition("@")
    try:
        try:
            files = HfApi().list_repo_files(name, revision=revision or None)
            unwanted = ["*.bin", "*.pt", "*.pth"] if any(f.endswith(".safetensors") for f in files) else []
        except OSError:
            unwanted = []  # offline: take what the cache holds
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=_PATTERNS,
                ignore_patterns=[*unwanted, "original/*", "consolidated*", "*/*"],
            )
        )
    except Exception as error:
        raise InputOutput(
            f"no such directory, and the hub did not give it: {str(error).splitlines()[0] or type(error).__name__}",
            where=identifier,
            hint="check the spelling, the network and `huggingface-cli login`",
        ) from None
