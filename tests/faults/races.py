"""Trials in which two to four runs, or a run and a stranger, want one destination at the same time."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from faults.baseline import COMMANDS, Command, line
from faults.directors import Fault, Turns
from faults.runs import Run, drive
from faults.syscalls import CHANGES, Note
from faults.trial import Trial
from faults.world import World, look

STOPS = CHANGES | {"list", "look"}


def _set_up(trial: Trial) -> tuple[Command, str, list[str], list[list[str]], World]:
    """Sources and flags of each run, and how the destination is before."""
    dice = trial.dice
    command = COMMANDS[dice.choice(["llama", "llama", "shards", "split"])]
    verify = dice.choice(["none", "none", "weights"])
    count = dice.choice([2, 2, 2, 3, 4])
    alike = dice.random() < 0.4
    names = ["source-0"] * count if alike else [f"source-{number}" for number in range(count)]
    world = trial.set_up({name: trial.baselines.source(command.source, int(name[7:])) for name in set(names)})
    style = dice.choice(["plain", "overwrite", "mixed", "older", "unfinished"])
    pools = {
        "plain": [[]], "overwrite": [["--overwrite"]], "mixed": [[], ["--overwrite"], ["--resume"]],
        "older": [["--overwrite"], ["--overwrite"], []], "unfinished": [["--resume"], ["--resume"], ["--overwrite"], []],
    }  # fmt: skip
    flags = [dice.choice(pools[style]) for _ in names]
    if style == "older":
        trial.older(command)
    elif dice.random() < 0.15:
        world.dst.mkdir()
    world.begin()
    if style == "unfinished":
        calls = [c for c in trial.baselines.calls(command, verify) if c.kind in CHANGES]
        at = dice.randrange(len(calls))
        trial.run(line(command, names[0], verify), Fault(at, "SIGKILL", CHANGES), stops=CHANGES)
    return command, verify, names, flags, world


def _judge(trial: Trial, command: Command, verify: str, names: list[str], codes: set[int], before: int) -> None:
    for run in trial.runs[before:]:
        trial.judge_run(run, codes)
    first = [names[0]] if before else []
    expected = [trial.baselines.expected(command, name, verify) for name in first + names]
    trial.judge(trial.runs, expected, tidy=False)
    name = trial.dice.choice(names)
    trial.follow(command, trial.baselines.expected(command, name, verify), name, verify)


def race(trial: Trial) -> None:
    """Two to four runs take turns, by the dice, at every call that changes something or looks at something."""
    command, verify, names, flags, world = _set_up(trial)
    before = len(trial.runs)
    runs = [
        trial.start(line(command, name, verify, *own), stops=STOPS) for name, own in zip(names, flags, strict=True)
    ]

    def matters(note: Note) -> bool:
        return any(file.startswith(str(world.place)) for file in note.files)

    drive(runs, Turns(random.Random(trial.dice.random()), matters, _changes(trial, command, verify, runs)))
    _judge(trial, command, verify, names, {0, 2}, before)


def _changes(trial: Trial, command: Command, verify: str, runs: list[Run]) -> dict[int, frozenset[int]]:
    """When turns change: seldom, so that one run is far ahead of another, or often.

    Most races need two or three changes, each at the right call (Burckhardt et al., "A randomized scheduler with
    probabilistic guarantees of finding bugs", 2010). Calls made once are as likely as those made a hundred times.
    """
    dice = trial.dice
    calls = trial.baselines.calls(command, verify)
    names = [n.name for n in calls if n.kind in STOPS and any("/place" in file for file in n.files)]
    if dice.random() < 0.15:
        return {run.number: frozenset(k for k in range(len(names)) if dice.random() < 0.2) for run in runs}
    changes: dict[int, set[int]] = {run.number: set() for run in runs}
    for _ in range(dice.choice([1, 2, 2, 3, 4])):
        name = dice.choice(sorted(set(names)))
        changes[dice.choice(runs).number].add(dice.choice([k for k, other in enumerate(names) if other == name]))
    return {number: frozenset(points) for number, points in changes.items()}


def free_race(trial: Trial) -> None:
    """The same, as the machine's clock will have it: no order is imposed, so a seed does not repeat it exactly."""
    command, verify, names, flags, _ = _set_up(trial)
    before = len(trial.runs)
    runs = [
        trial.start(line(command, name, verify, *own), delay=trial.dice.random() * 0.02)
        for name, own in zip(names, flags, strict=True)
    ]
    drive(runs)
    _judge(trial, command, verify, names, {0, 2}, before)


def _folder_with(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text("a stranger's\n")

    return make


def stranger(trial: Trial) -> None:
    """At one call of a run a stranger makes the destination, puts a file into it or into the work directory, or takes it."""
    dice = trial.dice
    command, verify = COMMANDS[dice.choice(["llama", "shards", "split"])], dice.choice(["none", "weights"])
    world = trial.set_up({"source": trial.baselines.source(command.source)})
    expected = trial.baselines.expected(command, verify=verify)
    replacing = dice.random() < 0.5
    if replacing:
        trial.older(command)
    world.begin()
    calls = trial.baselines.calls(command, verify, replacing=replacing)
    act = dice.choice(["folder", "empty", "file", "link", "into", "into work", "take work", "swap work", "lock"])
    if act in ("folder", "file", "link", "empty") and replacing:
        act = "into"
    codes = {0, 2}

    def work() -> Path | None:
        return next((path for path in world.place.glob(".dst.llmconvert-*") if path.is_dir()), None)

    def new(make: Callable[[Path], None]) -> None:
        if not os.path.lexists(world.dst):
            world.strange(world.dst, make)

    def into() -> None:
        if world.dst.is_dir():
            world.strange(world.dst / "mine.txt", lambda path: path.write_text("a stranger's\n"))

    def into_work() -> None:
        if (folder := work()) is not None:
            (folder / "mine.txt").write_text("a stranger's\n")
            (folder / "mine").mkdir(exist_ok=True)

    def take_work() -> None:
        if (folder := work()) is not None:
            folder.rename(world.root / "outside" / "taken")
            world.before.pop("outside", None)

    def swap_work() -> None:
        if (folder := work()) is not None:
            folder.rename(world.root / "outside" / "taken")
            world.before.pop("outside", None)
            world.strange(folder, _folder_with("config.json"))

    def remove_lock() -> None:
        for path in world.place.glob(".dst.llmconvert-*/llmconvert-lock"):
            path.unlink()
        for path in world.place.glob(".dst.llmconvert-lock"):
            path.unlink()

    acts: dict[str, Callable[[], None]] = {
        "folder": lambda: new(_folder_with("mine.txt")), "empty": lambda: world.dst.mkdir(exist_ok=True),
        "file": lambda: new(lambda path: path.write_text("a stranger's\n") and None),
        "link": lambda: new(lambda path: path.symlink_to(world.root / "outside" / "folder")), "into": into,
        "into work": into_work, "take work": take_work, "swap work": swap_work, "lock": remove_lock,
    }  # fmt: skip
    # Who loses the ground under its feet may say so, or find that it does not read what it wrote.
    codes |= {5, 6} if act in ("take work", "swap work", "into work", "lock") else set()
    at = dice.randrange(sum(call.kind in STOPS for call in calls))
    fault = Fault(at, "", STOPS, other=acts[act])
    trial.story.append(f"at call {fault.at} a stranger: {act}")
    flags = ["--overwrite"] if replacing else []
    run = trial.run(line(command, "source", verify, *flags), fault, stops=STOPS, codes=codes)
    if act == "empty" and world.dst.is_dir() and not any(world.dst.iterdir()):
        world.before["place/dst"] = look(world.dst) or {}  # refused, and left as it is
    trial.judge([run], [expected])
    if not world.kept and act != "into work":
        trial.follow(command, expected, "source", verify)
