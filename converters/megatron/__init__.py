"""Megatron checkpoints: how a model is cut over tensor and pipeline ranks, and put together again."""
