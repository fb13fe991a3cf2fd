"""Pickles and archives made to harm: refused at once, in little memory, or read exactly as torch reads them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archives
import bounded
import pytest
import torch
from archives import name, state, storage, tensor, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.checkpoint.pickle_machine import Inert
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.checkpoint.torch_pickle import read_inert, read_object, read_pickle
from llmconvert.errors import BadInput, Refused

ROUNDS = 60


def _doubled(link: Callable[[int], bytes]) -> bytes:
    """Sixty containers, each holding the one before twice."""
    return b"".join(link(k) for k in range(ROUNDS))


SHARED_LISTS = b"]q\0" + _doubled(lambda k: b"](h" + bytes([k]) + b"h" + bytes([k]) + b"eq" + bytes([k + 1]))
SHARED_TUPLES = b")q\0" + _doubled(lambda k: b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1]))
DEEP = b"]" * 100_000 + b"a" * 99_999
UNPICKLED = {
    "an index of four thousand million": state(b"Nr\xff\xff\xff\xff" + tensor()),
    "lists that share": state(SHARED_LISTS, tensor()),
    "tuples that share": state(SHARED_TUPLES),
    "a key that takes for ever to hash": state(b"}" + SHARED_TUPLES + b"Ns"),
    "a list in itself": state(b"]q\0h\0a"),
    "a dictionary in itself": state(b"}q\0" + text("a") + b"h\0s"),
    "a state in itself": state(name("argparse", "Namespace") + b")\x81q\0}" + text("a") + b"h\0sb"),
    "lists a hundred thousand deep": state(DEEP),
    "lists that grow deep in small steps": state(
        b"](" + b")q\0" + b"".join(b"h" + bytes([k]) + b"\x85q" + bytes([k + 1]) for k in range(200)) + b"e"
    ),
    "a tuple a thousand deep": state(b")" + b"\x85" * 1000),
    "marks without end": b"\x80\x02" + b"(" * 1_000_000,
    "a number of two thousand million bytes": state(b"\x8b\xff\xff\xff\x7f"),
    "a number of two hundred bytes": state(b"\x8a\xc8" + b"\x7f" * 200),
    "text of 2^63 bytes": state(b"\x8d" + struct.pack("<Q", 1 << 63)),
    "bytes of 2^63 bytes": state(b"\x8e" + struct.pack("<Q", 1 << 63)),
    "a byte array of 2^40 bytes": state(b"\x96" + struct.pack("<Q", 1 << 40)),
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"}.",
    "what was never kept": state(b"h\x07"),
    "an empty stack": b"\x80\x02a.",
    "an empty stack below a mark": b"\x80\x02}(a.",
    "no mark": b"\x80\x02t.",
    "a mark left over": b"\x80\x02}(.",
    "two values left over": b"\x80\x02}}.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "protocol 6": b"\x80\x06}.",
    "protocol 0": b"(dS'a'\nI1\ns.",
    "an extension": state(b"\x82\x01"),
    "a buffer outside": state(b"\x97"),
    "text that is no text": state(b"X\x01\0\0\0\xff"),
    "half a surrogate": state(b"X\x03\0\0\0\xed\xa0\x80"),
    "a key without a value": b"\x80\x02}(" + text("a") + b"u.",
    "a list as a key": b"\x80\x02}(]Nu.",
    "a tensor as a key": b"\x80\x02}(" + tensor() + b"Nu.",
    "a call of a number": state(b"K\x01)R"),
    "a call of a storage type": state(name("torch", "FloatStorage") + b")R"),
    "a call without arguments": state(name("torch._utils", "_rebuild_tensor_v2") + b"NR"),
    "a call with too few": state(name("torch._utils", "_rebuild_tensor_v2") + b")R"),
    "a call of what was called": state(tensor() + b")R"),
    "a state for a function": state(
        name("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("__defaults__") + b")s\x86b"
    ),
    "a state for a tensor": state(tensor() + b"}b"),
    "a parameter of nothing": state(name("torch._utils", "_rebuild_parameter") + b"NNN\x87R"),
    "an ordered dictionary of numbers": state(name("collections", "OrderedDict") + b"K\x05\x85R"),
    "an entry of a tuple": state(b")(K\x01K\x02u"),
    "no dictionary": b"\x80\x02].",
    "no tensors": state(b"K\x01"),
    "a name that is a number": b"\x80\x02}(K\x01" + tensor() + b"u.",
}

TENSORS = {
    "no storage": tensor(b"N"),
    "no tuple for a storage": tensor(text("storage") + b"Q"),
    "something other than a storage": tensor(storage().replace(b"storage", b"gadgets")),
    "a storage of no type": tensor(storage(kind=b"N")),
    "a storage of a name": tensor(storage(kind=text("FloatStorage"))),
    "a storage of another type": tensor(storage(kind=name("collections", "OrderedDict"))),
    "a key that is a number": tensor(storage(key=b"K\0")),
    "a key of nothing": tensor(storage(key="1")),
    "a key that leads away": tensor(storage(key="../data.pkl")),
    "fewer than no elements": tensor(storage(numel=-1)),
    "elements by the text": tensor(storage(numel=text("4"))),
    "elements without end": tensor(storage(numel=1 << 900)),
    "more elements than the record has": tensor(storage(numel=5)),
    "an offset before the file": tensor(offset=-1),
    "an offset far before the file": tensor(offset=-(1 << 62)),
    "an offset behind the storage": tensor(offset=1),
    "an offset without end": tensor(offset=1 << 900),
    "an offset that is text": tensor(offset=text("0")),
    "an offset that is true": tensor(offset=b"\x88"),
    "sizes below zero": tensor(shape=(-4,)),
    "two sizes below zero": tensor(shape=(-2, -2), stride=(2, 1)),
    "sizes without end": tensor(shape=(0, 1 << 900), stride=(1, 1)),
    "sizes that are text": tensor(shape=text("4")),
    "sizes that are a number": tensor(shape=b"K\x04"),
    "sizes that are nothing": tensor(shape=b"N"),
    "sizes of text": tensor(shape=text("4") + b"\x85"),
    "a thousand axes": tensor(shape=(1,) * 1000, stride=(1,) * 1000),
    "more strides than sizes": tensor(stride=(4, 1)),
    "no strides": tensor(stride=()),
    "strides that are a number": tensor(stride=b"K\x01"),
    "strides of text": tensor(stride=text("1") + b"\x85"),
    "strides of halves": tensor(stride=b"G" + struct.pack(">d", 0.5) + b"\x85"),
    "one storage of two types": tensor() + text("b") + tensor(storage(kind=name("torch", "HalfStorage"))),
    "one storage of two lengths": tensor() + text("b") + tensor(storage(numel=3), shape=(3,)),
}


@pytest.mark.parametrize("case", [*UNPICKLED, *TENSORS])
def test_a_pickle_made_to_harm_is_bad_input(case: str, tmp_path: Path) -> None:
    pickled = UNPICKLED[case] if case in UNPICKLED else state(TENSORS[case])
    path = archives.write(tmp_path / "pytorch_model.bin", pickled)

    def read() -> None:
        # As a rank file, where names may stand for nothing, and as `.metadata`.
        for other in (lambda: read_object(path, inert="anything"), lambda: read_inert(pickled, lambda *_: True)):
            with contextlib.suppress(BadInput, ValueError):
                other()
        read_pickle(path)

    kind, message = bounded.run(read)
    assert kind == ("Refused" if case == "a state in itself" else "BadInput"), message
    assert str(path) in message


def test_the_control_of_these_is_read(tmp_path: Path) -> None:
    path = archives.write(
        tmp_path / "x.bin", state(tensor(), tensor(storage(numel=4), 1, (3,)), tensor(shape=(0, 7), stride=(9, 1)))
    )
    found = read_pickle(path)
    data = path.read_bytes().index(b"archive/data/0") + len("archive/data/0")
    places = {key: (value.offset, value.shape, value.dtype) for key, value in found.items()}
    assert places == {"a": (data, (4,), "F32"), "b": (data + 4, (3,), "F32"), "c": (data, (0, 7), "F32")}
    assert torch.load(path, weights_only=True)["b"].shape == (3,)


@pytest.mark.parametrize("rest", [b"}" + text("neg") + b"\x88s", b"}" + text("conj") + b"\x88s"])
def test_numbers_that_are_not_what_is_stored_are_refused(rest: bytes, tmp_path: Path) -> None:
    path = archives.write(tmp_path / "x.bin", state(tensor(rest=rest)))
    with pytest.raises(Refused, match="negated"):
        read_pickle(path)


def test_torch_negates_lazily(tmp_path: Path) -> None:
    """The oracle of the refusal above: what lies in the file is not what torch gives."""
    torch.save({"a": torch.tensor([1.0, 2.0])._neg_view()}, tmp_path / "x.bin")
    assert torch.load(tmp_path / "x.bin", weights_only=True)["a"].tolist() == [-1.0, -2.0]
    with pytest.raises(Refused, match="negated"):
        read_pickle(tmp_path / "x.bin")


def _plain_archive() -> bytes:
    return archives.archive(state(tensor()))


def _patched(data: bytes, old: bytes, new: bytes, *, last: bool = False) -> bytes:
    at = data.rindex(old) if last else data.index(old)
    return data[:at] + new + data[at + len(old) :]


def _sized(packed: int, plain: int) -> bytes:
    return _patched(_plain_archive(), struct.pack("<II", 16, 16), struct.pack("<II", packed, plain), last=True)


_PICKLE, _DATA = ("archive/data.pkl", state(tensor())), ("archive/data/0", bytes(16))


def _as_folder(archive: bytes) -> bytes:
    """The first record with the attribute of a folder, of which torch's reader reads no byte."""
    at = archive.index(b"PK\1\2") + 38
    return archive[:at] + b"\x10" + archive[at + 1 :]


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a folder with bytes": (lambda: _as_folder(archives.records(_PICKLE, _DATA)), "says that it is a folder"),
    "two records of one name": (lambda: archives.records(_PICKLE, _DATA, ("archive/data/0", b"\1" * 16)), "two records"),
    "two pickles": (lambda: archives.records(_PICKLE, ("archive/data.pkl", state()), _DATA), "two records"),
    "two names but for case": (lambda: archives.records(_PICKLE, _DATA, ("archive/DATA/0", bytes(16))), "two records"),
    "encrypted": (lambda: archives.records(_PICKLE, _DATA, flags=1), "encrypted"),
    "patched": (lambda: archives.records(_PICKLE, _DATA, flags=0x20), "torch does not read"),
    "bytes before": (lambda: b"#!/bin/sh\n" + _plain_archive(), "truncated"),
    "bytes behind": (lambda: _plain_archive() + b"\0", "truncated"),
    "no folder": (lambda: archives.records(("data.pkl", state(tensor())), ("data/0", bytes(16))), "no folder"),
    "another folder first": (lambda: archives.records(("other/x", b""), _PICKLE, _DATA), "no `data.pkl`"),
    "no records": (lambda: archives.end(0, 0, 0), "no `data.pkl`"),
    "several parts": (lambda: _plain_archive()[:-14] + struct.pack("<HH", 1, 5) + _plain_archive()[-10:], "parts"),
    "a directory elsewhere": (lambda: _plain_archive()[:-6] + struct.pack("<IH", 7, 0), "truncated"),
    "a directory of 4 GB": (lambda: _plain_archive()[:-10] + struct.pack("<IIH", 0xFFFFFFF0, 7, 0), "truncated"),
    "a record elsewhere": (lambda: _patched(_plain_archive(), b"PK\3\4", b"PK\3\5"), "truncated"),
    "a record of two names": (lambda: _patched(_plain_archive(), b"archive/data/0", b"archive/data/1"), "two names"),
    "two sizes": (lambda: _sized(16, 9), "two sizes"),
    "a record of 2 GB": (lambda: _sized(1 << 31, 1 << 31), "truncated"),
    "a name that is no text": (lambda: _plain_archive().replace(b"archive/data/0", b"archive/dat\xff/0"), "utf-8"),
    "a flipped bit in the pickle": (lambda: _patched(_plain_archive(), text("cpu"), text("cpv")), "checksum"),
    "nothing": (lambda: b"", "truncated"),
    "text": (lambda: b"hello", "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_can_be_read_in_two_ways_or_none_is_bad_input(case: str, tmp_path: Path) -> None:
    make, words = ARCHIVES[case]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(make())
    kind, message = bounded.run(lambda: read_pickle(path))
    assert kind == "BadInput" and words in message, message


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.bin"
    path.write_bytes(archives.archive(b"\x80\x02" + b"N0" * (1 << 27), compress=True))
    assert path.stat().st_size < 500_000
    kind, message = bounded.run(lambda: read_pickle(path))
    assert kind == "Refused" and "compressed" in message
    path.write_bytes(archives.records(_PICKLE, _DATA, method=8))
    with pytest.raises(Refused, match="compressed"):
        read_pickle(path)


def test_a_zip_of_64_bits_is_read_and_one_that_contradicts_itself_is_not(tmp_path: Path) -> None:
    path, raw = tmp_path / "x.bin", _plain_archive()
    count, size, offset = struct.unpack("<HII", raw[-12:-2])
    body, where = raw[:-22], len(raw) - 22

    def ending(count64: int, size64: int, offset64: int, small: tuple[int, int, int]) -> bytes:
        wide = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count64, count64, size64, offset64)
        return wide + b"PK\6\7" + struct.pack("<IQI", 0, where, 1) + archives.end(*small)

    for small in ((0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (count, size, offset)):
        path.write_bytes(body + ending(count, size, offset, small))
        assert list(read_pickle(path)) == ["a"]
        assert list(torch.load(path, weights_only=True)) == ["a"]
    path.write_bytes(body + ending(count, size, offset, (count, size, offset + 1)))
    with pytest.raises(BadInput, match="two ways"):
        read_pickle(path)
    path.write_bytes(body + ending(count, 1 << 60, 1 << 60, (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)))
    with pytest.raises(BadInput, match="truncated"):
        read_pickle(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A state dict as torch saves it, with what state dicts have: tied weights, views, scalars, parameters, buffers."""
    base = torch.randn(6, 5)
    made = {
        "weight": base, "tied": base, "view": base[2:4], "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4),
        "half": torch.randn(3, dtype=torch.float16), "brain": torch.randn(2, 2).bfloat16(), "ids": torch.arange(7),
        "flags": torch.tensor([True, False]), "parameter": torch.nn.Parameter(torch.randn(4)),
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(made, buffer)
    return buffer.getvalue()


def _same(ours: Any, theirs: Any) -> None:
    """Whether a `StoredTensor` has the bytes of torch's tensor, and everything else is equal."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, StoredTensor)
        assert ours.shape == tuple(theirs.shape)
        assert TO_NAME.get(ours.dtype, "") in (str(theirs.dtype).removeprefix("torch."), "")
        with ours.path.open("rb") as file:
            file.seek(ours.offset)
            raw = file.read(ours.nbytes)
        flat = theirs.detach().contiguous().reshape(-1)
        assert raw == (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(theirs, dict):
        assert type(ours) is dict and list(ours) == list(theirs)
        for key, value in theirs.items():
            _same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for own, other in zip(ours, theirs, strict=True):
            _same(own, other)
    else:
        assert ours == theirs or theirs != theirs


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_torch_writes_is_read(protocol: int, saved: bytes, tmp_path: Path) -> None:
    value = torch.load(io.BytesIO(saved), weights_only=True)
    extra = {"nested": [{"betas": (0.9, 0.999), "lr": 1e-4, "amsgrad": False, "big": 1 << 70, "none": None}, (torch.ones(2),)],
             "step": 7, "minus": -5, "far": -(1 << 40), "bytes": b"\0\xff" * 200, "long": "x" * 70000, "odd": "ä\U0001f600"}  # fmt: skip
    for entry in (value, {**value, **extra}):
        torch.save(entry, tmp_path / "x.pt", pickle_protocol=protocol)
        theirs = torch.load(tmp_path / "x.pt", weights_only=False)
        if protocol == 2:  # bytes are a call of `_codecs.encode` there
            theirs.pop("bytes", None)
        ours = read_object(tmp_path / "x.pt", inert="harmless")
        if protocol == 2 and "bytes" in ours:
            assert type(ours.pop("bytes")) is Inert
        _same(ours, theirs)


def test_what_was_saved_without_checksums_is_read(saved: bytes, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(io.BytesIO(saved), weights_only=True), tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    _same(dict(read_pickle(tmp_path / "x.bin")), {k: v for k, v in torch.load(tmp_path / "x.bin").items()})


def test_an_optimizer_and_its_model_are_read(tmp_path: Path) -> None:
    betas = (0.9, 0.999)
    moments = {k: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2), "exp_avg_sq": torch.rand(2)} for k in range(2)}
    groups = [{"lr": 1e-3, "betas": betas, "foreach": None, "params": [k]} for k in range(2)]
    model = torch.nn.Linear(3, 2).state_dict()  # ordered, with `_metadata`
    torch.save({"model": model, "optimizer": {"state": moments, "param_groups": groups}}, tmp_path / "x.pt")
    _same(read_object(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True))


def test_names_are_stand_ins_with_what_they_were_given() -> None:
    class Thing:
        def __init__(self) -> None:
            self.size, self.kinds = torch.Size([2, 3]), {"a": torch.float32}

    Thing.__module__, Thing.__qualname__ = __name__, "Thing"
    globals()["Thing"] = Thing
    for protocol in (2, 4, 5):
        found = read_inert(pickle.dumps({"t": Thing(), "set": {1, 2}}, protocol), lambda module, attribute: True)
        made = found["t"]
        assert made.name == f"{__name__}.Thing" and made.called and set(made.state) == {"size", "kinds"}
        assert made.state["size"].arguments == ((2, 3),) and made.state["kinds"]["a"].name == "torch.float32"
        assert not made.state["kinds"]["a"].called and type(found["set"]) is Inert


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_as_torch_reads_it(saved: bytes, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(saved)
    # Where it matters: the pickle, and the zip's own headers, which have no checksums.
    pickled = raw.index(b"\x80\x02")
    pickle_end = raw.index(b"PK", pickled)
    directory = raw.index(b"PK\1\2")
    places = st.one_of(
        st.integers(0, pickled - 1), st.integers(pickled, pickle_end - 1), st.integers(directory, len(raw) - 1)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(places)] = data.draw(st.integers(0, 255))
    raw = raw.replace(struct.pack("<I", _crc(saved)), bytes(4))  # as if saved without checksums
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))]))
    try:
        ours = read_pickle(path)
    except (BadInput, Refused):
        return
    try:
        theirs = torch.load(path, weights_only=True)
    except (RuntimeError, ValueError):
        return  # it wants more of records that hold no tensor (`version`, `byteorder`) than is read here
    _same(dict(ours), dict(theirs))


def _crc(saved: bytes) -> int:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(saved)) as found:
        return found.getinfo("archive/data.pkl").CRC


def test_a_file_that_comes_in_pieces_is_read(saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.bin").write_bytes(saved)
    whole, pread = read_pickle(tmp_path / "x.bin"), os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 7), offset))
    assert read_pickle(tmp_path / "x.bin") == whole


def test_no_stump_of_a_file_is_read(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for length in (*range(0, 300, 7), *range(len(saved) - 400, len(saved))):
        path.write_bytes(saved[:length])
        with pytest.raises((BadInput, Refused)):
            read_pickle(path)
