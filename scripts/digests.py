"""SHA-256 of every file that a corpus of conversions writes, to hold behaviour fixed while code moves.

    python scripts/digests.py -o before.json          # at one commit
    python scripts/digests.py --against before.json   # at another: lists what differs, exit code 1 if anything does

The corpus: every checkpoint of tests/checkpoints.py × every target × dtypes, through the command line; splits over grids
and formats, each merged and resharded. Refusals count too, by exit code and message.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

VARIES = ("llmconvert.json", "llmconvert-report.json")
"""Records of a run: versions, digests of specs and wording may change."""

DTYPES = ([], ["--dtype", "float32"], ["--dtype", "bfloat16"])
DENSE = ("llama", "qwen2", "llama_tied", "glm", "granite", "internlm2", "baichuan2", "chatglm2", "qwen3")
LARGE = ("megatron_qwen3_moe", "megatron_glm4_moe", "megatron_deepseek_v2", "megatron_deepseek_v3", "mixtral")
GRIDS = (
    [], ["--tp", "2"], ["--tp", "2", "--pp", "3"], ["--pp", "3", "--transformer-impl", "local"], ["--format", "torch_dist"],
    ["--format", "torch_dist", "--transformer-impl", "local"],
)  # fmt: skip
EXPERT_GRIDS = (["--ep", "2"], ["--tp", "2", "--ep", "2", "--etp", "1"], ["--ep", "2", "--moe-grouped-gemm"])


@functools.cache
def command() -> Any:
    """The command line, built once."""
    import typer

    from llmconvert.cli import app
    from llmconvert.spec.registry import registry

    app._register(registry())
    return typer.main.get_command(app.app)


def run(*arguments: object) -> tuple[int, str]:
    """A command in this process: its exit code and its error."""
    from llmconvert.errors import LlmconvertError

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            command().main([str(argument) for argument in arguments], standalone_mode=False)
        except LlmconvertError as error:
            return error.exit_code, error.what
    return 0, ""


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file below a directory, by name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in VARIES
    }


def written(destination: Path, *arguments: str) -> dict[str, Any]:
    """What a command wrote, or why it did not."""
    code, error = run(*arguments, "--no-sync", "-q")
    if code:
        return {"exit": code, "error": error.replace(str(destination.parent), "")}
    return digests(destination)


def corpus(place: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every conversion by name, with what it wrote."""
    import checkpoints

    from llmconvert.spec.registry import registry

    out = place / "out"
    for arch in checkpoints.ALL:
        source = checkpoints.make(arch, place / arch)
        for target in registry().specs:
            for options in DTYPES:
                found = written(out, "convert", source, out, "--to", target, "--verify", "weights", *options)
                yield f"{arch} --to {target} {' '.join(options)}".strip(), found
                shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(source)
    for arch in (*DENSE, *LARGE):
        source, ranks = checkpoints.make(arch, place / arch), place / "ranks"
        for grid in (*GRIDS, *(EXPERT_GRIDS if arch in LARGE else ())):
            for options in DTYPES[:2]:
                name = f"{arch} split {' '.join([*grid, *options])}".strip()
                yield name, written(ranks, "split", source, ranks, *grid, *options, "--verify", "weights")
                if ranks.is_dir():
                    yield f"{name}, merged", written(out, "merge", ranks, out, "--verify", "weights")
                    shutil.rmtree(out, ignore_errors=True)
                    again = ("--tp", "1", "--format", "torch_dist" if "torch_dist" not in grid else "torch")
                    yield f"{name}, resharded", written(out, "reshard", ranks, out, *again, "--verify", "weights")
                    shutil.rmtree(out, ignore_errors=True)
                    shutil.rmtree(ranks)
        shutil.rmtree(source)


def main() -> int:
    """Make the corpus; write its digests, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the digests to this file")
    parser.add_argument("--against", type=Path, help="compare with digests written before")
    parser.add_argument("--only", default="", help="conversions whose name begins so")
    options = parser.parse_args()
    started, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, entry in corpus(Path(folder)):
            if name.startswith(options.only):
                found[name] = entry
    refused = sum("exit" in entry for entry in found.values())
    print(f"{len(found)} conversions, {refused} of them refused, in {time.monotonic() - started:.0f} s")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if not options.against:
        return 0
    before = json.loads(options.against.read_text())
    differing = [name for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)]
    for name in differing:
        was, now = before.get(name, {}), found.get(name, {})
        files = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        print(
            f"{name}: {', '.join(files[:4])}"
            + (f" ({was['error']} / {now['error']})" if "error" in was and "error" in now else "")
        )
    print(f"{len(differing)} differ")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
