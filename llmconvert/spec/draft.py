"""Draft a spec for a checkpoint nobody has described: recognise names by shape and habit, say what is undecided."""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.canonical import model as canonical
from llmconvert.checkpoint.directory import Checkpoint, open_checkpoint
from llmconvert.errors import BadInput, LlmconvertError
from llmconvert.spec.dialect import lift

_SIZES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "hidden_dim", "model_dim"),
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": (
        "num_key_value_heads",
        "n_kv_heads",
        "num_kv_heads",
        "multi_query_group_num",
        "num_query_groups",
    ),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "inner_hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size", "n_vocab"),
    "rms_norm_eps": ("rms_norm_eps", "layernorm_epsilon", "layer_norm_epsilon", "norm_eps", "layer_norm_eps"),
    "max_position_embeddings": (
        "max_position_embeddings",
        "seq_length",
        "n_positions",
        "max_sequence_length",
        "max_seq_len",
    ),
}
_HEAD_DIM = ("head_dim", "kv_channels", "attention_head_dim")
_THETA = ("rope_theta", "rotary_emb_base", "rope_base", "rotary_base")

_CONSTANTS = {
    value: name
    for name, value in vars(canonical).items()
    if isinstance(value, str) and name.isupper() and name != "LAYER"
}


@dataclass(frozen=True)
class Draft:
    """A drafted spec.

    Attributes:
        text: the Python file.
        remarks: what was checked, and what is left to decide.
        undecided: how many things are left to decide.
    """

    text: str
    remarks: tuple[str, ...]
    undecided: int


def _key(config: dict[str, Any], candidates: tuple[str, ...]) -> str | None:
    return next((key for key in candidates if config.get(key) is not None), None)


def _templates(checkpoint: Checkpoint, layers: int) -> dict[str, list[str]]:
    """Names with the layer number replaced by {i}: the first number in a name that counts to `layers`."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.tensors:
        groups[re.sub(r"\.\d+\.", ".{i}.", name, count=1)].append(name)
    return dict(groups)


def _guess(template: str, shape: tuple[int, ...], s: dict[str, int]) -> tuple[tuple[str, ...], str]:
    """The modules a stored weight holds, and a doubt in words ("" for none)."""
    h, f, q, kv = s["hidden_size"], s["intermediate_size"], s["q"], s["kv"]
    name = template.lower()
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if "{i}" not in template:
        if shape == (h,):
            return (canonical.NORM,), ""
        if len(shape) == 2 and shape[1] == h and shape[0] >= s["vocab_size"]:
            head = any(word in leaf for word in ("head", "output"))
            return (canonical.HEAD if head else canonical.EMBED,), ""
        return (), "not per layer, and neither a norm, an embedding nor a head"
    if shape == (h,):
        after = any(word in name for word in ("post", "ffn", "ln_2", "ln2", "mlp", "norm2"))
        return (canonical.POST_NORM if after else canonical.INPUT_NORM,), ""
    attention = any(word in name for word in ("attn", "attention")) and "mlp" not in name
    if shape == (q + 2 * kv, h) and (attention or any(w in leaf for w in ("qkv", "query_key", "pack"))):
        doubt = 'packed [q|k|v]: if the groups are interleaved by key/value head, add pack="grouped"'
        return (canonical.Q, canonical.K, canonical.V), doubt
    if attention and shape in ((q, h), (kv, h)) and leaf[:1] in "qkv" and leaf not in ("qkv",):
        return ({"q": canonical.Q, "k": canonical.K, "v": canonical.V}[leaf[0]],), ""
    if attention and shape == (h, q):
        return (canonical.O,), ""
    if shape == (2 * f, h):
        return (canonical.GATE, canonical.UP), "packed [gate|up]: swap the two if it is [up|gate]"
    if shape == (f, h):
        if any(word in leaf for word in ("gate", "w1")):
            return (canonical.GATE,), "" if "gate" in leaf else "w1 is the gate in most architectures; check"
        return (canonical.UP,), "" if any(word in leaf for word in ("up", "w3")) else "taken for up_proj; check"
    if shape == (h, f):
        return (canonical.DOWN,), ""
    return (), f"shape {list(shape)} fits no module of hidden {h}, intermediate {f}, q {q}, k/v {kv}"


def _sizes(checkpoint: Checkpoint) -> tuple[dict[str, int], list[str], list[str]]:
    """Sizes by name, the config lines that differ from Llama's, and what could not be found."""
    config = checkpoint.config
    sizes: dict[str, int] = {}
    lines: list[str] = []
    missing: list[str] = []
    for attribute, candidates in _SIZES.items():
        key = _key(config, candidates)
        if key is not None:
            sizes[attribute] = config[key]
            if key != candidates[0]:
                lines.append(f'        Field("{attribute}", "{key}"),')
        elif attribute == "num_key_value_heads":
            sizes[attribute] = sizes.get("num_attention_heads", 0)
        elif attribute not in ("rms_norm_eps", "max_position_embeddings"):
            missing.append(attribute)
    if missing:
        raise BadInput(
            f"config.json has no key recognised as {', '.join(missing)}",
            where=str(checkpoint.path),
            hint="write the spec by hand: docs/adding-an-architecture.md",
        )
    key = _key(config, _HEAD_DIM)
    d = config[key] if key else sizes["hidden_size"] // sizes["num_attention_heads"]
    if key not in (None, "head_dim"):
        lines.append(f'        HeadDim("{key}"),')
    sizes |= {"q": sizes["num_attention_heads"] * d, "kv": sizes["num_key_value_heads"] * d}
    theta = _key(config, _THETA)
    if theta not in (None, "rope_theta"):
        lines.append(f'        Rope(theta_key="{theta}"),')
    return sizes, lines, missing


