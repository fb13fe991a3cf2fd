"""Trials in which a header, a config, an index or a manifest is not what it should be."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import oracle, reader
from faults.baseline import COMMANDS, line
from faults.oracle import equal_weights, unchanged
from faults.trial import Trial

BAD_INPUT = {0, 3, 4}
"""What may become of a source that is not what it should be: it is so to no effect, refused, or found bad."""


class Raw(str):
    """JSON text that `json.dumps` would not write."""


HUGE = Raw("7" * 4301)
_DEEP = Raw("[" * 100_000 + "]" * 100_000)
_DEEP_OBJECT = Raw('{"a":' * 20_000 + "1" + "}" * 20_000)


def hostile(dice: random.Random) -> Any:
    """A value that does not belong where it will be put."""
    return dice.choice([
        None, True, False, 0, -1, 1, 2, 3, 7, 10**4, 10**7, 10**12, 2**31, 2**63, 2**64, -(2**63), HUGE, Raw("-" + HUGE),
        Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e-400"), 0.0, -0.0, 0.5, 1e308,
        5e-324, "", "0", "none", "x" * 100_000, "\x00", "\x1b[2J\x1b[31m", "\r\n\u202e", "../../outside/secret.txt",
        "/etc/passwd", Raw('"\\ud800"'), "🦙" * 50, [], [[]], [1], [1, 2, 3], ["a", None], [0.5] * 100, [1] * 100_000,
        {}, {"a": 1}, {"rope_type": "yarn"}, {"": {}}, {"rope_type": [], "factor": "4"}, _DEEP, _DEEP_OBJECT,
        {"x" * 1000: None}, Raw('{"a": 1, "a": 2}'), "float32", "bfloat16", ["float32"], "F32", Raw("1.0000000000000000000"),
    ])  # fmt: skip


def dumped(value: Any) -> str:
    """JSON, with `Raw` text as it is."""
    raw: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value)
            return f"\x01raw{len(raw) - 1}\x01"
        if isinstance(value, dict):
            return {key: marked(entry) for key, entry in value.items()}
        return [marked(entry) for entry in value] if isinstance(value, list) else value

    text = json.dumps(marked(value))
    for number, found in enumerate(raw):
        text = text.replace(f'"\\u0001raw{number}\\u0001"', found)
    return text


Place = tuple[Any, Any]


def _places(value: Any, found: list[Place]) -> list[Place]:
    """Every container and key in a value."""
    if isinstance(value, dict):
        entries: list[tuple[Any, Any]] = list(value.items())
    else:
        entries = list(enumerate(value)) if isinstance(value, list) else []
    for key, entry in entries:
        found.append((value, key))
        _places(entry, found)
    return found


def mutate(value: Any, dice: random.Random, keys: tuple[str, ...] = ()) -> str:
    """Change one thing in a JSON value, in place; `keys` are names that mean something at its top.

    Returns:
        What was done, in words.
    """
    places = _places(value, [])
    if keys and dice.random() < 0.6:
        key = dice.choice(keys)
        value[key] = hostile(dice)
        return f"{key} = {_shown(value[key])}"
    container, key = dice.choice(places)
    what = dice.choice(["value", "value", "value", "delete", "rename", "swap", "wrap", "nest"])
    if what == "delete":
        del container[key]
    elif what == "rename" and isinstance(container, dict):
        new = dice.choice([str(key) + "x", "", "\x1b[1m", "x" * 5000, str(key).upper(), "__class__"])
        container[new] = container.pop(key)
    elif what == "swap":
        other, there = dice.choice(places)
        container[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(container[key])
    elif what == "wrap":
        container[key] = [container[key]]
    elif what == "nest":
        container[key] = {str(key): container[key]}
    else:
        container[key] = hostile(dice)
        return f"{key} = {_shown(container[key])}"
    return f"{what} {_shown(key)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:60]}… ({len(text)} characters)"


def spoil(data: bytes, dice: random.Random) -> tuple[bytes, str]:
    """Change bytes, whatever they mean."""
    at = dice.randrange(max(1, len(data)))
    what = dice.choice(["cut", "empty", "flip", "flip", "insert", "double", "zeros", "mark", "wide", "drop"])
    if what == "cut":
        return data[:at], f"cut at {at}"
    if what == "empty":
        return b"", "empty"
    if what == "flip":
        return data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :] if data else b"", f"flip {at}"
    if what == "insert":
        part = bytes(dice.randrange(256) for _ in range(dice.choice([1, 3, 100])))
        return data[:at] + part + data[at:], f"insert at {at}"
    if what == "double":
        return data + data, "double"
    if what == "zeros":
        return data[:at] + bytes(len(data) - at), f"zeros from {at}"
    if what == "mark":
        return b"\xef\xbb\xbf" + data, "byte order mark"
    if what == "wide":
        return data.decode("latin-1").encode("utf-16"), "UTF-16"
    return data[:at] + data[at + 1 :], f"drop {at}"


def edit_json(path: Path, dice: random.Random, keys: tuple[str, ...] = ()) -> str:
    """Change a JSON file, by its structure or byte by byte; `keys` as in `mutate`. What was done, in words."""
    if dice.random() < 0.25:
        data, what = spoil(path.read_bytes(), dice)
        path.write_bytes(data)
        return what
    value = json.loads(path.read_text())
    what = "; ".join(mutate(value, dice, keys) for _ in range(dice.choice([1, 1, 1, 2])))
    path.write_text(dumped(value), encoding="utf-8", errors="surrogatepass")
    return what


CONFIG_KEYS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings", "torch_dtype", "dtype", "hidden_act", "bos_token_id",
    "eos_token_id", "pad_token_id", "use_sliding_window", "sliding_window", "layer_types", "quantization_config",
    "auto_map", "attention_bias", "mlp_bias", "num_experts", "num_local_experts", "max_window_layers",
    "num_nextn_predict_layers", "partial_rotary_factor", "transformers_version", "attention_dropout", "use_cache",
)  # fmt: skip
_SAID = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""What a Llama says in the words of a Qwen2."""


