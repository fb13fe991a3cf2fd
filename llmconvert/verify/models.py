"""Load a checkpoint as a model, by code that had no part in its conversion."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from llmconvert.errors import BadInput, Refused
from llmconvert.verify.reference import find_reference


def _state_dict(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the libraries that define the formats."""
    from safetensors.torch import load_file

    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (directory / index).is_file():
            names = sorted(set(json.loads((directory / index).read_text())["weight_map"].values()))
        elif (directory / single).is_file():
            names = [single]
        else:
            continue
        state: dict[str, torch.Tensor] = {}
        for name in names:
            path = directory / name
            state |= (
                load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)
            )
        return state
    raise BadInput("the directory holds no weights", where=str(directory))


def load_model(directory: Path, dtype: torch.dtype, device: str) -> nn.Module:
    """A checkpoint as a module: a reference module where transformers has no class of its own, else transformers'.

    Args:
        directory: the checkpoint.
        dtype: the type to compute in.
        device: where.

    Returns:
        A module; called with input_ids, attention_mask and position_ids it gives logits, or an object with `.logits`.

    Raises:
        BadInput: the tensors do not fit the model.
        Refused: transformers has no such model, or needs code of the checkpoint's own.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"config.json cannot be read: {error}", where=str(directory)) from None
    reference = find_reference(config)
    if reference is not None:
        model = reference(config).to(dtype)
        state = {k: v for k, v in _state_dict(directory).items() if not k.endswith("rotary_emb.inv_freq")}
        optional = {name for name in model.state_dict() if name.endswith("inv_freq")} - set(state)
        try:
            result = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise BadInput(f"the tensors do not fit the model: {error}", where=str(directory)) from None
        if result.unexpected_keys or set(result.missing_keys) - optional:
            raise BadInput(f"the tensors do not fit the model: {result}", where=str(directory))
        return model.to(device).eval()
    import transformers

    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options = {"dtype" if release >= (4, 56) else "torch_dtype": dtype, "attn_implementation": "eager"}
    try:
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (ValueError, KeyError) as error:
        raise Refused(f"transformers cannot load it: {str(error).splitlines()[0]}", where=str(directory)) from None
    if info["missing_keys"]:
        raise BadInput(f"transformers found no weights for {sorted(info['missing_keys'])[:4]}", where=str(directory))
    module: nn.Module = loaded
    return module.to(device).eval()
