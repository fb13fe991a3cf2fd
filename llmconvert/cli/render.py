"""Reports as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llmconvert.terminal import printable

if TYPE_CHECKING:
    from llmconvert.converters.running import Report


def size(count: int) -> str:
    """Bytes as people write them."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def _text(lines: Iterable[str]) -> str:
    """Lines put together; a line break within one, which came with a name, is shown as one."""
    return "\n".join(map(printable, lines))


def report(found: Report, *, dry_run: bool) -> str:
    """What a conversion did, or would do."""
    arrow = f"{found.source_architecture} → {found.target_architecture}"
    if found.unchanged:
        lines = [f"nothing to do, an earlier run converted {arrow}: {found.destination}"]
    elif found.published:
        lines = [f"converted {arrow}: {found.destination}"]
    else:
        lines = [f"plan for {arrow}: {found.source} → {found.destination}" + (" (nothing written)" if dry_run else "")]
    dtypes = ", ".join(f"{count} {name}" for name, count in found.dtype.items())
    lines.append(
        f"  tensors   {found.tensors_read} read, {found.tensors_written} written ({dtypes}), {size(found.bytes_written)}"
    )
    for step in found.steps:
        lines += [f"  rewrite   {step['name']} [{step['exactness']}]", f"            because {step['why']}"]
    if not found.steps:
        lines.append("  rewrite   none: bytes move, names change [bit-exact]")
    for why in dict.fromkeys(found.dropped.values()):
        names = [name for name, reason in found.dropped.items() if reason == why]
        lines.append(f"  dropped   {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}")
    lines += [f"  left      {name}: {why}" for name, why in found.not_carried.items()]
    lines += [f"  note      {note}" for note in found.notes]
    ledger = found.ledger
    lines.append(
        f"  ledger    every row of {ledger['consumed']} tensors used, {len(found.dropped)} dropped by rule, "
        f"{ledger['filled']} filled with a constant; every output byte written once"
    )
    trip = found.roundtrip
    if trip is not None:
        parts = [f"{trip['bitwise']} tensors come back bit for bit"]
        if trip["rounded"]:
            parts.append(f"{trip['rounded']} to rounding (at most {trip['largest_error']:.1e} of their scale)")
        if trip["quantised"]:
            parts.append(f"{trip['quantised']} to FP8 (at most {trip['largest_error']:.1e} of their scale)")
        if trip["one_way"]:
            parts.append(f"{trip['one_way']} cannot come back and were recomputed")
        lines.append("  proof     " + ", ".join(parts))
        if found.loading is not None:
            lines.append(f"  loading   {found.loading}")
        if found.logits is not None:
            lines.append(f"  logits    {found.logits['reason']}")
        if found.tokenizer is not None:
            lines.append(f"  tokenizer {found.tokenizer['reason']}")
            lines += [f"  note      {note}" for note in found.tokenizer["notes"]]
    elif found.published:
        lines.append("  proof     none (--verify none)")
    else:
        lines.append(f"  disk      {size(found.disk_needed)} needed")
    return _text(lines)


_LAYERS_SHOWN = 12


def _routing(routing: Mapping[str, Any]) -> str:
    """What the routers decided, in a line."""
    different, layers = routing["different"], routing["layers"]
    share = f"{different:,} of {routing['choices']:,} choices differ"
    where = f" ({different / routing['choices']:.2%}), in layer{'s' * (len(layers) > 1)} " if different else ""
    named = ", ".join(map(str, layers[:8])) + (" and others" if len(layers) > 8 else "") if different else ""
    never = routing["experts"] - routing["chosen"]
    unseen = f"; {never:,} of {routing['experts']:,} experts were never chosen" if never > 0 else ""
    return share + where + named + unseen


