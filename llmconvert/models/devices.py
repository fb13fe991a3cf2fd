"""Spread a model's layers over chosen devices, in order and by size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmconvert.errors import Usage

Device = int | str | torch.device


def _device(device: Device) -> torch.device:
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise Usage(
            f"there is no CUDA device {found.index or 0}", hint=f"devices here: {torch.cuda.device_count()}, from 0"
        )
    return found


def layer_device_map(model: nn.Module, devices: Sequence[Device]) -> dict[str, Any]:
    """Which device each part of a decoder goes to.

    Consecutive layers go to one device; each device gets its share of the bytes as nearly as whole layers allow. The
    embedding goes to the first, the norm and the head to the last; a tied head goes to the embedding's.

    Args:
        model: the model; parameters may be on the meta device.
        devices: numbers of CUDA devices, or anything torch takes for a device.

    Returns:
        Module names to devices, as transformers' `device_map` and accelerate's `dispatch_model` take them.

    Raises:
        Usage: there are no devices, the same twice, more than layers, or one that does not exist.
    """
    wanted = [_device(device) for device in devices]
    layers = [name for name, _ in model.named_modules() if name.endswith("layers")]
    if not wanted:
        raise Usage("no devices are given", hint="such as [0, 1]")
    if not layers:
        raise Usage(f"{type(model).__name__} has no `layers` to spread")
    stem = min(layers, key=len)
    parts = _parts(model, stem)
    numbered = [part for part in parts if part.startswith(f"{stem}.")]
    if len(wanted) > len(numbered):
        raise Usage(f"{len(wanted)} devices for {len(numbered)} layers")
    first = parts.index(numbered[0])
    before, after = parts[:first], parts[first + len(numbered) :]
    sizes = {part: sum(p.nbytes for p in model.get_submodule(part).parameters()) for part in parts}
    total, done, place = sum(sizes.values()), sum(sizes[part] for part in before), 0
    result: dict[str, Any] = dict.fromkeys(before, wanted[0])
    for number, layer in enumerate(numbered):
        # Where the layer's middle falls in the whole; leaving a layer for each device to come, and skipping none.
        fair = int((done + sizes[layer] / 2) / max(total, 1) * len(wanted))
        needed = len(wanted) - (len(numbered) - number)
        place = min(max(fair, place, needed), place + (number > 0), len(wanted) - 1)
        result[layer] = wanted[place]
        done += sizes[layer]
    early = {id(p) for part in before for p in model.get_submodule(part).parameters()}
    for part in after:
        tied = any(id(p) in early for p in model.get_submodule(part).parameters())
        result[part] = wanted[0 if tied else -1]
    return result


def _parts(model: nn.Module, stem: str) -> list[str]:
    """The modules that are placed whole, in the order they are run: what stands beside the layers, and each layer."""
    found: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path == stem:
                found.extend(f"{path}.{i}" for i in range(len(child)))
            elif stem.startswith(f"{path}."):
                walk(child, f"{path}.")
            else:
                found.append(path)

    walk(model, "")
    return found


def set_device(model: nn.Module, devices: Sequence[Device] | Device) -> nn.Module:
    """Move a model to one device, or spread it over several; what it is given and gives is moved along.

    Args:
        model: the model, in memory.
        devices: one device or several; see `layer_device_map`.

    Returns:
        The same model.

    Raises:
        Usage: see `layer_device_map`.
    """
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    several = [devices] if isinstance(devices, int | str | torch.device) else list(devices)
    remove_hook_from_submodules(model)
    if len(several) == 1:
        return model.to(_device(several[0]))
    skipped = getattr(model, "_skip_keys_device_placement", None)
    spread: nn.Module = dispatch_model(model, layer_device_map(model, several), skip_keys=skipped, force_hooks=True)
    return spread
