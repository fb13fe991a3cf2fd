"""Directories of weights as they are: bytes, names and offsets; nothing about models."""

from llmconvert.checkpoint.directory import Checkpoint, open_checkpoint, read_json
from llmconvert.checkpoint.stored import StoredTensor

__all__ = ["Checkpoint", "StoredTensor", "open_checkpoint", "read_json"]
