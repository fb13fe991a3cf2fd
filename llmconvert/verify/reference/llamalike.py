"""A pre-norm decoder with named parts, for the reference models that differ from each other in names and attention only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Block(nn.ModuleDict):
    """One pre-norm residual block; its entries are, in order: norm, attention, norm, MLP, under the published names."""

    def forward(self, hidden: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Same shape as `hidden`, [batch, tokens, hidden]; positions and mask are [batch, tokens]."""
        norm1, attention, norm2, mlp = self.values()
        hidden = hidden + attention(norm1(hidden), position_ids, attention_mask)
        return hidden + mlp(norm2(hidden))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Base of the reference models: a head that may be tied to the embedding.

    Attributes:
        tied: names of the head and of the embedding where config.json ties them; None where they are two.
    """

    tied: tuple[str, str] | None = None

    def _tie(self, config: Mapping[str, Any], head: str, embedding: str) -> None:
        """Tie the two where `tie_word_embeddings` says so; a key that is absent does not."""
        if config.get("tie_word_embeddings"):
            self.tied = head, embedding
            self.tie_weights()

    def tie_weights(self) -> None:
        """Let head and embedding share their weight again, once one of them has been replaced."""
        if self.tied is not None:
            self.get_submodule(self.tied[0]).weight = self.get_submodule(self.tied[1]).weight


def decode(hidden: Tensor, position_ids: Tensor, attention_mask: Tensor | None, layers: nn.ModuleList) -> Tensor:
    """Run the blocks in order; shapes as in `Block.forward`."""
    for layer in layers:
        hidden = layer(hidden, position_ids, attention_mask)
    return hidden
