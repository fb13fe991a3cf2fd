"""Curves of channel losses, out of the logs a run left: TensorBoard's event files or `trainer_state.json`."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.config import COUNT as STEP
from llmconvert.checkpoint.config import OBJECT, Kind, check
from llmconvert.checkpoint.files import open_descriptor, read_json, shown
from llmconvert.errors import BadInput, InputOutput, Refused, Usage

TOTAL = "all channels"
"""The name of the curve of all channels together: the loss the trainer logged."""

Points = dict[int, float]
"""Step to value."""

_STATE = {
    "global_step": STEP,
    "log_history": Kind("a list of objects", lambda value: isinstance(value, list) and all(map(OBJECT.fits, value))),
}
_LOSS = re.compile(r"(?:(?P<split>[^/]+)_)?loss(?:/(?P<channel>.+))?")
_TOKENS = re.compile(r"(?:(?P<split>[^/]+)_)?tokens/(?P<channel>.+)")
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """The loss of a channel.

    Attributes:
        channel: its name, or `TOTAL`.
        split: `train`, `eval`, or `eval_<name>` of one evaluation set among several.
        steps: rising.
        losses: at those steps, in nats per token.
        tokens: as many as were logged for it in all; None if none were.
    """

    channel: str
    split: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    tokens: float | None = None

    def smoothed(self, weight: float) -> list[float]:
        """Exponential moving average, with the start corrected for (as in Adam: Kingma and Ba, 2015, section 3).

        Args:
            weight: of what came before, from 0 (none) to below 1. What is no finite number is passed over.
        """
        found, average, total = [], 0.0, 0.0
        for loss in self.losses:
            if math.isfinite(loss):
                average, total = weight * average + (1 - weight) * loss, weight * total + (1 - weight)
            found.append(average / total if total else math.nan)
        return found


def read_curves(path: Path) -> list[Curve]:
    """All loss curves in a log: training before evaluation, the total before the channels.

    Event files of several runs in one directory are taken as one run and its continuations: a later one counts from its
    first step on.

    Args:
        path: an event file, a `trainer_state.json`, or a directory with either at any depth. Where it has both, the
            event files count: they reach beyond the last checkpoint.

    Raises:
        BadInput: nothing of the kind is there, or it has no channels.
        Refused: there are event files only, and tensorboard is not installed.
    """
    if not path.exists():
        raise BadInput("no such file or directory", where=str(path))
    events = sorted(path.rglob("*.tfevents.*")) if path.is_dir() else [path] if "tfevents" in path.name else []
    states = sorted(path.rglob("trainer_state.json")) if path.is_dir() else [] if events else [path]
    if not events and not states:
        raise BadInput(
            "no logs: neither event files of TensorBoard nor a trainer_state.json",
            where=str(path),
            hint="name the run's output or logging directory",
        )
    curves: list[Curve] = []
    try:
        curves = _curves(_from_events(events)) if events else []
    except ImportError as error:
        if not states:
            raise Refused("event files cannot be read without tensorboard", hint="pip install 'llmconvert[plot]'") from error
    if states and not any(curve.channel != TOTAL for curve in curves):
        curves = _curves(_from_states(states))
    if not any(curve.channel != TOTAL for curve in curves):
        raise BadInput(
            "the logs have no `loss/<channel>`",
            where=str(path),
            hint="train with llmconvert.training.ChannelLossTrainer, or log ChannelLossMeter's results under that name",
        )
    return curves


def sparkline(values: Sequence[float], low: float, high: float, width: int = 24) -> str:
    """A line of at most `width` bars, each the mean of the values it stands for; a blank where there is none finite."""
    width = min(width, len(values))
    line = ""
    for bar in range(width):
        part = values[bar * len(values) // width : (bar + 1) * len(values) // width]
        finite = [value for value in part if math.isfinite(value)]
        if not finite:
            line += " "
            continue
        share = (sum(finite) / len(finite) - low) / (high - low) if high > low else 0.0
        line += _BARS[min(len(_BARS) - 1, max(0, int(share * len(_BARS))))]
    return line


def summary(curves: Iterable[Curve], weight: float) -> list[dict[str, Any]]:
    """A row for each curve: its points, first and last smoothed loss, and a sparkline, all on one scale."""
    smooth = [(curve, curve.smoothed(weight)) for curve in curves]
    finite = [value for _, values in smooth for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return [
        {
            "channel": curve.channel,
            "split": curve.split,
            "steps": list(curve.steps),
            "losses": [_finite(loss) for loss in curve.losses],
            "first": _finite(values[0]),
            "last": _finite(values[-1]),
            "tokens": curve.tokens,
            "sparkline": sparkline(values, low, high),
        }
        for curve, values in smooth
    ]


def plot(curves: Sequence[Curve], output: Path, weight: float) -> None:
    """Draw all curves in one figure: raw ones faint, smoothed ones bold, evaluations dashed, the total black.

    Args:
        curves: as `read_curves` gives them.
        output: an image; its ending says of what kind.
        weight: of `Curve.smoothed`.

    Raises:
        Refused: matplotlib is not installed.
        Usage: matplotlib does not write such images, or the directory does not exist.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refused("a plot needs matplotlib", hint="pip install 'llmconvert[plot]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in kinds:
        raise Usage("no such kind of image", where=str(output), hint=f"end it in one of {', '.join(sorted(kinds))}")
    if not output.parent.is_dir():
        raise Usage("the image's directory does not exist", where=str(output.parent))
    axes = figure.subplots()
    names = [name for name in dict.fromkeys(curve.channel for curve in curves) if name != TOTAL]
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    colours: dict[str, Any] = {name: palette(number % palette.N) for number, name in enumerate(names)}
    for curve in curves:
        colour = colours.get(curve.channel, "black")
        label = curve.channel if curve.split == "train" else f"{curve.channel} ({curve.split})"
        if curve.split == "train":
            axes.plot(curve.steps, curve.losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(curve.steps, curve.smoothed(weight), color=colour, linewidth=1.6, label=label)
        else:
            axes.plot(curve.steps, curve.losses, color=colour, linestyle="--", marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend(fontsize="small")
    part = output.with_name(f".{output.stem}.partial{output.suffix}")
    try:
        figure.savefig(part, dpi=120)
        part.replace(output)
    except OSError as error:
        raise InputOutput(f"cannot write the image: {error.strerror}", where=str(output)) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _curves(scalars: Mapping[str, Points]) -> list[Curve]:
    """Curves out of tags, named as the Trainer names them or as TensorBoard and W&B show them (`train/…`, `eval/…`)."""
    losses: dict[tuple[str, str], Points] = {}
    tokens: dict[tuple[str, str], float] = {}
    for tag, points in scalars.items():
        name = tag.removeprefix("train/")
        for split in ("eval", "test"):
            name = re.sub(f"^{split}/", f"{split}_", name)
        if counted := _TOKENS.fullmatch(name):
            tokens[counted["split"] or "train", counted["channel"]] = sum(points.values())
        elif (found := _LOSS.fullmatch(name)) and name != "train_loss":  # that is the mean of a whole run
            losses[found["split"] or "train", found["channel"] or TOTAL] = points
    order = sorted(losses, key=lambda key: (key[0] != "train", key[0], key[1] != TOTAL, key[1]))
    made = []
    for split, channel in order:
        points = losses[split, channel]
        steps = tuple(sorted(points))
        values = tuple(points[step] for step in steps)
        made.append(Curve(channel, split, steps, values, tokens.get((split, channel))))
    return [curve for curve in made if curve.steps]


def _from_states(paths: Sequence[Path]) -> dict[str, Points]:
    """The log of the state that got farthest."""
    states = []
    for path in paths:
        state = read_json(path, anywhere=True)
        check(state, _STATE, str(path))
        if any(state.get(key) is None for key in _STATE):
            raise BadInput("not a trainer_state.json", where=str(path))
        states.append((state["global_step"], state["log_history"], path))
    _, history, path = max(states, key=lambda one: one[0])
    found: dict[str, Points] = defaultdict(dict)
    for entry in history:
        step = entry.get("step")
        if step is None:
            continue
        if not STEP.fits(step):
            raise BadInput(f"an entry's `step` is {shown(step)}, expected {STEP.expected}", where=str(path))
        for name, value in entry.items():
            if isinstance(value, int | float):
                found[name][step] = float(value)
    return found


def _from_events(paths: Sequence[Path]) -> dict[str, Points]:
    """The scalars of event files, each file replacing what earlier ones have from its first step on."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        EventAccumulator,
    )

    files = []
    for path in paths:
        os.close(open_descriptor(path))  # a FIFO would keep the library waiting
        log = EventAccumulator(str(path), size_guidance={"scalars": 0})
        try:
            log.Reload()
            scalars = {tag: log.Scalars(tag) for tag in log.Tags()["scalars"]}
        except Exception as error:  # of several kinds, from a parser of foreign bytes
            raise BadInput(f"the event file cannot be read: {error}", where=str(path)) from None
        if scalars:
            files.append((min(one[0].wall_time for one in scalars.values()), scalars))
    found: dict[str, Points] = defaultdict(dict)
    for _, scalars in sorted(files, key=lambda file: file[0]):
        first = min(entry.step for entries in scalars.values() for entry in entries)
        for tag in found:
            found[tag] = {step: value for step, value in found[tag].items() if step < first}
        for tag, entries in scalars.items():
            found[tag].update({entry.step: entry.value for entry in entries})
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
