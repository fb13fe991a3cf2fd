"""`python -m llmconvert`."""

import os
import sys

# `-m` puts the current directory first on the import path, where a checkpoint's `torch.py` or `json.py` may lie.
if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)) and sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from llmconvert.cli.app import main  # noqa: E402

main()
