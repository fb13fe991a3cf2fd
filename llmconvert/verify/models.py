"""Checkpoints as models, by code that had no part in their conversion: modules, whole or empty, and their weights."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmconvert.checkpoint import config as configs
from llmconvert.checkpoint.directory import no_weights, refuse_pointers, refuse_two_sets, require_directory
from llmconvert.checkpoint.files import check_inside, read_json
from llmconvert.checkpoint.megatron import is_megatron, open_megatron
from llmconvert.checkpoint.safetensors import read_header
from llmconvert.checkpoint.torch_pickle import read_pickle
from llmconvert.errors import BadInput, LlmconvertError, Refused
from llmconvert.verify.reference import find_reference

_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


class Weights(Protocol):
    """Tensors by name, read when asked for."""

    shapes: dict[str, tuple[int, ...]]
    """Of every tensor there is."""

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        ...


class FileWeights:
    """A directory's tensors, read one at a time by the libraries that define the formats."""

    def __init__(self, directory: Path) -> None:
        """Open the files; no data is read.

        Raises:
            BadInput: there are no weights, or a file cannot be opened.
        """
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        self._block = block_size(read_config(directory)) if (directory / "config.json").is_file() else None
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in check_weights(directory):
            try:
                if path.suffix == ".safetensors":
                    handle: Any = safe_open(path, framework="pt")
                    found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
                else:
                    handle = torch.load(path, weights_only=True, mmap=True)
                    found = {name: tuple(tensor.shape) for name, tensor in handle.items()}
            except (OSError, SafetensorError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                raise BadInput(f"the weights cannot be read: {error}", where=str(path)) from None
            self.shapes |= found
            self._files |= dict.fromkeys(found, handle)
        if self._block:
            # The scales are part of the tensors they scale.
            scales = {name + _SCALE for name in self.shapes}
            self.shapes = {name: shape for name, shape in self.shapes.items() if name not in scales}

    def read(self, name: str) -> Tensor:
        """One tensor, as stored; an FP8 one dequantised to bfloat16."""
        handle = self._files[name]
        tensor: Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        if self._block and tensor.dtype == torch.float8_e4m3fn:
            return _dequantised(tensor, self.read(name + _SCALE), self._block)
        return tensor

    def part(self, name: str, index: int) -> Tensor:
        """One entry of a tensor's first axis, as stored."""
        if self._block and f"{name}{_SCALE}" in self._files:
            raise Refused(f"`{name}` is FP8 with experts fused, which is not read here")
        handle = self._files[name]
        tensor: Tensor = handle[name][index] if isinstance(handle, dict) else handle.get_slice(name)[index]
        return tensor


_SCALE = "_scale_inv"


def block_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where a config.json says that weights are FP8 in blocks."""
    size = (config.get("quantization_config") or {}).get("weight_block_size")
    return (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None


def _dequantised(numbers: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Numbers times their blocks' scales in float32, rounded once to bfloat16 (DeepSeek-V3, README_WEIGHTS.md).

    Not through transformers, whose own is wrong where a matrix is no multiple of the block.
    """
    wide = scale.double() if scale.dtype != torch.uint8 else torch.exp2(scale.double() - 127)
    height, width = numbers.shape
    per_row = wide.float().repeat_interleave(block[0], 0)[:height]
    return (numbers.float() * per_row.repeat_interleave(block[1], 1)[:, :width]).bfloat16()


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a Hugging Face checkpoint's tensors.

    Raises:
        BadInput: there are none, or the index cannot be read.
    """
    for index, single in _LAYOUTS:
        names: set[Any] = {single} if (directory / single).is_file() else set()
        if (directory / index).is_file():
            refuse_pointers(directory, [index])
            refuse_two_sets(directory, index, single)
            weight_map = read_json(directory / index).get("weight_map")
            names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
            if not names:
                raise BadInput("the index has no `weight_map`", where=str(directory / index))
        if names:
            refuse_pointers(directory, names)
            return [directory / name for name in sorted(names)]
    raise no_weights(directory, set(os.listdir(directory)))


_STATED: dict[Path, dict[str, Any]] = {}


@contextmanager
def stating(keys: Mapping[Path, Mapping[str, Any]]) -> Iterator[None]:
    """For a while, let directories' config.json say what they leave open, and somebody else knows: keys by directory."""
    before = dict(_STATED)
    _STATED.update({directory.resolve(): dict(told) for directory, told in keys.items() if told})
    try:
        yield
    finally:
        _STATED.clear()
        _STATED.update(before)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, with what `stating` adds to it.

    Raises:
        LlmconvertError: there is no such directory, or one of another kind, or as
            `llmconvert.checkpoint.config.read_config`.
    """
    refuse_pointers(require_directory(directory), ["config.json"])
    names = set(os.listdir(directory))
    if "config.json" not in names and names.isdisjoint(chain(*_LAYOUTS)):
        raise no_weights(directory, names)
    return configs.read_config(directory) | _STATED.get(directory.resolve(), {})


def check_weights(directory: Path) -> list[Path]:
    """The files of `weight_files`, each seen to be what it should.

    Raises:
        LlmconvertError: as `check_file`.
    """
    paths = weight_files(directory)
    for path in paths:
        check_file(directory, path)
    return paths


def check_file(directory: Path, path: Path) -> None:
    """Check a file of weights before a library is told to open it, which would wait for a FIFO or fill memory.

    Raises:
        BadInput: it is missing, lies elsewhere, or is damaged.
        Refused: a pickle asks for what could run code.
    """
    check_inside(directory, path)
    if path.suffix == ".safetensors":
        read_header(path)
    else:
        read_pickle(path)


def config_of(directory: Path) -> dict[str, Any]:
    """config.json, or what a Megatron checkpoint's arguments say in its words.

    Raises:
        LlmconvertError: it cannot be read.
    """
    if is_megatron(directory):
        from llmconvert.verify.sharded import describe

        return describe(directory)
    return read_config(directory)


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor, by name; a Megatron shard's name is its rank, chunk and name.

    Raises:
        LlmconvertError: it cannot be opened.
    """
    if is_megatron(directory):
        return {name: tensor.shape for name, tensor in open_megatron(directory, trust_pickle=True).stored.items()}
    return FileWeights(directory).shapes


def release() -> tuple[int, ...]:
    """The release of transformers, (major, minor)."""
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and warnings: what it leaves out is told by us."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _options(dtype: torch.dtype, attention: str) -> dict[str, Any]:
    return {"dtype" if release() >= (4, 56) else "torch_dtype": dtype, "attn_implementation": attention}


def _register(config: dict[str, Any]) -> None:
    """Let transformers know the canonical model's class, where that is what is to be run."""
    if config.get("model_type") == "llmconvert":
        from llmconvert.models import register

        register()


def _refused(error: Exception, directory: Path) -> Refused:
    lines = (str(error) or type(error).__name__).splitlines()
    first = lines[0] if len(lines) < 2 or not lines[0].endswith(":") else f"{lines[0]} {lines[1].strip()}"
    return Refused(f"transformers cannot load it: {first}", where=str(directory))


def check_runnable(directory: Path) -> None:
    """Check that there is code to run a checkpoint's config.

    Raises:
        BadInput: config.json cannot be read.
        Refused: neither a reference model nor transformers knows it.
    """
    if is_megatron(directory):
        from llmconvert.verify.sharded import ShardedModel

        ShardedModel(directory, torch.float32, "cpu", vocab_size=1)
    else:
        empty_model(directory, torch.float32)


def empty_model(directory: Path, dtype: torch.dtype, attention: str = "eager") -> nn.Module:
    """A checkpoint's module with parameters on the meta device; buffers are real and on the CPU.

    Args:
        directory: the checkpoint; only config.json is read.
        dtype: of the parameters.
        attention: transformers' attention implementation.

    Raises:
        BadInput: config.json cannot be read.
        Refused: neither a reference model nor transformers knows it.
    """
    from accelerate import init_empty_weights

    config = read_config(directory)
    reference = find_reference(config)
    if reference is not None:
        try:
            with init_empty_weights(include_buffers=False):
                made = reference(config).to(dtype)
        except KeyError as error:
            raise BadInput(f"config.json says nothing of {error}", where=str(directory)) from None
        except LlmconvertError as error:
            error.where = str(directory)
            raise
        made.tie_weights()
        return made.eval()
    import transformers

    _register(config)
    with init_empty_weights(include_buffers=False):
        try:
            known = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            if hasattr(known, "quantization_config"):
                if block_size(read_config(directory)) is None:
                    raise Refused("the checkpoint is quantised in a way that is not read here", where=str(directory))
                del known.quantization_config  # the weights it is given are dequantised
            known._experts_implementation = (
                "eager"  # torch groups no float64 matrices, and sums others in another order
            )
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                known, trust_remote_code=False, **_options(dtype, attention)
            )
        except LlmconvertError:
            raise
        except Exception as error:  # its configs validate themselves, with errors of several libraries
            raise _refused(error, directory) from None
    model.tie_weights()  # type: ignore[operator]
    _check_temperature(model, directory)
    return model.eval()


