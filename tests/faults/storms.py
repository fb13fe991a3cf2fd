"""Trials in which a run meets one thing at one of its calls: a signal, a failing call, one that falls short."""

from __future__ import annotations

import os
from pathlib import Path

from faults import syscalls
from faults.baseline import Command, line, some
from faults.directors import Fault, Several
from faults.syscalls import CHANGES, KINDS, Note
from faults.trial import Trial
from faults.world import look

DISK = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")
ERRORS: dict[str, tuple[str, ...]] = {
    "create": (*DISK, "EMFILE", "EINTR"),
    "make": DISK,
    "write": ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EINTR"),
    "size": ("ENOSPC", "EDQUOT", "EFBIG", "EIO"),
    "sync": ("EIO", "ENOSPC", "EDQUOT"),
    "mode": ("EIO", "EROFS", "EPERM"),
    "rename": ("EIO", "ENOSPC", "EACCES", "EROFS"),
    "remove": ("EIO", "EACCES", "EROFS"),
    "lock": ("EIO", "ENOLCK", "EINTR"),
    "open": ("EIO", "EACCES", "EMFILE", "ESTALE", "EINTR"),
    "read": ("EIO", "ESTALE", "EINTR"),
    "list": ("EIO", "EACCES"),
    "look": ("EIO", "EACCES", "ESTALE"),
}
PARTIAL = frozenset({"read", "pread64", "preadv", "preadv2", "write", "pwrite64"})


def pick(trial: Trial, calls: list[Note]) -> tuple[Note, int, frozenset[str]]:
    """One of the calls: with its number among those of its name, so that rare calls are met as often as frequent ones."""
    name = trial.dice.choice(sorted({call.name for call in calls}))
    named = [call for call in calls if call.name == name]
    number = trial.dice.randrange(len(named))
    return named[number], number, frozenset({name})


def kill(trial: Trial) -> None:
    """A run is killed, interrupted or told to end at one of its calls; and perhaps the one that goes on with it, too."""
    dice = trial.dice
    command, verify = some(dice)
    expected = trial.baselines.expected(command, verify=verify)
    world = trial.set_up({"source": trial.baselines.source(command.source)})
    replacing = dice.random() < 0.4
    if replacing:
        trial.older(command)
    elif dice.random() < 0.2:
        world.dst.mkdir()
    world.begin()
    calls = [c for c in trial.baselines.calls(command, verify, replacing=replacing) if c.kind in CHANGES]
    flags = ["--overwrite"] if replacing else []
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        if dice.random() < 0.5:
            _, at, names = pick(trial, calls)
        else:
            at, names = dice.randrange(len(calls)), frozenset()
        what = dice.choice(["SIGKILL", "SIGKILL", "SIGKILL", "SIGINT", "SIGTERM"])
        run = trial.run(line(command, "source", verify, *flags), Fault(at, what, CHANGES, names=names), stops=CHANGES)
        trial.judge(trial.runs, [expected] * len(trial.runs), replaces=[True] * len(trial.runs))
        if run.done.code in (0, 2):
            break
        flags = dice.choice([["--resume"], ["--overwrite"]])
    trial.follow(command, expected, "source", verify)


def _planned(trial: Trial, odds: float) -> tuple[Command, str, bool, list[Note], list[int]]:
    """A command set up, over an older output with these odds; the calls it will make that change something.

    Returns:
        The command, its proof, whether it replaces, the calls, and which of them rename.
    """
    command, verify = some(trial.dice)
    trial.set_up({"source": trial.baselines.source(command.source)})
    replacing = trial.dice.random() < odds
    if replacing:
        trial.older(command)
    trial.world.begin()
    calls = [c for c in trial.baselines.calls(command, verify, replacing=replacing) if c.kind in CHANGES]
    return command, verify, replacing, calls, [number for number, call in enumerate(calls) if call.kind == "rename"]


def old_filesystem(trial: Trial) -> None:
    """A run is killed where the filesystem can neither exchange names nor refuse to replace one.

    Between the two renames it then takes, the old output may be away; the next command puts it back.
    """
    dice = trial.dice
    command, verify, replacing, calls, renames = _planned(trial, 0.7)
    expected, world = trial.baselines.expected(command, verify=verify), trial.world
    at = min(renames) + dice.randrange(-2, 12) if dice.random() < 0.8 else dice.randrange(len(calls))
    without = Fault(0, dice.choice(["EINVAL", "ENOSYS", "ENOTSUP"]), CHANGES, True, frozenset({"renameat2"}))
    killing = Fault(at, dice.choice(["SIGKILL", "SIGKILL", "SIGINT", "SIGTERM", ""]), CHANGES)
    arguments = line(command, "source", verify)
    trial.run(arguments + ["--overwrite"] * replacing, Several([killing, without]), stops=CHANGES)
    if replacing and look(world.dst) is None:
        trial.run(arguments, codes={2})
    trial.judge(trial.runs, [expected] * len(trial.runs), replaces=[True] * len(trial.runs))
    trial.follow(command, expected, "source", verify)


