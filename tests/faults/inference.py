"""Trials of `infer`: its workers and itself are killed, its disk fails, its logs are damaged; no row is lost or doubled."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from faults import oracle, storms
from faults.baseline import COMMANDS, line
from faults.directors import Fault
from faults.mutations import hostile, spoil
from faults.planted import PLANTS
from faults.runs import Run, drive
from faults.syscalls import CHANGES, KINDS, Note
from faults.trial import Trial
from faults.world import CONTENT, OLD, differences, look

ROWS = 9
_FLAGS = ["--engine", "faults.engine:Backwards", "--devices", "cpu", "--num-workers", "2", "--batch-size", "3"]
_OUT = "out.jsonl"
_calls: list[Note] = []


def _expected() -> bytes:
    rows = [{"prompt": f"row {row}", "output": json.dumps(f"row {row}")[::-1]} for row in range(ROWS)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _set_up(trial: Trial, *, older: bool = False) -> list[str]:
    world = trial.set_up({"source": trial.baselines.source("plain"), "data": trial.baselines.source("plain")})
    data = world.root / "data" / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(ROWS)))
    if older:
        (world.place / _OUT).write_text("an older one\n")
        os.utime(world.place / _OUT, (OLD, OLD))
    world.begin()
    return ["infer", "source", "data/prompts.jsonl", f"place/{_OUT}", *_FLAGS, *(["--overwrite"] if older else [])]


def _judge(trial: Trial, runs: list[Run], *, older: bool, tidy: bool = False) -> None:
    out = trial.world.place / _OUT
    found = out.read_bytes() if out.is_file() and not out.is_symlink() else None
    won = any(run.done.code == 0 for run in runs)
    allowed = [_expected()] if won else [_expected(), b"an older one\n" if older else None]
    if found not in allowed:
        trial.blame([f"the output is not whole and right: {None if found is None else found[:200]!r}"])
    trial.blame(oracle.of_surroundings(trial.world))
    trial.blame(oracle.of_place(trial.world, tidy=tidy, of=_OUT))


def _follow(trial: Trial, command: list[str]) -> None:
    if trial.faults:
        return
    plain = [word for word in command if word != "--overwrite"]
    flag = trial.dice.choice(["--resume", "--overwrite"])
    run = trial.run([*plain, flag], codes={0, 2})
    if run.done.code == 2 and flag == "--resume":
        if "--overwrite" not in run.done.err:
            trial.blame([f"the next run is refused and no way out is named: {run.done.err[:300]}"])
        run = trial.run([*plain, "--overwrite"], codes={0})
    _judge(trial, [run], older=False, tidy=True)


def infer(trial: Trial) -> None:
    """One of many things happens to a run of `infer`, or between it and its resumption."""
    dice = trial.dice
    what = dice.choice(["kill", "kill", "kill", "error", "error", "short", "race", "log", "log", "planted"])
    older = dice.random() < 0.3 and what not in ("planted", "log")
    command = _set_up(trial, older=older)
    if not _calls:
        measured = Trial("infer", -1, trial.baselines, trial.folder.with_name("infer-measured"))
        run = measured.run(_set_up(measured), stops=KINDS, codes={0})
        assert not measured.faults, measured.faults
        _calls.extend(note for note, _ in run.calls)
        measured.world.remove()
    if what in ("kill", "error", "short"):
        _storm(trial, command, what, older)
    elif what == "race":
        runs = [trial.start(command, delay=dice.random() * 0.1) for _ in range(2)]
        drive(runs)
        for run in runs:
            trial.judge_run(run, {0, 2})
        _judge(trial, runs, older=older)
    elif what == "log":
        _damage(trial, command)
        return
    else:
        plant = dice.choice(list(PLANTS))
        trial.story.append(f"at the work directory: {plant}")
        path = trial.world.place / f".{_OUT}.llmconvert-infer"
        PLANTS[plant](trial, path)
        flag = dice.choice([[], ["--resume"], ["--overwrite"]])
        run = trial.run([*command, *flag], codes={0, 2, 6})
        trial.blame(oracle.of_surroundings(trial.world))
        if run.done.code == 0:
            _judge(trial, [run], older=False)
        return
    _follow(trial, command)


def _storm(trial: Trial, command: list[str], what: str, older: bool) -> None:
    dice = trial.dice
    calls = [c for c in _calls if c.kind in (CHANGES if what != "short" else ("read", "write"))]
    if what == "short":
        calls = [c for c in calls if c.name in storms.PARTIAL]
    call, at, names = storms.pick(trial, calls)
    kinds = frozenset({call.kind})
    if what == "kill":
        fault = Fault(at, dice.choice(["SIGKILL", "SIGKILL", "SIGINT", "SIGTERM"]), kinds, names=names)
        # A worker that ends is replaced; the run itself ends with what it was sent.
        codes = {0}
    elif what == "error":
        fault = Fault(at, dice.choice(storms.ERRORS[call.kind]), kinds, lasting=dice.random() < 0.3, names=names)
        codes = {0, 6}
    else:
        fault = Fault(at, "short", kinds, names=names, share=dice.choice([0.01, 0.5]))
        codes = {0}
    run = trial.run(command, fault, stops=KINDS, codes=codes)
    _judge(trial, [run], older=older)


def _damage(trial: Trial, command: list[str]) -> None:
    """Kill a run in its middle, damage what it left, and go on with it."""
    dice = trial.dice
    writes = [k for k, c in enumerate(c for c in _calls if c.name == "write") if "answers-" in "".join(c.files)]
    fault = Fault(dice.choice(writes[1:]), "SIGKILL", frozenset({"write"}), names=frozenset({"write"}))
    first = trial.start(command, stops=KINDS)
    drive([first], fault)
    trial.judge_run(first)
    work = trial.world.place / f".{_OUT}.llmconvert-infer"
    logs = sorted(path for path in work.rglob("*") if path.is_file() and path.suffix in (".jsonl", ".json"))
    if not logs:
        return
    path = dice.choice([path for path in logs if path.stat().st_size] or logs)
    trial.story.append(f"before --resume: {path.name}: {_spoil_log(path, dice)}")
    run = trial.run([*command, "--resume"], codes={0, 2, 4})
    if run.done.code == 0:
        _judge(trial, [run], older=False)
    elif "--overwrite" not in run.done.err:
        trial.blame([f"the way out is not named: {run.done.err[:300]}"])
    if not trial.faults and run.done.code:
        _judge(trial, [trial.run([*command, "--overwrite"], codes={0})], older=False, tidy=True)


def _spoil_log(path: Path, dice: random.Random) -> str:
    data = path.read_bytes()
    if path.suffix == ".jsonl" and dice.random() < 0.7:
        lines = data.splitlines(keepends=True)
        odd = dice.choice([
            b"\n", b"null\n", b"[]\n", b'{"row": 0}\n', b'{"row": "0", "output": "x"}\n', b'{"row": -1, "output": "x"}\n',
            b'{"row": 99999999999, "output": "x"}\n', b'{"row": 1.5}\n', b'{"row": true, "output": "x"}\n', b"\xff\xfe\n",
            b'{"row": 0, "output": 5, "error": [], "tokens": "x"}\n', b"[" * 100_000 + b"\n", b"7" * 5000 + b"\n",
            b'{"row": 500, "output": "x"}\n', b'{"row": 3, "output": null, "error": null}\n', b'{"more": 1}\n', b"\0" * 512,
            (lines or [b"\n"])[0], b"NaN\n", b'{"row": NaN}\n', b'{"row": 1e400}\n', b'{"row": {}}\n', b'{"row": 0, "tokens": -5}\n',
        ])  # fmt: skip
        lines.insert(dice.randrange(len(lines) + 1), odd)
        path.write_bytes(b"".join(lines))
        return f"a line {odd[:40]!r}"
    if path.suffix == ".json" and dice.random() < 0.5:
        value = json.loads(data)
        key = dice.choice(sorted(value))
        value[key] = hostile(dice)
        path.write_text(json.dumps(value, default=str))
        return f"{key} changed"
    # What is cut off or unreadable is a row that is not done.
    data, did = spoil(data, dice) if path.suffix == ".json" else (data[: dice.randrange(len(data) + 1)], "cut")
    path.write_bytes(data)
    return did


CANARIES = (
    "torch", "transformers", "numpy", "json", "llmconvert", "sitecustomize", "usercustomize", "xxhash", "typer", "socket",
    "multiprocessing", "safetensors", "encodings", "accelerate", "tokenizers", "faults", "pickle", "signal",
)  # fmt: skip


def inside(trial: Trial) -> None:
    """The working directory is the checkpoint, which holds modules by the names of libraries: none is imported."""
    dice = trial.dice
    world = trial.set_up({"source": trial.baselines.source("plain"), "data": trial.baselines.source("plain")})
    (world.root / "data" / "prompts.jsonl").write_text('{"prompt": "one"}\n')
    for name in CANARIES:
        text = f"open({str(world.canary)!r}, 'a').write({name!r} + ' ')\n"
        if dice.random() < 0.3:
            (world.root / "source" / name).mkdir()
            (world.root / "source" / name / "__init__.py").write_text(text)
        else:
            (world.root / "source" / f"{name}.py").write_text(text)
    world.begin()
    command = dice.choice([
        ["infer", ".", "../data/prompts.jsonl", f"../place/{_OUT}", *_FLAGS],
        ["infer", "../source", "../data/prompts.jsonl", f"../place/{_OUT}", *_FLAGS],
        ["convert", ".", "../place/dst", "--to", "llama", "--verify", "weights"],
        ["inspect", "."], ["split", ".", "../place/dst", "--verify", "weights"], ["specs"],
    ])  # fmt: skip
    trial.run(command, codes={0}, inside="source")
    trial.blame(oracle.of_surroundings(world))


def torchrun(trial: Trial) -> None:
    """One of the processes of a `torchrun` is killed; what they had done is taken up by others."""
    dice = trial.dice
    command = COMMANDS[dice.choice(["split", "shards"])]
    expected = trial.baselines.expected(command)
    trial.set_up({"source": trial.baselines.source("plain")}).begin()
    script = trial.folder / "script.py"
    script.write_text("from llmconvert.cli.app import main\nmain()\n")
    roots = [entry for entry in sys.path if entry and (Path(entry) / "llmconvert").is_dir()]

    def processes(arguments: list[str]) -> None:
        started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        os.execve(sys.executable, [*started, *arguments], {**os.environ, "PYTHONPATH": os.pathsep.join(roots)})

    calls = [c for c in trial.baselines.calls(command, "none") if c.kind in CHANGES]
    _, at, names = storms.pick(trial, calls)
    fault = Fault(at, "SIGKILL", CHANGES, names=names)
    run = trial.start(line(command), stops=CHANGES, program=processes, limited=False)
    drive([run], fault, limit=120)
    trial.story += [f"torchrun llmconvert {' '.join(run.arguments)}", *run.met, f"  exit code {run.done.code}"]
    if run.done.hung or run.done.left:
        trial.blame(["it hung" if run.done.hung else "it left processes running"])
    trial.world.killed = True
    made = look(trial.world.dst)
    if made is not None or not run.met:
        trial.blame(f"the destination: {found}" for found in differences(expected, made, CONTENT))
    trial.blame(oracle.of_surroundings(trial.world))
    trial.follow(command, expected, "source", "none")