def _command(trial: Trial) -> list[str]:
    """A command that reads a source; converting most often."""
    dice = trial.dice
    plain = line(COMMANDS["llama"], "source", dice.choice(["none", "weights"]))
    return dice.choice([
        plain, plain, plain, plain, plain, ["inspect", "source"], ["inspect", "source", "--json"], [*plain, "--dry-run"],
        line(COMMANDS["split"]), ["megatron-args", "source"], [*plain, "--json"], ["new-spec", "source"],
        ["to-reward", "source", "place/dst", "--verify", "none"],
    ])  # fmt: skip


def _hurt(trial: Trial, name: str, edit: Callable[[Path], str]) -> list[str]:
    """Set up a source with one file changed, and choose a command."""
    world = trial.set_up({"source": trial.baselines.source("plain")})
    what = edit(world.root / "source" / name)
    trial.story.append(f"{name}: {what}")
    world.begin()
    return _command(trial)


def _judge(trial: Trial, command: list[str], codes: set[int]) -> bool:
    """Run a command on a source that was hurt; whether a Llama was made."""
    run = trial.run(command, codes=codes)
    trial.blame(oracle.of_surroundings(trial.world))
    made = run.done.code == 0 and "place/dst" in command and "--dry-run" not in command
    trial.blame(oracle.of_place(trial.world, tidy=True))
    if not made:
        trial.blame(unchanged(trial.world))
    return made and command[0] == "convert"


