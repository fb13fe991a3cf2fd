"""The readers that meet foreign bytes, each as a function of bytes.

A target returns, or raises what a reader may raise; anything else is a finding. The files around the bytes are made
once, in a directory in memory.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import archives

from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.checkpoint.megatron import open_megatron
from llmconvert.checkpoint.safetensors import layout, read_header
from llmconvert.checkpoint.torch_dist import lay_out_torch_dist
from llmconvert.checkpoint.torch_pickle import read_inert, read_object
from llmconvert.checkpoint.torch_zip import Global, Instance, Slot, lay_out_torch
from llmconvert.engine import manifest
from llmconvert.engine.journal import Workspace, work_directory
from llmconvert.errors import BadInput, InputOutput, Refused, Usage
from llmconvert.spec.dialect import lift
from llmconvert.spec.fused import unfused
from llmconvert.spec.registry import registry

EXPECTED = (BadInput, Refused, InputOutput, Usage)

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "max_position_embeddings": 256, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1, "bos_token_id": 1,
    "eos_token_id": [2, 3], "pad_token_id": None,
}  # fmt: skip
_LAYER = "model.layers.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (11, 8), "lm_head.weight": (11, 8), "model.norm.weight": (8,),
    **{_LAYER + f"{norm}.weight": (8,) for norm in ("input_layernorm", "post_attention_layernorm")},
    **{_LAYER + f"self_attn.{p}_proj.weight": (rows, 8) for p, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 8))},
    **{_LAYER + f"self_attn.{p}_proj.bias": (rows,) for p, rows in (("q", 8), ("k", 4), ("v", 4))},
    **{_LAYER + f"mlp.{p}_proj.weight": (12, 8) for p in ("gate", "up")}, _LAYER + "mlp.down_proj.weight": (8, 12),
}  # fmt: skip
"""A model of one layer, in 16 bits."""

_FILE = "model-00001-of-00001.safetensors"


def safetensors(shapes: dict[str, tuple[int, ...]] | None = None) -> bytes:
    """A small file of zeros."""
    tensors = {name: ("BF16", shape) for name, shape in (shapes or {"a": (2, 3), "b": (), "c": (0, 4)}).items()}
    prefix, _ = layout(tensors)
    return prefix + bytes(2 * sum(_size(shape) for _, shape in tensors.values()))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


def checkpoint(folder: Path) -> Path:
    """A checkpoint of `CONFIG` and `SHAPES`, whole."""
    folder.mkdir()
    (folder / _FILE).write_bytes(safetensors(SHAPES))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(SHAPES, _FILE)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


class Reading:
    """A directory with one file to be replaced, and what reads it."""

    def __init__(self, folder: Path, file: str, read: Callable[[Path], Any]) -> None:
        """Keep them, and the valid file that is there, if one is."""
        self.path, self._folder, self._read = folder / file, folder, read
        self.valid = self.path.read_bytes() if self.path.is_file() else b""

    def read(self, data: bytes) -> None:
        """Read with these bytes in the file's place."""
        self.path.write_bytes(data)
        self._read(self._folder)

    def __call__(self, data: bytes) -> None:
        """The same; it may refuse."""
        with contextlib.suppress(*EXPECTED):
            self.read(data)


def _lifted(folder: Path) -> None:
    opened = unfused(open_checkpoint(folder))
    lift(registry().detect(opened.config), opened)


def _as_journal(data: bytes) -> None:
    """Bytes as the journal of an unfinished run, which is taken up."""
    for path in _work.glob("*journal*"):
        path.unlink()
    _journal.write_bytes(data)
    with (
        contextlib.suppress(*EXPECTED),
        contextlib.closing(Workspace(ROOT / "out", "identity", resume=True, restart=False)) as space,
    ):
        assert all(isinstance(text, str) for entry in space.done.items() for text in entry)


def _as_pickle(data: bytes) -> None:
    """Bytes as the pickle of an archive, and as `.metadata`."""
    with contextlib.suppress(ValueError):
        read_inert(data, lambda module, name: len(name) % 2 == 0)
    _pickle.path.write_bytes(archives.archive(data, {"0": bytes(64), "1": bytes(64)}))
    for inert in ("nothing", "anything"):
        with contextlib.suppress(*EXPECTED):
            read_object(_pickle.path, inert=inert)


def _as_archive(data: bytes) -> None:
    """Bytes as an archive; if it is one, with the checksum its pickle would have."""
    _archive(data)
    at = data.rfind(b"PK\1\2", 0, data.find(b"data.pkl", data.find(b"PK\1\2")))
    if at >= 0 and len(data) > at + 46:
        start = 30 + sum(struct.unpack("<HH", data[26:30]))
        size = struct.unpack("<I", data[at + 20 : at + 24])[0]
        crc = struct.pack("<I", zlib.crc32(data[start : start + size]))
        _archive(data[: at + 16] + crc + data[at + 20 :])


