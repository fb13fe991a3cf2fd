"""Compare two checkpoints as models: the same tokens through both, and a verdict that is derived, not set.

Two codes for one function differ by rounding, and how much depends on the model. So where two models' logits are not
bit-equal, both are run once more in float64 throughout. What is left there is a difference of the functions; what went
away was rounding, and its size in the first run is the floor that this pair had.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmconvert.checkpoint.directory import listing
from llmconvert.checkpoint.megatron import is_megatron
from llmconvert.errors import Refused, Usage
from llmconvert.verify.layerwise import LayerwiseModel
from llmconvert.verify.models import block_size, config_of, read_config, stored_shapes
from llmconvert.verify.probes import Probe, limits, make_probes, padded, token_texts
from llmconvert.verify.runnable import Runnable
from llmconvert.verify.sharded import ShardedModel
from llmconvert.verify.sweep import Departure, LayerDifference, Sweep, sweep

_EIGHT = "float8_e4m3fn"
"""Weights may have been rounded to it; nothing is computed in it."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GREEDY_TOKENS, _GREEDY_PROMPT = 16, 5
_CHUNK = 64
_WORST = 8

_SLACK = 2.0**8
"""How far beyond float64's share of the measured rounding two equal functions may be.

float64 rounds 2^29 times finer than float32. Equal functions have been seen at 2 to 4 times that share; one element of one
matrix moved by one float32 unit in the last place, at 2^13 times and more. Figures between give the same verdicts."""

_ROUNDING_SLACK = 4.0
"""How far beyond one random rounding's effect another may be, at the logits and at every half of every layer.

Both are largest differences over the same tokens, and the random one moves more than rounding does; see `disturb`."""

BIT_EQUAL, REORDERED, ROUNDED, DIFFERENT, NOT_FINITE = (
    "bit-equal", "equal to rounding", "weights rounded", "different", "not finite",
)  # fmt: skip


@dataclass(frozen=True)
class LogitsReport:
    """How far two models' logits are apart.

    Attributes:
        verdict: whether they are the same model.
        kind: bit-equal; equal to rounding (float64 sees no difference); weights rounded (as far apart as rounding the
            weights that were rounded explains); different; not finite.
        reason: the verdict in words.
        max_abs, mean_abs: differences of logits, computed in `dtype`.
        relative: max_abs over the largest logit of the first model.
        floor: what rounding in `dtype` explains of `relative`: both models' distance from themselves in float64; None
            where it was not needed.
        exact_relative: the largest difference in float64 throughout, over the largest logit; None where not needed.
        tolerance: the largest `exact_relative` of equal functions, or with rounded weights; None where not needed.
        max_abs_allowed: the user's own limit on `max_abs`, in place of the derived one; or None.
        kl_divergence: mean KL(first || second) a token, in nats.
        top1_agreement, top5_agreement: share of tokens whose best one, and set of five best, agree.
        greedy_agreement: share of greedily continued tokens that agree up to the first that does not; None if not run.
        num_tokens: tokens compared.
        layers: differences a layer, in float64 if that was run, else in `dtype`.
        departures: where the second model computes something else, in order; empty if the verdict is good.
        note: what could not be compared.
        routing: of mixtures of experts: `choices` compared, how many are `different`, in which `layers`, the first few
            `examples`, and of all `experts` of all layers how many were `chosen`, each model on the first one's stream;
            None where there are none.
        worst_tokens: those with the largest differences.
        norms: place, and the norms of the tensors used there, of the first and the second model.
        probes: what was run.
        dtype, devices, load, attention: how it was computed.
        versions: of torch and transformers.
        seconds: it took.
    """

    verdict: bool
    kind: str
    reason: str
    max_abs: float
    mean_abs: float
    relative: float
    kl_divergence: float
    top1_agreement: float
    top5_agreement: float
    num_tokens: int
    floor: float | None = None
    exact_relative: float | None = None
    tolerance: float | None = None
    max_abs_allowed: float | None = None
    greedy_agreement: float | None = None
    layers: tuple[LayerDifference, ...] = ()
    departures: tuple[Departure, ...] = ()
    note: str = ""
    routing: dict[str, Any] | None = None
    worst_tokens: tuple[dict[str, Any], ...] = ()
    norms: tuple[tuple[str, dict[str, float], dict[str, float]], ...] = ()
    probes: tuple[dict[str, Any], ...] = ()
    dtype: str = "float32"
    devices: tuple[str, str] = ("cpu", "cpu")
    load: str = "whole"
    attention: tuple[str, str] = ("eager", "eager")
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def _pair(value: str, what: str) -> tuple[str, str]:
    parts = [part.strip() for part in value.split(",")]
    if len(parts) > 2 or not all(parts):
        raise Usage(f"`{value}` is not a {what}, nor two of them with a comma between")
    return parts[0], parts[-1]