def config(trial: Trial) -> None:
    """config.json, or a file beside it that is read, is not what it should be."""
    dice = trial.dice
    name = dice.choice(["config.json"] * 6 + ["tokenizer_config.json", "generation_config.json"])
    keys = CONFIG_KEYS if name == "config.json" else ("auto_map", "tokenizer_class", "eos_token_id", "chat_template")
    command = _hurt(trial, name, lambda path: edit_json(path, dice, keys))
    if not _judge(trial, command, BAD_INPUT):
        return
    world = trial.world
    trial.blame(equal_weights(world.root / "source", world.dst))
    made = json.loads((world.dst / "config.json").read_text())
    said = json.loads((world.root / "source" / "config.json").read_text(encoding="utf-8-sig"))
    for key in _SAID:
        if key in said and key in made and said[key] != made[key]:
            trial.blame([f"config.json says {key} {_shown(made[key])}, the source's says {_shown(said[key])}"])
    why = reader.loads(world.dst) if reader.available() else None
    # A config is written anew; a companion goes along as it is.
    if why is not None and (name == "config.json" or reader.loads(world.root / "source") is None):
        trial.blame([f"exit code 0, but transformers cannot load what was made: {why}"])


def index(trial: Trial) -> None:
    """The index of weight files is not what it should be."""
    dice = trial.dice
    name = "model.safetensors.index.json"
    values = (
        "model-00001-of-00002.safetensors", "../outside/model.safetensors", "config.json", "", ".", "/etc/passwd",
        "model-00001-of-00002.safetensors/", "./model-00001-of-00002.safetensors", "additional_chat_templates",
    )  # fmt: skip

    def edit(path: Path) -> str:
        if dice.random() < 0.4:
            value = json.loads(path.read_text())
            key = dice.choice(sorted(value["weight_map"]))
            value["weight_map"][key] = dice.choice(values)
            path.write_text(json.dumps(value))
            return f"{key} is in {value['weight_map'][key]!r}"
        return edit_json(path, dice, ("weight_map", "metadata"))

    if _judge(trial, _hurt(trial, name, edit), BAD_INPUT):
        trial.blame(equal_weights(trial.world.root / "source", trial.world.dst))


def _edit_header(path: Path, dice: random.Random) -> str:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    head, body = raw[8 : 8 + length], raw[8 + length :]
    what = dice.choice(["length", "json", "json", "json", "tensor", "tensor", "tensor", "bytes", "tail", "names"])
    if what == "length":
        new = dice.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_001, len(raw)])
        path.write_bytes(new.to_bytes(8, "little") + raw[8:])
        return f"the header is {new} bytes long, it says"
    if what == "bytes":
        head, did = spoil(head, dice)
    elif what == "tail":
        did = dice.choice(["shorter", "longer", "empty"])
        body = {"shorter": body[:-1], "longer": body + b"\0", "empty": b""}[did]
    else:
        header = json.loads(head)
        names = sorted(name for name in header if name != "__metadata__")
        one, two = dice.sample(names, 2)
        if what == "json":
            did = mutate(header, dice)
        elif what == "names":
            new = dice.choice(["\x1b[2Jx", "a\nb", "x" * 10_000, "", "../x", "\u202e", "model.layers.99.x", "__metadata__ "])
            header[new] = header.pop(one)
            did = f"{one} is called {new[:40]!r}"
        else:
            key = dice.choice(["dtype", "shape", "data_offsets"])
            if dice.random() < 0.3:
                header[one][key] = header[two][key]
                did = f"{key} of {one} is that of {two}"
            else:
                header[one][key] = dice.choice([
                    hostile(dice), [0, 2**63], [2**64, 2**64], [-4, 0], [0], [1, 2, 3], [0, 0], [0] * 100_000, [2**40, 2**40],
                    [2**32, 2**32, 2**32], [[], []], ["0", "4"], [0.0, 4.0], [True, True], "F16", "F8_E5M2", "F4", "I64",
                ])  # fmt: skip
                did = f"{key} of {one} is {_shown(header[one][key])}"
        head = dumped(header).encode("utf-8", "surrogatepass")
        if dice.random() < 0.5:
            head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)
    return did


