"""PyTorch `.bin`/`.pt` files: find every tensor's bytes without running the pickle's code and without torch.

`torch.save` writes a zip of uncompressed records: `*/data.pkl` (the object, pickled) and one `*/data/KEY` a storage.
The pickle is read by an unpickler that knows a short list of names, each bound to an inert stand-in of ours, so
nothing in the file can call anything else; the zip directory then says where each storage lies.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmconvert.checkpoint.dtypes import ITEMSIZE
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.errors import BadInput, Refused

_STORAGE_DTYPES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
}


class Inert:
    """What a name in a pickle becomes that is harmless and useless here: it does nothing, whatever is done to it.

    Attributes:
        name: in full.
        arguments: what it was called with.
        state: what it was given as its state, or None.
    """

    name = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        """Keep the arguments."""
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        """Nothing."""

    def extend(self, values: Any) -> None:
        """Nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing."""

    def __hash__(self) -> int:
        return id(self)


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


class _Forbidden(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, *, inert: str = "nothing") -> None:
        super().__init__(file)
        self._inert = inert

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if self._inert == "anything" or (self._inert == "harmless" and _harmless(module, name)):
            return type("Inert", (Inert,), {"name": f"{module}.{name}"})
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("not a storage")
        return _Storage(storage_type.dtype, str(key), int(numel))


def _data_offset(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    file = archive.fp
    assert file is not None
    file.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return int(info.header_offset) + 30 + int(name_length) + int(extra_length)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


class _Window(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = path.open("rb"), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def read_inert(data: bytes, harmless: Callable[[str, str], bool]) -> Any:
    """Unpickle bytes with every name a stand-in of ours.

    Args:
        data: the pickle.
        harmless: whether a name (module, name) becomes `Inert`; another is refused.

    Raises:
        pickle.UnpicklingError: it is no pickle, or asks for another name.
    """

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if not harmless(module, name):
                raise pickle.UnpicklingError(f"it asks for `{module}.{name}`, which was not run")
            return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    return Reader(io.BytesIO(data)).load()


def read_object(path: Path, *, inert: str = "nothing", hint: str = _SAFE, window: tuple[int, int] | None = None) -> Any:
    """Read what `torch.save` wrote, tensors by where they lie; no code of the file's choosing is run.

    Args:
        path: the file.
        inert: which names beside tensors' become `Inert` stand-ins: nothing, harmless (those of training checkpoints)
            or anything.
        hint: what to do about a name that is refused.
        window: offset and length of the part of the file that `torch.save` wrote; all of it if None.

    Returns:
        The object, with a `StoredTensor` (its `name` is empty) for each tensor.

    Raises:
        BadInput: the file is truncated or not a torch zip.
        Refused: the pickle asks for another name, or a tensor is not stored contiguously.
    """
    where, base = str(path), window[0] if window else 0
    try:
        with (
            _Window(path, *window) if window else path.open("rb") as opened,
            zipfile.ZipFile(opened) as archive,
        ):
            records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in records if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1:
                raise BadInput("the archive holds no `data.pkl`: not a file written by torch.save", where=where)
            root = pickles[0][: -len("data.pkl")]
            order = archive.read(root + "byteorder") if root + "byteorder" in records else b"little"
            if order != b"little":
                raise Refused("the tensors are stored big-endian", where=where)
            with archive.open(pickles[0]) as file:
                value = _Unpickler(file, inert=inert).load()
            offsets: dict[str, int] = {}
            sizes: dict[str, int] = {}
            for name, info in records.items():
                if name.startswith(root + "data/"):
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise Refused(
                            f"record `{name}` is compressed", where=where, hint="save it again with torch.save"
                        )
                    key = name[len(root) + 5 :]
                    offsets[key], sizes[key] = base + _data_offset(archive, info), info.file_size
    except _Forbidden as error:
        raise Refused(
            f"the pickle asks for `{error}`, which is not needed to hold weights and could run code; it was not run",
            where=where,
            hint=hint,
        ) from None
    except zipfile.BadZipFile:
        head = path.open("rb").read(2)
        if head[:1] == b"\x80":
            raise Refused(
                "the file is in torch's format from before 1.6, which is not read",
                where=where,
                hint="load it with torch.load(..., weights_only=True) and save it again with torch.save",
            ) from None
        raise BadInput(
            "the file is truncated or not written by torch.save", where=where, hint="download it again"
        ) from None
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        struct.error,
    ) as error:
        raise BadInput(f"the pickle cannot be read: {error}", where=where, hint="download the file again") from None
    size = path.stat().st_size

    def located(value: Any) -> Any:
        if isinstance(value, _Tensor):
            return _locate(value, offsets, sizes, size, path)
        if isinstance(value, Inert):
            value.state = located(value.state)
            return value
        if isinstance(value, dict):
            return {key: located(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [located(entry) for entry in value]
        return value

    return located(value)


def _locate(value: _Tensor, offsets: dict[str, int], sizes: dict[str, int], size: int, path: Path) -> StoredTensor:
    storage, item, where = value.storage, ITEMSIZE[value.storage.dtype], str(path)
    if not _contiguous(value.shape, value.stride):
        raise Refused("a tensor is stored non-contiguously", where=where, hint="save it after .contiguous()")
    begin, count = value.offset * item, math.prod(value.shape) * item
    cut = storage.key not in offsets or begin + count > sizes[storage.key]
    if cut or offsets[storage.key] + begin + count > size:
        raise BadInput("the bytes of a tensor are missing or cut short", where=where, hint="download it again")
    return StoredTensor("", path, offsets[storage.key] + begin, storage.dtype, value.shape)


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
        if not isinstance(value, StoredTensor) or not isinstance(name, str):
            raise BadInput(f"entry `{name}` is not a tensor: not a plain state dict", where=where)
        tensors[name] = value._replace(name=name)
    return tensors
