"""Trials in which a `.bin` file is hostile: its pickle, or the zip around it."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from faults import oracle, reader, sources
from faults.baseline import COMMANDS, line
from faults.mutations import BAD_INPUT, spoil
from faults.oracle import unchanged
from faults.sources import Assembler, State
from faults.trial import Trial

FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"

Crafted = Callable[[Assembler, random.Random, str], str]


# What stands for a tensor in a state dict; each tells what it is.


def _text_of(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _code(assembler: Assembler, dice: random.Random, canary: str) -> str:
    """Something that would run a command, if anything at all were run."""
    command = f"echo ran >> '{canary}'"
    module, name = dice.choice([
        ("os", "system"), ("posix", "system"), ("subprocess", "getoutput"), ("builtins", "exec"), ("builtins", "eval"),
        ("torch", "serialization.os.system"), ("torch._utils", "sys.modules"), ("nt", "system"), ("pty", "spawn"),
        ("llmconvert.cli.app", "main"), ("importlib", "import_module"), ("runpy", "_run_code"), ("pathlib", "Path.touch"),
        ("collections", "OrderedDict.__init__.__globals__"), ("torch", "load"), ("numpy", "load"), ("code", "interact"),
    ])  # fmt: skip
    if module == "builtins":
        command = f"__import__('os').system({command!r})"
    how = dice.choice(["reduce", "stack global", "inst", "obj", "newobj", "newobj ex", "build", "getattr", "ext", "storage"])
    argument = _text_of(command)
    name_of = b"c" + f"{module}\n{name}\n".encode()
    if how == "reduce":
        assembler.add(name_of, b"(", argument, b"tR")
    elif how == "stack global":
        assembler.add(_text_of(module), _text_of(name), b"\x93", argument, b"\x85R")
    elif how == "inst":
        assembler.add(b"(", argument, b"i" + f"{module}\n{name}\n".encode())
    elif how == "obj":
        assembler.add(b"(", name_of, argument, b"o")
    elif how == "newobj":
        assembler.add(name_of, argument, b"\x85\x81")
    elif how == "newobj ex":
        assembler.add(name_of, argument, b"\x85}\x92")
    elif how == "build":
        assembler.name("collections", "OrderedDict").add(b")R", b"}", _text_of("__setstate__"), name_of, b"sb")
        assembler.add(argument, b"b")
    elif how == "getattr":
        assembler.add(b"cbuiltins\ngetattr\n(cos\nsystem\n", _text_of("__call__"), b"tR(", argument, b"tR")
    elif how == "ext":
        assembler.add(dice.choice([b"\x82\x01", b"\x83\x01\x02", b"\x84\x01\x02\x03\x04"]), argument, b"\x85R")
    else:
        assembler.name("torch._utils", "_rebuild_tensor_v2").add(b"((", _text_of("storage"), name_of, _text_of("0"))
        assembler.add(_text_of("cpu"), b"K\x01tQK\x00K\x01\x85K\x01\x85\x89}tR")
    return f"{module}.{name} by {how}"


def _bomb(assembler: Assembler, dice: random.Random, canary: str) -> str:
    """Little data that asks for much memory or time."""
    what = dice.choice([
        "shared lists", "shared tuples", "shared dicts", "tuple as a key", "deep lists", "deep tuples", "cycle", "memo", "memo",
        "long text", "long bytes", "long bytearray", "frame", "long number", "decimal", "marks", "copies", "wide",
    ])  # fmt: skip
    depth = dice.choice([25, 40, 64])
    if what == "shared lists":
        assembler.add(b"]")
        for _ in range(depth):
            assembler.add(b"q\x00](h\x00h\x00e")
    elif what == "shared tuples":
        assembler.add(b")", *(b"2\x86" for _ in range(depth)))
    elif what == "shared dicts":
        assembler.add(b"}")
        for _ in range(depth):
            assembler.add(b"q\x00}(K\x01h\x00K\x02h\x00u")
    elif what == "tuple as a key":
        assembler.add(b"}K\x07\x85", *(b"2\x86" for _ in range(depth)), b"K\x01s")
    elif what == "deep lists":
        assembler.add(b"]" * (many := dice.choice([900, 5000, 200_000])), b"a" * (many - 1))
    elif what == "deep tuples":
        assembler.add(b")", b"\x85" * dice.choice([900, 5000, 200_000]))
    elif what == "cycle":
        assembler.add(dice.choice([b"]q\x00h\x00a", b"}q\x00K\x01h\x00s", b"](]q\x00h\x00\x85e", b"]q\x00(h\x00h\x00h\x00e"]))
    elif what == "memo":
        number = dice.choice([2**20, 10**8, 3 * 10**8, 2**31 - 1, 2**32 - 1])
        assembler.add(b"Nr", struct.pack("<I", number))
        what += f" {number}"
    elif what == "long text":
        assembler.add(dice.choice([b"X" + struct.pack("<I", 2**32 - 1), b"\x8d" + struct.pack("<Q", 2**40)]), b"abc")
    elif what == "long bytes":
        assembler.add(b"\x8e", struct.pack("<Q", dice.choice([2**31, 2**40, 2**63, 2**64 - 1])), b"abc")
    elif what == "long bytearray":
        assembler.add(b"\x96", struct.pack("<Q", dice.choice([2**31, 2**40, 2**64 - 1])), b"abc")
    elif what == "frame":
        assembler.add(b"\x95", struct.pack("<Q", dice.choice([2**31, 2**40, 2**64 - 1])), b"N")
    elif what == "long number":
        assembler.add(b"\x8b", struct.pack("<i", dice.choice([-1, 10**6, 2**31 - 1])), b"\x01" * 10**6)
    elif what == "decimal":
        assembler.add(dice.choice([b"I", b"L"]), b"7" * dice.choice([4301, 10**6]), b"\n")
    elif what == "marks":
        assembler.add(b"(" * 10**6, b"t" * (10**6 - 1), b"N")
    elif what == "copies":
        assembler.add(b"]", b"2" * 10**6, b"0" * 10**6)
    else:
        assembler.add(b"](", b"K\x01" * 10**6, b"e")
    return what


def _tensor(assembler: Assembler, dice: random.Random, canary: str) -> str:
    """A tensor that is not one."""
    number = lambda: dice.choice([-1, 0, 1, 2, 19, 2**31, 2**62, 2**63, 2**64, -(2**63)])  # noqa: E731
    what = dice.choice(["stride", "offset", "shape", "kind", "count", "key", "arguments", "pid", "types", "rebuild"])
    shape: tuple[int, ...] = (4, 4)
    if what == "stride":
        stride = dice.choice([(1, 4), (0, 0), (-4, 1), (4,), (4, 1, 1), (8, 1), (4, 2), (number(), number()), ()])
        assembler.tensor("0", shape, stride=stride)
        return f"stride {stride}"
    if what == "offset":
        assembler.tensor("0", shape, offset=(found := number()))
        return f"offset {found}"
    if what == "shape":
        found_shape = dice.choice([(number(),), (number(), number()), (1,) * 10_000, (), (0,), (2**40, 0), (True, 2)])
        assembler.tensor("0", found_shape, stride=(1,) * len(found_shape), count=4)
        return f"shape {found_shape[:4]}"
    if what == "kind":
        kind = dice.choice(["DoubleStorage", "HalfStorage", "UntypedStorage", "ComplexFloatStorage", "QInt8Storage", "Tensor"])
        assembler.tensor("0", shape, kind=kind)
        return kind
    if what == "count":
        assembler.tensor("0", shape, count=(found := number()))
        return f"{found} numbers"
    if what == "key":
        assembler.tensor(key := dice.choice(["", "../0", "/0", "99", "0/", "٠", "data.pkl", "\x1b[2J", "x" * 70_000]), shape)
        return f"storage {key[:20]!r}"
    assembler.name("torch._utils", dice.choice(["_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor", "_rebuild_qtensor"])
                   if what == "rebuild" else "_rebuild_tensor_v2")  # fmt: skip
    odd = dice.choice([
        b"N", b"]", b"}", b")", b"K\x00", b"K\x05", _text_of("abc"), b"G\x7f\xf8\0\0\0\0\0\0", b"\x88", b"ctorch\nFloatStorage\n",
    ])  # fmt: skip
    if what == "arguments":
        assembler.add(b"(", odd * dice.choice([0, 1, 3, 6, 100]), b"tR")
    elif what == "pid":
        assembler.add(b"((", odd * dice.choice([0, 1, 4, 5, 6]), b"tQ", b"K\x00(K\x04K\x04t(K\x04K\x01t\x89}tR")
    else:
        assembler.add(b"(").storage("FloatStorage", "0", 16)
        parts = [b"K\x00", b"(K\x04K\x04t", b"(K\x04K\x01t", b"\x89", b"}"]
        parts[dice.randrange(3)] = odd
        assembler.add(*parts, b"tR")
    return f"{what} with {odd[:8]!r}"


def _other(assembler: Assembler, dice: random.Random, canary: str) -> str:
    """A value that is no tensor and does nobody harm, or no value at all."""
    part = dice.choice([
        b"N", b"K\x01", b"]", b"}", b"\x88", _text_of("text"), b"C\x03abc", b"ccollections\nOrderedDict\n)R", b"\x8f", b"0", b"",
        b"h\x05", b"P1\n", b"Q", b"t", b"R", b"b", b"s", b"\xff", b"1", b".", b"\x80\x05", b"\x80\xff", b"N\x94h\x00\x98\x97",
        b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n(K\x01\x85tR",
    ])  # fmt: skip
    assembler.add(part)
    return f"opcodes {part[:12]!r}"


def _pickle(state: State, dice: random.Random, canary: str) -> tuple[bytes, str]:
    """A `data.pkl` with one entry, one name or some bytes that are not as they should be."""
    names = list(state)
    chosen = dice.randrange(len(names))
    way = dice.choice(["entry", "entry", "entry", "extra", "key", "whole", "bytes"])
    make: Crafted = dice.choice([_code, _code, _bomb, _bomb, _tensor, _tensor, _tensor, _other])
    if way == "whole":
        assembler = Assembler()
        what = make(assembler, dice, canary)
        return assembler.end(), f"nothing but {what}"
    if way == "bytes":
        return spoil(sources.pickled(state), dice)
    assembler, what = Assembler().add(b"}("), ""
    if dice.random() < 0.2:
        assembler.data[1] = dice.choice([0, 1, 3, 4, 5])
    for number, (name, array) in enumerate(state.items()):
        if number != chosen or way == "extra":
            assembler.text(name).tensor(str(number), array.shape)
        if number != chosen:
            continue
        if way == "key":
            key = dice.choice([b"N", b"K\x01", b"C\x01a", b")", b"]", _text_of("\x1b[2J"), _text_of("x" * 10**6), _text_of(names[0])])
            assembler.add(key).tensor(str(number), array.shape)
            what = f"the name {key[:20]!r}"
            continue
        if way == "extra":
            assembler.text(dice.choice(["extra", "_metadata", names[0]]))
        else:
            assembler.text(name)
        what = f"{name}: {make(assembler, dice, canary)}"
    return assembler.add(b"u").end(), what


def pickle(trial: Trial) -> None:
    """The pickle of a `.bin` file is hostile."""
    state = _half()
    data, what = _pickle(state, trial.dice, str(trial.folder / "canary"))
    records = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    records |= {f"data/{number}": array.tobytes() for number, array in enumerate(state.values())}
    _attack(trial, sources.zipped(records), what)


def _half() -> State:
    whole = sources.state(0)
    return {name: whole[name] for name in sorted(whole)[::2]}


def _attack(trial: Trial, file: bytes, what: str) -> None:
    world = trial.set_up({"source": trial.baselines.source("bin")})
    (world.root / "source" / FIRST).write_bytes(file)
    trial.story.append(what)
    world.begin()
    plain = line(COMMANDS["bin"], "source", trial.dice.choice(["none", "weights"]))
    command = trial.dice.choice([plain, plain, plain, [*plain, "--json"], ["inspect", "source"]])
    run = trial.run(command, codes=BAD_INPUT)
    trial.blame(oracle.of_surroundings(world))
    trial.blame(oracle.of_place(world, tidy=True))
    if run.done.code or "place/dst" not in command:
        trial.blame(unchanged(world))
    elif reader.available():
        trial.blame(_alike(world.root / "source", world.dst))


def _alike(source: Path, destination: Path) -> list[str]:
    """Whether what was made is what torch reads; where torch reads nothing, whether it is what was there at first."""
    from safetensors.numpy import load_file

    whole = sources.state(0)
    expected: dict[str, str] = {}
    refused = ""
    for number, name in enumerate((FIRST, SECOND)):
        if (source / name).read_bytes()[:4] != b"PK\x03\x04":
            return [f"exit code 0, but {name} does not begin as a zip: torch takes it for a pickle"]
        found = reader.digests(source / name)
        if isinstance(found, str):
            refused = f" (torch does not read {name}: {found})"
            found = {name: _digest(whole[name]) for name in sorted(whole)[number::2]}
        expected |= found
    made = {name: _digest(array) for name, array in load_file(destination / "model.safetensors").items()}
    faults = [f"`{name}` is not as torch reads it{refused}" for name, digest in expected.items() if made.get(name) != digest]
    more = [name for name in made.keys() - expected.keys() if not name.endswith(".bias")]
    return faults + [f"`{name}` is not in the source" for name in more]


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha1(np.ascontiguousarray(array).tobytes()).hexdigest()


# The zip around it.


def _zip(dice: random.Random) -> tuple[bytes, str]:
    """A zip that is not as torch writes it."""
    state = _half()
    pkl = sources.pickled(state)
    records = [("data.pkl", pkl), ("byteorder", b"little"), *((f"data/{n}", a.tobytes()) for n, a in enumerate(state.values())),
               ("version", b"3\n")]  # fmt: skip
    what = dice.choice(list(_ZIPS))
    return _ZIPS[what](records, dice), what


Records = list[tuple[str, bytes]]


def _packed(records: Records, methods: dict[str, int] | None = None, *, root: str = "archive/") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice
        for name, data in records:
            archive.writestr(zipfile.ZipInfo(root + name), data, (methods or {}).get(name, zipfile.ZIP_STORED))
    return file.getvalue()


def _twice(records: Records, dice: random.Random) -> bytes:
    name, data = dice.choice(records)
    other = bytes(len(data)) if dice.random() < 0.5 else data
    return _packed([*records, (name, other)] if dice.random() < 0.5 else [(name, other), *records])


def _edited(records: Records, dice: random.Random, mark: bytes, fields: dict[int, str], values: tuple[int, ...]) -> bytes:
    """Change a field of one header of a kind: at an offset, of a size, to a value."""
    data = bytearray(_packed(records))
    places, at = [], data.find(mark)
    while at >= 0:
        places.append(at)
        at = data.find(mark, at + 1)
    offset = dice.choice(list(fields))
    size = struct.calcsize(fields[offset])
    value = dice.choice([*values, *range(4)]) & ((1 << 8 * size) - 1)
    start = dice.choice(places) + offset
    data[start : start + size] = struct.pack(fields[offset], value)
    return bytes(data)


_LOCAL = {4: "<H", 6: "<H", 8: "<H", 14: "<I", 18: "<I", 22: "<I", 26: "<H", 28: "<H"}
_CENTRAL = {6: "<H", 8: "<H", 10: "<H", 16: "<I", 20: "<I", 24: "<I", 28: "<H", 30: "<H", 32: "<H", 34: "<H", 38: "<I", 42: "<I"}
_END = {4: "<H", 6: "<H", 8: "<H", 10: "<H", 12: "<I", 16: "<I", 20: "<H"}
_VALUES = (0, 1, 8, 9, 12, 99, 0x41, 0x800, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFE, 100, 5000, 2**31)


def _bombed(records: Records, dice: random.Random) -> bytes:
    """A member that is a thousand times as large as it is in the file: more than a gigabyte of zeros."""
    name = dice.choice(["data.pkl", "byteorder", "data/0", "version", "extra"])
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = 16 << 20
    first, again = (press.compress(bytes(block)) + press.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    count = 80
    head = press.copy()
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = press.compress(b"\x80\x02") + press.flush(zlib.Z_FULL_FLUSH)
    pressed = start + first + again * (count - 1) + head.flush(zlib.Z_FINISH)
    data = bytearray(_packed([*((n, d) for n, d in records if n != name), (name, pressed)]))
    for mark, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.rfind(mark)
        data[at + method : at + method + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)
        data[at + method + 14 : at + method + 18] = struct.pack("<I", 2 + block * count)
    return bytes(data)


def _renamed(records: Records, dice: random.Random) -> bytes:
    at = dice.randrange(len(records))
    name = dice.choice(["../data/0", "/data/0", "data\\0", "data/0/", "data/\x1b[2J", "data/00", "DATA.PKL", "x/data.pkl", "data.pkl"])
    return _packed([(name if k == at else n, d) for k, (n, d) in enumerate(records)])


def _spoilt(records: Records, dice: random.Random) -> bytes:
    data = _packed(records)
    cut = dice.choice([len(data), 2000, 300, 40])
    tail, _ = spoil(data[-cut:], dice)
    return data[:-cut] + tail


_ZIPS: dict[str, Callable[[Records, random.Random], bytes]] = {
    "a member twice": _twice,
    "a member twice ": _twice,
    "local header": lambda r, dice: _edited(r, dice, b"PK\x03\x04", _LOCAL, _VALUES),
    "central header": lambda r, dice: _edited(r, dice, b"PK\x01\x02", _CENTRAL, _VALUES),
    "central header ": lambda r, dice: _edited(r, dice, b"PK\x01\x02", _CENTRAL, _VALUES),
    "end": lambda r, dice: _edited(r, dice, b"PK\x05\x06", _END, _VALUES),
    "bomb": _bombed,
    "compressed": lambda r, dice: _packed(
        r, dict.fromkeys(dice.sample([n for n, _ in r], dice.choice([1, 3])), dice.choice([8, 12, 14]))
    ),
    "names": _renamed,
    "bytes": _spoilt,
    "bytes ": _spoilt,
    "junk before": lambda r, dice: b"\0" * dice.choice([1, 8, 1000]) + _packed(r),
    "junk after": lambda r, dice: _packed(r) + b"\0" * dice.choice([1, 22, 70_000]),
    "another root": lambda r, dice: _packed(r, root=dice.choice(["", "a/b/", "../", "/", "archive/archive/"])),
    "two pickles": lambda r, dice: _packed([*r, ("other/data.pkl", b"N.")]),
    "byte order": lambda r, dice: _packed(
        [(n, dice.choice([b"big", b"", b"LITTLE", b"\xff" * 100]) if n == "byteorder" else d) for n, d in r]
    ),
    "many members": lambda r, dice: _packed([*r, *((f"x/{number}", b"") for number in range(20_000))]),
    "a member less": lambda r, dice: _packed([entry for k, entry in enumerate(r) if k != dice.randrange(len(r)) or not k]),
    "a shorter member": lambda r, dice: _packed([(n, d[:-1] if n == "data/1" else d) for n, d in r]),
}


def zip(trial: Trial) -> None:
    """The zip of a `.bin` file is hostile."""
    data, what = _zip(trial.dice)
    _attack(trial, data, what.strip())
