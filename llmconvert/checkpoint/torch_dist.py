"""Megatron's `torch_dist` format: global tensors in chunks, in `.distcp` files that `.metadata` describes.

That is torch.distributed.checkpoint's layout (`torch/distributed/checkpoint/{metadata,filesystem}.py`): `.metadata` is
a pickled `Metadata`; each item of a `.distcp` file is what `torch.save` writes for one chunk. megatron-core adds
`common.pt` (arguments, iteration) and `metadata.json`. Neither torch nor Megatron is needed to read or write it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from llmconvert.checkpoint.directory import read_json, stays_inside
from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.checkpoint.files import check_inside, read_bytes
from llmconvert.checkpoint.stored import StoredTensor, is_name
from llmconvert.checkpoint.torch_pickle import Inert, read_inert, read_object
from llmconvert.checkpoint.torch_zip import Called, Global, Instance, Slot, lay_out_torch, pickled, torch_saved
from llmconvert.errors import BadInput, Refused

METADATA, COMMON, DESCRIPTION = ".metadata", "common.pt", "metadata.json"
_MAX_METADATA_BYTES = 1 << 30
"""Of `.metadata`: about three million chunks."""

_MODULE = "torch.distributed.checkpoint.metadata"


class Chunk(NamedTuple):
    """A part of a global tensor.

    Attributes:
        offsets: where it begins, an entry an axis.
        stored: its bytes; its shape is the chunk's.
    """

    offsets: tuple[int, ...]
    stored: StoredTensor


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor as the checkpoint names it, whatever the ranks that wrote it.

    Attributes:
        shape: of the whole.
        chunks: which tile it.
    """

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class TorchDist:
    """A `torch_dist` checkpoint, opened.

    Attributes:
        tensors: by name.
        objects: names of what is no tensor (extra states, random states).
        common: what `common.pt` holds.
        left_out: bytes of `objects`, and of tensors that were passed over.
    """

    tensors: dict[str, GlobalTensor]
    objects: tuple[str, ...]
    common: dict[str, Any]
    left_out: int