def resolve_device(name: str) -> str:
    """A device torch has: `auto` is CUDA where there is one.

    Raises:
        Usage: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Usage(f"`{name}` is not a device", hint="auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Usage(f"there is no device `{name}` here: torch sees {torch.cuda.device_count()} CUDA devices")
    return name


def _free(device: str) -> int:
    """Bytes free for models."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _whole(load: str, paths: tuple[Path, Path], devices: tuple[str, str]) -> bool:
    """Whether to load models whole: if asked for, or where both fit in float64 with room to work."""
    if load not in ("auto", "whole", "layers"):
        raise Usage(f"`{load}` is not a way to load", hint="choose auto, whole or layers")
    eight = [path for path in paths if not is_megatron(path) and block_size(read_config(path))]
    if eight and load == "whole":
        raise Refused(
            "FP8 weights are dequantised as they are read, so the model is run by layers",
            where=str(eight[0]),
            hint="leave out `--load whole`",
        )
    if load != "auto" or eight:
        return load == "whole"
    need = [8 * sum(math.prod(shape) for shape in stored_shapes(path).values()) for path in paths]
    if devices[0] == devices[1]:
        return sum(need) * 1.5 < _free(devices[0])
    return all(n * 1.5 < _free(device) for n, device in zip(need, devices, strict=True))


def _clean(devices: Sequence[str]) -> None:
    gc.collect()
    if any(device.startswith("cuda") for device in devices):
        torch.cuda.empty_cache()


