"""Make a small Qwen2 checkpoint with random weights, shards and a tokenizer: something to try llmconvert on.

python scripts/make_checkpoint.py DIR
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "敏捷的棕色狐狸跳过懒狗。",
    "def fold(norm, weight):\n    return weight * (1 + norm)",
    "A checkpoint that exists is a checkpoint that was proved.",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def main() -> None:
    """Write the checkpoint."""
    directory = Path(sys.argv[1])
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    config = Qwen2Config(
        vocab_size=len(fast) + 7, hidden_size=384, intermediate_size=1056, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=4096, rope_theta=1e6, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.05)
    model.save_pretrained(directory, max_shard_size="6MB")
    (directory / "README.md").write_text("A checkpoint with random weights.\n")
    print(f"made {directory}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
