"""What was looked at, as PNG; two models side by side."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmconvert.debug.measures import AttentionWeights, CosDistance, TopkToken
from llmconvert.debug.tables import Seen
from llmconvert.errors import Refused, Usage
from llmconvert.terminal import printable

_MOST_HEADS, _MOST_TOKENS, _MOST_ROWS, _MOST_LETTERS = 16, 40, 160, 14
_MARK = "#00e5ff"
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
        raise Refused("plots need matplotlib", hint="pip install 'llmconvert[plot]'") from None
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
        (line,) = axes.plot(each.layers, each.mean, style, marker="o", label=_name(each.model))
        axes.fill_between(each.layers, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="layer", ylabel="cosine of input and output", title="mean over tokens, and their range")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _topk(figure_class: Any, found: Sequence[TopkToken]) -> Any:
    """A row for each rank within each layer, the last layer on top, as many ranks as there is room for."""
    count, layers = len(found[0].tokens), max(len(each.layers) for each in found)
    first = max(0, count - _MOST_TOKENS)
    width, k = count - first, max(len(each.text[0][0]) for each in found)
    ranks = min(k, max(1, _MOST_ROWS // layers))
    size = (len(found) * (2 + 0.9 * width), 1.8 + 0.24 * layers * ranks)
    figure = figure_class(figsize=size, layout="constrained")
    for axes, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        places = [(row, rank) for row in reversed(range(len(each.layers))) for rank in range(ranks)]
        best = [[each.probability[row][x][rank] for x in range(first, count)] for row, rank in places]
        image = axes.imshow(best, vmin=0, vmax=1, aspect="auto", cmap="Blues")
        for y, (row, rank) in enumerate(places):
            for x, place in enumerate(each.text[row][first:]):
                colour = "white" if best[y][x] > 0.6 else "black"
                axes.text(x, y, _plain(place[rank]), ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(width), [_plain(token) for token in each.tokens[first:]], rotation=45, ha="right")
        if len(each.layers) > 1:
            middles = [ranks * (n + 0.5) - 0.5 for n in range(len(each.layers))]
            axes.set_yticks(middles, [str(layer) for layer in reversed(each.layers)])
            for border in range(1, len(each.layers)):
                axes.axhline(ranks * border - 0.5, color="grey", linewidth=0.8)
        else:
            axes.set_yticks(range(ranks), [str(rank + 1) for rank in range(ranks)])
        ylabel = "layer" if len(each.layers) > 1 else "rank"
        ylabel += f", best of {ranks} on top" if len(each.layers) > 1 and ranks > 1 else ""
        of = f", layer {each.layers[0]}" if len(each.layers) == 1 else ""
        of += f", the likeliest {ranks} of {k}" if ranks < k else ""
        of += f", the last {width} of {count} tokens" if first else ""
        axes.set(xlabel="token", ylabel=ylabel, title=_name(each.model) + of)
        figure.colorbar(image, ax=axes, label="probability of the next token")
    return figure


def _attention(figure_class: Any, found: Sequence[AttentionWeights]) -> Any:
    heads = [min(_MOST_HEADS, len(each.weights)) for each in found]
    columns = min(4, max(heads) + 1)
    rows = [-(-(count + 1) // columns) for count in heads]
    figure = figure_class(figsize=(3 * columns + 0.8, 3 * sum(rows) + 0.7 * len(found)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False, height_ratios=rows)[:, 0]
    for part, each, count, high in zip(parts, found, heads, rows, strict=True):
        more = f", the first {count} of {len(each.weights)} heads" if count < len(each.weights) else ""
        part.suptitle(f"{_name(each.model)}, layer {each.layer}{more}{_marked(each)}", fontsize=9)
        mean = [
            [sum(column) / len(each.weights) for column in zip(*rows_of, strict=True)]
            for rows_of in zip(*each.weights, strict=True)
        ]
        panels = [("mean", mean), *((f"head {i}", each.weights[i]) for i in range(count))]
        places = part.subplots(high, columns, squeeze=False).ravel()
        for number, (axes, (title, matrix)) in enumerate(zip(places, panels, strict=False)):
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="magma")
            ticks = _ticks(each)
            for axis, letter, place in ((axes.yaxis, "A", each.token_a), (axes.xaxis, "B", each.token_b)):
                names = [f"{letter} {_plain(each.tokens[i])}" if i == place else _plain(each.tokens[i]) for i in ticks]
                labels = axis.set_ticks(ticks, names, fontsize=5)
                for tick in labels:
                    tick.label1.set_fontweight("bold" if round(tick.get_loc()) == place else "normal")
            axes.tick_params(axis="x", labelrotation=90)
            axes.set_title(title if each.between is None else f"{title}: {_weight(each, matrix):.3f}", fontsize=8)
            axes.set_xlabel("key" if number + columns >= len(panels) else "", fontsize=7)
            axes.set_ylabel("query" if number % columns == 0 else "", fontsize=7)
            _mark(axes, each)
        for axes in places[len(panels) :]:
            axes.axis("off")
        part.colorbar(image, ax=list(places), label="attention weight", shrink=0.8)
    return figure


def _weight(each: AttentionWeights, matrix: Sequence[Sequence[float]]) -> float:
    return matrix[each.token_a or 0][each.token_b or 0]


def _marked(each: AttentionWeights) -> str:
    """Which tokens are marked, for the title."""
    if each.token_a is None or each.token_b is None:
        return ""
    query, key = (f"{i}:{_plain(each.tokens[i])}" for i in (each.token_a, each.token_b))
    return f"\nA = {query} (query), B = {key} (key)"


def _ticks(each: AttentionWeights) -> list[int]:
    """Which tokens are named: all of a few, every eighth of many, those looked at always."""
    count = len(each.tokens)
    own = {place for place in (each.token_a, each.token_b) if place is not None}
    if count <= 24:
        return list(range(count))
    return sorted(own | {i for i in range(0, count, 8) if all(abs(i - place) > 3 for place in own)})


def _mark(axes: Any, each: AttentionWeights) -> None:
    """Show where the query and the key looked at meet: a box, and lines to their names."""
    if each.token_a is None or each.token_b is None:
        return
    from matplotlib.patches import Rectangle

    axes.axhline(each.token_a, color=_MARK, linewidth=0.6, alpha=0.7)
    axes.axvline(each.token_b, color=_MARK, linewidth=0.6, alpha=0.7)
    axes.add_patch(
        Rectangle((each.token_b - 0.5, each.token_a - 0.5), 1, 1, fill=False, edgecolor=_MARK, linewidth=1.5)
    )


def _name(model: str) -> str:
    return printable(model).replace("$", r"\$")


def _plain(token: str) -> str:
    """A token as matplotlib shows it: blanks seen, what is not printable as a code, no dollar that starts mathematics."""
    shown = printable(token).replace(" ", "␣")
    shown = shown if len(shown) <= _MOST_LETTERS else shown[: _MOST_LETTERS - 1] + "…"
    return shown.replace("$", r"\$") or "∅"
