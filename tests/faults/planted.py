"""Trials in which something lies where the destination, the work directory or a lock would be; or in which outputs are changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from faults import oracle
from faults.baseline import COMMANDS, line
from faults.oracle import unchanged
from faults.trial import Trial
from faults.world import CONTENT, differences, look

Planter = Callable[[Trial, Path], None]


def _link_out(trial: Trial, path: Path) -> None:
    path.symlink_to(trial.world.root / "outside")


def _link_in(trial: Trial, path: Path) -> None:
    """A link to a folder of a neighbour."""
    path.symlink_to("other")


def _link_file(trial: Trial, path: Path) -> None:
    path.symlink_to(trial.world.root / "outside" / "secret.txt")


def _link_nowhere(trial: Trial, path: Path) -> None:
    path.symlink_to(trial.world.root / "outside" / "new")


def _link_self(trial: Trial, path: Path) -> None:
    path.symlink_to(path.name)


def _pipe(trial: Trial, path: Path) -> None:
    os.mkfifo(path)


def _file(trial: Trial, path: Path) -> None:
    path.write_text("mine\n")


def _folder(trial: Trial, path: Path) -> None:
    path.mkdir()


def _foreign(trial: Trial, path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine\n")
    (path / "deep").mkdir()
    (path / "deep" / "mine.txt").write_text("mine\n")


def _like_a_checkpoint(trial: Trial, path: Path) -> None:
    """A folder with a config.json, and what no checkpoint holds."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    name = trial.dice.choice(["thesis.tex", "model.py.bak", "photos/one.jpg", ".git/HEAD", "data.csv", ".env", "notes"])
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("mine\n")


def _with_link(trial: Trial, path: Path) -> None:
    """An earlier output, in which a name is a link to somewhere else."""
    shutil.copytree(trial.baselines.made(COMMANDS["llama"]), path)
    victim = path / trial.dice.choice(["model.safetensors", "config.json", "additional_chat_templates"])
    if victim.is_dir():
        shutil.rmtree(victim)
        victim.symlink_to(trial.world.root / "outside" / "folder")
    else:
        victim.unlink()
        victim.symlink_to(trial.world.root / "outside" / "model.safetensors")


def _of_another(trial: Trial, path: Path) -> None:
    """An earlier, unfinished run's folder, which belongs to another user."""
    path.mkdir(mode=0o777)
    (path / "llmconvert-identity.json").write_text("{}")
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        path.chmod(0o777)


PLANTS: dict[str, Planter] = {
    function.__name__.strip("_"): function
    for function in (
        _link_out, _link_in, _link_file, _link_nowhere, _link_self, _pipe, _file, _folder, _foreign, _like_a_checkpoint,
        _with_link, _of_another,
    )
}  # fmt: skip
PLACES = (".dst.llmconvert-partial", ".dst.llmconvert-lock", ".dst.llmconvert-replaced", "dst")


def planted(trial: Trial) -> None:
    """Something lies where the destination, the work directory or a lock would be: it is not followed, read or emptied."""
    dice = trial.dice
    world = trial.set_up({"source": trial.baselines.source("plain")})
    name, what = dice.choice([*PLACES, "dst", ".dst.llmconvert-partial"]), dice.choice(list(PLANTS))
    path = world.place / name
    PLANTS[what](trial, path)
    trial.story.append(f"at {name}: {what}")
    world.begin()
    # What llmconvert names as its own may be tidied up; what lies behind a link, and what is in DST, may not.
    if name == "dst" and not (what == "folder" or what == "with_link"):
        world.kept["place/dst"] = world.before["place/dst"]
    flags = dice.choice([[], ["--overwrite"], ["--resume"]])
    expected = trial.baselines.expected(COMMANDS["llama"])
    run = trial.run(line(COMMANDS["llama"], "source", "none", *flags), codes={0, 2, 6})
    trial.blame(oracle.of_surroundings(world))
    if run.done.code == 0:
        if name == "dst" and what == "with_link" and flags != ["--overwrite"]:
            trial.blame(["what was there was replaced, though nobody said so"])
        trial.blame(f"the destination: {found}" for found in differences(expected, look(world.dst), CONTENT))
    elif name == "dst":
        trial.blame(unchanged(world))
    elif os.path.lexists(world.dst):
        trial.blame(["a destination was made"])
    if run.done.code:
        remains = look(path)
        if remains is None and what in ("file", "pipe", "foreign", "like_a_checkpoint", "of_another") and not flags:
            trial.blame([f"{name} is gone, though the run was refused"])


def tamper(trial: Trial) -> None:
    """Something in an output is changed: `inspect --check` sees it; and sees nothing where nothing is."""
    dice = trial.dice
    name = dice.choice(["llama", "shards", "canonical", "split", "split-dist"])
    world = trial.set_up({})
    shutil.copytree(trial.baselines.made(COMMANDS[name]), world.dst)
    files = sorted(path for path in world.dst.rglob("*") if path.is_file() and path.name != "llmconvert.json")
    path = dice.choice(files)
    what = dice.choice(["nothing", "flip", "flip", "flip", "shorter", "longer", "gone", "new", "link", "exchanged"])
    if what == "flip":
        data = bytearray(path.read_bytes())
        at = dice.randrange(len(data))
        data[at] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        what = f"byte {at} changed"
    elif what == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "longer":
        path.write_bytes(path.read_bytes() + b"\n")
    elif what == "gone":
        path.unlink()
    elif what == "new":
        path = path.parent / dice.choice(["new.txt", "modeling_new.py", "model-9.safetensors", "pytorch_model.bin", "deep/new.json"])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"new")
    elif what == "link":
        data = path.read_bytes()
        path.unlink()
        (trial.folder / "same").write_bytes(data)
        path.symlink_to(trial.folder / "same")
    elif what == "exchanged":
        other = dice.choice([found for found in files if found.suffix == path.suffix and found.read_bytes() != path.read_bytes()] or [path])
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
        what = "nothing" if one == two else f"exchanged with {other.name}"
    trial.story.append(f"{path.relative_to(world.dst)}: {what}")
    world.begin()
    # The same bytes behind a link are the same bytes: so lies an output in a hub cache.
    codes = {0} if what == "nothing" else {0, 4} if what == "link" else {4}
    flags = ["--json"] if dice.random() < 0.3 else []
    trial.run(["inspect", "--check", "place/dst", *flags], codes=codes)
    trial.blame(oracle.of_surroundings(world))
    trial.blame(unchanged(world))
