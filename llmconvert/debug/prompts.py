"""What a model is looked at on: one row of tokens, and how each is shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmconvert.checkpoint.directory import holds_vocabulary
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.verify.probes import ids_of


@dataclass(frozen=True)
class Prompt:
    """One row of tokens.

    Attributes:
        input_ids: [1, tokens].
        tokenizer: shows tokens as text, or None.
    """

    input_ids: Tensor
    tokenizer: Any = None

    @property
    def tokens(self) -> list[str]:
        """Each token as text, or its number where there is no tokenizer."""
        return [self.show(number) for number in self.input_ids[0].tolist()]

    def show(self, number: int) -> str:
        """A token of the vocabulary as text, blanks and line breaks kept; its bytes where they are no whole characters.

        Without text of its own it is shown by its piece and number.
        """
        if self.tokenizer is None:
            return str(number)
        text = str(self.tokenizer.decode([number]))
        if text and "\ufffd" not in text:
            return text
        piece = self.tokenizer.convert_ids_to_tokens(number)
        raw = piece_bytes(piece) if text else None
        if raw:
            return "".join(f"<{byte:02X}>" for byte in raw)
        return f"{piece}#{number}" if piece else f"#{number}"

    def position(self, token: int | str) -> int:
        """Where a token stands.

        Args:
            token: a position, from the end where negative; or the token's text, which must stand once.

        Raises:
            Usage: it does not stand there, or in several places.
        """
        count = self.input_ids.shape[1]
        if isinstance(token, int):
            if not -count <= token < count:
                raise Usage(f"there is no position {token} among {count} tokens", hint=self.listing())
            return token % count
        places = [i for i, text in enumerate(self.tokens) if text == token]
        places = places or [i for i, text in enumerate(self.tokens) if text.strip() == token.strip()]
        if len(places) != 1:
            found = f"stands at positions {places}" if places else "is no token of the prompt"
            raise Usage(f"`{token}` {found}", hint=f"give a position: {self.listing()}")
        return places[0]

    def listing(self) -> str:
        """Positions and tokens in one line."""
        return " ".join(f"{i}:{text!r}" for i, text in enumerate(self.tokens))


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (openai/gpt-2, src/encoder.py)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def piece_bytes(piece: Any) -> bytes | None:
    """The bytes a piece of a vocabulary stands for: as bytes, as `<0xE6>` or in the byte alphabet; None in none of these."""
    if isinstance(piece, bytes):
        return piece
    if not isinstance(piece, str) or not piece:
        return None
    if re.fullmatch(r"(<0x[0-9A-Fa-f]{2}>)+", piece):
        return bytes.fromhex(re.sub(r"<0x|>", "", piece))
    return bytes(_BYTES[char] for char in piece) if all(char in _BYTES for char in piece) else None


def make_prompt(
    prompt: str | None, input_ids: Sequence[int] | Tensor | None, tokenizer: Any = None, folder: str | None = None
) -> Prompt:
    """A prompt from text or ids.

    Args:
        prompt: text; it needs a tokenizer.
        input_ids: ids, [tokens] or [1, tokens], in place of text.
        tokenizer: of the model.
        folder: where to look for a tokenizer where none is given.

    Raises:
        Usage: not exactly one of text and ids is given, or there are no tokens, or several rows.
        Refused: there is no tokenizer for the text.
        BadInput: the tokenizer fails.
    """
    if (prompt is None) == (input_ids is None):
        raise Usage("give either a prompt or input ids", hint="`--prompt TEXT`, or `--input-ids 5,17,42`")
    if tokenizer is None and folder:
        tokenizer = read_tokenizer(folder)
    if prompt is not None:
        if tokenizer is None:
            raise Refused("there is no tokenizer to read the prompt with", where=folder, hint="give `--input-ids`")
        try:
            input_ids = ids_of(tokenizer, prompt)
        except ValueError as error:
            raise BadInput(
                f"the tokenizer cannot read the prompt: {error}", where=folder, hint="give `--input-ids`"
            ) from None
    try:
        ids = torch.as_tensor(input_ids).long()
    except (ValueError, OverflowError, RuntimeError) as error:
        raise Usage(f"the input ids cannot be read: {error}") from None
    ids = ids[None] if ids.ndim == 1 else ids
    if not ids.numel():
        raise Usage("the prompt has no tokens: at least one token is needed")
    if ids.ndim != 2 or len(ids) != 1:
        raise Usage(f"one row of at least one token is looked at, not {list(ids.shape)}")
    return Prompt(ids, tokenizer)


def read_tokenizer(folder: str) -> Any:
    """The tokenizer of a directory, or None where there is none that can be read without its own code."""
    import transformers

    from llmconvert.models import register

    register()
    try:
        made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001  # of several libraries, down to bare `Exception`
        return None
    return made if not Path(folder).is_dir() or holds_vocabulary(Path(folder), made) else None
