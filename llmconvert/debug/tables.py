"""What was looked at, as tables for the terminal; two models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from llmconvert.debug.measures import AttentionWeights, CosDistance, TopkToken
from llmconvert.terminal import printable

Seen = CosDistance | TopkToken | AttentionWeights

_SHADES = " ░▒▓█"
_MOST_COLUMNS, _MOST_SHADES = 10, 48


def table(found: Sequence[Seen]) -> Any:
    """One table for one model, or for two of the same kind side by side."""
    first = found[0]
    if isinstance(first, CosDistance):
        title, body = _cosines([each for each in found if isinstance(each, CosDistance)])
    elif isinstance(first, TopkToken):
        title, body = _topk([each for each in found if isinstance(each, TopkToken)])
    else:
        title, body = _attention([each for each in found if isinstance(each, AttentionWeights)])
    # Not the table's own title, which is broken to the table's width.
    return Group(Text(printable(_title(title, found))), body)


def _names(found: Sequence[Seen]) -> list[str]:
    return [each.model for each in found] if len(found) == 1 else ["A", "B"]


def _title(kind: str, found: Sequence[Seen]) -> str:
    if len(found) == 1:
        return f"{kind}: {found[0].model}"
    return f"{kind}: A = {found[0].model}, B = {found[1].model}"


def _cosines(found: Sequence[CosDistance]) -> tuple[str, Table]:
    result = Table()
    result.add_column("layer", justify="right")
    names = [""] if len(found) == 1 else ["A ", "B "]
    for name in names:
        for head in ("mean", "least", "at"):
            result.add_column(f"{name}{head}", justify="right" if head != "at" else "left")
    if len(found) == 1:
        result.add_column("")
    else:
        result.add_column("A − B", justify="right")
    for row in range(max(len(each.layers) for each in found)):
        cells: list[str] = []
        for each in found:
            if row >= len(each.layers):
                cells += ["", "", ""]
                continue
            values = each.cosine[row]
            place = values.index(min(values))
            cells += [f"{each.mean[row]:.4f}", f"{min(values):.4f}", f"{place}:{each.tokens[place]!r}"]
        number = next(each.layers[row] for each in found if row < len(each.layers))
        if len(found) == 1:
            last = "█" * round(20 * max(0.0, found[0].mean[row]))
        else:
            both = all(row < len(each.mean) for each in found)
            last = f"{found[0].mean[row] - found[1].mean[row]:+.1e}" if both else ""
        result.add_row(str(number), *cells, last)
    return "cosine between a layer's input and output", result


def _topk(found: Sequence[TopkToken]) -> tuple[str, Table]:
    title = "likeliest next tokens (logit lens)"
    length = len(found[0].tokens)
    first = max(0, length - _MOST_COLUMNS) if len(found[0].layers) > 1 else 0
    if first:
        title += f", the last {_MOST_COLUMNS} of {length} tokens (`--json` has all)"
    one = len(found[0].layers) == 1
    result = Table()
    if one:
        result.add_column("position", justify="right")
        result.add_column("token")
        for name in _names(found):
            number = found[0 if name != "B" else 1].layers[0]
            result.add_column(f"layer {number}" if len(found) == 1 else f"{name}, layer {number}")
        for place, token in enumerate(found[0].tokens):
            cells = [
                "  ".join(
                    f"{t!r} {p:.3f}" for t, p in zip(each.text[0][place], each.probability[0][place], strict=True)
                )
                for each in found
            ]
            result.add_row(str(place), repr(token), *cells)
        return title, result
    result.add_column("layer", justify="right")
    for place in range(first, length):
        result.add_column(f"{place}:{found[0].tokens[place]!r}", overflow="fold")
    for row in range(max(len(each.layers) for each in found)):
        cells = []
        for place in range(first, length):
            best = [
                f"{each.text[row][place][0]!r} {each.probability[row][place][0]:.2f}" if row < len(each.layers) else "–"
                for each in found
            ]
            cells.append(best[0] if len(best) == 1 else "\n".join(best))
        number = next(each.layers[row] for each in found if row < len(each.layers))
        result.add_row(str(number), *cells)
    return title, result


def _attention(found: Sequence[AttentionWeights]) -> tuple[str, Table]:
    first = found[0]
    if first.between is not None:
        query, key = first.token_a or 0, first.token_b or 0
        title = f"layer {first.layer}, weight from {query}:{first.tokens[query]!r} to {key}:{first.tokens[key]!r}"
        result = Table()
        result.add_column("head", justify="right")
        for name in ["weight"] if len(found) == 1 else ["A", "B", "A − B"]:
            result.add_column(name, justify="right")
        for head in range(max(len(each.between or ()) for each in found)):
            values = [each.between[head] if each.between and head < len(each.between) else None for each in found]
            cells = ["" if value is None else f"{value:.6f}" for value in values]
            if len(values) == 2:
                a, b = values
                cells.append("" if a is None or b is None else f"{a - b:+.1e}")
            result.add_row(str(head), *cells)
        return title, result
    title = f"layer {first.layer}, attention weights, mean over heads"
    result = Table()
    result.add_column("query")
    shaded = len(first.tokens) * len(found) <= _MOST_SHADES
    for name in _names(found):
        if shaded:
            result.add_column(f"keys 0 … {len(first.tokens) - 1}" if len(found) == 1 else name)
        result.add_column("most to" if shaded or len(found) == 1 else f"{name}: most to")
    for query, token in enumerate(first.tokens):
        cells = []
        for each in found:
            rows = [head[query] for head in each.weights]
            mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            best = mean.index(max(mean))
            shades = "".join(_SHADES[min(4, round(4 * value**0.5))] for value in mean)
            cells += [shades] if shaded else []
            cells += [f"{best}:{each.tokens[best]!r} {mean[best]:.3f}"]
        result.add_row(f"{query}:{token!r}", *cells)
    return title, result