def _check_temperature(model: nn.Module, directory: Path) -> None:
    """Refuse DeepSeek-V2 in releases of transformers that leave YaRN's temperature out of its scores, 4.57 among them.

    The published code multiplies them by its square (arXiv:2405.04434, section 3.1.4), as V3's class does.
    """
    config = read_config(directory)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("model_type") != "deepseek_v2" or not scaling.get("mscale_all_dim") or scaling.get("factor", 1) <= 1:
        return
    attention: Any = next((module for module in model.modules() if hasattr(module, "qk_head_dim")), None)
    if attention is not None and math.isclose(attention.scaling, attention.qk_head_dim**-0.5):
        raise Refused(
            "this release of transformers leaves YaRN's temperature (`mscale_all_dim`) out of DeepSeek-V2's attention, "
            "and computes another model than its published code",
            where=str(directory),
            hint="use transformers 5, or compare the weights alone",
        )


def load_model(directory: Path, dtype: torch.dtype, device: str, attention: str = "eager") -> nn.Module:
    """A checkpoint as a module, whole in memory.

    A reference module where transformers has no class of its own, else transformers' own class, loaded by transformers.

    Args:
        directory: the checkpoint.
        dtype: the type to compute in.
        device: where.
        attention: transformers' attention implementation.

    Returns:
        A module; called with input_ids, attention_mask and position_ids it gives logits, or an object with `.logits`.

    Raises:
        BadInput: the tensors do not fit the model.
        Refused: transformers has no such model, or needs code of the checkpoint's own.
    """
    reference = find_reference(read_config(directory))
    if reference is not None:
        model = empty_model(directory, dtype)
        weights = FileWeights(directory)
        check_fit(model, weights, directory, strict=True)
        state = {name: weights.read(name).to(dtype) for name in model.state_dict() if name in weights.shapes}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()  # type: ignore[operator]
        return model.to(device)
    return _load("AutoModelForCausalLM", directory, dtype, device, attention)


