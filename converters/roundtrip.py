"""There and back: convert a checkpoint to another architecture and home again, with every proof on the way."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.directory import open_checkpoint, read_json
from llmconvert.converters.huggingface import convert
from llmconvert.converters.running import Progress, Report
from llmconvert.engine.held import temporary
from llmconvert.errors import ProofFailed, Usage
from llmconvert.spec.fused import unfused
from llmconvert.tensors.expressions import stored
from llmconvert.verify.roundtrip import BITWISE, Pair, compare


@dataclass(frozen=True)
class ThereAndBack:
    """What a trip there and back found.

    Attributes:
        verdict: whether every tensor came back bit for bit. The two conversions' own proofs held, or there is no report.
        reason: the same in words.
        there, back: the two conversions.
        tensors: how many were compared.
        different: those that came back different.
        config: whether config.json came back the same.
        stale: what earlier round trips left, and how to remove it.
    """

    verdict: bool
    reason: str
    there: Report
    back: Report
    tensors: int
    different: tuple[str, ...]
    config: bool
    stale: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def round_trip(
    source: Path, to: str = "llama", *, source_name: str | None = None, work_dir: Path | None = None, workers: int = 2,
    progress: Progress = lambda stage, done, total: None, **options: Any,
) -> ThereAndBack:  # fmt: skip
    """Convert there and back in a temporary place and compare with the source, byte by byte.

    Args:
        source: a checkpoint directory.
        to: the architecture or family to go through.
        source_name: the source's spec; told from config.json if None.
        work_dir: where the temporary place is made; the system's if None. It needs twice the checkpoint's size.
        workers: threads.
        progress: as in `convert`.
        options: further options of `convert`.

    Raises:
        Usage: the temporary place would be inside the source.
        LlmconvertError: a conversion is refused or its proof fails.
    """
    if work_dir is not None and Path(os.path.realpath(work_dir)).is_relative_to(os.path.realpath(source)):
        raise Usage("the work directory is inside the source", where=str(work_dir), hint="name a directory outside it")
    with temporary(work_dir, "llmconvert-roundtrip-") as (folder, left):
        outward, homeward = folder / "there", folder / "back"
        common = {**options, "workers": workers, "sync": False, "progress": progress}
        there = convert(source, outward, to=to, source_name=source_name, **common)
        back = convert(outward, homeward, to=there.source_architecture, **common)
        before, after = unfused(open_checkpoint(Path(there.source))), open_checkpoint(homeward)
        names = [name for name in before.tensors if name not in there.dropped]
        wrong = sorted(set(names) ^ set(after.tensors))
        for name in names:
            if name in after.tensors:
                try:
                    compare([Pair(name, stored(before.tensors[name]), stored(after.tensors[name]), BITWISE)], workers)
                except ProofFailed:
                    wrong.append(name)
        config = read_json(before.path / "config.json") == read_json(homeward / "config.json")
    came = f"{len(names) - len(wrong)} of {len(names)} tensors come back bit for bit"
    reason = f"{came}; config.json comes back {'the same' if config else 'changed'}"
    stale = tuple(f"a round trip that was killed left its copies: `rm -r {path}`" for path in left)
    return ThereAndBack(not wrong, reason, there, back, len(names), tuple(wrong), config, stale)
