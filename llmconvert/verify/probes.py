"""The tokens two models are compared on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmconvert.errors import BadInput

FAR_POSITION = 4096
"""A probe reaches this position at least, where the model has it: rotary variants differ little before."""

_LENGTHS = (5, 17, 33)
_MOST_TOKENS = 48
_TEXTS = (
    "The quick brown fox jumps over the lazy dog; 3.14159 is not 22/7, and 1,024 = 2^10.",
    "Le cœur a ses raisons que la raison ne connaît point. ¿Dónde está la biblioteca? Привет, мир!",
    "人工智能正在改变我们的生活方式。请用一句话概括:学而时习之,不亦说乎?",
    "日本語の文章です。한국어 문장입니다. هذا نص عربي. यह हिन्दी है। 🙂🚀",
    "def gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n",
    '{"model": "llama", "layers": [1, 2, 3], "tied": false}\n<html>&nbsp;</html>\n\tSELECT * FROM t;',
)


def limits(config: Mapping[str, Any]) -> tuple[int, int]:
    """The vocabulary's size, and the number of positions up to which a model is what its code says."""
    vocab = config.get("padded_vocab_size") or config.get("vocab_size") or 0
    keys = ("seq_length", "n_positions", "max_position_embeddings", "model_max_length", "max_sequence_length")
    longest = next((config[key] for key in keys if config.get(key)), FAR_POSITION)
    return int(vocab), int(longest)


@dataclass(frozen=True)
class Probe:
    """One batch of tokens.

    Attributes:
        name: what it is for.
        input_ids: [batch, tokens].
        attention_mask: [batch, tokens], 0 at padding.
        position_ids: [batch, tokens].
    """

    name: str
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    @property
    def kept(self) -> Tensor:
        """Bool [batch, tokens], false at padding."""
        return self.attention_mask.bool()

    def describe(self) -> dict[str, object]:
        """For a report."""
        return {
            "name": self.name,
            "rows": self.input_ids.shape[0],
            "tokens": int(self.attention_mask.sum()),
            "last_position": int(self.position_ids[self.kept].max()),
        }


def make_probes(
    directories: Sequence[Path], vocab_size: int, longest: int, *, seed: int = 0, prompts: Path | None = None
) -> list[Probe]:
    """Four batches: text (or prompts), seeded random tokens, positions far apart, and one position only.

    The first two are padded on the left and of several lengths. The third has few tokens at positions up to `longest`,
    which tells rotary variants apart at no cost. In the fourth every token stands at position 0, so that nothing is
    rotated: what departs elsewhere and not there is a matter of positions.

    Args:
        directories: where to look for a tokenizer, in order.
        vocab_size: ids are below it.
        longest: positions are below it.
        seed: of the random tokens.
        prompts: a file of prompts in place of the text, one a line: text, or JSON objects with `text`, `prompt` or
            `input_ids`.

    Raises:
        BadInput: the prompts cannot be read, or there is no tokenizer to read them with.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocab_size, (min(n, longest),), generator=generator).tolist() for n in _LENGTHS]
    width = len(rows[-1])
    far = torch.randint(0, vocab_size, (1, width), generator=generator)
    spread = torch.linspace(0, longest - 1, width).long()[None]
    still = torch.randint(0, vocab_size, (1, min(_LENGTHS[1], longest)), generator=generator)
    text = _prompt_rows(prompts, directories) if prompts else _text_rows(directories)
    # A tokenizer may know more tokens than the model, and padding the batch to a stray long row helps nobody.
    text = [row[:longest] for row in text if row and max(row) < vocab_size]
    return [
        *([padded("prompts" if prompts else "text", text)] if text else []),
        padded("random tokens", rows),
        Probe("far positions", far, torch.ones_like(far), spread),
        Probe("position 0 only", still, torch.ones_like(still), torch.zeros_like(still)),
    ]


def padded(name: str, rows: Sequence[Sequence[int]]) -> Probe:
    """A left-padded batch of rows of ids; positions count from the first token that is not padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Probe(name, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))


def _tokenizer(directories: Sequence[Path]) -> object | None:
    if not any((folder / "tokenizer_config.json").is_file() for folder in directories):
        return None
    import transformers

    for folder in directories:
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # type: ignore[no-any-return]
        except Exception:  # noqa: BLE001, S112  # a tokenizer of one's own code, or none: random tokens do as well
            continue
    return None


def token_texts(directories: Sequence[Path], ids: Sequence[int]) -> list[str] | None:
    """What a tokenizer calls some ids, or None where there is no tokenizer."""
    tokenizer = _tokenizer(directories)
    return None if tokenizer is None else [str(text) for text in tokenizer.convert_ids_to_tokens(list(ids))]  # type: ignore[attr-defined]


def _text_rows(directories: Sequence[Path]) -> list[list[int]]:
    tokenizer = _tokenizer(directories)
    if tokenizer is None:
        return []
    try:
        return [ids_of(tokenizer, text)[:_MOST_TOKENS] for text in _TEXTS]
    except ValueError:
        return []  # whether it is a good tokenizer is asked elsewhere: random tokens do as well


def ids_of(tokenizer: object, text: str) -> list[int]:
    """A text's ids.

    Raises:
        ValueError: the tokenizer fails, in whatever way.
    """
    try:
        return [int(number) for number in tokenizer(text)["input_ids"]]  # type: ignore[operator]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of several libraries, down to panics of Rust, which are no `Exception`
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from None


def _prompt_rows(path: Path, directories: Sequence[Path]) -> list[list[int]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the prompts cannot be read: {error}", where=str(path)) from None
    if not lines:
        raise BadInput("there are no prompts", where=str(path), hint="one a line, as text or JSON")
    tokenizer = _tokenizer(directories)
    rows: list[list[int]] = []
    for number, line in enumerate(lines, 1):
        value: object = line
        if line.lstrip().startswith("{"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"not JSON: {error}", where=f"{path}, line {number}") from None
            value = next((record[key] for key in ("input_ids", "text", "prompt") if key in record), None)
        if isinstance(value, list) and value and all(isinstance(token, int) and token >= 0 for token in value):
            rows.append(value)
        elif isinstance(value, str) and tokenizer is not None:
            try:
                rows.append(ids_of(tokenizer, value))
            except ValueError as error:
                raise BadInput(f"the tokenizer cannot read it: {error}", where=f"{path}, line {number}") from None
        elif isinstance(value, str):
            raise BadInput(
                "neither checkpoint has a tokenizer that loads without code of its own",
                where=str(path),
                hint='give ids instead: {"input_ids": [1, 2, 3]} on each line',
            )
        else:
            raise BadInput("a prompt is text, or has `text`, `prompt` or `input_ids`", where=f"{path}, line {number}")
    return rows
