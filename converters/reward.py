"""Reward models: give a checkpoint a scalar head, and take one from a form to another.

Three forms are read: a causal model (its head is new), one with TRL's value head (`v_head.summary`, beside the language
model's head; LLaMA-Factory keeps it in a file of its own), and transformers' sequence classification (`score.weight`, in
place of the language model's head). The last two are written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.directory import Checkpoint, listing, open_checkpoint
from llmconvert.checkpoint.safetensors import read_header
from llmconvert.checkpoint.stored import StoredTensor
from llmconvert.checkpoint.torch_pickle import read_pickle
from llmconvert.converters.planning import Conversion, checked_away, plan_conversion
from llmconvert.converters.proofs import LOGITS, Proving, rounded_tensors
from llmconvert.converters.returning import return_pairs
from llmconvert.converters.running import Progress, Report, run
from llmconvert.engine.plan import INDEX, index_texts, lay_out, parse_size
from llmconvert.engine.publish import check_destination
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.tensors.expressions import Check, Expression, cast, fill, stored
from llmconvert.verify.ledger import account
from llmconvert.verify.roundtrip import BITWISE, Pair, failing

SCORE, V_HEAD = "score", "v_head"
_SCORE, _SUMMARY, _BIAS = "score.weight", "v_head.summary.weight", "v_head.summary.bias"
_BODY, _HEAD, _EMBED = "pretrained_model.", "lm_head.weight", "model.embed_tokens.weight"
_VALUE_HEAD_FILES = ("value_head.safetensors", "value_head.bin")

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LABELS = ("num_labels", "id2label", "label2id", "problem_type")

CLASSES = {
    "llama": "LlamaForSequenceClassification", "canonical": "CanonicalForRewardModel",
    "qwen2": "Qwen2ForSequenceClassification", "qwen3": "Qwen3ForSequenceClassification",
    "mistral": "MistralForSequenceClassification", "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification", "phi3": "Phi3ForSequenceClassification",
    "mixtral": "MixtralForSequenceClassification", "qwen2_moe": "Qwen2MoeForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification", "deepseek_v2": "DeepseekV2ForSequenceClassification",
    "deepseek_v3": "DeepseekV3ForSequenceClassification", "glm": "GlmForSequenceClassification",
    "glm4": "Glm4ForSequenceClassification", "seed_oss": "SeedOssForSequenceClassification",
}  # fmt: skip
"""The class with a `score` for each target (transformers' auto mapping, 4.57 and 5.23)."""


@dataclass(frozen=True)
class RewardHead:
    """A head as it is stored, under either name.

    Attributes:
        weight: [1, hidden], or None where the head is new.
        bias: [1], or None.
        causal: the language model's head stands beside it.
        further: the source's tensors of layers that predict further tokens, which a reward model has no use for.
    """

    weight: StoredTensor | None
    bias: StoredTensor | None
    causal: bool
    further: tuple[StoredTensor, ...] = ()


def take_head(checkpoint: Checkpoint) -> tuple[Checkpoint, RewardHead]:
    """A checkpoint as a causal model, and the reward head that was in it or beside it.

    A body without a language model's head gets the embedding in its place, which is not written.

    Raises:
        BadInput: the head is misshapen, or there are two.
    """
    tensors = dict(checkpoint.tensors)
    for name in _VALUE_HEAD_FILES:
        path = checkpoint.path / name
        if path.is_file():
            found = read_header(path) if path.suffix == ".safetensors" else read_pickle(path)
            tensors |= {key: tensor for key, tensor in found.items() if key.startswith("v_head.")}
    plain = {name: name.removeprefix(_BODY) for name in tensors}
    tensors = {plain[name]: tensor._replace(name=plain[name]) for name, tensor in tensors.items()}
    last = checkpoint.config.get("num_hidden_layers")
    further = [name for name in tensors if last and (layer := _LAYER.match(name)) and int(layer[1]) >= last]
    beyond = tuple(tensors.pop(name) for name in further)
    heads = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("v_head.", "score."))}
    odd = sorted(heads.keys() - {_SCORE, _SUMMARY, _BIAS})
    if odd or (_SCORE in heads and _SUMMARY in heads):
        raise BadInput(
            f"the reward head is {listing(sorted(heads))}; one is either `{_SCORE}`, or `{_SUMMARY}` and its bias",
            where=str(checkpoint.path),
        )
    weight, bias = heads.get(_SCORE) or heads.get(_SUMMARY), heads.get(_BIAS)
    wrong = [t for t, rank in ((weight, 2), (bias, 1)) if t is not None and (len(t.shape) != rank or t.shape[0] != 1)]
    if wrong:
        raise BadInput(
            f"`{wrong[0].name}` is {list(wrong[0].shape)}: a reward is one number", where=str(checkpoint.path),
            hint="a classifier of several labels is no reward model",
        )  # fmt: skip
    causal = _SCORE not in heads
    if not causal and _EMBED in tensors and _HEAD not in tensors:
        tensors[_HEAD] = tensors[_EMBED]._replace(name=_HEAD)
    config = {key: value for key, value in checkpoint.config.items() if key not in _LABELS}
    architectures = [
        str(name).replace("ForSequenceClassification", "ForCausalLM") for name in config.get("architectures") or ()
    ]
    config["architectures"] = [
        name.replace("CanonicalForRewardModel", "CanonicalForCausalLM") for name in architectures
    ]
    return replace(checkpoint, tensors=tensors, config=config), RewardHead(weight, bias, causal, beyond)


