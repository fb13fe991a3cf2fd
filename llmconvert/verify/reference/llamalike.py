"""A pre-norm decoder with named parts, for the reference models that differ from each other in names and attention only."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def decode(
    hidden: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    layers: nn.ModuleList,
    parts: Callable[[nn.Module], tuple[nn.Module, nn.Module, nn.Module, nn.Module]],
) -> Tensor:
    """Run pre-norm residual blocks.

    Args:
        hidden: [batch, tokens, hidden].
        position_ids: [batch, tokens].
        attention_mask: [batch, tokens] or None.
        layers: the blocks.
        parts: gives a block's (norm before attention, attention, norm before MLP, MLP).
    """
    for layer in layers:
        norm1, attention, norm2, mlp = parts(layer)
        hidden = hidden + attention(norm1(hidden), position_ids, attention_mask)
        hidden = hidden + mlp(norm2(hidden))
    return hidden
