"""Settings for all tests: few threads each (the tests run side by side), no network, no colour."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_COLOR"] = "1"
os.environ.pop("FORCE_COLOR", None)

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

try:
    from hypothesis import settings
except ImportError:  # other releases of transformers are tried without
    pass
else:
    # The same examples each time: what is new is looked for by hand, with `HYPOTHESIS_PROFILE=default` and `scripts/fuzz`.
    settings.register_profile("same", derandomize=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def megatron_args_are_taken(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test is about, the options a split wrote for Megatron-LM are options its parser takes."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    scripts = sorted(folder.rglob("megatron-args.sh")) if folder else []
    if scripts:
        import megatron_options

        megatron_options.check(*scripts)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
