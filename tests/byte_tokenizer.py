"""A byte-level tokenizer as GPT-2, Llama 3 and Qwen have it: what it has not learned to join it writes byte by byte."""

from __future__ import annotations

from pathlib import Path

TEXT = ["the quick brown fox jumps over the lazy dog", "prices in $ and %, a\nnew line", "模型"] * 4


def write(directory: Path, vocab_size: int = 400) -> int:
    """Train it and save it as transformers does; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return int(tokenizer.get_vocab_size())
