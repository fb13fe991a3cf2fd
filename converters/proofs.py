"""The proofs a conversion runs on its result before it is published, and the record of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.converters.planning import Conversion
from llmconvert.engine.manifest import REPORT
from llmconvert.engine.plan import Plan
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


def check_provable(conversion: Conversion, proving: Proving) -> None:
    """Before anything is written: can both models be run at all?

    Raises:
        Refused: torch or transformers is missing, or no code here runs the source or the target.
        Usage: there is no such device.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(conversion.plan.texts["config.json"])
        refuse_unprovable(proving, [("source", conversion.checkpoint.path), ("result", Path(folder))])


def refuse_unprovable(proving: Proving, models: Sequence[tuple[str, Path]]) -> None:
    """Refuse where logits are to be compared and one of the models, named as in messages, cannot be run.

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
    from llmconvert.verify.models import check_runnable

    for name in proving.device.split(","):
        resolve_device(name.strip())
    for name, directory in models:
        try:
            check_runnable(directory)
        except LlmconvertError as error:
            raise Refused(
                f"the {name} cannot be run to compare logits: {error.what}",
                where=str(models[0][1]),
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
    source: Path, written: Path, plan: Plan, proving: Proving, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Compare the source's logits with the written result's.

    Returns:
        The report, as a dictionary.
    """
    from llmconvert.verify.logits import compare_logits

    found = compare_logits(
        source, written, device=proving.device, load=proving.load, rounded=rounded_tensors(plan), progress=progress
    )
    return found.to_dict()


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write what was proved into a directory: the same for the same conversion, wherever and whenever it was run."""
    logits = record.get("logits")
    record = {
        **{key: value for key, value in record.items() if key != "destination"},
        "source": Path(record["source"]).name,
        "logits": {key: value for key, value in logits.items() if key != "seconds"} if logits else None,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    (directory / REPORT).write_text(text + "\n", encoding="utf-8")


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
