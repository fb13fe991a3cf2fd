"""PyTorch `.bin`/`.pt` files: find every tensor's bytes without running the pickle's code and without torch.

`torch.save` writes a zip of uncompressed records: `*/data.pkl` (the object, pickled) and one `*/data/KEY` a storage.
The pickle is read by a machine that calls nothing (`pickle_machine`); the zip directory says where each storage lies.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.checkpoint.files import opened, read_at, shown
from llmconvert.checkpoint.pickle_machine import Inert, Known, PickleError, load_pickle
from llmconvert.checkpoint.stored import StoredTensor, is_name
from llmconvert.checkpoint.zip_records import NotAnArchive, Record, read_records
from llmconvert.errors import BadInput, Refused

__all__ = ["Inert", "read_inert", "read_object", "read_pickle"]

_STORAGE_DTYPES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip

_MAX_PICKLE_BYTES = 1 << 30
"""Of `data.pkl`, which holds no tensors: enough for several million of their descriptions."""

_MAX_AXES = 64
_MAX_SIZE = 1 << 62


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    dtype: str
    offset: int
    numel: int


_HARMLESS = {
    ("argparse", "Namespace"), ("types", "SimpleNamespace"), ("torch", "Size"), ("torch", "device"),
    ("collections", "defaultdict"), ("_codecs", "encode"), ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"), ("_io", "BytesIO"),
    ("io", "BytesIO"), ("pathlib", "PosixPath"), ("signal", "Signals"), ("builtins", "set"),
    ("builtins", "getattr"),  # how Python before 3.11.4 names the members of an enumeration
}  # fmt: skip
"""Names that training checkpoints hold beside their tensors: arguments, random states. None is ever called."""

_DTYPES = {
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "float",
    "half",
    "double",
    "int64",
    "int32",
    "uint8",
    "int8",
    "bool",
}


def _harmless(module: str, name: str) -> bool:
    enums = module.split(".")[0] == "megatron" and module.split(".")[-1].endswith(("enums", "arguments"))
    return (module, name) in _HARMLESS or enums or (module == "torch" and name in _DTYPES)


_SAFE = "get the checkpoint as safetensors, or save its plain state dict again in a sandbox"


class _Reader:
    """What the names and storages of one pickle stand for."""

    def __init__(self, path: Path, records: Mapping[str, Record], inert: str, hint: str) -> None:
        self._path, self._records, self._inert, self._hint = path, records, inert, hint
        self._storages: dict[str, _Storage] = {}
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): Known(_ordered_dict),
            ("torch._utils", "_rebuild_tensor_v2"): Known(self._tensor),
            ("torch._utils", "_rebuild_parameter"): Known(_parameter),
            **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
        }

    def find(self, module: str, name: str) -> Any:
        """See `load_pickle`."""
        if (module, name) in self._known:
            return self._known[module, name]
        if self._inert == "anything" or (self._inert == "harmless" and _harmless(module, name)):
            return Inert(f"{module}.{name}")
        full = f"{module}.{name}"
        raise Refused(
            f"the pickle asks for `{full[:200]}`, which is not needed to hold weights and could run code; it was not run",
            where=str(self._path),
            hint=self._hint,
        )

    def storage(self, pid: Any) -> _Storage:
        """See `load_pickle`: torch names a storage by a type, the key of its record, a place and a length."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage" or type(pid[1]) is not _StorageType:
            raise PickleError("it refers to something other than a storage")
        dtype, key, numel = pid[1].dtype, pid[2], pid[4]
        if type(key) is not str or type(numel) is not int or not 0 <= numel < _MAX_SIZE:
            raise PickleError("it describes a storage by what is no key or no length")
        record = self._records.get(f"data/{key}")
        if record is None or numel * ITEMSIZE[dtype] > record.size:
            raise self._cut()
        if not record.stored:
            raise _compressed(f"data/{key}", self._path)
        # Torch goes by the first mention of a key and does not look at later ones.
        found = self._storages.setdefault(key, _Storage(dtype, record.offset, numel))
        if found.dtype != dtype or found.numel != numel:
            raise PickleError(f"it describes the storage `{key}` in two ways")
        return found

    def _tensor(self, arguments: tuple[Any, ...]) -> StoredTensor:
        """`torch._utils._rebuild_tensor_v2`."""
        if not 4 <= len(arguments) <= 7 or type(arguments[0]) is not _Storage:
            raise PickleError("it describes a tensor by something other than a storage, an offset, sizes and strides")
        storage, offset, shape, stride = arguments[:4]
        if not (_sizes(shape) and _sizes(stride) and len(shape) == len(stride) and _sizes((offset,))):
            raise PickleError("a tensor's offset, sizes or strides are not whole numbers that fit each other")
        if len(arguments) == 7 and arguments[6]:
            raise Refused(
                "a tensor is stored conjugated or negated", where=str(self._path), hint="save it after .clone()"
            )
        if not _contiguous(shape, stride):
            raise Refused(
                "a tensor is stored non-contiguously", where=str(self._path), hint="save it after .contiguous()"
            )
        if offset + math.prod(shape) > storage.numel:
            raise self._cut()
        return StoredTensor("", self._path, storage.offset + offset * ITEMSIZE[storage.dtype], storage.dtype, shape)

    def _cut(self) -> BadInput:
        return BadInput(
            "the bytes of a tensor are missing or cut short", where=str(self._path), hint="download it again"
        )


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise PickleError("it fills an ordered dictionary in a way torch does not")
    return {}


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    if not arguments or type(arguments[0]) is not StoredTensor:
        raise PickleError("it makes a parameter of what is no tensor")
    return arguments[0]