def load_classifier(directory: Path, dtype: torch.dtype, device: str) -> nn.Module:
    """A sequence classifier, whole in memory, loaded by transformers.

    Args:
        directory: the checkpoint.
        dtype: the type to compute in.
        device: where.

    Raises:
        BadInput: tensors are missing.
        Refused: transformers has no such model.
    """
    return _load("AutoModelForSequenceClassification", directory, dtype, device, "eager")


def _load(auto: str, directory: Path, dtype: torch.dtype, device: str, attention: str) -> nn.Module:
    import transformers

    _register(read_config(directory))
    check_weights(directory)
    options = _options(dtype, attention)
    if release() >= (5, 0):
        options["experts_implementation"] = "eager"
    try:
        with quiet():
            loaded, info = getattr(transformers, auto).from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,  # they are refused below, by name
            )  # fmt: skip
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise _refused(error, directory) from None
    others = [f"`{name}` is {list(own)}, not {list(held)}" for name, own, held in sorted(info["mismatched_keys"])]
    if others:
        more = f"; and {len(others) - 4} more" if len(others) > 4 else ""
        raise BadInput(f"the tensors do not fit the model: {'; '.join(others[:4])}{more}", where=str(directory))
    if info["missing_keys"]:
        raise BadInput(f"transformers found no weights for {sorted(info['missing_keys'])[:4]}", where=str(directory))
    module: nn.Module = loaded
    _check_temperature(module, directory)
    return module.to(device).eval()


def check_fit(model: nn.Module, weights: Weights, directory: Path, *, strict: bool) -> None:
    """Check that every parameter has a tensor of its shape.

    Args:
        model: the module.
        weights: the tensors.
        directory: for messages.
        strict: refuse a tensor the module has no place for as well.

    Raises:
        BadInput: naming what is missing, too much, or of another shape.
    """
    held = model.state_dict()
    tied = tied_names(model)
    faults = []
    for name, parameter in model.named_parameters():
        if name not in weights.shapes and not any(other in weights.shapes for other in tied.get(name, ())):
            faults.append(f"no tensor `{name}`")
        elif tuple(parameter.shape) != weights.shapes.get(name, tuple(parameter.shape)):
            faults.append(f"`{name}` is {list(weights.shapes[name])}, not {list(parameter.shape)}")
    if strict:
        surplus = sorted(name for name in weights.shapes if name not in held and not name.endswith("inv_freq"))
        faults += [f"`{name}` has no place in the model" for name in surplus]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise BadInput(f"the tensors do not fit the model: {'; '.join(faults[:4])}{more}", where=str(directory))


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter that has several names, its first name to all of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in groups.values() if len(names) > 1}
