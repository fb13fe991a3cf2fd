"""One process of several that share a canonical model by tensor parallelism, as transformers cuts it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers

IDS = torch.randint(3, 131, (2, 11), generator=torch.Generator().manual_seed(7))


def run(directory: Path, rank: int, size: int) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter, whole."""
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig

    from llmconvert.models import CanonicalForCausalLM

    shared = {"distributed_config": DistributedConfig(tp_size=size)} if size > 1 else {}
    model = CanonicalForCausalLM.from_pretrained(directory, attn_implementation="eager", **shared).train()
    logits = model(IDS).logits
    (logits.float().logsumexp(-1).sum() / 10).backward()
    found = {"logits": logits.detach()}
    cut = 0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        cut += isinstance(gradient, DTensor)
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    assert size == 1 or cut > 4, "nothing was cut"
    return found


def main(rank: int, size: int, port: int, folders: list[str]) -> None:
    """Run every model, and write what the first process found beside it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    if size > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    for folder in folders:
        found = run(Path(folder), rank, size)
        if rank == 0:
            torch.save(found, Path(folder) / f"found-{size}.pt")
    if size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