def compare_logits(
    left: str | os.PathLike[str],
    right: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    device: str = "auto",
    load: str = "auto",
    attention: str = "eager",
    prompts: str | os.PathLike[str] | None = None,
    greedy_tokens: int | None = None,
    rounded: str | Mapping[str, str] | None = None,
    max_abs: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LogitsReport:
    """Run the same tokens through two checkpoints, side by side, and compare.

    Args:
        left: a checkpoint directory of any architecture transformers or the reference models know.
        right: another.
        dtype: to compute in: float32, float64 (throughout), bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N; or two with a comma between, for the first model and the second.
        load: `whole` (both models in memory), `layers` (one block at a time), or `auto` (whole where both fit).
        attention: transformers' attention implementation, such as eager or sdpa; or two with a comma between.
        prompts: a file of prompts, one a line, in place of the built-in texts.
        greedy_tokens: how many tokens to continue greedily; None for 16 when whole, none by layers.
        rounded: the dtype the second checkpoint's weights were rounded to on purpose: one for all, or one a tensor.
        max_abs: the largest difference of logits allowed, in place of the derived verdict.
        seed: of the random tokens.
        progress: called with the layers done and their number in all.

    Raises:
        Usage: an unknown dtype or device, or vocabularies of different size.
        LlmconvertError: a checkpoint cannot be loaded.
    """
    started = time.monotonic()
    for kind in (dtype, *([rounded] if isinstance(rounded, str) else (rounded or {}).values())):
        if kind not in _DTYPES and (kind == dtype or kind != _EIGHT):
            raise Usage(f"`{kind}` is not a dtype to compute in", hint=f"choose {', '.join(_DTYPES)}")
    first, second = (resolve_device(name) for name in _pair(device, "device"))
    devices, attentions = (first, second), _pair(attention, "attention implementation")
    left, right = Path(left), Path(right)
    (vocab, longest), (other, other_longest) = limits(config_of(left)), limits(config_of(right))
    # A Megatron checkpoint may know only its padded vocabulary: the other model says what of it is real.
    vocab, other = vocab or other, other or vocab
    if not vocab:
        vocab, other = (int(config_of(path).get("rows") or 0) for path in (left, right))
    if vocab != other:
        raise Usage(f"the vocabularies differ: {vocab} and {other} tokens", where=f"{left}, {right}")
    whole = _whole(load, (left, right), devices)
    probes = make_probes(
        (left, right), vocab, min(longest, other_longest), seed=seed, prompts=None if prompts is None else Path(prompts)
    )
    runs = Runs((left, right), devices, attentions, whole, probes, progress)
    kind = _DTYPES[dtype]
    count = greedy_tokens if greedy_tokens is not None else (_GREEDY_TOKENS if whole else 0)
    plain, agreement = runs.compare(kind, greedy_tokens=count, rounded=bool(rounded))
    metrics = _Metrics(probes, plain.first, plain.second)
    report = LogitsReport(
        verdict=True, kind=BIT_EQUAL, reason="every logit is bit-equal", greedy_agreement=agreement,
        max_abs_allowed=max_abs, note=plain.note, routing=_routing(plain), layers=tuple(plain.layers), norms=tuple(plain.norms),
        probes=tuple(probe.describe() for probe in probes), dtype=dtype, devices=devices, attention=attentions,
        load="whole" if whole else "layers",
        versions={"torch": torch.__version__, "transformers": _version("transformers")}, **metrics.fields(),
    )  # fmt: skip
    if not metrics.finite:
        report = replace(report, verdict=False, kind=NOT_FINITE, reason="some logits are not finite")
    elif metrics.max_abs or kind in (torch.bfloat16, torch.float16):
        # Equal bits in 16 would hide what 16 bits cannot hold.
        wide = plain if kind == torch.float64 else runs.compare(torch.float64, rounded=bool(rounded))[0]
        narrow = runs.forward_both(torch.float32) if kind == torch.float64 else (plain.first, plain.second)
        report = _judge(report, runs, wide, narrow, kind, rounded)
    if max_abs is not None and report.kind != NOT_FINITE:
        within = metrics.max_abs <= max_abs
        words = f"logits differ by at most {metrics.max_abs:.3g}, {max_abs:.3g} allowed"
        report = replace(report, verdict=within, reason=f"{words} ({report.reason})")
    texts = token_texts((left, right), [token["id"] for token in report.worst_tokens]) if report.worst_tokens else None
    if texts:
        named = tuple({**token, "text": text} for token, text in zip(report.worst_tokens, texts, strict=True))
        report = replace(report, worst_tokens=named)
    return replace(report, seconds=round(time.monotonic() - started, 2))


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


class Runs:
    """The runs of a pair: each loads its models anew and lets them go."""

    def __init__(
        self, paths: tuple[Path, Path], devices: tuple[str, str], attentions: tuple[str, str], whole: bool,
        probes: list[Probe], progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.paths, self.devices, self.attentions, self.whole = paths, devices, attentions, whole
        self.probes, self.progress = probes, progress
        configs = [config_of(path) for path in paths]
        sizes = [limits(config)[0] or int(config.get("rows") or 0) for config in configs]
        self.vocab_size = min(size for size in sizes if size) if any(sizes) else 0

    @classmethod
    def of(cls, paths: tuple[Path, Path], device: str, load: str, probes: list[Probe]) -> Runs:
        """Runs on one device."""
        devices = (device, device)
        whole = _whole(load, paths, devices)
        return cls(paths, devices, ("eager", "eager"), whole, probes, lambda done, total: None)

    def _model(self, side: int, dtype: torch.dtype, rounded: Mapping[str, torch.dtype] | None = None) -> Runnable:
        if is_megatron(self.paths[side]):
            size = self.vocab_size or 0
            return ShardedModel(self.paths[side], dtype, self.devices[side], vocab_size=size, rounded=rounded)
        return LayerwiseModel(
            self.paths[side], dtype, self.devices[side], whole=self.whole, attention=self.attentions[side],
            rounded=rounded,
        )  # fmt: skip

    def compare(
        self, dtype: torch.dtype, *, greedy_tokens: int = 0, rounded: bool = False
    ) -> tuple[Sweep, float | None]:
        """Both models side by side; and how far their greedy continuations agree."""
        models = self._model(0, dtype), self._model(1, dtype)
        explain = dtype == torch.float64
        found = sweep(*models, self.probes, explain=explain, rounded=rounded, progress=self.progress)
        for path, model in zip(self.paths, models, strict=True):
            if unused := getattr(model, "unused", []):
                own = f"no code uses {listing(unused)} of {path.name}"
                found.note = f"{found.note}; {own}" if found.note else own
        agreement = _greedy(models, self.probes, greedy_tokens) if greedy_tokens else None
        del models
        _clean(self.devices)
        return found, agreement

    def disturb(self, rounded: Mapping[str, torch.dtype]) -> Sweep:
        """The second model beside itself with some tensors rounded at random."""
        found = sweep(self._model(1, torch.float64), self._model(1, torch.float64, rounded), self.probes, explain=True)
        _clean(self.devices)
        return found

    def forward_both(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of each model alone."""
        return self.forward(0, dtype), self.forward(1, dtype)

    def forward(self, side: int, dtype: torch.dtype | str) -> list[Tensor]:
        """Logits of one model."""
        kind = _DTYPES[dtype] if isinstance(dtype, str) else dtype
        logits = [each.cpu() for each in self._model(side, kind).forward(self.probes)]
        _clean(self.devices)
        return logits


def _greedy(models: tuple[Runnable, Runnable], probes: Sequence[Probe], count: int) -> float:
    """Share of `count` greedy tokens that agree: once one differs the rest continue different texts."""
    probe = probes[0]
    row = probe.input_ids[-1][probe.kept[-1]].tolist()[:_GREEDY_PROMPT]
    for done in range(count):
        best = [int(model.forward([padded("greedy", [row])])[0][0, -1].argmax()) for model in models]
        if best[0] != best[1]:
            return done / count
        row.append(best[0])
    return 1.0


def _largest(probes: Sequence[Probe], a: Sequence[Tensor], b: Sequence[Tensor] | None = None) -> float:
    """max|a - b|, or max|a|, over the tokens that are not padding."""
    worst = 0.0
    for k, probe in enumerate(probes):
        for row in range(probe.input_ids.shape[0]):
            kept = probe.kept[row]
            value = a[k][row][kept].double()
            worst = max(worst, float((value if b is None else value - b[k][row][kept].double()).abs().max()))
    return worst


class _Metrics:
    """Differences of logits, a few tokens at a time."""

    def __init__(self, probes: Sequence[Probe], a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self.max_abs = self.scale = self.total = self.kl = 0.0
        self.top1 = self.top5 = self.tokens = self.entries = 0
        self.finite = True
        self.worst: list[dict[str, Any]] = []
        for probe, mine, theirs in zip(probes, a, b, strict=True):
            for row in range(probe.input_ids.shape[0]):
                places = probe.kept[row].nonzero()[:, 0]
                for low in range(0, len(places), _CHUNK):
                    part = places[low : low + _CHUNK]
                    self._add(probe, row, part, mine[row][part].double(), theirs[row][part].double())
        self.worst = sorted(self.worst, key=lambda entry: -entry["difference"])[:_WORST]

    def _add(self, probe: Probe, row: int, places: Tensor, a: Tensor, b: Tensor) -> None:
        if not (a.isfinite().all() and b.isfinite().all()):
            self.finite = False
            self.max_abs = math.inf
            return
        difference = (a - b).abs()
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.scale = max(self.scale, float(a.abs().max()))
        self.total += float(difference.sum())
        self.entries += difference.numel()
        self.tokens += len(places)
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        five = min(5, a.shape[-1])
        best, others = a.topk(five).indices, b.topk(five).indices
        self.top1 += int((best[:, 0] == others[:, 0]).sum())
        self.top5 += int((best.sort(-1).values == others.sort(-1).values).all(-1).sum())
        by_token = difference.amax(-1)
        for k in by_token.topk(min(_WORST, len(places))).indices.tolist():
            if by_token[k] > 0:
                place = int(places[k])
                self.worst.append({
                    "probe": probe.name, "row": row, "token": place,
                    "position": int(probe.position_ids[row, place]), "id": int(probe.input_ids[row, place]),
                    "difference": float(by_token[k]), "first_best": int(best[k, 0]), "second_best": int(others[k, 0]),
                })  # fmt: skip

    def fields(self) -> dict[str, Any]:
        """The report's fields."""
        tokens = max(1, self.tokens)
        return {
            "max_abs": self.max_abs, "mean_abs": self.total / max(1, self.entries),
            "relative": self.max_abs / (self.scale or 1.0), "kl_divergence": max(0.0, self.kl / tokens),
            "top1_agreement": self.top1 / tokens, "top5_agreement": self.top5 / tokens, "num_tokens": self.tokens,
            "worst_tokens": tuple(self.worst),
        }  # fmt: skip


def _routing(found: Sweep) -> dict[str, Any] | None:
    """The routers' decisions over all layers."""
    if not found.routing:
        return None
    return {
        "choices": sum(layer.choices for layer in found.routing),
        "different": sum(layer.different for layer in found.routing),
        "layers": [layer.index for layer in found.routing if layer.different],
        "examples": [
            dict(zip(("layer", "probe", "row", "token", "first", "second"), (layer.index, *example), strict=True))
            for layer in found.routing
            for example in layer.examples
        ][:_WORST],
        "experts": sum(layer.experts for layer in found.routing),
        "chosen": sum(layer.chosen for layer in found.routing),
    }


def _judge(
    report: LogitsReport, runs: Runs, wide: Sweep, narrow: tuple[list[Tensor], list[Tensor]], kind: torch.dtype,
    rounded: str | Mapping[str, str] | None,
) -> LogitsReport:  # fmt: skip
    """Tell rounding from a difference of functions, with both models in float64 throughout.

    With A, B the models as computed in `narrow` and A', B' in float64: |A - B| ≤ |A - A'| + |A' - B'| + |B' - B|. The
    outer two are rounding; the middle one would be float64's share of them if the functions were equal.
    """
    probes = runs.probes
    scale = _largest(probes, wide.first) or 1.0
    exact = _largest(probes, wide.first, wide.second) / scale
    noise = sum(_largest(probes, a, b) for a, b in zip(narrow, (wide.first, wide.second), strict=True)) / scale
    computed = torch.float32 if kind == torch.float64 else kind
    share = torch.finfo(torch.float64).eps / torch.finfo(computed).eps
    tolerance = max(noise, torch.finfo(computed).eps) * share * _SLACK
    floor = noise * share if kind == torch.float64 else noise
    report = replace(
        report, floor=floor, exact_relative=exact, tolerance=tolerance, layers=tuple(wide.layers),
        note=wide.note or report.note, routing=_routing(wide),
    )  # fmt: skip
    if not math.isfinite(exact):
        return replace(report, verdict=False, kind=NOT_FINITE, reason="some logits are not finite in float64")
    if exact <= tolerance:
        reason = (
            f"the functions are equal: in float64 logits differ by {exact:.1e} of their scale; "
            f"the {report.relative:.1e} in {report.dtype} is rounding (up to {floor:.1e} expected)"
        )
        return replace(report, kind=REORDERED if report.max_abs else BIT_EQUAL, reason=reason)
    departures = [d for d in wide.departures if d.difference > tolerance]
    if rounded:
        by_name = dict.fromkeys(stored_shapes(runs.paths[1]), rounded) if isinstance(rounded, str) else dict(rounded)
        moved = runs.disturb({name: getattr(torch, dtype) for name, dtype in by_name.items()})
        allowed = _ROUNDING_SLACK * _largest(probes, moved.first, moved.second) / scale
        by_place = {d.place: _ROUNDING_SLACK * d.difference for d in moved.departures}
        departures = [d for d in departures if d.difference > by_place.get(d.place, 0.0)]
        report = replace(report, tolerance=max(tolerance, allowed))
        if exact <= allowed and not departures:
            kinds = ", ".join(sorted(set(by_name.values())))
            reason = (
                f"logits differ by {exact:.1e} of their scale, as weights rounded to {kinds} make them "
                f"(at most {allowed:.1e}, from rounding {len(by_name)} tensors at random once more)"
            )
            return replace(report, kind=ROUNDED, reason=reason)
    reason = f"in float64 logits differ by {exact:.1e} of their scale (at most {report.tolerance:.1e} allowed)"
    if departures:
        others = f", and {len(departures) - 1} other places" if len(departures) > 1 else ""
        reason += f"; they part at {departures[0].place}: {departures[0].why}{others}"
    return replace(report, verdict=False, kind=DIFFERENT, reason=reason, departures=tuple(departures))
