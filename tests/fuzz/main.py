"""Fuzz one reader, guided by coverage: `python tests/fuzz/main.py TARGET [libFuzzer options] [CORPUS…]`.

Needs atheris (`pip install atheris`). A crash, a reader that takes longer than ten seconds or more than 1 GiB ends it,
with the input in `crash-…`, `timeout-…` or `oom-…`.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["llmconvert", "json"]):
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import targets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mutations


def _mutate_json(data: bytes, most: int, seed: int) -> bytes:
    """Half of the time change the value rather than its bytes."""
    chance = random.Random(seed)
    try:
        value = json.loads(data)
        if chance.random() < 0.3 or not isinstance(value, dict):
            raise ValueError
        for _ in range(chance.choice((1, 1, 2, 4))):
            _change(value, chance)
        made = json.dumps(value).encode()
    except (ValueError, RecursionError, TypeError):
        return atheris.Mutate(data, most)  # type: ignore[no-any-return]
    return made if len(made) <= most else data


def _change(value: Any, chance: random.Random) -> None:
    *upper, key = chance.choice(mutations.places(value) or [("x",)])
    for step in upper:
        value = value[step]
    if chance.random() < 0.15:
        value.pop(key, None) if isinstance(value, dict) else value.pop(key)
    elif isinstance(value, list) and chance.random() < 0.3:
        value.append(copy.deepcopy(chance.choice(mutations.NASTY)))
    else:
        value[key] = copy.deepcopy(chance.choice(mutations.NASTY))


def main() -> None:
    """See the module."""
    target = sys.argv.pop(1)
    run = targets.TARGETS[target]
    begin = targets.ROOT / "seeds"
    begin.mkdir()
    for number, seed in enumerate(targets.seeds(target)):
        (begin / str(number)).write_bytes(seed)
    mutator = {"custom_mutator": _mutate_json} if target in targets.JSON else {}
    limits = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=20000"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(begin)], run, **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
