"""Checkpoints by hub id, through huggingface_hub and its cache."""

from __future__ import annotations

import difflib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

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

_PICKLED = ["*.bin", "*.pt", "*.pth"]


def download(identifier: str) -> Path:
    """Fetch `owner/name` or `owner/name@revision` and return the local snapshot directory.

    Safetensors are preferred: `.bin` files are fetched only where a repository has nothing else. Where the hub cannot be
    reached, the cache is taken. Where a directory `owner` stands here, only a revision or a place in the cache make it an
    id of the hub: otherwise it is a path that is misspelt.

    Raises:
        Usage: `identifier` is neither an existing path nor of that form.
        InputOutput: the hub cannot be reached, or has no such repository or revision.
    """
    name, at, revision = identifier.partition("@")
    if not _HUB_ID.fullmatch(identifier) or any(part.startswith(".") for part in name.split("/")):
        raise Usage("no such directory", where=identifier, hint=what_is_there(identifier))
    if not at and os.path.isdir(name.split("/")[0]) and not _cached(name):
        meant = f"for a model of the hub, name its revision too: `{name}@main`"
        raise Usage("no such directory", where=identifier, hint=f"{what_is_there(identifier)}; {meant}")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    wanted: dict[str, Any] = {"revision": revision or None, "allow_patterns": _PATTERNS}
    ignored = ["original/*", "consolidated*", "*/*"]
    try:
        # One request, which is not repeated: whether the hub is there and has the model is soon known.
        listed = HfApi().model_info(name, revision=revision or None, timeout=10).siblings or []
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _not_given(identifier, error) from None
    except Exception as error:
        # What was left out when the model was fetched must not be missed now.
        for left_out in ([], _PICKLED):
            with suppress(Exception):
                ignored = [*ignored, *left_out]
                return Path(snapshot_download(name, local_files_only=True, ignore_patterns=ignored, **wanted))
        raise _not_given(identifier, error) from None
    if any(file.rfilename.endswith(".safetensors") for file in listed):
        ignored += _PICKLED
    try:
        return Path(snapshot_download(name, ignore_patterns=ignored, **wanted))
    except Exception as error:
        raise _not_given(identifier, error) from None


def _cached(name: str) -> bool:
    """Whether the cache holds a model of that name."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _not_given(identifier: str, error: Exception) -> InputOutput:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = identifier.partition("@")
    if isinstance(error, GatedRepoError):
        return InputOutput(
            "no such directory, and the hub gives this model only to those who have accepted its terms",
            where=identifier,
            hint=f"accept them at https://huggingface.co/{name}, then `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputOutput(f"the hub's `{name}` has no revision `{revision}`", where=identifier)
    if isinstance(error, RepositoryNotFoundError):
        return InputOutput(
            "no such directory, and the hub has no such model, or a private one",
            where=identifier,
            hint="check the spelling; for a private model, `hf auth login`",
        )
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return InputOutput(
        f"no such directory, and the hub could not be asked for it: {reason}",
        where=identifier,
        hint="check the spelling and the network",
    )


def what_is_there(path: str, otherwise: str = "give a directory or a hub id such as `Qwen/Qwen2.5-7B`") -> str:
    """A hint for a path that does not exist: names like it, how far it goes, or what to do `otherwise`."""
    if os.path.islink(path):
        return f"it is a link to `{os.readlink(path)}`, which is not there"
    folder, missing = os.path.split(os.path.normpath(path))
    while folder and not os.path.isdir(folder):
        folder, missing = os.path.split(folder)
    try:
        near = difflib.get_close_matches(missing, os.listdir(folder or "."), 3, 0.6)
    except OSError:
        near = []
    if near:
        return f"there is {', '.join(f'`{os.path.join(folder, name)}`' for name in near)}"
    if folder:
        return f"`{folder}` is there, `{missing}` in it is not"
    return otherwise
