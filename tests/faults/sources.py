"""Tiny checkpoints, made by numpy, safetensors' own library and zipfile; no torch, and none of the code under attack."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

State = dict[str, npt.NDArray[Any]]

HIDDEN, MLP, VOCABULARY, HEADS, GROUPS, WIDTH, LAYERS = 16, 12, 19, 4, 2, 4, 2
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float32", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "use_sliding_window": False, "sliding_window": None, "attention_dropout": 0.0,
    "initializer_range": 0.02, "use_cache": True, "transformers_version": "4.57.0",
    "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
}  # fmt: skip
COMPANIONS = {
    "generation_config.json": json.dumps({"eos_token_id": 2, "max_new_tokens": 20}),
    "tokenizer.json": json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}),
    "tokenizer_config.json": json.dumps({"tokenizer_class": "OwnTokenizer"}),
    "tokenization_own.py": "class OwnTokenizer:\n    pass\n",
    "additional_chat_templates/tool.jinja": "{{ messages }}\n",
    "README.md": "A model for tests.\n",
}


def state(seed: int) -> State:
    """Random weights of the model of `CONFIG`; no two numbers alike, no norm of ones, no bias of zeros."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }  # fmt: skip
    for layer in range(LAYERS):
        own = f"model.layers.{layer}."
        shapes |= {f"{own}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes[f"{own}self_attn.{name}_proj.weight"] = (heads * WIDTH, HIDDEN)
            shapes[f"{own}self_attn.{name}_proj.bias"] = (heads * WIDTH,)
        shapes[f"{own}self_attn.o_proj.weight"] = (HIDDEN, HEADS * WIDTH)
        shapes |= {f"{own}mlp.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        shapes[f"{own}mlp.down_proj.weight"] = (HIDDEN, MLP)
    dice = np.random.default_rng(seed)
    return {name: dice.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make(folder: Path, seed: int, *, form: str = "safetensors", shards: int = 2) -> Path:
    """A checkpoint with all that goes along with one.

    Args:
        folder: made.
        seed: of the weights.
        form: safetensors or bin.
        shards: weight files.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    for name, text in COMPANIONS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    whole = state(seed)
    names, mapped = sorted(whole), {}
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    for number in range(shards):
        part = {name: whole[name] for name in names[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        mapped |= dict.fromkeys(part, file)
        if form == "safetensors":
            save_file(part, folder / file, {"format": "pt"})
        else:
            (folder / file).write_bytes(saved(part))
    if shards > 1:
        total = sum(array.nbytes for array in whole.values())
        index = {"metadata": {"total_size": total}, "weight_map": mapped}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


class Assembler:
    """Writes a pickle opcode by opcode (protocol 2), in the way torch does."""

    def __init__(self) -> None:
        self.data = bytearray(b"\x80\x02")

    def add(self, *parts: bytes) -> Assembler:
        for part in parts:
            self.data += part
        return self

    def text(self, text: str) -> Assembler:
        data = text.encode("utf-8", "surrogatepass")
        return self.add(b"X", struct.pack("<I", len(data)), data)

    def number(self, number: int) -> Assembler:
        if -(2**31) <= number < 2**31:
            return self.add(b"J", struct.pack("<i", number))
        data = pickle.encode_long(number)
        return self.add(b"\x8a", bytes([len(data)]), data)

    def numbers(self, numbers: tuple[int, ...]) -> Assembler:
        self.add(b"(")
        for number in numbers:
            self.number(number)
        return self.add(b"t")

    def name(self, module: str, name: str) -> Assembler:
        return self.add(b"c", module.encode(), b"\n", name.encode(), b"\n")

    def storage(self, kind: str, key: str, count: int) -> Assembler:
        self.add(b"(").text("storage").name("torch", kind).text(key).text("cpu").number(count)
        return self.add(b"tQ")

    def tensor(
        self, key: str, shape: tuple[int, ...], *, kind: str = "FloatStorage", offset: int = 0,
        stride: tuple[int, ...] | None = None, count: int | None = None,
    ) -> Assembler:  # fmt: skip
        steps = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))) if stride is None else stride
        self.name("torch._utils", "_rebuild_tensor_v2").add(b"(")
        self.storage(kind, key, int(np.prod(shape)) if count is None else count)
        self.number(offset).numbers(shape).numbers(steps).add(b"\x89").name("collections", "OrderedDict")
        return self.add(b")R", b"tR")

    def end(self) -> bytes:
        return bytes(self.add(b".").data)


def pickled(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The `data.pkl` of a state dict; storages are named 0, 1, …"""
    assembler = Assembler().add(b"}(")
    for number, (name, array) in enumerate(arrays.items()):
        assembler.text(name).tensor(str(number), array.shape)
    return assembler.add(b"u").end()


def saved(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """What `torch.save` writes of a state dict."""
    records = {"data.pkl": pickled(arrays), "byteorder": b"little"}
    records |= {f"data/{number}": array.tobytes() for number, array in enumerate(arrays.values())}
    return zipped({**records, "version": b"3\n"})


def zipped(records: Mapping[str, bytes]) -> bytes:
    """Records under `archive/`, not compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return file.getvalue()