def to_reward(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, to: str = "llama", head: str = SCORE,
    lm_head_from: str | None = None, drop_bias: bool = False, pad_token_id: int | None = None,
    source_name: str | None = None, spec_file: Path | None = None, dtype: str | None = None, max_shard_size: str = "5GB",
    verify: str = "weights", device: str = "auto", workers: int | None = None, overwrite: bool = False, resume: bool = False,
    dry_run: bool = False, sync: bool = True, progress: Progress = lambda stage, done, total: None,
) -> Report:  # fmt: skip
    """Make a reward model of a checkpoint, or take its head from one form to the other.

    Args:
        source: a causal model, one with a value head, or a sequence classifier of one label.
        destination: the directory to make; it exists only once it is whole and proved.
        to: the body's architecture, one of `CLASSES`.
        head: `score` (transformers' sequence classification) or `v_head` (TRL's value head).
        lm_head_from: a checkpoint with the language model's head, for `v_head` where the source has none.
        drop_bias: leave out a value head's bias, which shifts all rewards alike and which `score` cannot hold.
        pad_token_id: where config.json has none; sequence classification looks for the last token that is another.
        source_name: the source's spec; told from config.json if None.
        spec_file: a spec from outside the package.
        dtype: float32, bfloat16 or float16; each tensor's own if None.
        max_shard_size: such as `5GB`.
        verify: `none`, `weights`, or `logits` (rewards of both, in float64; the result is loaded whole).
        device: where rewards are computed.
        workers: threads.
        overwrite: replace a destination that exists.
        resume: go on with an unfinished run.
        dry_run: plan, and write nothing.
        sync: have the disk confirm every byte.
        progress: called as bytes are done.

    Raises:
        LlmconvertError: of the kind that fits; the source is untouched and `destination` is not made.
    """
    proving = Proving(verify, device)
    if head not in (SCORE, V_HEAD):
        raise Usage(f"`{head}` is not a form of head", hint=f"choose {SCORE} or {V_HEAD}")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise Usage(f"a reward model is not written in `{dtype}`", hint="choose float32, bfloat16 or float16")
    target_dir = Path(destination)
    opened = open_checkpoint(source)
    body, found = take_head(opened)
    if verify == LOGITS and any(name.startswith(_BODY) for name in opened.tensors):
        raise Refused(
            f"nothing runs a checkpoint whose tensors are called `{_BODY}…`, so its rewards cannot be compared",
            where=str(body.path), hint="add `--verify weights`",
        )  # fmt: skip
    if not dry_run:
        for path in (body.path, *([Path(lm_head_from)] if lm_head_from else [])):
            check_destination(path, target_dir, overwrite=overwrite, resume=resume)
    language = _language_head(body, found, head, lm_head_from)
    if language is not None:
        body = replace(body, tensors={**body.tensors, _HEAD: language})
    conversion = plan_conversion(
        body.path, to, source_name=source_name, spec_file=spec_file, dtype=dtype, max_shard_size=max_shard_size,
        opened=body,
    )
    if conversion.target.name not in CLASSES:
        raise Refused(f"there is no reward model of `{conversion.target.name}`", hint=f"choose {', '.join(CLASSES)}")
    planned = _with_head(conversion, found, head, drop_bias, pad_token_id, max_shard_size)
    faults = failing(planned.plan.checks)
    if faults:
        raise Refused("; ".join(faults), where=str(body.path))
    report = _report(planned, str(destination))
    if dry_run:
        return report

    def prove(written: Path, shown: Callable[[int, int], None]) -> dict[str, Any]:
        from llmconvert.verify.rewards import compare_rewards

        return compare_rewards(
            body.path, written, device=device, rounded=bool(rounded_tensors(planned.plan)), bias_counts=not drop_bias,
            progress=shown,
        )  # fmt: skip

    return run(
        planned.plan, body.path, target_dir, report, proving, workers, overwrite, resume, sync, progress,
        pairs=lambda written: _pairs(conversion, planned, found, head, open_checkpoint(written)),
        prove=prove,
        tokenizer=body.path,
    )  # fmt: skip


