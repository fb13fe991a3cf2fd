"""The fault campaign's short form: the same seeds each time, about five hundred trials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from faults import syscalls
from faults.campaign import KINDS, shares

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 520
WHY = syscalls.unavailable()
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))


def _group(kind: str) -> str:
    """Kinds of a group share a process, which has much to load; two groups can run side by side."""
    return "faults-slow" if KINDS[kind].slow else f"faults-{zlib.crc32(kind.encode()) % 2}"


@lru_cache
def _found(group: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    counts = {kind: count for kind, count in shares(TRIALS, slow=group.endswith("slow")).items() if _group(kind) == group}
    command = [sys.executable, str(ROOT / "scripts" / "fault_campaign"), "--json"]
    command += [f"--count={kind}:{count}" for kind, count in counts.items()]
    # Which clone is attacked is for whoever runs the tests to say.
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False, timeout=1500)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    return found


def _marked(kind: str) -> Any:
    marks = [pytest.mark.xdist_group(_group(kind)), *([pytest.mark.slow] if KINDS[kind].slow else [])]
    return pytest.param(kind, marks=marks)


@pytest.mark.parametrize("kind", [_marked(kind) for kind in KINDS])
def test_all_trials_hold(kind: str) -> None:
    found = _found(_group(kind))["kinds"][kind]
    assert found["trials"] > 0
    assert not found["failed"], "\n".join(found["failed"][:5])


def test_there_are_five_hundred_of_them() -> None:
    assert sum(shares(TRIALS, slow=False).values()) >= 500
