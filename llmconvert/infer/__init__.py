"""Batch inference: a file of prompts through many copies of a model.

`Infer(model_path, data_path, output_path, num_workers=8).run()` does what `llmconvert infer` does.
"""

from __future__ import annotations

from llmconvert.infer.run import Infer

__all__ = ["Infer"]