def power(trial: Trial) -> None:
    """The machine loses power at one of a run's calls: what the disk has not confirmed is lost, or zeros."""
    dice = trial.dice
    command, verify, replacing, calls, renames = _planned(trial, 0.4)
    expected, world = trial.baselines.expected(command, verify=verify), trial.world
    at = dice.choice([dice.randrange(len(calls)), max(renames) + dice.randrange(1, 4)])
    flags = ["--overwrite"] * replacing
    run = trial.run(line(command, "source", verify, *flags), Fault(at, "SIGKILL", CHANGES), stops=CHANGES)
    lost = unconfirmed([note for note, became in run.calls if not became])
    for path in sorted(lost, reverse=True):
        if not path.is_relative_to(world.place) or not os.path.lexists(path):
            continue
        if path.is_dir():
            if lost[path] and not any(path.iterdir()):
                path.rmdir()
        elif lost[path] and dice.random() < 0.3:
            path.unlink()
        else:
            path.write_bytes(bytes(dice.choice([0, path.stat().st_size])))
    trial.story.append(f"lost: {', '.join(sorted(path.name for path in lost))[:300]}")
    trial.judge([run], [expected])
    trial.follow(command, expected, "source", verify)


def unconfirmed(calls: list[Note]) -> dict[Path, bool]:
    """What would be lost with the power after some calls.

    Returns:
        Paths whose bytes, or whose names in their folder, no `fsync` has confirmed; and whether it is the names.
    """
    bytes_of: set[Path] = set()
    names: set[Path] = set()
    for call in calls:
        paths = [Path(file) for file in call.files]
        if call.kind in ("create", "write", "size"):
            bytes_of.add(paths[0])
        if call.kind in ("create", "make"):
            names.add(paths[-1])
        elif call.kind == "remove":
            bytes_of.discard(paths[0])
            names.discard(paths[0])
        elif call.kind == "sync":
            bytes_of.discard(paths[0])
            names = {path for path in names if path.parent != paths[0]}
        elif call.kind == "rename" and len(paths) == 2:
            exchanged = call.name == "renameat2" and call.arguments[4] & 2
            bytes_of, names = ({_moved(path, *paths, exchanged) for path in found} for found in (bytes_of, names))
    return {path: path in names for path in bytes_of | names}


def _moved(path: Path, old: Path, new: Path, exchanged: int) -> Path:
    if path.is_relative_to(old):
        return new / path.relative_to(old)
    return old / path.relative_to(new) if exchanged and path.is_relative_to(new) else path


def error(trial: Trial) -> None:
    """One of a run's calls fails, and perhaps all like it after: the disk is full, at its end, or gone."""
    dice = trial.dice
    command, verify = some(dice)
    expected = trial.baselines.expected(command, verify=verify)
    world = trial.set_up({"source": trial.baselines.source(command.source)})
    replacing = dice.random() < 0.3
    if replacing:
        trial.older(command)
    world.begin()
    calls = trial.baselines.calls(command, verify, replacing=replacing)
    if dice.random() < 0.7:
        calls = [call for call in calls if call.kind in CHANGES]
    call, at, names = pick(trial, calls)
    what, lasting = dice.choice(ERRORS[call.kind]), dice.random() < 0.3
    if what == "EINTR":
        lasting = False
    flags = ["--overwrite"] if replacing else []
    flags += ["--json"] if dice.random() < 0.3 else []
    kinds = frozenset({call.kind})
    fault = Fault(at, what, kinds, lasting=lasting, names=names)
    # What cannot be read of a source may be bad input as well; anything else is for the disk to answer for.
    codes = {0, 4, 6} if call.kind in ("open", "read", "list", "look") else {0, 6}
    if call.name == "access":
        codes.add(2)  # what may not be read or written is a matter of usage, too
    run = trial.run(line(command, "source", verify, *flags), fault, stops=KINDS, codes=codes)
    if what == "EINTR" and call.kind in ("write", "read", "open", "create") and run.done.code:
        trial.blame(["an interrupted call was not repeated"])
    trial.judge([run], [expected])
    trial.follow(command, expected, "source", verify)


def short(trial: Trial) -> None:
    """Reads or writes do less than they were asked to: nothing comes of it."""
    dice = trial.dice
    command, verify = some(dice)
    expected = trial.baselines.expected(command, verify=verify)
    trial.set_up({"source": trial.baselines.source(command.source)}).begin()
    calls = [call for call in trial.baselines.calls(command, verify) if call.name in PARTIAL]
    call, at, names = pick(trial, calls)
    fault = Fault(
        at, "short", frozenset({call.kind}), lasting=dice.random() < 0.5, names=names, share=dice.choice([0.01, 0.5, 0.99])
    )
    run = trial.run(line(command, "source", verify), fault, stops=frozenset({"read", "write"}), codes={0})
    trial.judge([run], [expected], tidy=True)
    trial.follow(command, expected, "source", verify)


assert set(ERRORS) == KINDS, "every kind of call can fail"
assert syscalls.CALLS.keys() >= PARTIAL
