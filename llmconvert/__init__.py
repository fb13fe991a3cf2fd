"""Convert, shard and prove LLM checkpoints.

The public functions are imported when first used, so that `import llmconvert` costs nothing.
"""

from __future__ import annotations

import importlib
import os

__version__ = "0.1.0"

if __name__ != "llmconvert":
    # The checkout's root is on `__path__`, where this folder would be found a second time.
    raise ImportError(f"import `llmconvert`, not `{__name__}`")

_HERE = os.path.dirname(os.path.realpath(__file__))
_ROOT = os.path.dirname(_HERE)
if not os.path.isdir(os.path.join(_HERE, "specs")) and os.path.isfile(os.path.join(_ROOT, "pyproject.toml")):
    # In a checkout `converters/` and `specs/` lie at the root; a wheel carries them inside the package.
    __path__.append(_ROOT)

# From `typing`, or with a `Path` above, a file of such a name in the current directory would be imported before
# `python -m llmconvert` can take that directory off the import path.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from llmconvert.checkpoint import open_checkpoint
    from llmconvert.converters.huggingface import convert
    from llmconvert.converters.inspection import inspect
    from llmconvert.verify.logits import compare_logits

# No name here may be that of a subpackage: importing `llmconvert.verify` would put the module in the function's place.
_PUBLIC = {
    "compare_logits": ("llmconvert.verify.logits", "compare_logits"),
    "convert": ("llmconvert.converters.huggingface", "convert"),
    "inspect": ("llmconvert.converters.inspection", "inspect"),
    "open_checkpoint": ("llmconvert.checkpoint", "open_checkpoint"),
}

__all__ = ["__version__", "compare_logits", "convert", "inspect", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llmconvert' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
