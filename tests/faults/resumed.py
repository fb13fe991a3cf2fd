"""Trials in which something changes between a kill and `--resume`."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from faults import oracle
from faults.baseline import COMMANDS, Command, line, some
from faults.directors import Fault
from faults.mutations import edit_json, spoil
from faults.syscalls import CHANGES
from faults.trial import Trial
from faults.world import CONTENT, differences, look


def _unfinished(trial: Trial, command: Command, verify: str) -> bool:
    """Leave an unfinished run behind; False where it was over too soon, or too late."""
    calls = [call for call in trial.baselines.calls(command, verify) if call.kind in CHANGES]
    at = [number for number, call in enumerate(calls) if call.name in ("pwrite64", "fsync")]
    trial.run(line(command, "source", verify), Fault(trial.dice.choice(at), "SIGKILL", CHANGES), stops=CHANGES)
    return bool(oracle.private(trial.world)) and not trial.world.dst.exists()


def _private_files(trial: Trial) -> list[Path]:
    """What llmconvert keeps of an unfinished run for itself: the text files there that no destination has."""
    published = {Path(name).name for command in COMMANDS.values() for name in trial.baselines.expected(command)}
    found = [path for name in oracle.private(trial.world) for path in (trial.world.place / name).rglob("*")]
    return sorted(path for path in found if path.is_file() and path.suffix.startswith(".json") and path.name not in published)


def resume(trial: Trial) -> None:
    """Between a kill and `--resume` something changes: the source, the options, what is written, the journal."""
    dice = trial.dice
    command, verify = some(dice)
    while command.source != "plain":
        command, verify = some(dice)
    world = trial.set_up({"source": trial.baselines.source("plain")})
    world.begin()
    if not _unfinished(trial, command, verify):
        return
    source, options, work = world.root / "source", [], world.place / oracle.private(world)[0]
    kept = sorted(path for path in work.rglob("*") if path.is_file() and not path.is_symlink())
    what = dice.choice(list(_CHANGES))
    did, options = _CHANGES[what](trial, source, work, kept)
    trial.story.append(f"before --resume: {what}{': ' + did if did else ''}")
    arguments = line(command, "source", verify, *options)
    for name in world.sources:
        tree = look(world.root / name)
        assert tree is not None
        world.before[name] = tree
    run = trial.run([*arguments, "--resume"], codes={0, 2} if what != "keep" else {0})
    trial.blame(oracle.of_surroundings(world, sources_may_be_read=True))
    fresh = Trial(trial.kind, trial.seed, trial.baselines, trial.folder / "fresh", trial.program)
    clean = fresh.set_up({"source": source})
    fresh.run(arguments, codes={0})
    if fresh.faults:
        trial.blame(f"a run from nothing: {fault}" for fault in fresh.faults)
        return
    expected = look(clean.dst)
    assert expected is not None
    if run.done.code == 0:
        trial.blame(f"resumed: {found}" for found in differences(expected, look(world.dst), CONTENT))
        trial.blame(oracle.of_place(world, tidy=True))
    else:
        trial.blame(["a destination was made"] if os.path.lexists(world.dst) else [])
        if not any(way in run.done.err for way in ("--overwrite", "remove", "`rm ")):
            trial.blame([f"the way out is not named: {run.done.err[:300]}"])
        elif what not in ("a link among what is written", "a pipe among what is written", "a folder that is a link"):
            again = trial.run([*arguments, "--overwrite"], codes={0})
            if again.done.code == 0:
                trial.blame(f"then: {found}" for found in differences(expected, look(world.dst), CONTENT))


Change = Callable[[Trial, Path, Path, list[Path]], tuple[str, list[str]]]


def _touch(path: Path) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1000))


def _keep(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    return "", []


def _weights(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    path = trial.dice.choice(sorted(source.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    for at in range(1, 200):
        data[-at] ^= 1
    path.write_bytes(data)
    _touch(path)
    return path.name, []


def _companion_less(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    path = source / trial.dice.choice(["README.md", "tokenizer.json", "generation_config.json"])
    path.unlink()
    return path.name, []


def _companion_more(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    name = trial.dice.choice(["LICENSE", "vocab.txt", "additional_chat_templates/other.jinja", "merges.txt"])
    (source / name).write_text("new\n")
    return name, []


def _companion_other(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    path = source / trial.dice.choice(["README.md", "tokenizer.json", "tokenizer_config.json"])
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        path.write_text(json.dumps({**value, "new": 1}))
    else:
        path.write_text("another\n")
    _touch(path)
    return path.name, []


def _config(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    value = json.loads((source / "config.json").read_text())
    value["max_position_embeddings"] = 128
    (source / "config.json").write_text(json.dumps(value, indent=1))
    _touch(source / "config.json")
    return "", []


def _options(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    return "--workers 2", ["--workers", "2"]


def _foreign_file(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    name = trial.dice.choice(["mine.txt", "model.py", "sub/mine.txt", "llmconvert-journal-9.jsonl", ".hidden", "llmconvert.json"])
    (work / name).parent.mkdir(exist_ok=True)
    (work / name).write_text("a stranger's\n")
    return name, []


def _journal(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    """What is kept of the run itself is damaged."""
    own = _private_files(trial)
    if not own:
        return "nothing kept", []
    path, dice = trial.dice.choice(own), trial.dice
    if path.suffix == ".jsonl" and dice.random() < 0.6:
        lines = path.read_bytes().splitlines(keepends=True)
        odd = dice.choice([
            b"\n", b"null\n", b"[]\n", b'["a"]\n', b'["a", 1]\n', b"{}\n", b'[["a"], "b"]\n', b"\xff\xfe\n", b"\x00" * 64, b'["a", "b"',
            b'["\\ud800", "b"]\n', b"[" * 100_000 + b"\n", b"1" * 5000 + b"\n", b'["a", "' + b"x" * 10**6 + b'"]\n', b"NaN\n",
        ])  # fmt: skip
        lines.insert(dice.randrange(len(lines) + 1), odd)
        if dice.random() < 0.3:
            dice.shuffle(lines)
        path.write_bytes(b"".join(lines))
        return f"{path.name}: a line {odd[:20]!r}", []
    if path.suffix == ".json" and dice.random() < 0.5:
        try:
            return f"{path.name}: {edit_json(path, dice)}", []
        except (ValueError, IndexError):
            pass
    data, did = spoil(path.read_bytes(), dice)
    path.write_bytes(data)
    return f"{path.name}: {did}", []


def _exchanged(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    """The journal's lines with one another's checksums."""
    journals = [path for path in _private_files(trial) if path.suffix == ".jsonl" and path.stat().st_size]
    if not journals:
        return "no journal", []
    entries = [json.loads(text) for text in journals[0].read_text().splitlines()]
    sums = [entry[1] for entry in entries]
    trial.dice.shuffle(sums)
    journals[0].write_text("".join(json.dumps([entry[0], one]) + "\n" for entry, one in zip(entries, sums, strict=True)))
    return "", []


def _written(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    """What was written is not what it was: a disk that lost power."""
    path = trial.dice.choice(kept)
    data, did = spoil(path.read_bytes(), random.Random(trial.seed))
    path.write_bytes(data)
    return f"{path.name}: {did}", []


def _less(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    path = trial.dice.choice(kept)
    path.unlink()
    return path.name, []


def _linked(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    path = trial.dice.choice(kept)
    path.unlink()
    path.symlink_to(trial.world.root / "outside" / trial.dice.choice(["model.safetensors", "secret.txt", "new"]))
    return path.name, []


def _piped(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    path = trial.dice.choice(kept)
    path.unlink()
    os.mkfifo(path)
    return path.name, []


def _folder_linked(trial: Trial, source: Path, work: Path, kept: list[Path]) -> tuple[str, list[str]]:
    folders = sorted(path for path in work.rglob("*") if path.is_dir())
    path = trial.dice.choice([*folders, work])
    trial.world.kept["outside"] = trial.world.before["outside"]
    shutil.rmtree(path)
    path.symlink_to(trial.world.root / "outside")
    return str(path.relative_to(work.parent)), []


_CHANGES: dict[str, Change] = {
    "keep": _keep, "other weights": _weights, "a companion less": _companion_less, "a companion more": _companion_more,
    "another companion": _companion_other, "another config": _config, "other options": _options,
    "a foreign file": _foreign_file, "a damaged journal": _journal, "a damaged journal ": _journal,
    "checksums exchanged": _exchanged, "what is written is damaged": _written, "a file less": _less,
    "a link among what is written": _linked, "a pipe among what is written": _piped, "a folder that is a link": _folder_linked,
}  # fmt: skip
