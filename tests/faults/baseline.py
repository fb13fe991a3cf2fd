"""What commands make when nothing goes wrong, and the calls they make on the way: what trials are measured against."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from faults import sources, syscalls
from faults.oracle import equal_weights, of_run
from faults.runs import drive, start
from faults.syscalls import Note
from faults.world import Tree, World, look


@dataclass(frozen=True)
class Command:
    """A kind of conversion.

    Attributes:
        name: of it.
        arguments: what it is called with, before SRC and DST, and after.
        source: of `SOURCES`.
        moves: whether names and bytes of tensors stay, so that what is right can be told without another run.
    """

    name: str
    arguments: tuple[tuple[str, ...], tuple[str, ...]]
    source: str
    moves: bool = False


def _convert(*options: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ("convert",), ("--workers", "1", *options)


_GRID = ("--tp", "2", "--pp", "2", "--workers", "1")
COMMANDS = {
    command.name: command
    for command in (
        Command("llama", _convert("--to", "llama"), "plain", moves=True),
        Command("shards", _convert("--to", "llama", "--max-shard-size", "1KB"), "plain", moves=True),
        Command("canonical", _convert("--to", "canonical"), "plain"),
        Command("bin", _convert("--to", "llama"), "bin"),
        Command("split", (("split",), _GRID), "plain"),
        Command("split-dist", (("split",), ("--format", "torch_dist", *_GRID)), "plain"),
        Command("merge", (("merge",), ("--workers", "1")), "ranks"),
        Command("reshard", (("reshard",), ("--pp", "2", "--workers", "1")), "ranks"),
        Command("home", _convert("--to", "qwen2"), "llama"),
    )
}


class Baselines:
    """Sources, and what is made of them; each made once.

    Attributes:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is made yet."""
        self.folder = folder
        self._sources: dict[str, Path] = {}
        self._made: dict[tuple[str, str, str], Tree] = {}
        self._calls: dict[tuple[str, str, bool], list[Note]] = {}

    def source(self, kind: str, number: int = 0) -> Path:
        """A source of a kind: plain, bin, or made by a command of a plain one (ranks, llama); `number` seeds its weights."""
        name = f"{kind}-{number}"
        if name not in self._sources:
            folder = self.folder / "sources" / name
            if kind in ("plain", "bin"):
                sources.make(folder, number, form="safetensors" if kind == "plain" else "bin")
            else:
                command = COMMANDS["split" if kind == "ranks" else "llama"]
                shutil.copytree(self.made(command, f"source-{number}", "weights"), folder)
            self._sources[name] = folder
        return self._sources[name]

    def made(self, command: Command, source: str = "source", verify: str = "none") -> Path:
        """A folder with what a command makes of a source called so (`source`, or `source-N` for the weights of seed N)."""
        folder = self.folder / "made" / f"{command.name}-{source}-{verify}"
        if not folder.exists():
            world = self.begun(command, source)
            calls = self._run(world, line(command, source, verify))
            if command.moves:
                assert not (faults := equal_weights(world.root / source, world.dst)), faults
            if source == "source":
                self._calls[command.name, verify, False] = calls
            shutil.copytree(world.dst, folder)
            world.remove()
        return folder

    def _run(self, world: World, arguments: list[str]) -> list[Note]:
        run = start(arguments, world.root, world.logs, stops=syscalls.KINDS, environment=world.environment)
        drive([run])
        assert not (faults := of_run(run, {0})), (faults, run.done)
        return [note for note, _ in run.calls]

    def begun(self, command: Command, source: str = "source") -> World:
        """A fresh folder with a command's source."""
        number = int(source.rpartition("-")[2]) if "-" in source else 0
        world = World.make(self.folder / "making" / command.name, {source: self.source(command.source, number)})
        world.begin()
        return world

    def expected(self, command: Command, source: str = "source", verify: str = "none") -> Tree:
        """What a command makes; see `made`."""
        key = (command.name, source, verify)
        if key not in self._made:
            tree = look(self.made(command, source, verify))
            assert tree is not None
            self._made[key] = tree
        return self._made[key]

    def calls(self, command: Command, verify: str, *, replacing: bool = False) -> list[Note]:
        """The calls a command makes in the trial's folder; with `replacing`, where it replaces what it made before."""
        made = self.made(command, verify=verify)
        key = (command.name, verify, replacing)
        if key not in self._calls:
            world = self.begun(command)
            shutil.copytree(made, world.dst)
            self._calls[key] = self._run(world, line(command, "source", verify, "--overwrite"))
            world.remove()
        return self._calls[key]


def line(command: Command, source: str = "source", verify: str = "none", *flags: str) -> list[str]:
    """A command as it is typed in a trial's folder."""
    before, after = command.arguments
    return [*before, source, "place/dst", *after, "--verify", verify, *flags]


def some(dice: random.Random) -> tuple[Command, str]:
    """A command, and how it is to prove its result; the simplest ones more often."""
    name = dice.choice(["llama", "llama", "shards", "canonical", "bin", "split", "split-dist", "merge", "reshard", "home"])
    return COMMANDS[name], dice.choice(["none", "none", "weights"])