def _language_head(body: Checkpoint, found: RewardHead, head: str, lm_head_from: str | None) -> StoredTensor | None:
    """The language model's head from elsewhere, where it is written and the source has none."""
    tied = body.config.get("tie_word_embeddings")
    if head == SCORE or found.causal or tied:
        if lm_head_from is not None:
            raise Usage("`--lm-head-from` is for a source without the language model's head", hint="leave it out")
        return None
    if lm_head_from is None:
        raise Refused(
            "TRL's value head stands beside the language model's head, and a sequence classifier has none",
            where=str(body.path), hint="name the causal model it was trained from: `--lm-head-from DIR`",
        )  # fmt: skip
    other, form = take_head(open_checkpoint(lm_head_from))
    tensor = other.tensors.get(_HEAD) if form.causal else None
    if tensor is None or tensor.shape != body.tensors[_EMBED].shape:
        shape = list(body.tensors[_EMBED].shape)
        raise BadInput(
            f"there is no `{_HEAD}` of {shape}", where=str(other.path), hint="name the model it was trained from"
        )
    return tensor


def _with_head(
    conversion: Conversion, found: RewardHead, head: str, drop_bias: bool, pad_token_id: int | None, max_shard_size: str
) -> Conversion:
    """The conversion of the body, with the head in the form asked for."""
    config, notes = conversion.model.config, list(conversion.notes)
    tensors = {output.name: output.expression for output in conversion.plan.tensors}
    checks, dropped = list(conversion.plan.checks), dict(conversion.lifted.dropped)
    dropped |= {tensor.name: "a reward model predicts no further tokens" for tensor in found.further}
    if head == SCORE:
        tensors.pop(_HEAD, None)
        dropped |= _unused_head(conversion, found)
    kind = conversion.dtype or next(iter(tensors.values())).dtype
    if found.weight is None:
        weight: Expression = fill((1, config.hidden_size), kind)
        notes.append("the reward head is new and all zeros: every reward is 0 until it is trained")
    else:
        if found.weight.shape[1] != config.hidden_size:
            raise BadInput(f"`{found.weight.name}` is {list(found.weight.shape)} for a width of {config.hidden_size}")
        weight = cast(stored(found.weight), conversion.dtype or found.weight.dtype)
    if head == V_HEAD:
        tensors[_SUMMARY] = weight
        bias = None if found.bias is None else cast(stored(found.bias), weight.dtype)
        tensors[_BIAS] = fill((1,), weight.dtype) if bias is None else bias
    else:
        tensors[_SCORE] = weight
        if found.bias is not None and drop_bias:
            notes.append("the value head's bias is left out: every reward is shifted by it alike")
            dropped[_BIAS] = "left out as asked"
        elif found.bias is not None:
            left = stored(found.bias)
            why = "`score` has no bias, and this one is not zero (`--drop-bias` leaves it out: rewards shift alike)"
            checks.append(Check(_BIAS, left, fill(left.shape, left.dtype), why))
            dropped[_BIAS] = "checked to be zero"
    texts = {**conversion.plan.texts, **_config_text(conversion, head, pad_token_id, notes)}
    texts.pop(INDEX, None)
    outputs, files = lay_out(tensors, parse_size(max_shard_size))
    texts |= index_texts(outputs, files)
    identity = conversion.plan.identity + json.dumps([head, [(f.name, f.size, f.digest) for f in files]])
    plan = replace(
        conversion.plan, tensors=outputs, files=files, texts=texts, checks=tuple(checks), identity=identity,
        summary={**conversion.plan.summary, "head": head, "dropped": dropped},
    )  # fmt: skip
    sources = _sources(conversion, found)
    ledger = account(plan, sources, {**dropped, **checked_away(replace(conversion.model, checks=tuple(checks)))})
    return replace(conversion, plan=plan, ledger=ledger, notes=tuple(notes))


