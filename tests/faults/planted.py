"""Trials in which links, pipes, devices and foreign files lie where they can do harm; and ones that change what is resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

from faults import oracle, sources
from faults.baseline import COMMANDS, Command, line, some
from faults.mutations import edit_json, spoil
from faults.oracle import unchanged
from faults.runs import Fault
from faults.syscalls import CHANGES
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


# What is taken up by --resume.


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
        if "--overwrite" not in run.done.err and "remove" not in run.done.err:
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


# What lies in a source.


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


# What was made, and what becomes of it later.


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
