"""What a child interpreter is given: the imports of this process, and no way to the current directory's modules.

Python puts the current directory first on the import path of `-c` and `-m`, and so do libraries that start interpreters of
their own. Where somebody stands in a checkpoint's directory, its `torch.py` would run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import llmconvert


def import_path() -> list[str]:
    """Where this process finds modules, as absolute paths, so that they mean the same elsewhere."""
    path = [os.path.abspath(entry) for entry in sys.path]
    own = str(Path(llmconvert.__file__).parent.parent)  # found by `-m` in a checkout, which is then not on the path
    return path + ([] if own in path else [own])


def environment(added: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child with another current directory.

    Args:
        added: variables to set.
        defaults: variables to set where the user has not.
    """
    made = {**defaults, **os.environ, **added}
    # To Python an empty entry is the current directory.
    named = [os.path.abspath(entry) for entry in made.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    return made | ({"PYTHONPATH": os.pathsep.join(named)} if named else {})
