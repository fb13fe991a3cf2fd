"""What was looked at, as PNG; two models side by side."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmconvert.debug.measures import AttentionWeights, CosDistance, TopkToken
from llmconvert.debug.tables import Seen
from llmconvert.errors import Refused, Usage

_MOST_HEADS, _MOST_TOKENS = 16, 40
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
    "Heiti SC", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip
"""Fonts that have what DejaVu lacks; the first installed is fallen back on."""


def save(found: Sequence[Seen], path: Path) -> str | None:
    """Draw one model, or two of the same kind side by side.

    Args:
        found: what was looked at.
        path: the file to write: PNG, or what its ending says.

    Returns:
        What to know of it, or None.

    Raises:
        Refused: matplotlib is not installed.
        Usage: there is no such kind of image.
        OSError: the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib import font_manager
        from matplotlib.figure import Figure
    except ImportError:
        raise Refused("plots need matplotlib", hint="pip install matplotlib") from None
    installed = set(font_manager.get_font_names())
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *(font for font in _CJK_FONTS if font in installed)]}):
        figure = _draw(Figure, found)
        kind = path.suffix[1:].lower() or "png"
        if kind not in figure.canvas.get_supported_filetypes():
            raise Usage(f"there is no kind of image `{kind}`", where=str(path), hint="name it .png")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            figure.savefig(path, dpi=150, format=kind)
    if any("Glyph" in str(warning.message) for warning in told):
        return "no installed font has all characters of the tokens: install Noto Sans CJK, say"
    return None


def _draw(figure_class: Any, found: Sequence[Seen]) -> Any:
    if isinstance(found[0], CosDistance):
        return _cosines(figure_class, [each for each in found if isinstance(each, CosDistance)])
    if isinstance(found[0], TopkToken):
        return _topk(figure_class, [each for each in found if isinstance(each, TopkToken)])
    return _attention(figure_class, [each for each in found if isinstance(each, AttentionWeights)])


def _cosines(figure_class: Any, found: Sequence[CosDistance]) -> Any:
    figure = figure_class(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for each, style in zip(found, ("-", "--"), strict=False):
        low, high = ([pick(values) for values in each.cosine] for pick in (min, max))
        (line,) = axes.plot(each.layers, each.mean, style, marker="o", label=each.model)
        axes.fill_between(each.layers, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="layer", ylabel="cosine of input and output", title="mean over tokens, and their range")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _topk(figure_class: Any, found: Sequence[TopkToken]) -> Any:
    first = max(0, len(found[0].tokens) - _MOST_TOKENS)
    width, height = len(found[0].tokens) - first, max(len(each.layers) for each in found)
    figure = figure_class(figsize=(len(found) * (2 + 0.9 * width), 1.5 + 0.35 * height), layout="constrained")
    for axes, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        best = [[place[0] for place in row[first:]] for row in each.probability]
        image = axes.imshow(best, vmin=0, vmax=1, aspect="auto", cmap="Blues", origin="lower")
        for y, row in enumerate(each.text):
            for x, place in enumerate(row[first:]):
                colour = "white" if best[y][x] > 0.6 else "black"
                axes.text(x, y, _plain(place[0]), ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(width), [_plain(token) for token in each.tokens[first:]], rotation=45, ha="right")
        axes.set_yticks(range(len(each.layers)), [str(layer) for layer in each.layers])
        more = f", the last {width} of {len(each.tokens)} tokens" if first else ""
        axes.set(xlabel="token", ylabel="layer", title=each.model + more)
        figure.colorbar(image, ax=axes, label="probability")
    return figure


def _attention(figure_class: Any, found: Sequence[AttentionWeights]) -> Any:
    heads = [min(_MOST_HEADS, len(each.weights)) for each in found]
    columns = min(4, max(heads) + 1)
    rows = [-(-(count + 1) // columns) for count in heads]
    figure = figure_class(figsize=(3 * columns, 3 * sum(rows) + 0.5 * len(found)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False, height_ratios=rows)[:, 0]
    for part, each, count, high in zip(parts, found, heads, rows, strict=True):
        more = f", the first {count} of {len(each.weights)} heads" if count < len(each.weights) else ""
        part.suptitle(f"{each.model}, layer {each.layer}{more}", fontsize=9)
        mean = [
            [sum(column) / len(each.weights) for column in zip(*rows_of, strict=True)]
            for rows_of in zip(*each.weights, strict=True)
        ]
        panels = [("mean", mean), *((f"head {i}", each.weights[i]) for i in range(count))]
        places = part.subplots(high, columns, squeeze=False).ravel()
        for axes, (title, matrix) in zip(places, panels, strict=False):
            axes.imshow(matrix, vmin=0, vmax=1, cmap="magma")
            axes.set_title(title, fontsize=8)
            ticks = range(len(each.tokens)) if len(each.tokens) <= 24 else range(0, len(each.tokens), 8)
            axes.set_xticks(ticks, [_plain(each.tokens[i]) for i in ticks], rotation=90, fontsize=5)
            axes.set_yticks(ticks, [_plain(each.tokens[i]) for i in ticks], fontsize=5)
        for axes in places[len(panels) :]:
            axes.axis("off")
    return figure


def _plain(token: str) -> str:
    # Dollar signs would start mathematics, and a line break another line.
    return token.replace("$", r"\$").replace("\n", "⏎") or "∅"
