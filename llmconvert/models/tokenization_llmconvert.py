"""Read the tokenizer beside this file as the class its tokenizer_config.json names, whatever the model's type is.

transformers 5 goes by the type of the model before it goes by `tokenizer_class`, but not where tokenizer_config.json has
an `auto_map`: then the name counts. This file is what that `auto_map` points to. It is only run with
`trust_remote_code=True`, and then does what transformers does without.
"""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast


class NamedTokenizer(PreTrainedTokenizer):
    """Loads the class named, in its slow form where it has one."""

    @classmethod
    def from_pretrained(cls, path: Any, *inputs: Any, trust_remote_code: Any = None, **options: Any) -> Any:
        """What `AutoTokenizer` loads without remote code, `use_fast=False`."""
        return AutoTokenizer.from_pretrained(path, *inputs, use_fast=False, trust_remote_code=False, **options)


class NamedTokenizerFast(PreTrainedTokenizerFast):
    """Loads the class named."""

    @classmethod
    def from_pretrained(cls, path: Any, *inputs: Any, trust_remote_code: Any = None, **options: Any) -> Any:
        """What `AutoTokenizer` loads without remote code."""
        return AutoTokenizer.from_pretrained(path, *inputs, trust_remote_code=False, **options)
