"""A trial: a folder, dice, and what came of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults import oracle
from faults.baseline import Baselines, Command, line
from faults.runs import Director, Program, Run, command_line, drive, start
from faults.world import CONTENT, Tree, World, differences, look


@dataclass
class Trial:
    """One trial.

    Attributes:
        kind: of trial.
        seed: with the kind, it decides all that happens.
        baselines: what is right.
        folder: the trial's own.
        program: what is under attack.
        faults: what did not hold.
        story: what happened.
    """

    kind: str
    seed: int
    baselines: Baselines
    folder: Path
    program: Program = command_line
    faults: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The dice are the seed's."""
        self.dice = random.Random(f"{self.kind} {self.seed}")
        self.world = World(self.folder / "root", self.folder / "logs", [])

    def set_up(self, sources: dict[str, Path]) -> World:
        """Make the folder, with copies of sources by name; `world.begin()` is to follow."""
        self.world = World.make(self.folder, sources)
        return self.world

    def start(
        self, arguments: Sequence[str], *, stops: frozenset[str] = frozenset(), delay: float = 0.0, inside: str = ".",
        program: Program | None = None, limited: bool = True,
    ) -> Run:  # fmt: skip
        """Start a command; see `runs.start`."""
        run = start(
            arguments, self.world.root, self.world.logs, number=len(self.runs), stops=stops,
            program=program or self.program, environment=self.world.environment, delay=delay, inside=inside,
            limited=limited,
        )  # fmt: skip
        self.runs.append(run)
        return run

    def run(
        self, arguments: Sequence[str], director: Director | None = None, *, stops: frozenset[str] = frozenset(),
        codes: Iterable[int] = oracle.DOCUMENTED, inside: str = ".",
    ) -> Run:  # fmt: skip
        """Run a command to its end, and judge how it ended."""
        run = self.start(arguments, stops=stops, inside=inside)
        drive([run], director)
        self.judge_run(run, codes)
        return run

    def judge_run(self, run: Run, codes: Iterable[int] = oracle.DOCUMENTED) -> None:
        """Judge how a run ended, and tell the story of it."""
        self.story.append(f"llmconvert {' '.join(run.arguments)}")
        self.story += [f"  {met}" for met in run.met[:4]]
        said = [text for text in run.done.err.splitlines() if text.startswith("error: ")] or run.done.err.splitlines()[:1]
        self.story.append(f"  exit code {run.done.code}{': ' + said[0][:300] if said and run.done.code else ''}")
        self.blame(oracle.of_run(run, codes))
        if run.done.code < 0:
            self.world.killed = True

    def blame(self, faults: Iterable[str]) -> None:
        """Note what did not hold."""
        self.faults += faults

    def judge(
        self, runs: Sequence[Run], expected: Sequence[Tree], *, tidy: bool = False, replaces: Sequence[bool] = ()
    ) -> None:
        """Judge what is left after runs that may have made the destination; see `oracle`."""
        numbered = {run.number: tree for run, tree in zip(runs, expected, strict=True)}
        trees = [numbered.get(number, {}) for number in range(len(self.runs))]
        told = dict(zip([run.number for run in runs], replaces, strict=False))
        flags = [told.get(run.number, "--overwrite" in run.arguments) for run in self.runs]
        self.blame(oracle.of_destination(self.world, runs, trees, replaces=flags))
        self.blame(oracle.of_surroundings(self.world))
        self.blame(oracle.of_place(self.world, tidy=tidy))

    def follow(self, command: Command, expected: Tree, source: str, verify: str) -> None:
        """The next run succeeds, doing what messages say; afterwards all is as if nothing had happened."""
        if self.faults:
            return  # what follows from them is no news
        flags: list[str] = self.dice.choice([[], ["--resume"], ["--overwrite"]])
        run = self.run(line(command, source, verify, *flags), codes={0, 2})
        if run.done.code == 2 and "--overwrite" not in flags:
            said = [flag for flag in ("--resume", "--overwrite") if flag in run.done.err and flag not in flags]
            if not said:
                self.blame([f"the next run is refused and no way out is named: {run.done.err[:400]}"])
                return
            flags = [self.dice.choice(said)]
            run = self.run(line(command, source, verify, *flags), codes={0, 2})
            if run.done.code == 2 and "--overwrite" in run.done.err and flags != ["--overwrite"]:
                run = self.run(line(command, source, verify, "--overwrite"), codes={0})
        if run.done.code:
            self.blame([f"the next run fails: {run.done.err[:400]}"])
            return
        self.blame(f"after the next run: {what}" for what in differences(expected, look(self.world.dst), CONTENT))
        self.blame(oracle.of_surroundings(self.world))
        self.blame(f"after the next run: {what}" for what in oracle.of_place(self.world, tidy=True))

    def older(self, command: Command) -> None:
        """Put what the command made of other weights where the destination goes."""
        shutil.copytree(self.baselines.made(command, "source-7"), self.world.dst)


Kind = Callable[[Trial], None]
