"""A pre-norm decoder with named parts, for the reference models that differ from each other in names and attention only."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.ModuleDict):
    """One pre-norm residual block; its entries are, in order: norm, attention, norm, MLP, under the published names."""

    def forward(self, hidden: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Same shape as `hidden`, [batch, tokens, hidden]; positions and mask are [batch, tokens]."""
        norm1, attention, norm2, mlp = self.values()
        hidden = hidden + attention(norm1(hidden), position_ids, attention_mask)
        return hidden + mlp(norm2(hidden))  # type: ignore[no-any-return]


def decode(hidden: Tensor, position_ids: Tensor, attention_mask: Tensor | None, layers: nn.ModuleList) -> Tensor:
    """Run the blocks in order; shapes as in `Block.forward`."""
    for layer in layers:
        hidden = layer(hidden, position_ids, attention_mask)
    return hidden