def _sizes(values: Any) -> bool:
    return (
        type(values) is tuple
        and len(values) <= _MAX_AXES
        and all(type(n) is int and 0 <= n < _MAX_SIZE for n in values)
    )


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return 0 in shape
        expected *= size
    return True


def _compressed(name: str, path: Path) -> Refused:
    return Refused(f"the record `{name}` is compressed", where=str(path), hint="save it again with torch.save")


def read_inert(data: bytes, harmless: Callable[[str, str], bool]) -> Any:
    """Read a pickle with every name a stand-in of ours.

    Args:
        data: the pickle.
        harmless: whether a name (module, name) becomes `Inert`; another is refused.

    Raises:
        ValueError: it is no pickle, or asks for another name.
    """

    def find(module: str, name: str) -> Inert:
        if not harmless(module, name):
            raise PickleError(f"it asks for `{f'{module}.{name}'[:200]}`, which was not run")
        return Inert(f"{module}.{name}")

    return load_pickle(data, find)


def read_object(path: Path, *, inert: str = "nothing", hint: str = _SAFE, window: tuple[int, int] | None = None) -> Any:
    """Read what `torch.save` wrote, tensors by where they lie; no code of the file's choosing is run.

    Args:
        path: the file.
        inert: which names beside tensors' become `Inert` stand-ins: nothing, harmless (those of training checkpoints)
            or anything.
        hint: what to do about a name that is refused.
        window: offset and length of the part of the file that `torch.save` wrote; all of it if None.

    Returns:
        The object, with a `StoredTensor` (its `name` is empty) for each tensor, and a plain dictionary for an ordered
        one. It can be walked: it does not contain itself, and is not much larger than the file when written out.

    Raises:
        BadInput: the file is no regular one, truncated, or not written by `torch.save`.
        Refused: the pickle asks for another name, or a tensor is not stored contiguously.
        InputOutput: the file cannot be read.
    """
    where = str(path)
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start, length = window or (0, size)
        try:
            if not 0 <= start <= start + length <= size:
                raise NotAnArchive
            records = read_records(file, start, length)
        except NotAnArchive:
            if read_at(file.fileno(), 1, max(0, min(start, size))) == b"\x80":
                raise Refused(
                    "the file is in torch's format from before 1.6, which is not read",
                    where=where,
                    hint="load it with torch.load(..., weights_only=True) and save it again with torch.save",
                ) from None
            raise BadInput(
                "the file is truncated or not written by torch.save", where=where, hint="download it again"
            ) from None
        except ValueError as error:
            raise BadInput(f"torch.save did not write the archive: {error}", where=where) from None
        record, order = records.get("data.pkl"), records.get("byteorder")
        if record is None:
            raise BadInput("the archive holds no `data.pkl`: not a file written by torch.save", where=where)
        if order is not None and read_at(file.fileno(), min(order.size, 16), order.offset) != b"little":
            raise Refused("the tensors are stored big-endian", where=where)
        if not record.stored:
            raise _compressed("data.pkl", path)
        if record.size > _MAX_PICKLE_BYTES:
            raise BadInput(f"`data.pkl` is {record.size:,} bytes long", where=where)
        file.seek(record.offset)
        data = file.read(record.size)
    if record.crc not in (0, zlib.crc32(data)):
        raise BadInput("`data.pkl` is damaged: its checksum is another", where=where, hint="download the file again")
    reader = _Reader(path, records, inert, hint)
    try:
        return load_pickle(data, reader.find, reader.storage)
    except PickleError as error:
        raise BadInput(f"the pickle cannot be read: {error}", where=where, hint="download the file again") from None


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a state dict saved by `torch.save`.

    Raises:
        BadInput: the file is truncated, not a torch zip, or not a mapping of names to tensors.
        Refused: the pickle asks for anything but tensors, or a tensor is not stored contiguously.
    """
    where = str(path)
    state = read_object(path)
    if not isinstance(state, Mapping):
        raise BadInput("the file does not hold a state dict (a mapping of names to tensors)", where=where)
    tensors: dict[str, StoredTensor] = {}
    for name, value in state.items():
        if not isinstance(value, StoredTensor) or not is_name(name):
            raise BadInput(f"the entry {shown(name)} is not a tensor: not a plain state dict", where=where)
        tensors[name] = value._replace(name=name)
    return tensors
