"""Trials in which a run meets one thing at one of its calls: a signal, a failing call, one that falls short."""

from __future__ import annotations

from faults import syscalls
from faults.baseline import line, some
from faults.runs import Fault
from faults.syscalls import CHANGES, KINDS, Note
from faults.trial import Trial

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
PARTIAL = frozenset({"read", "pread64", "preadv", "write", "pwrite64"})


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