def header(trial: Trial) -> None:
    """The header of a safetensors file is not what it should be."""
    dice = trial.dice
    name = "model-00001-of-00002.safetensors"
    if _judge(trial, _hurt(trial, name, lambda path: _edit_header(path, dice)), BAD_INPUT):
        trial.blame(equal_weights(trial.world.root / "source", trial.world.dst))


def _runs(found: dict[str, Any]) -> dict[str, Any]:
    """A manifest's tensors; a run of more rows than there are is a run of all."""
    return {
        name: {**entry, "rows_per_checksum": min(entry["rows_per_checksum"], (entry["shape"] or [1])[0])}
        for name, entry in found.get("tensors", {}).items()
    }


def manifest(trial: Trial) -> None:
    """llmconvert.json, of a source or of what is checked, is not what it should be."""
    dice = trial.dice
    world = trial.set_up({"source": trial.baselines.source("llama")})
    path = world.root / "source" / "llmconvert.json"
    before = json.loads(path.read_text())
    keys = ("source", "target", "tensors", "llmconvert", "steps", "dropped", "dtype", "source_files", "checksum")
    if dice.random() < 0.3:
        name = dice.choice(sorted(before["tensors"]))
        value = copy.deepcopy(before)
        what = f"{name}: {mutate(value['tensors'][name], dice, ('file', 'dtype', 'shape', 'rows_per_checksum', 'checksums'))}"
        path.write_text(dumped(value), encoding="utf-8", errors="surrogatepass")
    else:
        what = edit_json(path, dice, keys)
    trial.story.append(f"llmconvert.json: {what}")
    world.begin()
    check = ["inspect", "--check", "source"]
    command = dice.choice([check, check, line(COMMANDS["home"]), line(COMMANDS["llama"]), ["inspect", "source"]])
    run = trial.run(command, codes={0, 2, 3, 4} if command == check else BAD_INPUT)
    if run.done.code == 0 and command == check:
        after = json.loads(path.read_text(encoding="utf-8-sig"))
        if _runs(after) != _runs(before):
            trial.blame(["`inspect --check` finds nothing in a manifest that was changed"])
    trial.blame(oracle.of_surroundings(world))
    if run.done.code == 0 and "place/dst" in command:
        trial.blame(equal_weights(world.root / "source", world.dst))
    elif "place/dst" in command:
        trial.blame(unchanged(world))


def megatron(trial: Trial) -> None:
    """A file of a Megatron checkpoint is not what it should be."""
    dice = trial.dice
    kind = dice.choice(["split", "split-dist"])
    made = trial.baselines.made(COMMANDS[kind])
    world = trial.set_up({"source": made})
    files = sorted(path for path in (world.root / "source").rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix in (".pt", ".distcp") or path.name in (".metadata", "metadata.json")]
    path = dice.choice(weights + [p for p in files if p.name == "latest_checkpointed_iteration.txt"])
    if path.suffix == ".txt":
        what = dice.choice(["-1", "9" * 5000, "../../outside", "release/..", "", "\x00", "1e3", "٣", "release\x1b[2J"])
        path.write_text(what)
    elif path.name == "metadata.json":
        what = edit_json(path, dice, ("sharded_backend",))
    else:
        # What is no tensor lies at both ends of a file.
        data = path.read_bytes()
        cut = dice.choice([min(len(data), 4096), len(data)])
        head, what = spoil(data[:cut], dice)
        path.write_bytes(head + data[cut:] if dice.random() < 0.7 else data[: len(data) - cut] + head)
    trial.story.append(f"{os.path.relpath(path, world.root)}: {what[:60]!r}")
    world.begin()
    command = dice.choice([line(COMMANDS["merge"]), line(COMMANDS["reshard"]), ["inspect", "source"]])
    run = trial.run(command, codes=BAD_INPUT)
    trial.blame(oracle.of_surroundings(world))
    if run.done.code:
        trial.blame(unchanged(world))
        trial.blame(oracle.of_place(world, tidy=True))