def draft(source: str) -> Draft:
    """Draft a spec from a checkpoint's names, shapes and config, and check it against the checkpoint.

    Args:
        source: a directory or a hub id.

    Raises:
        LlmconvertError: the checkpoint cannot be opened, or its config names no sizes.
    """
    checkpoint = open_checkpoint(source)
    sizes, config_lines, _ = _sizes(checkpoint)
    stored = {t.removesuffix(".weight").removesuffix(".bias") for t in _templates(checkpoint, 0)}
    rows: list[str] = []
    drops: list[str] = []
    undecided: list[str] = []
    used: set[str] = set()
    taken: Counter[str] = Counter()
    for template, names in sorted(_templates(checkpoint, sizes["num_hidden_layers"]).items()):
        shape = checkpoint.tensors[names[0]].shape
        if template.endswith("inv_freq"):
            drops.append(f'        Drop("{template}", "recomputed from the config"),')
            continue
        if (
            template.endswith(".bias")
            and template.removesuffix(".bias") in stored
            and template[:-4] + "weight" in _names(checkpoint)
        ):
            continue
        modules, doubt = _guess(template, shape, sizes)
        if not modules or not template.endswith("weight") or any(taken[m] for m in modules):
            reason = doubt or "its module is in another row already"
            undecided.append(f"        # UNDECIDED: `{template}` {list(shape)}: {reason}")
            continue
        taken.update(modules)
        if modules == (template.removesuffix(".weight"),):
            continue
        used.update(_CONSTANTS[m] for m in modules)
        comment = f"  # {doubt}" if doubt else ""
        rows.append(
            f'        row("{template.removesuffix("weight")}{{p}}", {", ".join(_CONSTANTS[m] for m in modules)}),{comment}'
        )
    text = _render(checkpoint, config_lines, rows, drops, undecided, used, taken)
    doubts = len(undecided) + sum("  # " in line for line in rows)
    return Draft(text, _check(checkpoint, text, doubts), doubts)


def _names(checkpoint: Checkpoint) -> set[str]:
    return {re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in checkpoint.tensors}


def _render(
    checkpoint: Checkpoint, config: list[str], rows: list[str], drops: list[str], undecided: list[str],
    used: set[str], taken: Counter[str],
) -> str:  # fmt: skip
    model_type = str(checkpoint.config.get("model_type") or "unnamed")
    name = re.sub(r"\W", "_", model_type).lower()
    architectures = checkpoint.config.get("architectures") or ["UnnamedForCausalLM"]
    biased = [
        t
        for t in ("self_attn", "attn", "attention")
        if any(f"{t}." in n and n.endswith(".bias") for n in checkpoint.tensors)
    ]
    if biased:
        config.append(
            '        Fixed("qkv_bias", True),  # biases were found in the attention; say here which projections have them'
        )
        config.append('        Fixed("o_bias mlp_bias", False),')
    words = ["Spec"] + (["row"] if rows else []) + (["Drop"] if drops else [])
    words += [word for word in ("Field", "Fixed", "HeadDim") if any(f"{word}(" in line for line in config)]
    imports = [f"from llmconvert.canonical.model import {', '.join(sorted(used))}"] if used else []
    imports.append(f"from llmconvert.spec.language import {', '.join(sorted(words, key=str.lower))}")
    if any("Rope(" in line for line in config):
        imports.append("from llmconvert.spec.rope import Rope")
    body = [
        f'"""{model_type}: drafted by `llmconvert new-spec`; complete it, and say where each fact comes from."""', "",
        *imports, "", "SPEC = Spec(", f'    name="{name}",', f'    title="{model_type}",', f'    family="{name}",',
        f'    model_types=("{model_type}",),', f"    architectures=({', '.join(repr(a) for a in architectures)},),".replace("'", '"'),
    ]  # fmt: skip
    for title, lines in (("config", config), ("weights", rows + undecided), ("drops", drops)):
        if lines:
            body += [f"    {title}=(", *lines, "    ),"]
    traits = {"tied_embeddings": canonical.HEAD not in taken, "grouped_query": True}
    held = ", ".join(f'"{trait}"' for trait, present in traits.items() if present)
    body += [f"    holds=frozenset({{{held}}}),", ")", ""]
    return "\n".join(body)


def _check(checkpoint: Checkpoint, text: str, doubts: int) -> tuple[str, ...]:
    from llmconvert.spec.registry import load_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "draft.py"
        file.write_text(text, encoding="utf-8")
        try:
            lifted = lift(load_file(file), checkpoint)
            explained = f"the draft explains all {len(checkpoint.tensors)} tensors ({len(lifted.dropped)} dropped)"
        except LlmconvertError as error:
            explained = f"the draft does not explain the checkpoint yet: {error.what}"
    rest = f"{doubts} rows are marked for you to decide; names and shapes cannot tell rotary layout, norms or scales: compare logits"
    return (explained, rest)
