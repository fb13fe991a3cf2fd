"""What holds after every trial, whatever happened in it.

The destination is whole and right, or as it was; sources and what belongs to others are as they were, and were not read;
no code of a checkpoint ran; every run ended in time and in little memory, with a documented exit code and one clear
message; nothing strange is left; and the next run succeeds.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from faults.runs import Run
from faults.world import CONTENT, OLD, UNTOUCHED, Tree, World, differences, look

DOCUMENTED = frozenset({0, 2, 3, 4, 5, 6, 130})
MEMORY = 1 << 30
SECONDS = 10.0
"""Of the processor, for a tiny checkpoint."""

_NOISE = ("Traceback (most recent call last)", "Exception ignored", "Exception in thread", "Warning:", "ResourceWarning")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")


def of_run(run: Run, codes: Iterable[int] = DOCUMENTED) -> list[str]:
    """What is wrong with how a run ended."""
    done, faults, codes = run.done, [], set(codes)
    if done.hung:
        return [f"it hung: ended after {done.seconds:.0f} s, {done.processor:.0f} s of the processor"]
    if done.left:
        faults.append("it left processes running")
    if signal.SIGINT in run.sent:
        codes.add(130)
    if done.code < 0:
        if -done.code not in run.sent:
            faults.append(f"it died of {signal.Signals(-done.code).name}")
    elif done.code not in codes:
        faults.append(f"it ended with exit code {done.code}, not one of {sorted(codes)}")
    for word in _NOISE:
        if word in done.err:
            faults.append(f"it printed `{word}`")
    if done.code >= 0:
        faults += _message(run)
    if done.peak > MEMORY:
        faults.append(f"it took {done.peak / 2**20:.0f} MB of memory")
    if done.processor > SECONDS:
        faults.append(f"it took {done.processor:.0f} s of the processor")
    if raw := _CONTROL.search(done.out + done.err):
        faults.append(f"it printed the control character {raw[0]!r}")
    return faults


def _message(run: Run) -> list[str]:
    done = run.done
    faults = []
    errors = len(re.findall(r"^(?:error: |interrupted$)", done.err, re.MULTILINE))
    if done.code in (0, 130) and errors > 1:
        faults.append(f"it printed {errors} errors")
    elif done.code not in (0, 130) and errors != 1:
        faults.append(f"it printed {errors} errors and ended with exit code {done.code}")
    if "--json" in run.arguments and done.code != 130:
        try:
            value = json.loads(done.out)
        except ValueError:
            return [*faults, "stdout is not one JSON object under --json"]
        if done.code and (value.get("error") or {}).get("exit_code") != done.code:
            faults.append("the JSON error does not say the exit code")
    return faults


def of_surroundings(world: World, *, sources_may_be_read: bool = True) -> list[str]:
    """What is wrong with all but the destination."""
    faults = []
    for name, before in world.before.items():
        if name == "place/dst":
            continue
        after = look(world.root / name)
        faults += [f"{name}: {what}" for what in differences(before, after, UNTOUCHED)]
        if name in world.sources and sources_may_be_read:
            continue
        for inner, found in (after or {}).items():
            if found.kind == "file" and found.read // 10**9 != OLD:
                faults.append(f"{name}/{inner} was read")
    for name, before in world.kept.items():
        after = look(world.root / name)
        faults += [f"a stranger's {name}: {what}" for what in differences(before, after, ("kind", "size", "content"))]
    if world.canary.exists():
        faults.append(f"code of the checkpoint ran: {world.canary.read_text()[:200]}")
    if not world.killed:
        left = sorted(path.name for path in (world.root / "temporary").iterdir())
        faults += [f"`{name}` is left in the folder for temporary files" for name in left]
    known = {*world.sources, "place", "outside", "home", "temporary", *(name.split("/")[0] for name in world.kept)}
    faults += [f"`{path.name}` is new beside the source" for path in sorted(world.root.iterdir()) if path.name not in known]
    home = sorted(path.name for path in (world.root / "home").iterdir())
    faults += [f"`{name}` is new at home" for name in home]
    return faults


def private(world: World, *, of: str = "dst") -> list[str]:
    """What llmconvert keeps beside a destination, and says so by the name; what it means to leave there apart."""
    own = rf"\.{re.escape(of)}\.llmconvert-[a-z-]+"
    return [name for name in _beside(world) if re.fullmatch(own, name) and name not in _meant(of)]


def _meant(of: str) -> set[str]:
    """What stays beside a finished output: the lock, whose removal could only be a race; and what run `infer` made it in."""
    return {f".{of}.llmconvert-lock", f".{of}.llmconvert-infer.json"}


def _beside(world: World) -> list[str]:
    return sorted(path.name for path in world.place.iterdir())


def of_place(world: World, *, tidy: bool, of: str = "dst") -> list[str]:
    """What is wrong with the names beside the destination; with `tidy`, nothing unfinished is to be there."""
    strangers = {name.split("/")[1] for name in world.kept if name.startswith("place/")}
    own = set(private(world, of=of)) | _meant(of)
    faults = [f"`{name}` is left beside the destination" for name in _beside(world)
              if name not in {of, *world.others()} | strangers | own]  # fmt: skip
    if tidy:
        faults += [f"`{name}` is left beside the destination" for name in private(world, of=of) if name not in strangers]
    return faults


def of_destination(
    world: World, runs: Sequence[Run], expected: Sequence[Tree], *, replaces: Sequence[bool] = (),
) -> list[str]:  # fmt: skip
    """What is wrong with the destination after runs that may have made it.

    Args:
        world: the trial's.
        runs: all that could write there.
        expected: of each run what it makes.
        replaces: whether each was told to replace what is there.
    """
    after, before = look(world.dst), world.before.get("place/dst")
    if "place/dst" in world.kept:
        # A stranger made it, and with what is in it, it stays: `of_surroundings` sees to that.
        return ["exit code 0, but the destination is a stranger's" for run in runs if run.done.code == 0]
    strangers = {name.removeprefix("place/dst/") for name in world.kept if name.startswith("place/dst/")}
    own = None if after is None else {name: found for name, found in after.items() if name not in strangers}
    won = [run for run in runs if run.done.code == 0]
    replaces = replaces or ["--overwrite" in run.arguments for run in runs]

    def is_of(run: Run) -> bool:
        return own is not None and not differences(expected[run.number], own, CONTENT)

    if won:
        right = [run for run in runs if is_of(run) and (run in won or run.done.code < 0 or run.done.code in (6, 130))]
        if not right:
            shown = "; ".join(differences(expected[won[0].number], own, CONTENT)[:3])
            return [f"exit code 0, but the destination is not what was to be made: {shown}"]
        faults = []
        plain = [run for run in won if not replaces[run.number] and "--resume" not in run.arguments]
        if len(plain) > 1:
            faults.append(f"{len(plain)} runs made one destination, and none was told to replace it")
        if plain and before is not None and len(before) > 1:
            faults.append("what was there was replaced, though nobody said so")
        if plain and any(replaces[run.number] for run in won) and not any(replaces[run.number] for run in right):
            faults.append("a run replaced what another had made, though not told to")
        return faults
    if before is None and after is None:
        return []
    if before is not None and not differences(before, own, UNTOUCHED, folders=not strangers):
        return []
    if any(is_of(run) for run in runs):
        # Whole and right: a run was ended after its last step but one. One that says that all went well says so.
        return [] if all(run.done.code < 0 or run.done.code in (2, 6, 130) for run in runs) else ["made, but not said"]
    if before is None:
        return [f"a destination that is not whole: {'; '.join(differences(expected[0], after, CONTENT)[:3])}"]
    return [f"the destination is neither what it was nor what was to be made: "
            f"{'; '.join(differences(before, after, UNTOUCHED)[:3])}"]  # fmt: skip


def unchanged(world: World) -> list[str]:
    """The destination is as it was, or absent as it was."""
    before, after = world.before.get("place/dst"), look(world.dst)
    if before is None:
        return [] if after is None else ["a destination was made"]
    return [f"the destination: {what}" for what in differences(before, after, UNTOUCHED)]


def equal_weights(source: Path, destination: Path) -> list[str]:
    """Whether safetensors' own library reads the same tensors of both, name by name and bit by bit."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    faults, read = [], []
    for folder in (source, destination):
        try:
            parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            return [f"exit code 0, but safetensors cannot read the {folder.name}: {error}"]
        read.append({name: array for part in parts for name, array in part.items()})
    before, after = read
    # A Llama has all biases or none: those a source lacks are zeros, and zeros are left out on the way home.
    faults += [f"`{name}` is not in the destination" for name in sorted(before.keys() - after.keys())
               if not name.endswith(".bias") or before[name].any()]  # fmt: skip
    faults += [f"`{name}` is not in the source" for name in sorted(after.keys() - before.keys())
               if not name.endswith(".bias") or after[name].any()]  # fmt: skip
    for name in sorted(before.keys() & after.keys()):
        one, two = before[name], after[name]
        if one.dtype != two.dtype or one.shape != two.shape or one.tobytes() != two.tobytes():
            faults.append(f"`{name}` is not what it was")
    return faults
