"""Llama's gated MLP under Llama's own names, shared by Baichuan and Yi."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, GLU variants, 2020)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        """Linear maps without bias."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