ROOT = Path(tempfile.mkdtemp(prefix="llmconvert-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
(ROOT / "plain").mkdir()

_pickle = Reading(ROOT / "plain", "pickle.bin", lambda folder: None)
_archive = Reading(ROOT / "plain", "archive.bin", lambda folder: read_object(folder / "archive.bin", inert="harmless"))


def _made_by_us(folder: Path) -> Path:
    """The checkpoint with a manifest."""
    import xxhash

    checkpoint(folder)
    tensors = {
        name: {
            "file": _FILE, "dtype": "BF16", "shape": list(shape), "rows_per_checksum": 64,
            "checksums": [xxhash.xxh3_128(bytes(2 * _size(shape))).hexdigest()],
        }
        for name, shape in SHAPES.items()
    }  # fmt: skip
    made = {"llmconvert": "0", "source": {"path": "x", "spec": "qwen2", "architectures": None, "config": CONFIG},
            "target": {"spec": "llama"}, "dtype": None, "steps": [], "dropped": {}, "source_files": {}, "checksum": "xxh3-128",
            "tensors": tensors}  # fmt: skip
    (folder / manifest.MANIFEST).write_text(json.dumps(made))
    return folder


def _dist(folder: Path) -> Path:
    """A `torch_dist` checkpoint."""
    folder.mkdir()
    tensors = {"decoder.layers.mlp.linear_fc1.weight": ("F32", (2, 3, 4)), "output_layer.weight": ("F32", (5, 4))}
    files, texts = lay_out_torch_dist(
        tensors, {"x/_extra_state": None}, {"args": {}, "checkpoint_version": 3.0}, 1 << 20
    )
    for file in files:
        data = bytearray(file.size)
        for offset, piece in file.pieces:
            data[offset : offset + len(piece)] = piece
        (folder / file.name).write_bytes(bytes(data))
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return folder


def _rank(args: dict[str, Any]) -> bytes:
    """A rank file."""
    kept = {"args": Instance(Global("argparse", "Namespace"), args), "checkpoint_version": 3.0, "iteration": 1,
            "model": {"output_layer.weight": Slot("F32", (3, 4)), "output_layer._extra_state": None}}  # fmt: skip
    laid = lay_out_torch(kept)
    data = bytearray(laid.size)
    for offset, piece in laid.pieces:
        data[offset : offset + len(piece)] = piece
    return bytes(data)


_ranks = ROOT / "ranks"
(_ranks / "mp_rank_00").mkdir(parents=True)
_work = work_directory(ROOT / "out")
with contextlib.closing(Workspace(ROOT / "out", "identity", resume=False, restart=True)) as _space:
    _space.record("a:0", "00")
(_journal,) = _work.glob("*journal*")

TARGETS: dict[str, Callable[[bytes], None]] = {
    "safetensors": Reading(ROOT / "plain", "x.safetensors", lambda folder: read_header(folder / "x.safetensors")),
    "pickle": _as_pickle,
    "archive": _as_archive,
    "metadata": Reading(_dist(ROOT / "dist"), ".metadata", open_megatron),
    "rank": Reading(_ranks, "mp_rank_00/model_optim_rng.pt", open_megatron),
    "index": Reading(checkpoint(ROOT / "index"), "model.safetensors.index.json", open_checkpoint),
    "config": Reading(checkpoint(ROOT / "config"), "config.json", _lifted),
    "manifest": Reading(_made_by_us(ROOT / "manifest"), manifest.MANIFEST, manifest.check),
    "journal": _as_journal,
}
"""By name, which is that of its folder in `corpus/` too."""

JSON = ("index", "config", "manifest")


def seeds(target: str) -> list[bytes]:
    """Valid input to begin with."""
    if target == "safetensors":
        return [safetensors(), safetensors(SHAPES)]
    if target == "pickle":
        simple = archives.state(archives.tensor(archives.storage(numel=16)), archives.tensor(archives.storage(key="1")))
        return [simple, b"\x80\x04\x95\x07\0\0\0\0\0\0\0}\x8c\1a\x94Ns."]
    if target == "archive":
        return [archives.archive(archives.state(archives.tensor())), _rank({"num_layers": 2})]
    if target == "rank":
        return [_rank({"num_layers": 2, "tensor_model_parallel_size": 1, "hidden_size": 8, "swiglu": True})]
    if target == "journal":
        return [b'["a:0", "00"]\n["b:64", "11"]\n']
    reading = TARGETS[target]
    assert isinstance(reading, Reading)
    return [reading.valid]