def _harmless(module: str, name: str) -> bool:
    known = module.startswith(("torch.distributed.checkpoint", "megatron.core.dist_checkpointing"))
    # Python before 3.11.4 names the members of an enumeration by `getattr`; like all here it is not called.
    others = {("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("builtins", "getattr")}
    return known or module == "torch" or (module, name) in others


def _tuple(value: Any) -> tuple[int, ...]:
    """A torch.Size."""
    entries = value.arguments[0] if isinstance(value, Inert) else value
    if not all(type(entry) is int and entry >= 0 for entry in entries):
        raise ValueError("sizes that are not whole numbers")
    return tuple(entries)


def open_torch_dist(
    folder: Path, *, passed_over: Callable[[str], bool] = lambda name: False, trust_pickle: bool = False
) -> TorchDist:
    """Open a checkpoint in the `torch_dist` format; tensors are not read.

    Args:
        folder: that of `.metadata`.
        passed_over: names of tensors that are counted among what is left out, and not looked into.
        trust_pickle: read past names in `common.pt` that are not known to be harmless; nothing is run all the same.

    Raises:
        BadInput: a file is missing, cut short or inconsistent.
        Refused: the backend is another, or a pickle names what is not known.
    """
    if os.path.lexists(folder / DESCRIPTION):
        backend = read_json(folder / DESCRIPTION).get("sharded_backend")
        if backend != "torch_dist":
            raise Refused(f"the checkpoint's backend is `{backend}`, not torch_dist", where=str(folder))
    where = str(folder / METADATA)
    try:
        metadata = read_inert(read_bytes(folder / METADATA, _MAX_METADATA_BYTES, inside=folder), _harmless).state
        described, places = metadata["state_dict_metadata"], metadata["storage_data"]
        stored = {
            (
                index.state["fqn"],
                _tuple(index.state["offset"]) if index.state.get("offset") is not None else None,
            ): info.state
            for index, info in places.items()
        }
        tensors, objects, left_out = {}, [], 0
        for name, entry in described.items():
            if not is_name(name):
                raise ValueError("a name that is none")
            if "chunks" not in (entry.state or {}):
                objects.append(name)
                left_out += int(stored[name, None]["length"])
                continue
            if passed_over(name):
                left_out += sum(
                    int(stored[name, _tuple(chunk.state["offsets"])]["length"]) for chunk in entry.state["chunks"]
                )
                continue
            chunks = []
            for chunk in entry.state["chunks"]:
                offsets, sizes = _tuple(chunk.state["offsets"]), _tuple(chunk.state["sizes"])
                chunks.append(_chunk(folder, name, offsets, sizes, stored[name, offsets]))
            tensors[name] = GlobalTensor(_tuple(entry.state["size"]), tuple(chunks))
    except OSError as error:
        raise BadInput(f"`{METADATA}` cannot be read: {error.strerror}", where=str(folder)) from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadInput(f"`{METADATA}` cannot be understood: {error}", where=where) from None
    for name, tensor in tensors.items():
        if sum(prod(chunk.stored.shape) for chunk in tensor.chunks) != prod(tensor.shape):
            raise BadInput(f"the chunks of `{name}` do not make up its shape {list(tensor.shape)}", where=where)
    common: Any = {}
    if os.path.lexists(folder / COMMON):
        hint = "add `--trust-pickle` to read past it; it becomes an inert stand-in and is not run"
        check_inside(folder, folder / COMMON)
        common = read_object(folder / COMMON, inert="anything" if trust_pickle else "harmless", hint=hint)
    if not isinstance(common, dict):
        raise BadInput(f"`{COMMON}` does not hold a dictionary", where=str(folder))
    return TorchDist(tensors, tuple(objects), common, left_out)


def _chunk(folder: Path, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Mapping[str, Any]) -> Chunk:
    path = folder / str(info["relative_path"])
    if info.get("transform_descriptors"):
        raise Refused(f"`{name}` is stored compressed or transformed", where=str(path))
    if not stays_inside(folder, path):
        raise BadInput(f"`{name}` lies outside the checkpoint", where=str(path))
    if not path.is_file():
        raise BadInput("the file is missing", where=str(path), hint="copy the whole checkpoint again")
    start, length = int(info["offset"]), int(info["length"])
    if start + length > path.stat().st_size:
        raise BadInput(f"the file ends inside `{name}`", where=str(path), hint="copy the whole checkpoint again")
    found = read_object(path, window=(start, length))
    if not isinstance(found, StoredTensor) or found.shape != sizes:
        raise BadInput(f"the chunk of `{name}` at {list(offsets)} is not the tensor described", where=str(path))
    return Chunk(offsets, found._replace(name=name if not any(offsets) else f"{name}{list(offsets)}"))


@dataclass
class DistFile:
    """A `.distcp` file, laid out.

    Attributes:
        name: its name.
        size: in bytes.
        pieces: its bytes that are not tensors', as (offset, bytes).
        offsets: of each tensor's data, by name.
        crc_places: where each tensor's CRC-32 goes, by name.
    """

    name: str
    size: int = 0
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)
    crc_places: dict[str, tuple[int, ...]] = field(default_factory=dict)


def lay_out_torch_dist(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], objects: Mapping[str, Any], common: Mapping[str, Any],
    max_file_size: int,
) -> tuple[list[DistFile], dict[str, bytes]]:  # fmt: skip
    """Lay out a checkpoint, each global tensor in one chunk.

    Args:
        tensors: dtype code and shape, by name.
        objects: what is no tensor, by name.
        common: for `common.pt`.
        max_file_size: bytes of a `.distcp` file, unless one tensor is larger.

    Returns:
        The `.distcp` files, and the other files' bytes by name.
    """
    files = [DistFile("__0_0.distcp")]
    described: dict[str, Any] = {}
    places: list[tuple[Instance, Instance]] = []
    size, chunk_kind = Global("torch", "Size"), Global(_MODULE, "ChunkStorageMetadata")
    kinds = {dtype: Global("torch", torch_name) for dtype, torch_name in TO_NAME.items()}
    layout = Called(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Called(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    index_kind, info_kind = (
        Global(_MODULE, "MetadataIndex"),
        Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    )
    tensor_kind, bytes_kind = Global(_MODULE, "TensorStorageMetadata"), Global(_MODULE, "BytesStorageMetadata")
    properties_kind = Global(_MODULE, "TensorProperties")

    def add(name: str, length: int, **index: Any) -> None:
        file = files[-1]
        info = Instance(info_kind, {"relative_path": file.name, "offset": file.size, "length": length})
        places.append((Instance(index_kind, {"fqn": name, **index}), info))
        file.size += length

    def of_shape(shape: tuple[int, ...]) -> Called:
        return Called(size, (shape,))

    for name, value in objects.items():
        data = torch_saved(value)
        files[-1].pieces.append((files[-1].size, data))
        described[name] = Instance(bytes_kind, None)
        add(name, len(data), index=None)
    for name, (dtype, shape) in tensors.items():
        slot = Slot(dtype, shape)
        if files[-1].size and files[-1].size + slot.nbytes > max_file_size:
            files.append(DistFile(f"__0_{len(files)}.distcp"))
        file = files[-1]
        laid = lay_out_torch(slot, file.size)
        file.pieces += laid.pieces
        (file.offsets[name],), (file.crc_places[name],) = laid.offsets, laid.crc_places
        zeros = (0,) * len(shape)
        properties = Instance(properties_kind, (kinds[dtype], layout, False, contiguous, False))
        chunk = Instance(chunk_kind, {"offsets": of_shape(zeros), "sizes": of_shape(shape)})
        described[name] = Instance(tensor_kind, {"properties": properties, "size": of_shape(shape), "chunks": [chunk]})
        add(name, laid.size, index=0, offset=of_shape(zeros))
    metadata = Instance(
        Global(_MODULE, "Metadata"),
        {"state_dict_metadata": described, "planner_data": None, "storage_data": dict(places), "storage_meta": None,
         "version": "1.0.0"},
    )  # fmt: skip
    description = {
        "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
        "common_backend_version": 1,
    }  # fmt: skip
    return files, {
        METADATA: pickled(metadata), COMMON: torch_saved(dict(common)), DESCRIPTION: json.dumps(description).encode(),
    }  # fmt: skip