def comparison(found: dict[str, Any], first: str, second: str) -> Any:
    """Two checkpoints' logits, side by side."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text(
        "same model" if found["verdict"] else "NOT the same model",
        style="bold green" if found["verdict"] else "bold red",
    )
    parts: list[Any] = [title.append(f": {printable(found['reason'])}", style="default not bold")]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    rows = [
        ("largest difference", f"{found['max_abs']:.3g}, {found['relative']:.2e} of the largest logit, in {found['dtype']}"),
        ("mean difference", f"{found['mean_abs']:.3g}"),
        ("rounding explains", _scientific(found["floor"], "nothing to explain")),
        ("in float64", _scientific(found["exact_relative"], "not needed", found["tolerance"])),
        ("KL divergence", f"{found['kl_divergence']:.2e} nats a token"),
        ("agreement", f"top-1 {found['top1_agreement']:.2%}, top-5 {found['top5_agreement']:.2%}, greedy "
         + ("not run" if found["greedy_agreement"] is None else f"{found['greedy_agreement']:.0%}")),
        ("compared", f"{found['num_tokens']} tokens on {' and '.join(dict.fromkeys(found['devices']))}, "
         f"models {'whole' if found['load'] == 'whole' else 'by layers'}, {found['seconds']} s"),
    ]  # fmt: skip
    if found.get("weights"):
        rows.append(("weights", f"{found['weights']['kind']}: {found['weights']['reason']}"))
    if found.get("tokenizer"):
        verdict = "NOT the same: " if found["tokenizer"]["verdict"] is False else ""
        rows.append(("tokenizer", verdict + found["tokenizer"]["reason"]))
    if found.get("reader"):
        engine = found["reader"]
        rows.append((f"{engine['engine']} {engine['version']}", f"{engine['reason']}, {engine['num_tokens']} tokens"))
    if found["routing"]:
        rows.append(("router", _routing(found["routing"])))
    if found["note"]:
        rows.append(("note", found["note"]))
    for name, value in rows:
        table.add_row(name, printable(value))
    parts.append(table)
    if found["departures"]:
        departures = Table(title="where they part", title_justify="left", box=None, padding=(0, 2, 0, 2))
        for column in ("place", "difference", "what the numbers say", "tensors of the second"):
            departures.add_column(column, overflow="fold")
        for d in found["departures"][:_LAYERS_SHOWN]:
            place = d["part"] if d["layer"] is None else f"layer {d['layer']}, {d['part']}"
            cells = (place, f"{d['difference']:.1e}", d["why"], ", ".join(d["second"]))
            departures.add_row(*map(printable, cells))
        parts.append(departures)
        if len(found["departures"]) > _LAYERS_SHOWN:
            parts.append(
                f"  … and {len(found['departures']) - _LAYERS_SHOWN} more places (`--json` and `--report` have all)"
            )
    return Group(*parts)


def _scientific(value: float | None, otherwise: str, allowed: float | None = None) -> str:
    if value is None:
        return otherwise
    return f"{value:.2e}" + (f", {allowed:.1e} allowed" if allowed is not None else "")


def there_and_back(found: Any) -> str:
    """A trip there and back."""
    lines = [
        f"{found.there.source_architecture} → {found.there.target_architecture} → {found.back.target_architecture}: {found.reason}"
    ]
    for name, report in (("there", found.there), ("back", found.back)):
        logits = report.logits["reason"] if report.logits else "not compared"
        tokenizer = f"; tokenizer: {report.tokenizer['reason']}" if report.tokenizer else ""
        lines.append(f"  {name:<6}{len(report.steps)} rewrites, ledger closed; logits: {logits}{tokenizer}")
    if found.different:
        lines.append(f"  different: {', '.join(found.different[:8])}")
    lines += [f"  note  {note}" for note in found.stale]
    return _text(lines)


def inspection(found: dict[str, Any]) -> str:
    """What a checkpoint is."""
    lines = [f"{found['path']}"]
    unread = f"{found.get('named') or 'not named'}: no spec reads it"
    lines.append(
        f"  architecture  {found['architecture'] or unread}" + (f" ({found['title']})" if "title" in found else "")
    )
    if found.get("quantised"):
        lines.append(f"  quantised     {found['quantised']}")
    count = "not counted" if found["parameters"] is None else f"{found['parameters']:,}"
    held = "" if found["tensors"] is None else f" in {found['tensors']} tensors, {size(found['bytes'])}"
    lines.append(f"  parameters    {count}{held}")
    if found["dtypes"]:
        lines.append("  dtypes        " + ", ".join(f"{count} {name}" for name, count in found["dtypes"].items()))
    if found["files"]:
        names = ", ".join(f["name"] for f in found["files"][:4]) + (", …" if len(found["files"]) > 4 else "")
        lines.append(f"  files         {len(found['files'])}: {names}")
    if "config" in found:
        lines.append(
            "  config        "
            + ", ".join(
                f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in found["config"].items()
            )
        )
        lines.append("  traits        " + (", ".join(found["traits"]) or "none: plain Llama"))
    if "memory" in found:
        lines += _memory(found["memory"])
    if found.get("made_from"):
        lines.append(f"  made from     {found['made_from']}, by llmconvert")
    if "targets" in found:
        verdicts = found["targets"]
        yes = [name for name, verdict in verdicts.items() if verdict == "yes"]
        perhaps = [name for name, verdict in verdicts.items() if verdict.startswith("if: ")]
        lines.append("  converts to   " + (", ".join(yes) or "nothing"))
        if perhaps:
            lines.append(f"  perhaps       {', '.join(perhaps)} (if what they leave out is zero, or a copy)")
        if verdicts.get("llama", "yes") != "yes":
            lines.append(f"  not to llama  {verdicts['llama']}")
    lines += [f"  note          {note}" for note in found["notes"]]
    if "problem" in found:
        lines.append(f"  problem       {found['problem']}")
    if found.get("hint"):
        lines.append(f"  hint          {found['hint']}")
    return _text(lines)


def _memory(found: dict[str, Any]) -> list[str]:
    """Parameters by part, and what they take."""
    whole = sum(found["parts"].values())
    shares = (f"{part.replace('_', ' ')} {n:,} ({n / whole:.1%})" for part, n in found["parts"].items())
    lines = ["  by part       " + ", ".join(shares)]
    if found["active_parameters"]:
        lines.append(f"  active        {found['active_parameters']:,} parameters a token")
    inference, training = found["inference"], found["training"]
    lines.append(f"  inference     {_inference(inference)}, in {inference['dtype']}")
    lines.append(f"  training      {_training(training)}")
    lines.append(f"                {training['convention']}")
    if "problem" in found:
        lines.append(f"  ranks         {found['problem']}")
    if "ranks" not in found:
        return lines
    ranks, experts = found["ranks"], ("ep", "etp", "expert_dp") if found["active_parameters"] else ()
    shape = ", ".join(f"{key.upper()} {ranks[key]}" for key in ("tp", "pp", "vpp", "dp", *experts))
    lines.append(f"  per rank      {shape.replace('_', ' ')}, ZeRO {ranks['zero']}: {ranks['world_size']:,} ranks")
    for stages in _alike(ranks["stages"]):
        first, last = stages[0], stages[-1]
        place = f"{first['pp_rank']}" + (f"–{last['pp_rank']}" if len(stages) > 1 else "")
        lines.append(
            f"    stage {place}: {len(first['layers'])} layer{'s' * (len(first['layers']) != 1)}, {first['parameters']:,} parameters"
        )
        lines.append(f"      inference {_inference(first['inference'])}")
        lines.append(f"      training  {_training(first['training'])}")
    return lines


def _alike(stages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Consecutive stages that hold as much."""
    groups: list[list[dict[str, Any]]] = []
    for stage in stages:
        same = groups and all(groups[-1][0][key] == stage[key] for key in ("parameters", "inference", "training"))
        if same:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _inference(found: dict[str, Any]) -> str:
    kind = "" if found["kv_cache"] == "keys and values" else f", {found['kv_cache']}"
    expanded = found.get("kv_cache_per_token_expanded")
    kind += f" ({size(expanded)} with keys and values expanded)" if expanded else ""
    token, thousand = size(found["kv_cache_per_token"]), size(found["kv_cache_per_1k_tokens"])
    weights = size(found["weights"])
    for key, how in (("weights_fp8", "in FP8"), ("weights_stored", "as stored")):
        weights += f" ({size(found[key])} {how})" if key in found else ""
    return f"weights {weights}; KV cache {token} a token{kind}, {thousand} for {found['kv_cache_tokens']:,}"


