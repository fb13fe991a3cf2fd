"""Draft a spec for a checkpoint nobody has described: recognise names by shape and habit, say what is undecided."""

from __future__ import annotations

import re
import reprlib
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmconvert.canonical import model as canonical
from llmconvert.checkpoint.directory import Checkpoint, open_checkpoint
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.errors import BadInput, LlmconvertError
from llmconvert.spec import keys
from llmconvert.spec.dialect import keys_read, lift
from llmconvert.spec.fused import unfused
from llmconvert.spec.language import Spec
from llmconvert.spec.quantised import SCALE, quantisation
from llmconvert.spec.registry import load_file, registry
from llmconvert.spec.strangers import nearest, parts, template, towers
from llmconvert.terminal import printable

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
        explained: every tensor has a row or is dropped; it is no proof that the rows are right.
        nearest: the spec whose tensors are most like the checkpoint's, or None.
    """

    text: str
    remarks: tuple[str, ...]
    undecided: int
    explained: bool
    nearest: str | None


@dataclass
class _Lines:
    """What is written of each section, and what is accounted for.

    Attributes:
        rows, drops, undecided: lines of the file.
        used: names of canonical modules the file imports.
        place: the modules that the weights of a kind hold.
        biased: modules with a bias in every layer.
    """

    rows: list[str] = field(default_factory=list)
    drops: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    place: dict[str, tuple[str, ...]] = field(default_factory=dict)
    biased: set[str] = field(default_factory=set)

    def doubt(self, kind: str, tensor: StoredTensor, reason: str) -> None:
        """List a kind of tensors that its author has to see to."""
        self.undecided.append(f"        # UNDECIDED: `{printable(kind)}` {list(tensor.shape)}: {printable(reason)}")


def _quoted(text: str) -> str:
    """A Python string; whatever a checkpoint is called stays within it."""
    return f'"{text}"' if re.fullmatch(r"[\w.{}/ -]*", text, re.ASCII) else repr(text)


def _key(config: dict[str, Any], candidates: tuple[str, ...]) -> str | None:
    return next((key for key in candidates if config.get(key) is not None), None)


def _kinds(checkpoint: Checkpoint, layers: int) -> dict[str, list[StoredTensor]]:
    """Tensors by kind: their names with {i} for the layer and {j} for the expert, but for layers beyond the last."""
    groups: dict[str, list[StoredTensor]] = defaultdict(list)
    for name, tensor in checkpoint.tensors.items():
        number = _NUMBER.search(name)
        beyond = number is not None and int(number[1]) >= layers
        kind = name[: number.end()] + _NUMBER.sub(".{j}", name[number.end() :]) if number and beyond else template(name)
        groups[kind].append(tensor)
    return dict(groups)


_NUMBER = re.compile(r"\.(\d{1,9})(?=\.)")


def _unlike(kind: str, tensors: list[StoredTensor], layers: int) -> str:
    """Why a kind has no row of its own: it is not one tensor of one shape in every layer; "" where it is."""
    if len({tensor.shape for tensor in tensors}) > 1:
        return "its shape is not the same in all layers"
    if "{i}" not in kind:
        return f"of a layer beyond the {layers} there are" if _NUMBER.search(kind) else ""
    numbers = {_NUMBER.findall(tensor.name)[0] for tensor in tensors}
    return f"it is in {len(numbers)} of {layers} layers" if len(numbers) < layers else ""


def _guess(kind: str, shape: tuple[int, ...], s: dict[str, int]) -> tuple[tuple[str, ...], str]:
    """The modules a stored weight holds, and a doubt in words ("" for none)."""
    h, f, q, kv = s["hidden_size"], s["intermediate_size"], s["q"], s["kv"]
    name = kind.lower()
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if "{i}" not in kind:
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


def _sizes(checkpoint: Checkpoint) -> tuple[dict[str, int], list[str]]:
    """Sizes by name, and the config lines that differ from Llama's.

    Raises:
        BadInput: a size has no key that is recognised, or is not a number.
    """
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
    wanted = {name: value for name, value in sizes.items() if name != "rms_norm_eps"} | ({key: config[key]} if key else {})
    for name, value in wanted.items():
        if type(value) is not int or value < 1:
            raise BadInput(f"`{name}` is {reprlib.repr(value)}, which is no positive whole number", where="config.json")
    d = config[key] if key else sizes["hidden_size"] // sizes["num_attention_heads"]
    if key not in (None, "head_dim"):
        lines.append(f'        HeadDim("{key}"),')
    sizes |= {"q": sizes["num_attention_heads"] * d, "kv": sizes["num_key_value_heads"] * d}
    theta = _key(config, _THETA)
    if theta not in (None, "rope_theta"):
        lines.append(f'        Rope(theta_key="{theta}"),')
    return sizes, lines


_BIASES = {
    "qkv_bias": (canonical.Q, canonical.K, canonical.V),
    "o_bias": (canonical.O,),
    "mlp_bias": (canonical.GATE, canonical.UP, canonical.DOWN),
}


def draft(source: str) -> Draft:
    """Draft a spec from a checkpoint's names, shapes and config, and check it against the checkpoint.

    Every kind of tensors has a row, keeps Llama's name, is dropped, or is listed as undecided.

    Args:
        source: a directory or a hub id.

    Raises:
        Refused: it is quantised in a form that is not read, or multimodal.
        LlmconvertError: the checkpoint cannot be opened, or its config names no sizes.
    """
    checkpoint = unfused(open_checkpoint(source))
    block = quantisation(checkpoint)
    known = registry()
    if parts(checkpoint.config).key is not None or towers(checkpoint.tensors):
        known.detect(checkpoint.config, checkpoint.tensors)
    sizes, config_lines = _sizes(checkpoint)
    kinds, lines = _kinds(checkpoint, sizes["num_hidden_layers"]), _Lines()
    if block is not None:
        kinds = {kind: own for kind, own in kinds.items() if not kind.endswith(SCALE)}
    for kind, tensors in sorted(kinds.items(), key=lambda item: (item[0].endswith(".bias"), item[0])):
        _account(kind, tensors, sizes, lines)
    config_lines += _bias_lines(checkpoint, kinds, lines)
    asked = keys.unread(checkpoint.config, keys_read(_loaded(_render(checkpoint, config_lines, lines))))
    config_lines += [f"        # UNDECIDED: {key} changes what the model computes, and no field reads it" for key in asked]
    text = _render(checkpoint, config_lines, lines)
    doubts = len(lines.undecided) + sum("  # " in line for line in lines.rows + config_lines)
    fault = _fault(checkpoint, text)
    dropped = sum(len(own) for kind, own in kinds.items() if _is_buffer(kind))
    near = nearest(known.specs.values(), checkpoint.config, checkpoint.tensors)
    remarks = [
        f"the draft does not explain the checkpoint yet: {fault}" if fault else
        f"the draft explains all {len(checkpoint.tensors)} tensors ({dropped} dropped)",
        f"left for you to decide: {doubts}; names and shapes cannot tell rotary layout, norms or scales: compare logits",
    ]  # fmt: skip
    if near is not None:
        remarks.append(f"{near}: see {known.files[near.spec.name]}")
    return Draft(text, tuple(remarks), doubts, fault is None, near.spec.name if near else None)


def _is_buffer(kind: str) -> bool:
    return kind.endswith("inv_freq")


def _account(kind: str, tensors: list[StoredTensor], sizes: dict[str, int], lines: _Lines) -> None:
    """Give a kind of tensors its row, or say why it has none."""
    first = tensors[0]
    unlike = _unlike(kind, tensors, sizes["num_hidden_layers"])
    if _is_buffer(kind):
        lines.drops.append(f'        Drop({_quoted(kind)}, "recomputed from the config"),')
        return
    if kind.endswith(".bias"):
        modules = lines.place.get(kind.removesuffix("bias") + "weight", ())
        if not modules:
            lines.doubt(kind, first, "a bias of what has no row")
        elif not set(modules) <= {module for own in _BIASES.values() for module in own}:
            lines.doubt(kind, first, "the canonical layout has no bias there")
        elif unlike:
            lines.doubt(kind, first, unlike)
        else:
            lines.biased |= set(modules)
        return
    modules, doubt = _guess(kind, first.shape, sizes) if kind.endswith("weight") else ((), "it ends in neither `weight` nor `bias`")
    taken = next((other for other, own in lines.place.items() if set(own) & set(modules)), None)
    if "{j}" in kind:
        unlike = unlike or "of an expert, or of several parts of a layer: a row for it has `{j}`"
    if unlike or not modules or taken is not None:
        lines.doubt(kind, first, unlike or doubt or f"looks like what `{taken}` was taken for; the code tells which is which")
        return
    lines.place[kind] = modules
    if modules == (kind.removesuffix(".weight"),):
        return
    lines.used.update(_CONSTANTS[m] for m in modules)
    comment = f"  # {doubt}" if doubt else ""
    named = ", ".join(_CONSTANTS[m] for m in modules)
    lines.rows.append(f"        row({_quoted(kind.removesuffix('weight') + '{p}')}, {named}),{comment}")


def _bias_lines(checkpoint: Checkpoint, kinds: dict[str, list[StoredTensor]], lines: _Lines) -> list[str]:
    """Fields that say which projections have biases, as the tensors have it."""
    for attribute, modules in _BIASES.items():
        own = lines.biased & set(modules)
        if own and own != set(modules):
            lines.biased -= own
            for kind, held in lines.place.items():
                bias = kind.removesuffix("weight") + "bias"
                if own & set(held) and bias in kinds:
                    lines.doubt(bias, kinds[bias][0], f"`{attribute}` is for all of its projections, others have none")
    if not lines.biased:
        return []
    told = {value: [a for a, own in _BIASES.items() if (set(own) <= lines.biased) is value] for value in (True, False)}
    switches = [key for key, value in checkpoint.config.items() if "bias" in key and value is True]
    read = f", keys=({', '.join(map(_quoted, switches))},)" if switches else ""
    comment = "  # if a key of the config switches them, write a Field for it" if switches else ""
    result = [f'        Fixed("{" ".join(told[True])}", True{read}),{comment}']
    return result + ([f'        Fixed("{" ".join(told[False])}", False),'] if told[False] else [])


def _render(checkpoint: Checkpoint, config: list[str], lines: _Lines) -> str:
    said = checkpoint.config.get("model_type")
    model_type = said if isinstance(said, str) and said else "unnamed"
    name = re.sub(r"\W", "_", model_type, flags=re.ASCII).lower()
    claimed = checkpoint.config.get("architectures")
    architectures = [a for a in claimed if isinstance(a, str)] if isinstance(claimed, list) else []
    words = ["Spec"] + (["row"] if lines.rows else []) + (["Drop"] if lines.drops else [])
    words += [word for word in ("Field", "Fixed", "HeadDim") if any(f"{word}(" in line for line in config)]
    imports = [f"from llmconvert.canonical.model import {', '.join(sorted(lines.used))}"] if lines.used else []
    imports.append(f"from llmconvert.spec.language import {', '.join(sorted(words, key=str.lower))}")
    if any("Rope(" in line for line in config):
        imports.append("from llmconvert.spec.rope import Rope")
    listed = ", ".join(map(_quoted, architectures or ["UnnamedForCausalLM"]))
    body = [
        f'"""{name}: drafted by `llmconvert new-spec`; complete it, and say where each fact comes from."""', "",
        *imports, "", "SPEC = Spec(", f'    name="{name}",', f"    title={_quoted(model_type)},", f'    family="{name}",',
        f"    model_types=({_quoted(model_type)},),", f"    architectures=({listed},),",
    ]  # fmt: skip
    for title, own in (("config", config), ("weights", lines.rows + lines.undecided), ("drops", lines.drops)):
        if own:
            body += [f"    {title}=(", *own, "    ),"]
    placed = {module for modules in lines.place.values() for module in modules}
    held = [trait for trait, modules in _BIASES.items() if set(modules) <= lines.biased] + ["grouped_query"]
    held += ["tied_embeddings"] if canonical.HEAD not in placed else []
    body += [f"    holds=frozenset({{{', '.join(map(_quoted, sorted(held)))}}}),", ")", ""]
    return "\n".join(body)


def _loaded(text: str) -> Spec:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "draft.py"
        file.write_text(text, encoding="utf-8")
        return load_file(file)


def _fault(checkpoint: Checkpoint, text: str) -> str | None:
    """What the drafted spec does not explain of the checkpoint."""
    try:
        lift(_loaded(text), checkpoint)
    except LlmconvertError as error:
        return error.what
    return None
