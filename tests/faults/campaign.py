"""Run trials by kind and seed, and tell what held."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults import archives, companions, inference, mutations, planted, races, reader, resumed, runs, storms, syscalls
from faults.baseline import Baselines
from faults.controls import CONTROLS
from faults.runs import Program, command_line, warm
from faults.trial import Kind, Trial


@dataclass(frozen=True)
class Entry:
    """A kind of trial: what it does, how many of a thousand trials are of it, and whether each takes long."""

    kind: Kind
    share: int
    slow: bool = False


KINDS: dict[str, Entry] = {
    "kill": Entry(storms.kill, 200),
    "error": Entry(storms.error, 200),
    "short": Entry(storms.short, 50),
    "power": Entry(storms.power, 70),
    "old-filesystem": Entry(storms.old_filesystem, 40),
    "race": Entry(races.race, 120),
    "free-race": Entry(races.free_race, 50),
    "stranger": Entry(races.stranger, 80),
    "config": Entry(mutations.config, 80),
    "header": Entry(mutations.header, 60),
    "index": Entry(mutations.index, 30),
    "manifest": Entry(mutations.manifest, 40),
    "megatron": Entry(mutations.megatron, 40),
    "pickle": Entry(archives.pickle, 70),
    "zip": Entry(archives.zip, 60),
    "planted": Entry(planted.planted, 70),
    "companion": Entry(companions.companion, 50),
    "resume": Entry(resumed.resume, 90),
    "tamper": Entry(planted.tamper, 50),
    "infer": Entry(inference.infer, 25),
    "inside": Entry(inference.inside, 8),
    "torchrun": Entry(inference.torchrun, 1, slow=True),
}


@dataclass
class Outcome:
    """What came of the trials of a kind.

    Attributes:
        trials: how many there were.
        failed: those that did not hold.
        seconds: they took.
    """

    trials: int = 0
    failed: list[Trial] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    """Runs trials in a folder of its own.

    Attributes:
        folder: the place for trials; on a disk in memory if there is one, since trials confirm every byte.
        keep: leave the folders of trials that failed.
    """

    def __init__(self, folder: Path, *, keep: bool = False, program: Program = command_line) -> None:
        """Load what is attacked, and make what it is measured against."""
        self.folder, self.keep, self.program = folder, keep, program
        self.baselines = Baselines(folder / "baselines")
        warm(self.baselines.source("plain"), folder / "warm")

    def trial(self, kind: str, seed: int) -> Trial:
        """Run one trial."""
        trial = Trial(kind, seed, self.baselines, self.folder / f"{kind}-{seed}", self.program)
        try:
            KINDS[kind].kind(trial)
        except Exception as error:
            trial.blame([f"the campaign itself failed: {type(error).__name__}: {error}"])
            if self.keep:
                raise
        if not (trial.faults and self.keep):
            trial.world.remove()
        return trial

    def run(self, counts: dict[str, int], seed: int = 0, show: bool = True) -> dict[str, Outcome]:
        """Run so many trials of each kind, with seeds from `seed` on."""
        outcomes = {kind: Outcome() for kind in counts}
        for kind, count in counts.items():
            began = time.monotonic()
            for number in range(seed, seed + count):
                trial = self.trial(kind, number)
                outcomes[kind].trials += 1
                if trial.faults:
                    outcomes[kind].failed.append(trial)
                    if show:
                        print(told(trial), flush=True)
            outcomes[kind].seconds = time.monotonic() - began
        return outcomes


def check_controls(folder: Path, names: Sequence[str] = ()) -> dict[str, str]:
    """Attack broken variants until each is found out, by a trial that finds nothing of the kind in the real one.

    Returns:
        What is wrong, by the variant's name; empty for one that was found out for what it is.
    """
    campaign = Campaign(folder)
    runs.IDLE_SECONDS, runs.CPU_SECONDS, runs.GRACE_SECONDS = 2.0, 2, 1.0
    found: dict[str, str] = {}
    for control in CONTROLS:
        name = control.program.__name__
        if names and name not in names:
            continue
        other: set[str] = set()
        found[name] = "not found out in 60 trials"
        for seed in range(control.seed, control.seed + 60):
            campaign.program = control.program
            trial = campaign.trial(control.kind, seed)
            if not any(control.says(fault) for fault in trial.faults):
                other |= set(trial.faults)
                continue
            campaign.program = command_line
            if not any(control.says(fault) for fault in campaign.trial(control.kind, seed).faults):
                found[name] = ""
                break
        if found[name]:
            found[name] += f"; instead: {sorted(other)[:3]}"
    return found


def told(trial: Trial) -> str:
    """A trial that failed, with the line that repeats it."""
    lines = [f"FAILED {trial.kind} {trial.seed}: {'; '.join(trial.faults[:4])[:1500]}"]
    lines += [f"    {line}" for line in trial.story]
    return "\n".join([*lines, f"    repeat: scripts/fault_campaign --kind {trial.kind} --seed {trial.seed} --trials 1 --keep"])


def table(outcomes: dict[str, Outcome]) -> str:
    """A line a kind."""
    rows = [("kind", "trials", "held", "failed", "s/trial")]
    for kind, found in outcomes.items():
        each = f"{found.seconds / max(1, found.trials):.2f}"
        rows.append((kind, str(found.trials), str(found.trials - len(found.failed)), str(len(found.failed)), each))
    trials, failed = (sum(number) for number in zip(*((o.trials, len(o.failed)) for o in outcomes.values()), strict=True))
    rows.append(("all", str(trials), str(trials - failed), str(failed), ""))
    return "\n".join(f"{row[0]:15}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)


def findings(outcomes: dict[str, Outcome]) -> str:
    """Faults that are alike, in one line with the seeds that show them."""
    alike: dict[str, list[int]] = {}
    for kind, found in outcomes.items():
        for trial in found.failed:
            error = next((text for text in reversed(trial.story) if "failed unexpectedly" in text), "")
            fault = trial.faults[0].splitlines()[0] + error.partition("failed unexpectedly")[2]
            for pattern in (r"[`'][^`']*[`']", r"/[^ ]+", r"\b[0-9a-f]{16,}\b", r"\[Errno \d+\] ", r"\d{3,}", r"(; … is \w+)+"):
                fault = re.sub(pattern, "…", fault)
            alike.setdefault(f"{kind}: {fault[:160]}", []).append(trial.seed)
    lines = sorted(alike.items(), key=lambda item: -len(item[1]))
    return "\n".join(f"{len(seeds):4} × {fault}  (seeds {', '.join(map(str, seeds[:6]))})" for fault, seeds in lines)


def place() -> Path:
    """Where trials are run if nobody says: in memory, where there is such a place."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def shares(trials: int, *, slow: bool = True) -> dict[str, int]:
    """So many trials, shared out among the kinds; without the slow ones, if asked for."""
    chosen = {kind: entry for kind, entry in KINDS.items() if slow or not entry.slow}
    total = sum(entry.share for entry in chosen.values())
    return {kind: max(1, round(trials * entry.share / total)) for kind, entry in chosen.items()}