def _training(found: dict[str, Any]) -> str:
    kinds = ", ".join(f"{kind} {size(found[kind])}" for kind in ("weights", "gradients", "optimizer"))
    return f"{size(found['total'])}: {kinds}"


def matrix(reaches: list[Any]) -> str:
    """The table of sources (rows) and targets (columns, named downwards)."""
    marks = {"exact": "=", "rounded": "~", "one-way": "1", "no": "."}
    targets = list(dict.fromkeys(r.target for r in reaches))
    sources = list(dict.fromkeys(r.source for r in reaches))
    margin, tallest = max(map(len, sources)) + 2, max(map(len, targets))
    lines = ["from (rows) to (columns)"]
    for k in range(tallest):
        lines.append(" " * margin + "  ".join(name.rjust(tallest)[k] for name in targets))
    for source in sources:
        cells = {
            r.target: marks[r.verdict] + ("*" if r.unless and r.verdict != "no" else " ")
            for r in reaches
            if r.source == source
        }
        lines.append(source.ljust(margin) + " ".join(cells[target] for target in targets).rstrip())
    lines += [
        "",
        "=  bits only move   ~  exact to float rounding   1  cannot be undone   .  refused",
        "*  refused for checkpoints with certain traits; `llmconvert specs NAME` says which, and why",
    ]
    return _text(lines)


def spec_page(spec: Any, file: str, reaches: list[Any]) -> str:
    """One spec and where it goes."""
    lines = [
        f"{spec.name}: {spec.title}",
        f"  claims        model_type {', '.join(spec.model_types)}; {', '.join(spec.architectures)}",
        f"  file          {file}",
    ]
    for r in reaches:
        if r.source != spec.name or r.target == spec.name:
            continue
        text = {
            "exact": "exact",
            "rounded": "exact to rounding",
            "one-way": "exact, cannot be undone",
            "no": f"no: {r.why}",
        }[r.verdict]
        lines.append(f"  to {r.target:<14}{text}")
        lines += [f"                    · {step}" for step in r.steps]
        if r.unless and r.verdict != "no":
            lines.append(f"                    refused for checkpoints with: {', '.join(r.unless)}")
    return _text(lines)
