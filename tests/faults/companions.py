"""Trials in which links, pipes, devices and names that are llmconvert's own lie among a source's files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

from faults import oracle, sources
from faults.baseline import COMMANDS, line
from faults.oracle import unchanged
from faults.trial import Trial
from faults.world import look


def companion(trial: Trial) -> None:
    """Among a source's files are links, pipes and names that are llmconvert's own: nothing from elsewhere goes along."""
    dice = trial.dice
    command = COMMANDS[dice.choice(["llama", "canonical", "split"])]
    world = trial.set_up({"source": trial.baselines.source("plain")})
    source, outside, what = world.root / "source", world.root / "outside", dice.choice(list(_COMPANIONS))
    name = _COMPANIONS[what](trial, source, outside)
    trial.story.append(f"in the source: {what}: {name!r}")
    world.begin()
    verify = dice.choice(["none", "weights"])
    run = trial.run(line(command, "source", verify), codes={0, 3, 4, 6} if what != "own names" else {0})
    trial.blame(oracle.of_surroundings(world))
    trial.blame(oracle.of_place(world, tidy=True))
    if run.done.code:
        trial.blame(unchanged(world))
        return
    made = look(world.dst)
    assert made is not None
    secrets = {entry.content for entry in world.before["outside"].values() if entry.kind == "file"}
    trial.blame(f"`{inner}` came from elsewhere" for inner, entry in made.items() if entry.content in secrets)
    trial.blame(f"`{inner}` is a {entry.kind}" for inner, entry in made.items() if entry.kind not in ("file", "folder"))
    # Weights, config and code are llmconvert's own, whatever the source calls its files.
    expected = trial.baselines.expected(command, verify=verify)
    own = [n for n in expected if n.endswith((".safetensors", ".py", ".pt", "tokenizer_config.json")) or n == "config.json"]
    for inner in own:
        if ("tokenizer_config" in name or "tokenization" in name) and inner.endswith(("tokenizer_config.json", "own.py")):
            continue  # another tokenizer's now, or one without its code
        if inner not in made and inner.endswith(name):
            continue  # it is not a file, or not the source's own: left behind
        if inner not in made or made[inner].content != expected[inner].content:
            trial.blame([f"`{inner}` is not what llmconvert writes"])
    trial.run(["inspect", "--check", "place/dst"], codes={0})


Companion = Callable[[Trial, Path, Path], str]


def _out(trial: Trial, source: Path, outside: Path) -> str:
    name = trial.dice.choice(["vocab.txt", "additional_chat_templates/x.jinja", "LICENSE", "tokenizer.model", "merges.txt"])
    (source / name).symlink_to(outside / "secret.txt")
    return name


def _out_folder(trial: Trial, source: Path, outside: Path) -> str:
    shutil.rmtree(source / "additional_chat_templates")
    (source / "additional_chat_templates").symlink_to(outside / trial.dice.choice(["folder", "."]))
    return "additional_chat_templates"


def _out_read(trial: Trial, source: Path, outside: Path) -> str:
    """A file that is read, not only copied."""
    name = trial.dice.choice(["config.json", "tokenizer_config.json", "generation_config.json", "tokenization_own.py"])
    (outside / name).write_bytes((source / name).read_bytes())
    (source / name).unlink()
    (source / name).symlink_to(outside / name)
    return name


def _pipes(trial: Trial, source: Path, outside: Path) -> str:
    name = trial.dice.choice([
        "config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json", "llmconvert.json", "x.txt",
        "model-00001-of-00002.safetensors", "additional_chat_templates/x.jinja", "tokenization_own.py", "README.md",
    ])  # fmt: skip
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    return name


def _devices(trial: Trial, source: Path, outside: Path) -> str:
    name = trial.dice.choice(["config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors.index.json", "tokenization_own.py"])
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(trial.dice.choice(["/dev/zero", "/dev/stdin", "/proc/self/mem", "/dev/full", "/proc/kmsg"]))
    return name


def _loops(trial: Trial, source: Path, outside: Path) -> str:
    (source / "loop").symlink_to(".")
    (source / "additional_chat_templates" / "loop").symlink_to("../additional_chat_templates")
    (source / "self.txt").symlink_to("self.txt")
    return "loop"


def _own_names(trial: Trial, source: Path, outside: Path) -> str:
    name = trial.dice.choice([
        "modeling_canonical.py", "llmconvert-journal-1.jsonl", "llmconvert-journal.jsonl", "llmconvert-identity.json",
        "llmconvert-lock", "llmconvert-report.json", "configuration_canonical.py", "reward.py", ".llmconvert/x",
    ])  # fmt: skip
    (source / name).parent.mkdir(exist_ok=True)
    text = "{}\n"
    if name.endswith(".jsonl"):
        # A journal that says: all is done, and all is zeros.
        lines = [[f"{own}:0", xxhash.xxh3_128(bytes(array.nbytes)).hexdigest()] for own, array in sources.state(0).items()]
        text = "".join(json.dumps(entry) + "\n" for entry in lines)
    elif name.endswith(".py"):
        # A tokenizer that asks for the file makes it one of those that go along.
        value = json.loads((source / "tokenizer_config.json").read_text())
        value["auto_map"] = {"AutoTokenizer": [f"{name[:-3]}.OwnTokenizer", None]}
        (source / "tokenizer_config.json").write_text(json.dumps(value))
        config = json.loads((source / "config.json").read_text())
        del config["auto_map"]
        (source / "config.json").write_text(json.dumps(config))
        text = "class OwnTokenizer:\n    pass\n"
    (source / name).write_text(text)
    return name if not name.endswith(".py") else f"{name} (tokenizer_config)"


def _odd_names(trial: Trial, source: Path, outside: Path) -> str:
    name = trial.dice.choice(["\x1b[2Jx.txt", "a\nb.txt", "\u202etxt.x", "x" * 250, os.fsdecode(b"\xff\xfe.txt"), "-rf", " ", "con"])
    (source / name).write_text("odd\n")
    return name


def _huge(trial: Trial, source: Path, outside: Path) -> str:
    """A file with a terabyte of nothing in it."""
    name = trial.dice.choice(["vocab.txt", "tokenizer.json", "config.json", "tokenizer_config.json", "tokenization_own.py",
                              "model.safetensors.index.json", "additional_chat_templates/x.jinja"])  # fmt: skip
    with (source / name).open("ab") as file:
        file.truncate(1 << 40)
    return name


_COMPANIONS: dict[str, Companion] = {
    "a link out": _out, "a folder that is a link": _out_folder, "a link out that is read": _out_read, "a pipe": _pipes,
    "a device": _devices, "loops": _loops, "own names": _own_names, "odd names": _odd_names, "a huge file": _huge,
}  # fmt: skip