def _count(text: str) -> tuple[str, int]:
    kind, _, count = text.partition(":")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"there is no kind `{kind}`")
    return kind, int(count)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the campaign."""
    parser = argparse.ArgumentParser(prog="fault_campaign", description="Attack llmconvert in seeded trials.")
    parser.add_argument("--trials", type=int, default=600, help="how many, shared out among the kinds; or of the one kind")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="of this kind only; may be repeated")
    parser.add_argument("--count", action="append", type=_count, metavar="KIND:N", help="so many of a kind; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial of each kind")
    parser.add_argument("--folder", type=Path, default=place(), help="make the trials' folders in this one")
    parser.add_argument("--keep", action="store_true", help="keep the folders of trials that failed")
    parser.add_argument("--brief", action="store_true", help="print what was found, not every trial that failed")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--controls", nargs="*", help="attack broken variants instead (these, or all): each must be found out")
    given = parser.parse_args(arguments)
    if reason := syscalls.unavailable():
        print(f"fault_campaign: {reason}", file=sys.stderr)
        return 2
    counts = dict.fromkeys(given.kind, given.trials) if given.kind else shares(given.trials)
    if given.count:
        counts = dict(given.count)
    folder = Path(tempfile.mkdtemp(prefix="llmconvert-faults-", dir=given.folder))
    outcomes: dict[str, Outcome] = {}
    if given.controls is not None:
        try:
            passed = check_controls(folder, given.controls)
        finally:
            reader.close()
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(passed, indent=1))
        return int(any(passed.values()))
    try:
        outcomes = Campaign(folder, keep=given.keep).run(counts, given.seed, show=not (given.json or given.brief))
    finally:
        reader.close()
        failed = [trial for found in outcomes.values() for trial in found.failed]
        if given.keep and failed:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(usage.ru_utime + usage.ru_stime for usage in used)
    if given.json:
        value = {
            kind: {"trials": found.trials, "seconds": found.seconds, "failed": [told(trial) for trial in found.failed]}
            for kind, found in outcomes.items()
        }
        print(json.dumps({"kinds": value, "processor": processor}))
    else:
        if failed:
            print(findings(outcomes))
        print(table(outcomes))
        print(f"{processor:.0f} s of the processor")
    return int(bool(failed))
