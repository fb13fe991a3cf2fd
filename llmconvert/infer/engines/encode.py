"""Prompts to token ids, through the tokenizer and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmconvert.checkpoint.directory import holds_vocabulary
from llmconvert.errors import BadInput
from llmconvert.infer.rows import BadRow, Prompt


def load_tokenizer(model: str) -> Any:
    """A checkpoint's tokenizer.

    Raises:
        BadInput: it has none, or it cannot be loaded.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of several libraries, down to bare `Exception`
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"the tokenizer cannot be loaded: {first}", where=model) from None
    if Path(model).is_dir() and not holds_vocabulary(Path(model), tokenizer):
        raise BadInput("the directory holds no tokenizer", where=model, hint="copy the files of the original's there")
    return tokenizer


def context_length(config: Any) -> int | None:
    """How many tokens a model can see, prompt and answer together; None where its config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def encode(tokenizer: Any, prompt: Prompt, room: int | None) -> list[int]:
    """A prompt's token ids.

    Args:
        tokenizer: of transformers.
        prompt: a text, tokenised as the tokenizer does by default, or messages, put through its template.
        room: most tokens it may have; None for any number.

    Raises:
        BadRow: the template refuses it, or it has too many tokens, or none.
    """
    try:
        if isinstance(prompt, str):
            ids: list[int] = tokenizer(prompt)["input_ids"]
        else:
            if not tokenizer.chat_template:
                raise BadRow("the row is a chat, and the tokenizer has no chat template")
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except (BadRow, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # templates raise what they like, and panics of Rust are no `Exception`
        raise BadRow(
            f"the prompt cannot be tokenised: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    if not ids:
        raise BadRow("the prompt has no tokens")
    if room is not None and len(ids) > room:
        raise BadRow(f"too long: {len(ids)} tokens, where the model's context leaves {max(room, 0)} for a prompt")
    return ids
