"""Training a reward model on pairs of answers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """−log σ(r_chosen − r_rejected − margin), the mean over pairs (Bradley and Terry, 1952; Ouyang et al., 2022, eq. 1).

    Args:
        chosen: rewards of the better answers, [pairs] or [pairs, 1].
        rejected: of the worse ones.
        margin: by how much they should differ (Llama 2, eq. 2).

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: the shapes differ.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"{list(chosen.shape)} chosen rewards for {list(rejected.shape)} rejected")
    wide = chosen if chosen.dtype.itemsize > 4 else chosen.float()
    return -functional.logsigmoid(wide - rejected.to(wide.dtype) - margin).mean()