def _unused_head(conversion: Conversion, found: RewardHead) -> dict[str, str]:
    """The source's language model's head, where it has one of its own that is not written."""
    if not found.causal or conversion.lifted.model.config.tie_word_embeddings:
        return {}
    return {_source_head(conversion): "a reward model has no language model's head"}


def _source_head(conversion: Conversion) -> str:
    from llmconvert.canonical.model import HEAD
    from llmconvert.spec.expand import all_rows

    row = next(row for row in all_rows(conversion.source_spec) if HEAD in row.modules)
    return row.stored.replace("{p}", "weight")


def _sources(conversion: Conversion, found: RewardHead) -> dict[str, StoredTensor]:
    """Every tensor of the source, its head among them."""
    own = {
        name: tensor
        for name, tensor in conversion.checkpoint.tensors.items()
        if found.causal or name != _HEAD or tensor.path != conversion.checkpoint.tensors[_EMBED].path
        or tensor.offset != conversion.checkpoint.tensors[_EMBED].offset
    }  # fmt: skip
    return own | {tensor.name: tensor for tensor in (found.weight, found.bias, *found.further) if tensor is not None}


def _config_text(conversion: Conversion, head: str, pad_token_id: int | None, notes: list[str]) -> dict[str, bytes]:
    config: dict[str, Any] = json.loads(conversion.plan.texts["config.json"])
    if head == SCORE:
        config["architectures"] = [CLASSES[conversion.target.name]]
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        if pad_token_id is not None and pad_token_id >= conversion.model.config.vocab_size:
            raise Usage(
                f"--pad-token-id {pad_token_id} is beyond the vocabulary of {conversion.model.config.vocab_size}"
            )
        if pad_token_id is not None:
            config["pad_token_id"] = pad_token_id
        if config.get("pad_token_id") is None:
            notes.append(
                "config.json has no `pad_token_id`, without which transformers scores one row at a time: "
                "add `--pad-token-id N`"
            )
    return {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _pairs(
    conversion: Conversion, planned: Conversion, found: RewardHead, head: str, written: Checkpoint
) -> list[Pair]:
    """What the round trip compares: the body as ever, and the head by itself."""
    body, returned = take_head(written)
    pairs = return_pairs(conversion, body)
    if head == SCORE or not found.causal:
        unwritten = {_source_head(conversion), _HEAD}
        kept = head == V_HEAD and _HEAD in {output.name for output in planned.plan.tensors}
        pairs = pairs if kept else [pair for pair in pairs if pair.name not in unwritten]
    assert returned.weight is not None
    for source, back in ((found.weight, returned.weight), (found.bias, returned.bias)):
        if source is not None and back is not None:
            left, right = stored(source), stored(back)
            pairs.append(Pair(source.name, cast(left, right.dtype), right, BITWISE))
    return pairs


def _report(planned: Conversion, destination: str) -> Report:
    from collections import Counter

    from llmconvert.checkpoint.dtypes import TO_NAME

    plan = planned.plan
    dtypes = Counter(TO_NAME.get(output.expression.dtype, output.expression.dtype) for output in plan.tensors)
    return Report(
        source=str(planned.checkpoint.path), destination=destination, source_architecture=planned.source_spec.name,
        target_architecture=json.loads(plan.texts["config.json"])["architectures"][0],
        tensors_read=len(planned.checkpoint.tensors), tensors_written=len(plan.tensors), bytes_written=plan.nbytes,
        steps=[{"name": step.name, "exactness": step.exactness, "why": step.why} for step, _ in planned.steps],
        dropped=planned.ledger.dropped, notes=planned.notes, not_carried=planned.not_carried, dtype=dict(dtypes),
        ledger=asdict(planned.ledger), disk_needed=plan.nbytes, config=json.loads(plan.texts["config.json"]),
    )  # fmt: skip
