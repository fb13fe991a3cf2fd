"""A comparison of logits as one self-contained HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from string import Template
from typing import Any

from llmconvert.terminal import printable

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
.verdict { padding: .7em 1em; border-radius: 6px; background: $colour; }
table { border-collapse: collapse; font-size: .9em; } td, th { padding: .2em .8em .2em 0; text-align: left;
vertical-align: top; border-bottom: 1px solid #eee; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .92em; } svg text { font: 11px system-ui, sans-serif; fill: #555; } .scroll { overflow-x: auto; }
</style></head><body>
<h1>$title</h1>
<p><code>$first</code> (first) against <code>$second</code> (second)</p>
<p class="verdict">$verdict</p>
$body
<p>$how</p>
</body></html>
""")
_COLOURS = {"hidden": "#4477aa", "attention": "#ee7733", "mlp": "#228833"}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _FLOOR = 900, 300, 60, 40, -18.0


def escape(text: str) -> str:
    """Text as HTML shows it, with nothing in it that turns the direction of writing or cannot be encoded."""
    return html.escape(printable(text))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Cells that are numbers stand right; text is escaped."""
    lines = ["<div class='scroll'><table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    for row in rows:
        cells = (
            f"<td class='n'>{_number(cell)}</td>"
            if cell is None or isinstance(cell, int | float)
            else f"<td>{escape(str(cell))}</td>"
            for cell in row
        )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def _plot(layers: Sequence[Mapping[str, Any]], tolerance: float | None) -> str:
    """Differences a layer, on a logarithmic scale from 1e-18 to 1 and beyond."""

    def exponent(value: float | None) -> float | None:
        if value is None:
            return None
        return max(_FLOOR, min(2.0, math.log10(value))) if value > 0 else _FLOOR

    def x(index: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - 20) * (index / max(1, len(layers) - 1))

    def y(power: float) -> float:
        return 10 + (_HEIGHT - _BOTTOM - 10) * (2.0 - power) / (2.0 - _FLOOR)

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='difference of each layer'>"]
    for power in range(int(_FLOOR), 3, 4):
        label = "0" if power == _FLOOR else f"1e{power}"
        parts.append(f"<line x1='{_LEFT}' x2='{_WIDTH - 20}' y1='{y(power):.1f}' y2='{y(power):.1f}' stroke='#eee'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{y(power) + 4:.1f}' text-anchor='end'>{label}</text>")
    every = max(1, len(layers) // 20)
    for layer in layers[::every]:
        parts.append(
            f"<text x='{x(layer['index']):.1f}' y='{_HEIGHT - 18}' text-anchor='middle'>{layer['index']}</text>"
        )
    parts.append(f"<text x='{_WIDTH / 2}' y='{_HEIGHT - 3}' text-anchor='middle'>layer</text>")
    if (limit := exponent(tolerance)) is not None:
        ends = f"x1='{_LEFT}' x2='{_WIDTH - 20}' y1='{y(limit):.1f}' y2='{y(limit):.1f}'"
        parts.append(f"<line {ends} stroke='#cc3311' stroke-dasharray='5 4'><title>tolerance</title></line>")
    for key, colour in _COLOURS.items():
        places = [(x(layer["index"]), exponent(layer[key])) for layer in layers]
        points = [(a, y(power)) for a, power in places if power is not None]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='1.5'/>")
        for layer, (a, b) in zip(layers, points, strict=False):
            tip = f"<title>layer {layer['index']}, {key}: {_number(layer[key])}</title>"
            parts.append(f"<circle cx='{a:.1f}' cy='{b:.1f}' r='2.5' fill='{colour}'>{tip}</circle>")
    legend = "".join(
        f"<tspan fill='{colour}' dx='14'>● {escape(text)}</tspan>"
        for colour, text in zip(_COLOURS.values(), (
            "residual stream, each model on its own", "attention half alone", "MLP half alone"), strict=True)
    )  # fmt: skip
    return "".join([*parts, f"<text x='{_LEFT}' y='10'>{legend}</text></svg>"])


def render_page(report: Mapping[str, Any], first: str, second: str, weights: Mapping[str, Any] | None = None) -> str:
    """The page.

    Args:
        report: `LogitsReport.to_dict()`.
        first: what the first checkpoint is called.
        second: the second.
        weights: what a comparison of weights found, with `kind` and `reason`; or None.

    Returns:
        HTML that needs nothing from elsewhere.
    """
    measured = [(name.replace("_", " "), report[name]) for name in (
        "max_abs", "mean_abs", "relative", "floor", "exact_relative", "tolerance", "kl_divergence", "top1_agreement",
        "top5_agreement", "greedy_agreement", "num_tokens")]  # fmt: skip
    body = ["<h2>Logits</h2>", _table(("", ""), measured)]
    if weights:
        body.append(f"<h2>Weights</h2><p>{escape(weights['kind'])}: {escape(weights['reason'])}</p>")
    if report["routing"]:
        routing = report["routing"]
        body += [
            "<h2>Router decisions</h2>",
            f"<p>{routing['different']:,} of {routing['choices']:,} choices differ; {routing['chosen']:,} of "
            f"{routing['experts']:,} experts were chosen at all.</p>",
        ]
        if routing["examples"]:
            token = ("layer", "probe", "row", "token")
            sent = [(*(e[key] for key in token), str(e["first"]), str(e["second"])) for e in routing["examples"]]
            body.append(_table((*token, "first sends to", "second sends to"), sent))
    if report["departures"]:
        places = [
            (d["part"] if d["layer"] is None else f"layer {d['layer']}, {d['part']}", d["difference"], d["why"],
             ", ".join(d["first"]), ", ".join(d["second"]))
            for d in report["departures"]
        ]  # fmt: skip
        body += [
            "<h2>Where they part</h2>",
            _table(("place", "difference", "what the numbers say", "first", "second"), places),
        ]
    if report["layers"]:
        caption = "in float64" if report["exact_relative"] is not None else f"in {report['dtype']}"
        body += [f"<h2>Difference of each layer, {caption}</h2>", _plot(report["layers"], report["tolerance"])]
    if report["note"]:
        body.append(f"<p>{escape(report['note'])}</p>")
    if report["worst_tokens"]:
        tokens = [(t["probe"], t["row"], t["token"], t["position"], t["id"], t.get("text", ""), t["difference"],
                 t["first_best"], t["second_best"]) for t in report["worst_tokens"]]  # fmt: skip
        head = ("probe", "row", "token", "position", "id", "text", "difference", "best (first)", "best (second)")
        body += ["<h2>Worst tokens</h2>", _table(head, tokens)]
    rows: list[tuple[Any, ...]] = []
    for place, mine, theirs in report["norms"]:
        totals = [math.sqrt(sum(norm**2 for norm in side.values())) for side in (mine, theirs)]
        cells = ["; ".join(f"{name} {norm:.4g}" for name, norm in side.items()) for side in (mine, theirs)]
        rows.append((place, totals[0], totals[1], *cells))
    if rows:
        columns = ("place", "all (first)", "all (second)", "tensors (first)", "tensors (second)")
        body += ["<h2>Frobenius norms of the tensors used</h2>", _table(columns, rows)]
    body += [
        "<h2>Probes</h2>",
        _table(("name", "rows", "tokens", "last position"), (p.values() for p in report["probes"])),
    ]
    devices = " and ".join(dict.fromkeys(report["devices"]))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return _PAGE.substitute(
        title="The same model" if report["verdict"] else "Not the same model",
        colour="#e3f2e1" if report["verdict"] else "#fbe3e0",
        first=escape(first), second=escape(second), verdict=escape(f"{report['kind']}: {report['reason']}"),
        body="\n".join(body),
        how=escape(f"Computed in {report['dtype']} on {devices}, loaded {report['load']}, {versions}; {report['seconds']} s."),
    )  # fmt: skip
