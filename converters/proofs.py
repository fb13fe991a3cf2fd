"""The proofs a conversion runs on its result before it is published, and the record of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.engine.manifest import REPORT, encoded
from llmconvert.engine.plan import Plan
from llmconvert.engine.tree import Tree
from llmconvert.errors import LlmconvertError, ProofFailed, Refused, Usage
from llmconvert.tensors.expressions import (
    WIDENS,
    BlockScales,
    Cast,
    Dequantize,
    Expression,
    Fill,
    Mean,
    NormalizeRows,
    Quantize,
    Scale,
    Shift,
)

NONE, WEIGHTS, LOGITS = "none", "weights", "logits"


@dataclass(frozen=True)
class Proving:
    """How a result is proved.

    Attributes:
        verify: none; weights (ledger and round trip); logits (both models run as well).
        device: where logits are computed; see `compare_logits`.
        load: whole, layers or auto; see `compare_logits`.
    """

    verify: str = LOGITS
    device: str = "auto"
    load: str = "auto"

    def __post_init__(self) -> None:
        if self.verify not in (NONE, WEIGHTS, LOGITS):
            raise Usage(f"`{self.verify}` is not a way to verify", hint="choose none, weights or logits")


def refuse_unprovable(
    proving: Proving, models: Sequence[tuple[str, Path]], *, where: Path | None = None, told: Mapping[str, Any] | None = None
) -> None:
    """Refuse where logits are to be compared and one of the models, named as in messages, cannot be run.

    Args:
        proving: what is asked for.
        models: a directory with at least a config.json each.
        where: the directory the message names; the first model's if None.
        told: keys that their config.json leave open.

    Raises:
        Refused: torch or transformers is missing, or no code here runs a model.
        Usage: there is no such device.
    """
    if proving.verify != LOGITS:
        return
    without = "or add `--verify weights`, which compares weights and runs no model"
    missing = [name for name in ("torch", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise Refused(
            f"logits cannot be compared without {' and '.join(missing)}",
            hint=f"`pip install 'llmconvert[verify]'`, {without}",
        )
    from llmconvert.verify.logits import resolve_device
    from llmconvert.verify.models import check_runnable, stating

    for name in proving.device.split(","):
        resolve_device(name.strip())
    for name, directory in models:
        try:
            with stating({directory: told or {}}):
                check_runnable(directory)
        except LlmconvertError as error:
            raise Refused(
                f"the {name} cannot be run to compare logits: {error.what}",
                where=str(where or models[0][1]),
                hint=without.removeprefix("or "),
            ) from None


def rounded_tensors(plan: Plan) -> dict[str, str]:
    """Output tensors whose numbers were rounded when they were made, with the dtype they were rounded to."""
    found = {output.name: _rounding(output.expression) for output in plan.tensors}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def _rounding(expression: Expression) -> str | None:
    """The dtype an expression rounds to, as against how its source is read; None where it does not."""
    match expression:
        case Quantize():
            return "float8_e4m3fn"
        case BlockScales() | Cast(operand=Dequantize(), dtype="BF16"):
            return None  # part of the tensor it scales; and how the source is read, too
        case Dequantize():
            return "bfloat16"  # of which the source, as it is read, has less
        case Scale() | Shift() | NormalizeRows() | Mean():
            return TO_NAME[expression.dtype]
        case Fill(value=value, dtype=dtype) if value != 0.0:
            return TO_NAME[dtype]
        case Cast(operand=operand, dtype=dtype) if operand.dtype != dtype and (operand.dtype, dtype) not in WIDENS:
            return "bfloat16" if isinstance(operand, Dequantize) else TO_NAME[dtype]
    inner = [_rounding(operand) for operand in expression.operands]
    return TO_NAME[expression.dtype] if any(inner) and expression.dtype in TO_NAME else next(filter(None, inner), None)


def prove_written(
    source: Path, written: Path, plan: Plan, proving: Proving, progress: Callable[[int, int], None],
    told: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> dict[str, Any]:  # fmt: skip
    """Compare the source's logits with the written result's.

    Args:
        source: the directory read.
        written: the directory written.
        plan: how.
        proving: where and how models are run.
        progress: called as layers are done.
        told: what the config.json of either leave open.

    Returns:
        The report, as a dictionary.
    """
    from llmconvert.verify.logits import compare_logits
    from llmconvert.verify.models import stating

    with stating({source: told[0], written: told[1]}):
        found = compare_logits(
            source, written, device=proving.device, load=proving.load, rounded=rounded_tensors(plan), progress=progress
        )
    return found.to_dict()


def prove_tokenizer(source: Path, written: Path) -> dict[str, Any]:
    """Compare the source's tokenizer with the written result's.

    Args:
        source: the directory of the source's.
        written: the result's, of which only the weights may be missing.

    Returns:
        The report, as a dictionary.

    Raises:
        ProofFailed: they are not one.
        BadInput: reading them takes more than such files should.
    """
    from llmconvert.verify.apart import compare_tokenizers_apart

    found = compare_tokenizers_apart(source, written)
    if found.verdict is False:
        raise ProofFailed(
            f"the tokenizer would change: {found.reason}", where=str(source),
            hint="`--verify none` writes the checkpoint all the same; its tokenizer is then yours to put right",
        )  # fmt: skip
    return found.to_dict()


def write_record(tree: Tree, record: Mapping[str, Any]) -> None:
    """Write what was proved into a directory: the same for the same conversion, wherever and whenever it was run.

    Raises:
        OSError: the disk refuses.
    """
    logits = record.get("logits")
    record = {
        **{key: value for key, value in record.items() if key != "destination"},
        "source": Path(record["source"]).name,
        "logits": {key: value for key, value in logits.items() if key != "seconds"} if logits else None,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    tree.write(REPORT, encoded(text + "\n"))


def require_logits(logits: Mapping[str, Any], source: Path, output: Path) -> None:
    """Stop here if the logits differ.

    Raises:
        ProofFailed: they do.
    """
    if not logits["verdict"]:
        raise ProofFailed(
            f"the logits differ: {logits['reason']}",
            where=f"{output} (kept, not published; the proofs are in {REPORT})",
            hint=f"look closer with `llmconvert verify {source} {output} --report report.html`",
        )
