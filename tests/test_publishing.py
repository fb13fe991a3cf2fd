"""Publishing: what is proved is what appears, whoever else writes there, whatever was planted, wherever a run dies."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import checkpoints
import pytest
import tiny

from llmconvert.cli.app import main
from llmconvert.converters.huggingface import convert
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.merge import merge_checkpoint
from llmconvert.converters.megatron.reshard import reshard_checkpoint
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.converters.roundtrip import round_trip
from llmconvert.converters.running import Report
from llmconvert.engine import journal, rename
from llmconvert.engine.held import lock_file
from llmconvert.engine.journal import Workspace, work_directory
from llmconvert.engine.manifest import check
from llmconvert.engine.publish import check_destination
from llmconvert.engine.tree import Tree
from llmconvert.errors import BadInput, InputOutput, ProofFailed, Refused, Usage

ROOT = Path(__file__).resolve().parent.parent


def _snapshot(directory: Path) -> dict[str, str]:
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, `a` and `b`, and what each becomes, `a-out` and `b-out`."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate("ab"):
        tiny.make("qwen2", folder / name, seed=seed, tokenizer=True)
        _convert(folder / name, folder / f"{name}-out")
    return folder


def _convert(source: Path, destination: Path, **options: object) -> Report:
    options = {"to": "llama", "verify": "weights", "workers": 1, **options}
    return convert(source, destination, **options)  # type: ignore[arg-type]


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that knows no flags of renameat2, as NFS."""

    def unknown(*arguments: object) -> None:
        raise rename.Unsupported

    monkeypatch.setattr(rename, "rename_with", unknown)


def _child(source: Path, destination: Path, *extra: str, before: str = "") -> subprocess.Popen[str]:
    command = ["convert", str(source), str(destination), "--to", "llama", "--verify", "none", "--workers", "1", *extra]
    script = f"import os, signal, sys, time\n{before}\nfrom llmconvert.cli.app import main\nmain({command!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


_PAUSE = (
    "real = os.fsync\n"
    "def paused(d):\n"
    "    os.fsync = real\n"
    "    print('now', flush=True); sys.stdin.readline()\n"
    "    return real(d)\n"
    "os.fsync = paused\n"
)
"""The run stops once it has proved its work and is about to publish it."""


# -- races ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), ("--resume",), ("--overwrite",)])
def test_a_run_that_publishes_is_not_robbed(sources: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    first = _child(sources / "a", tmp_path / "dst", before=_PAUSE)
    assert first.stdout is not None and first.stdout.readline() == "now\n"
    second = _child(sources / "b", tmp_path / "dst", *extra)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2 and "another llmconvert run" in said
    _, said = first.communicate("go\n", timeout=60)
    assert first.returncode == 0, said
    assert _tensors(tmp_path / "dst") == _tensors(sources / "a-out")
    check(tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst"]


def _tensors(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def _when_synced(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something else just when a run is about to publish."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        act()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_destination_that_appears_meanwhile_is_not_replaced(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, request: pytest.FixtureRequest
) -> None:
    if not exchanges:
        request.getfixturevalue("no_exchange")
    destination = tmp_path / "dst"

    def appear() -> None:
        destination.mkdir()
        (destination / "mine").write_text("mine")

    _when_synced(monkeypatch, appear)
    with pytest.raises(Usage, match="appeared") as caught:
        _convert(sources / "a", destination)
    assert "--resume" in (caught.value.hint or "")
    assert _snapshot(destination).keys() == {"mine"}
    shutil.rmtree(destination)
    _convert(sources / "a", destination, resume=True)
    assert _snapshot(destination) == _snapshot(sources / "a-out")


def test_an_empty_directory_that_appears_meanwhile_is_not_replaced_either(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _when_synced(monkeypatch, (tmp_path / "dst").mkdir)
    with pytest.raises(Usage, match="appeared"):
        _convert(sources / "a", tmp_path / "dst")
    assert not list((tmp_path / "dst").iterdir())


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_file_that_appears_in_what_is_to_be_replaced_is_kept(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, request: pytest.FixtureRequest
) -> None:
    if not exchanges:
        request.getfixturevalue("no_exchange")
    destination = tmp_path / "dst"
    shutil.copytree(sources / "b-out", destination)
    real = rename.exchange

    def late(*arguments: object) -> None:
        if not (destination / "mine").exists():
            (destination / "mine").write_text("mine")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("llmconvert.engine.publish.exchange", late)
    with pytest.raises(Usage, match="`mine`"):
        _convert(sources / "a", destination, overwrite=True)
    assert (destination / "mine").read_text() == "mine" and _tensors(destination) == _tensors(sources / "b-out")


def test_a_destination_replaced_meanwhile_is_not_replaced(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "dst"
    shutil.copytree(sources / "b-out", destination)

    def replace() -> None:
        destination.rename(tmp_path / "aside")
        shutil.copytree(sources / "b-out", destination)

    _when_synced(monkeypatch, replace)
    with pytest.raises(Usage, match="appeared"):
        _convert(sources / "a", destination, overwrite=True)
    assert _snapshot(destination) == _snapshot(sources / "b-out") == _snapshot(tmp_path / "aside")


def test_a_work_directory_replaced_meanwhile_is_not_published(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_directory(tmp_path / "dst")

    def replace() -> None:
        work.rename(tmp_path / "aside")
        shutil.copytree(sources / "b-out", work / "output")

    _when_synced(monkeypatch, replace)
    with pytest.raises(InputOutput, match="removed or replaced"):
        _convert(sources / "a", tmp_path / "dst")
    assert not (tmp_path / "dst").exists() and _snapshot(work / "output") == _snapshot(sources / "b-out")


@pytest.mark.parametrize("act", ["added", "removed"])
def test_nothing_is_published_that_was_not_written(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    output = work_directory(tmp_path / "dst") / "output"

    def meddle() -> None:
        (output / "modeling_llama.py").write_text("1") if act == "added" else (output / "tokenizer.json").unlink()

    _when_synced(monkeypatch, meddle)
    with pytest.raises(InputOutput, match=act):
        _convert(sources / "a", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    _convert(sources / "a", tmp_path / "dst", resume=True)
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


def test_a_lock_removed_by_hand_lets_nobody_in(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def break_in() -> None:
        lock_file(tmp_path / "dst").unlink()
        with pytest.raises(Usage) as caught:
            _convert(sources / "b", tmp_path / "dst", overwrite=True)
        said.append(caught.value.what)

    _when_synced(monkeypatch, break_in)
    with pytest.raises(InputOutput, match="lock"):
        _convert(sources / "a", tmp_path / "dst")
    assert said == ["another llmconvert run is writing this destination"]
    assert not (tmp_path / "dst").exists()


def test_another_process_of_a_run_takes_no_other_directory(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_COMMON_SECONDS", 0)
    space = Workspace(tmp_path / "dst", "identity", resume=False, restart=False)
    try:
        other = Workspace(tmp_path / "dst", "", resume=False, restart=False, rank=1, token=space.token)
        assert other.tree.identity == space.tree.identity
        other.close()
        with pytest.raises(InputOutput, match="process 1 does not find"):
            Workspace(tmp_path / "dst", "", resume=False, restart=False, rank=1, token="another")
    finally:
        space.close()
    with pytest.raises(InputOutput, match="process 2 does not find"):
        Workspace(tmp_path / "elsewhere", "", resume=False, restart=False, rank=2, token=space.token)


# -- kills ---------------------------------------------------------------------------------------

_DYING = (
    "from llmconvert.engine import rename\n"
    "step, calls = {step}, [0]\n"
    "def dying(real, after):\n"
    "    def call(*a, **k):\n"
    "        calls[0] += 1\n"
    "        if calls[0] == step and not after: os.kill(os.getpid(), signal.SIGKILL)\n"
    "        try: return real(*a, **k)\n"
    "        finally:\n"
    "            if calls[0] == step and after: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    return call\n"
    "{how}\n"
)
_EXCHANGES = "rename.rename_with = dying(rename.rename_with, {after})"
_RENAMES = (
    "def unknown(*a): raise rename.Unsupported\n"
    "rename.rename_with = unknown\n"
    "real, calls[0] = os.rename, -1\n"  # the first is of `run.json`
    "os.rename = dying(real, {after})"
)
_CLEARS = "os.unlink = dying(os.unlink, {after})"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("how", "step"), [(_EXCHANGES, 1), (_RENAMES, 1), (_RENAMES, 2), (_CLEARS, 3), (_CLEARS, 6)])
def test_a_kill_leaves_the_old_or_the_new(sources: Path, tmp_path: Path, how: str, step: int, after: bool) -> None:
    destination = tmp_path / "dst"
    shutil.copytree(sources / "b-out", destination)
    old, new = _tensors(sources / "b-out"), _tensors(sources / "a-out")
    before = _DYING.format(step=step, how=how.format(after=after))
    child = _child(sources / "a", destination, "--overwrite", before=before)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    if how != _RENAMES:
        assert _tensors(destination) in (old, new)
    # Any next run puts right what there is to put right, even one that is refused.
    with pytest.raises(Usage, match="not empty"):
        _convert(sources / "a", destination)
    assert _tensors(destination) in (old, new)
    assert not (work_directory(destination).exists() and _tensors(destination) == new)
    report = _convert(sources / "a", destination, resume=True, verify="none")
    assert _tensors(destination) == new and report.published
    check(destination)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst"]


class _Calls:
    """Calls that rename and remove, once a run publishes or clears up: it is killed at one of them.

    Folders are listed in the worst order: what tells a folder's other files from a stranger's goes first, and what tells
    of the run goes last.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.count = 0, 0
        for name in ("unlink", "rmdir", "rename"):
            monkeypatch.setattr(os, name, self._dying(getattr(os, name)))
        monkeypatch.setattr(rename, "rename_with", self._dying(rename.rename_with))
        listdir, require = os.listdir, Workspace.require
        worst = ("llmconvert.json", "config.json")

        def listed(*where: int) -> list[str]:
            return sorted(listdir(*where), key=lambda name: (name == "run.json", name not in worst, name))

        def required(space: Workspace) -> None:
            require(space)
            self.count = 0

        monkeypatch.setattr(os, "listdir", listed)
        monkeypatch.setattr(Workspace, "require", required)

    def _dying(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments, **named)

        return call

    def killed(self, at: int, act: Callable[[], object], *, waits: bool = False) -> bool:
        """Whether a process that does this is killed at that call, rather than done before.

        Args:
            at: the call's number, from 1 on.
            act: what is done.
            waits: calls count from where a run is about to publish.
        """
        pid = os.fork()
        if not pid:
            self.at, self.count = at, -100_000 if waits else 0
            with suppress(Exception):
                act()
            os._exit(0)
        return os.waitpid(pid, 0)[1] == signal.SIGKILL


def _overwrite(command: str, source: Path, destination: Path) -> None:
    options = {"overwrite": True, "verify": "none", "sync": False, "workers": 1}
    if command == "convert":
        _convert(source, destination, **options)
    else:
        split_checkpoint(source, destination, Grid(tp=2), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("command", ["convert", "split"])
def test_a_kill_at_any_step_of_replacing_and_removing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, exchanges: bool
) -> None:
    """And at one after the other while the next runs clear up."""
    if not exchanges:
        monkeypatch.setattr(rename, "_function", lambda: None)
    states = {}
    for name in "ab":
        _overwrite(command, sources / name, tmp_path / f"{name}-out")
        states[name] = _snapshot(tmp_path / f"{name}-out")
    destination, work = tmp_path / "dst", work_directory(tmp_path / "dst")
    calls, at, published = _Calls(monkeypatch), 1, 0
    while True:
        for path in (destination, work):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "b-out", destination)
        if not calls.killed(at, lambda: _overwrite(command, sources / "a", destination), waits=True):
            break
        step = 1
        while calls.killed(step, lambda: check_destination(sources / "a", destination, overwrite=False)):
            step += 1
        with pytest.raises(Usage, match="not empty"):
            check_destination(sources / "a", destination, overwrite=False)
        there = _snapshot(destination)
        assert there in states.values(), at
        if there == states["a"]:
            assert not work.exists(), at
            published += 1
        at += 1
    assert published > len(states["b"]) > 6
    assert _snapshot(destination) == states["a"] and not work.exists()


LOST: dict[str, Callable[[Path], object]] = {
    "the record": lambda work: (work / "run.json").unlink(),
    "what the record says": lambda work: (work / "run.json").write_bytes(bytes((work / "run.json").stat().st_size)),
    "the journal": lambda work: [path.write_bytes(b"") for path in work.glob("journal-*")],
    "nothing": lambda work: None,
}


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("lost", LOST)
def test_what_a_loss_of_power_leaves_goes_with_the_next_run(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(rename, "_function", lambda: None)
    destination, work = tmp_path / "dst", work_directory(tmp_path / "dst")
    shutil.copytree(sources / "b-out", destination)
    real = Tree.rename

    def end(tree: Tree, name: str, new: str) -> None:
        if new == journal.DISCARDED:
            os.kill(os.getpid(), signal.SIGKILL)
        real(tree, name, new)

    monkeypatch.setattr(Tree, "rename", end)
    assert _Calls(monkeypatch).killed(0, lambda: _overwrite("convert", sources / "a", destination))
    monkeypatch.undo()
    assert _tensors(destination) == _tensors(sources / "a-out") and work.exists()
    LOST[lost](work)
    assert _convert(sources / "a", destination, resume=True, verify="none").unchanged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst"]


def test_an_unfinished_run_beside_its_own_result_goes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody gave the destination the same result another way; a run of another kind is another's."""
    _stop_half_way(monkeypatch, sources / "a", tmp_path / "dst")
    shutil.copytree(sources / "a-out", tmp_path / "dst")
    report = _convert(sources / "a", tmp_path / "dst", resume=True)
    assert report.unchanged and sorted(path.name for path in tmp_path.iterdir()) == ["dst"]
    shutil.rmtree(tmp_path / "dst")
    _stop_half_way(monkeypatch, sources / "b", tmp_path / "dst")
    shutil.copytree(sources / "a-out", tmp_path / "dst")
    report = _convert(sources / "a", tmp_path / "dst", resume=True)
    work = work_directory(tmp_path / "dst")
    assert report.unchanged and work.exists() and str(work) in report.notes[-1]


def test_what_says_which_directory_is_which_is_on_the_disk_before_it_is_published(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    _convert(sources / "a", tmp_path / "dst")
    at = done.index("output")
    assert done[at + 1 : at + 3] == ["run.json", work_directory(tmp_path / "dst").name]
    assert {"model.safetensors", "config.json", "llmconvert.json"} <= set(done[:at]) and done[-1] == tmp_path.name


def test_an_unfinished_run_is_resumed_as_it_was_begun(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as with `--overwrite`, which `--resume` need not repeat."""
    destination = tmp_path / "dst"
    shutil.copytree(sources / "b-out", destination)
    _when_synced(monkeypatch, lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(InputOutput, match="disk is full"):
        _convert(sources / "a", destination, overwrite=True)
    assert _snapshot(destination) == _snapshot(sources / "b-out")
    _convert(sources / "a", destination, resume=True)
    assert _snapshot(destination) == _snapshot(sources / "a-out")


# -- what may be replaced ------------------------------------------------------------------------


def _foreign(name: str) -> Callable[[Path], None]:
    def add(destination: Path) -> None:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        (destination / name).write_text("mine")

    return add


def _link(destination: Path) -> None:
    (destination / "tokenizer.json").unlink()
    (destination / "tokenizer.json").symlink_to("config.json")


FOREIGN = {
    "notes": (_foreign("notes.txt"), "notes.txt"),
    "script": (_foreign("train.py"), "train.py"),
    "training state": (_foreign("checkpoint-500/optimizer.pt"), "checkpoint-500/optimizer.pt"),
    "optimizer": (_foreign("optimizer.pt"), "optimizer.pt"),
    "repository": (_foreign(".git/HEAD"), ".git/HEAD"),
    "Megatron's training": (
        _foreign("iter_0000100/mp_rank_00/model_optim_rng.pt"),
        "iter_0000100/mp_rank_00/model_optim_rng.pt",
    ),
    "link": (_link, "tokenizer.json"),
}


def test_a_destination_no_library_can_open_is_refused_at_once(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(Usage, match="not UTF-8"):
        check_destination(sources, tmp_path / os.fsdecode(b"\xff") / "result", overwrite=False)
    assert not os.listdir(os.fsencode(tmp_path))


@pytest.mark.parametrize("case", FOREIGN)
def test_overwrite_leaves_what_others_wrote(sources: Path, tmp_path: Path, case: str) -> None:
    add, name = FOREIGN[case]
    destination = tmp_path / "dst"
    shutil.copytree(sources / "b-out", destination)
    add(destination)
    before = _snapshot(destination)
    with pytest.raises(Usage, match="overwrite") as caught:
        _convert(sources / "a", destination, overwrite=True)
    assert f"`{name}`" in caught.value.what and _snapshot(destination) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst"]


def test_overwrite_leaves_files_beside_shards_it_wrote(sources: Path, tmp_path: Path) -> None:
    """A run that trained on from what `split` wrote: weeks of work under names of the same kind."""
    destination = tmp_path / "ranks"
    options = {"verify": "weights", "workers": 1}
    split_checkpoint(sources / "a", destination, Grid(tp=2), **options)  # type: ignore[arg-type]
    split_checkpoint(sources / "a", destination, Grid(tp=2), overwrite=True, **options)  # type: ignore[arg-type]
    trained = destination / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt"
    trained.parent.mkdir(parents=True)
    trained.write_bytes(b"weeks")
    with pytest.raises(Usage, match="iter_0000100"):
        split_checkpoint(sources / "a", destination, Grid(tp=2), overwrite=True, **options)  # type: ignore[arg-type]
    assert trained.read_bytes() == b"weeks"


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
def test_overwrite_replaces_shards(sources: Path, tmp_path: Path, fmt: str) -> None:
    for overwrite in (False, True):
        split_checkpoint(sources / "a", tmp_path / "x", Grid(), fmt=fmt, verify="none", overwrite=overwrite, workers=1)
    check(tmp_path / "x")


def test_overwrite_replaces_what_transformers_saved(sources: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    destination = tmp_path / "dst"
    model = AutoModelForCausalLM.from_pretrained(sources / "a")
    model.save_pretrained(destination, max_shard_size="40KB")
    tokenizer = AutoTokenizer.from_pretrained(sources / "a")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(destination)
    assert len(list(destination.rglob("*"))) > 6
    _convert(sources / "a", destination, overwrite=True)
    assert _snapshot(destination) == _snapshot(sources / "a-out")


def test_a_destination_must_have_a_name(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name in (".", "..", "/"):
        with pytest.raises(Usage, match="no name|contains"):
            _convert(sources / "a", Path(name))


# -- planted -------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's files, which nothing may touch."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    return folder


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_link_in_place_of_the_work_directory(
    sources: Path, tmp_path: Path, victim: Path, options: dict[str, bool]
) -> None:
    work_directory(tmp_path / "dst").symlink_to(victim)
    with pytest.raises(Usage, match="link") as caught:
        _convert(sources / "a", tmp_path / "dst", **options)
    assert f"rm {work_directory(tmp_path / 'dst')}" in (caught.value.hint or "")
    assert _snapshot(victim).keys() == {"precious"} and not (tmp_path / "dst").exists()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_something_else_in_place_of_the_lock(sources: Path, tmp_path: Path, victim: Path, kind: str) -> None:
    lock = lock_file(tmp_path / "dst")
    if kind == "link":
        lock.symlink_to(victim / "precious")
    else:
        os.mkfifo(lock) if kind == "fifo" else lock.mkdir()
    with pytest.raises(Usage, match="not its own"):
        _convert(sources / "a", tmp_path / "dst")
    assert (victim / "precious").read_text() == "precious" and lock.lstat()


def _stop_half_way(monkeypatch: pytest.MonkeyPatch, source: Path, destination: Path, **options: object) -> None:
    real, calls = os.pwrite, 0

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(InputOutput, match="disk is full"):
            _convert(source, destination, **options)


def _symlink(file: Path, victim: Path) -> None:
    file.unlink()
    file.symlink_to(victim / "precious")


def _hard_link(file: Path, victim: Path) -> None:
    file.unlink()
    os.link(victim / "precious", file)


def _fifo(file: Path, victim: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("plant", [_symlink, _hard_link, _fifo])
@pytest.mark.parametrize("name", ["output/model.safetensors", "output/config.json", "journal-*.jsonl", "run.json"])
def test_links_in_the_work_directory_are_not_followed(
    sources: Path, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Path, Path], None], name: str,
) -> None:  # fmt: skip
    _stop_half_way(monkeypatch, sources / "a", tmp_path / "dst")
    (file,) = work_directory(tmp_path / "dst").glob(name)
    plant(file, victim)
    _convert(sources / "a", tmp_path / "dst", resume=True)
    assert (victim / "precious").read_text() == "precious"
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


def test_a_link_in_place_of_a_folder_in_the_work_directory(
    sources: Path, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_half_way(monkeypatch, sources / "a", tmp_path / "dst")
    output = work_directory(tmp_path / "dst") / "output"
    (output / "additional_chat_templates").symlink_to(victim)
    _convert(sources / "a", tmp_path / "dst", resume=True)
    assert _snapshot(victim).keys() == {"precious"}
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


def test_the_whole_output_replaced_by_a_link(
    sources: Path, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_half_way(monkeypatch, sources / "a", tmp_path / "dst")
    output = work_directory(tmp_path / "dst") / "output"
    output.rename(tmp_path / "aside")
    output.symlink_to(victim)
    with pytest.raises(Usage, match="not its own") as caught:
        _convert(sources / "a", tmp_path / "dst", resume=True)
    assert caught.value.where == str(output) and caught.value.exit_code == 2
    assert f"rm {output}" in (caught.value.hint or "") and "--overwrite" in (caught.value.hint or "")
    _convert(sources / "a", tmp_path / "dst", overwrite=True)
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")
    assert _snapshot(victim).keys() == {"precious"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_a_work_directory_of_another_user(sources: Path, tmp_path: Path) -> None:
    work = work_directory(tmp_path / "dst")
    work.mkdir(0o700)
    (work / "theirs").write_text("theirs")
    os.chown(work, 12345, 12345)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(Usage, match="another user"):
            _convert(sources / "a", tmp_path / "dst", **options)
    assert (work / "theirs").read_text() == "theirs"


def test_a_work_directory_open_to_others(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_half_way(monkeypatch, sources / "a", tmp_path / "dst")
    work_directory(tmp_path / "dst").chmod(0o777)
    for _ in range(2):
        with pytest.raises(Usage, match="other users can write"):
            _convert(sources / "a", tmp_path / "dst", resume=True)


def test_unknown_files_in_a_work_directory(sources: Path, tmp_path: Path) -> None:
    work = work_directory(tmp_path / "dst")
    work.mkdir(0o700)
    (work / "model.safetensors").write_text("of an older version, or not ours")
    for options in ({}, {"resume": True}):
        with pytest.raises(Usage, match="`model.safetensors`") as caught:
            _convert(sources / "a", tmp_path / "dst", **options)
        assert f"rm -r {work}" in (caught.value.hint or "")
    _convert(sources / "a", tmp_path / "dst", overwrite=True)
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


def test_modes(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private while it grows; then as any other directory of the user's."""
    seen: list[int] = []
    work = work_directory(tmp_path / "dst")

    def look() -> None:
        seen.extend(stat.S_IMODE(path.stat().st_mode) for path in (work, lock_file(tmp_path / "dst")))

    _when_synced(monkeypatch, look)
    mask = os.umask(0o027)
    try:
        _convert(sources / "a", tmp_path / "dst")
    finally:
        os.umask(mask)
    assert seen == [0o700, 0o600]
    assert stat.S_IMODE((tmp_path / "dst").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "dst").iterdir()} == {0o640}


# -- companions ----------------------------------------------------------------------------------


def test_texts_win_over_copies(sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(sources / "a", source)
    (source / "modeling_canonical.py").write_text("raise SystemExit('not llmconvert')\n")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["modeling_canonical.Tokenizer", None]}
    (source / "config.json").write_text(json.dumps(config))
    report = _convert(source, tmp_path / "dst", to="canonical")
    ours = ROOT / "llmconvert" / "models" / "modeling_canonical.py"
    assert (tmp_path / "dst" / "modeling_canonical.py").read_bytes() == ours.read_bytes()
    assert "of its own" in report.not_carried["modeling_canonical.py"]
    written = json.loads((tmp_path / "dst" / "tokenizer_config.json").read_text())
    assert written["auto_map"] == {"AutoTokenizer": ["modeling_canonical.Tokenizer", None]}


def test_links_that_leave_the_source_stay_behind(sources: Path, tmp_path: Path, victim: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(sources / "a", source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (source / "additional_chat_templates" / "x.jinja").symlink_to(victim / "precious")
    (source / "additional_chat_templates" / "y").symlink_to(victim)
    (source / "vocab.txt").symlink_to(victim / "nothing")
    (source / "merges.txt").symlink_to("merges.txt")
    with pytest.raises(BadInput, match="leaves the checkpoint"):  # transformers would follow `x.jinja`
        _convert(source, tmp_path / "dst")
    report = _convert(source, tmp_path / "dst", verify="none")
    assert report.not_carried == {
        "additional_chat_templates/x.jinja": "a symlink that leaves the checkpoint",
        "additional_chat_templates/y/": "a symlink that leaves the checkpoint",
        "vocab.txt": "a symlink that leads nowhere",
        "merges.txt": "a symlink that leads nowhere",
    }
    names = set(_snapshot(tmp_path / "dst"))
    assert "additional_chat_templates/rag.jinja" in names and len(names) == len(_snapshot(sources / "a-out")) + 1
    check(tmp_path / "dst")


def test_a_folder_of_templates_that_is_elsewhere(sources: Path, tmp_path: Path, victim: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(sources / "a", source)
    (source / "additional_chat_templates").symlink_to(victim)
    with pytest.raises(BadInput, match="leaves the checkpoint"):
        _convert(source, tmp_path / "dst")
    report = _convert(source, tmp_path / "dst", verify="none")
    assert "additional_chat_templates/" in report.not_carried
    assert "additional_chat_templates" not in {path.name for path in (tmp_path / "dst").iterdir()}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_beside_shards(sources: Path, tmp_path: Path, victim: Path, kind: str) -> None:
    ranks = tmp_path / "ranks"
    split_checkpoint(sources / "a", ranks, Grid(), verify="none", workers=1)
    if kind == "file":
        (ranks / "hf" / "secret").symlink_to(victim / "precious")
    else:
        (ranks / "hf").rename(victim / "hf")
        (victim / "hf" / "secret").write_text("precious")
        (ranks / "hf").symlink_to(victim / "hf")
    merged = merge_checkpoint(ranks, tmp_path / "merged", verify="none", workers=1)
    assert "secret" not in {path.name for path in (tmp_path / "merged").iterdir()} and "secret" in merged.not_carried
    again = reshard_checkpoint(ranks, tmp_path / "again", Grid(tp=2), verify="none", workers=1)
    assert not (tmp_path / "again" / "hf" / "secret").exists()
    assert "secret" in again.not_carried


# -- resuming ------------------------------------------------------------------------------------

COMPANIONS: dict[str, Callable[[Path], object]] = {
    "removed": lambda source: (source / "tokenizer.json").unlink(),
    "added": lambda source: (source / "chat_template.jinja").write_text("{{ messages }}"),
    "changed": lambda source: (source / "generation_config.json").write_text("{}"),
}


@pytest.mark.parametrize("change", COMPANIONS)
def test_a_run_is_another_if_its_companions_are(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = tmp_path / "src"
    shutil.copytree(sources / "a", source)
    _stop_half_way(monkeypatch, source, tmp_path / "dst")
    COMPANIONS[change](source)
    with pytest.raises(Usage, match="another conversion"):
        _convert(source, tmp_path / "dst", resume=True)


def test_foreign_files_are_not_published(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_half_way(monkeypatch, sources / "a", tmp_path / "dst")
    output = work_directory(tmp_path / "dst") / "output"
    (output / "modeling_llama.py").write_text("raise SystemExit\n")
    (output / "hf").mkdir()
    (output / "hf" / "tokenizer.json").write_text("{}")
    _convert(sources / "a", tmp_path / "dst", resume=True)
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


def test_a_journal_of_the_sources_own_is_a_file_like_any_other(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under names of this version and of earlier ones; it would make zeros of weights that no proof looks at."""
    source = tmp_path / "src"
    shutil.copytree(sources / "a", source)
    _convert(source, tmp_path / "expected", verify="none")
    import xxhash

    manifest = json.loads((tmp_path / "expected" / "llmconvert.json").read_text())
    lines = []
    for name, entry in manifest["tensors"].items():
        itemsize = {"F32": 4, "BF16": 2}[entry["dtype"]]
        zeros = bytes(itemsize * int(__import__("math").prod(entry["shape"])))
        lines.append(json.dumps([f"{name}:0", xxhash.xxh3_128(zeros).hexdigest()]) + "\n")
    for name in ("llmconvert-journal-1.jsonl", "journal-1.jsonl", "run.json"):
        (source / name).write_text("".join(lines))
    for folder in ("expected", "dst"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    _convert(source, tmp_path / "expected", verify="none")
    _stop_half_way(monkeypatch, source, tmp_path / "dst", verify="none")
    _convert(source, tmp_path / "dst", verify="none", resume=True)
    assert _tensors(tmp_path / "dst") == _tensors(tmp_path / "expected") == _tensors(sources / "a-out")
    assert (tmp_path / "dst" / "llmconvert-journal-1.jsonl").read_text() == "".join(lines)


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 7),
    "not JSON": lambda path: path.write_bytes(b"{{{\n" + path.read_bytes()),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\n" + path.read_bytes()),
    "other types": lambda path: path.write_bytes(b'[1, 2]\n["x"]\n{"a": 1}\n[[], {}]\nnull\n' + path.read_bytes()),
    "deep": lambda path: path.write_bytes(b"[" * 100_000 + b"\n"),
    "wrong sums": lambda path: path.write_bytes(path.read_bytes().replace(b'", "', b'", "0')),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_costs_work_and_no_more(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    _stop_half_way(monkeypatch, sources / "a", tmp_path / "dst")
    (file,) = work_directory(tmp_path / "dst").glob("journal-*.jsonl")
    DAMAGE[damage](file)
    _convert(sources / "a", tmp_path / "dst", resume=True)
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": 3}', "\xff"])
def test_a_damaged_record_of_the_run_starts_it_anew(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    _stop_half_way(monkeypatch, sources / "a", tmp_path / "dst")
    (work_directory(tmp_path / "dst") / "run.json").write_bytes(text.encode("latin-1"))
    _convert(sources / "a", tmp_path / "dst", resume=True)
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


def test_a_fault_of_the_moment_is_not_remembered(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, 0

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        count = real(descriptor, buffers, offset)
        if calls == 3:
            buffers[0][count // 2] ^= 1
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(ProofFailed, match="round trip") as caught:
            _convert(sources / "a", tmp_path / "dst")
    assert "--resume" in (caught.value.hint or "")
    _convert(sources / "a", tmp_path / "dst", resume=True)
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


def test_a_read_that_fails_is_told_and_not_remembered(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, 0

    def preadv(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(InputOutput, match="cannot read") as caught:
            _convert(sources / "a", tmp_path / "dst")
    assert str(sources / "a") in (caught.value.where or "") and "--resume" in (caught.value.hint or "")
    _convert(sources / "a", tmp_path / "dst", resume=True)
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")


def test_what_is_finished_is_left_as_it_is(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, destination = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(sources / "a", source)
    _convert(source, destination)

    def state() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in destination.iterdir()}

    before = state()
    again = ["convert", str(source), str(destination), "--to", "llama", "--verify", "weights", "--resume"]
    with pytest.raises(SystemExit) as done:
        main(again)
    assert done.value.code == 0 and "nothing to do" in capsys.readouterr().out and state() == before
    report = _convert(source, destination, resume=True)
    assert report.unchanged and report.published and report.roundtrip is not None
    for options, said in (
        ({"dtype": "bfloat16"}, "not what this command makes"),
        ({"max_shard_size": "60KB"}, "not what this command makes"),
        ({"verify": "logits"}, "--verify weights"),
    ):
        with pytest.raises(Usage, match=said):
            _convert(source, destination, resume=True, **options)
    assert _convert(source, destination, resume=True, verify="none").unchanged
    with pytest.raises(Usage, match="not empty"):
        _convert(source, destination)
    shutil.copytree(sources / "b", tmp_path / "other", copy_function=shutil.copy)
    (tmp_path / "other" / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(Usage, match="`model.embed_tokens.weight` differs"):
        _convert(tmp_path / "other", destination, resume=True)
    shutil.rmtree(tmp_path / "other")
    (destination / "tokenizer.json").write_text("{}")
    with pytest.raises(Usage, match="`tokenizer.json` has another size"):
        _convert(source, destination, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("what", ["weights", "header", "config.json"])
def test_what_was_finished_and_has_changed_is_no_success(sources: Path, tmp_path: Path, what: str) -> None:
    destination = tmp_path / "dst"
    _convert(sources / "a", destination)
    (destination / "notes.txt").write_text("a file more is no other model")
    assert _convert(sources / "a", destination, resume=True).unchanged
    path = destination / what if what == "config.json" else min(destination.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    if what == "weights":
        data[-1] ^= 1
    else:
        old, new = (b'"eos_token_id": 2', b'"eos_token_id": 3') if what == "config.json" else (b'"pt"', b'"tf"')
        assert old in data
        data = data.replace(old, new)
    path.write_bytes(data)
    with pytest.raises(BadInput, match="not what llmconvert wrote") as caught:
        _convert(sources / "a", destination, resume=True)
    assert "`--overwrite`" in (caught.value.hint or "")
    assert path.read_bytes() == data


@pytest.mark.parametrize("command", ["split", "merge", "reshard", "to-reward"])
def test_every_command_leaves_what_is_finished(sources: Path, tmp_path: Path, command: str) -> None:
    ranks, destination = tmp_path / "ranks", tmp_path / "dst"
    options = ["--verify", "weights", "--workers", "1"]
    if command in ("merge", "reshard"):
        split_checkpoint(sources / "a", ranks, Grid(tp=2), verify="none", workers=1)
    source = ranks if command in ("merge", "reshard") else sources / "a"
    for extra in ([], ["--resume"]):
        with pytest.raises(SystemExit) as done:
            main([command, str(source), str(destination), *options, *extra])
        assert done.value.code == 0
    check(destination)


def test_bad_data_found_while_writing_leave_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src"
    shutil.copytree(sources / "a", source)
    state = checkpoints.tensors(source)
    state["lm_head.weight"].view(-1)[0] = 1e38
    checkpoints.write_weights(state, source, 3, "safetensors")
    with pytest.raises(Refused, match="overflow"):
        _convert(source, tmp_path / "dst", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    weights = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    real, calls = os.pwrite, 0

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.truncate(weights, 5000)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(BadInput, match="ended inside tensor"):
        _convert(source, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_round_trip_names_what_killed_ones_left(sources: Path, tmp_path: Path) -> None:
    for name in ("left", "held", "new", "other"):
        (tmp_path / f"llmconvert-{'roundtrip-' if name != 'other' else ''}{name}").mkdir()
    (tmp_path / "llmconvert-roundtrip-link").symlink_to("llmconvert-other")
    for path in tmp_path.iterdir():
        if "new" not in path.name:
            os.utime(path, (0, 0))
    held = os.open(tmp_path / "llmconvert-roundtrip-held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    before = sorted(tmp_path.iterdir())
    try:
        found = round_trip(sources / "a", work_dir=tmp_path, workers=1, verify="weights")
    finally:
        os.close(held)
    assert found.verdict and sorted(tmp_path.iterdir()) == before
    assert len(found.stale) == 1 and f"`rm -r {tmp_path / 'llmconvert-roundtrip-left'}`" in found.stale[0]
    with pytest.raises(InputOutput):
        round_trip(sources / "a", work_dir=tmp_path / "nowhere", workers=1, verify="weights")


# -- a disk that fails ---------------------------------------------------------------------------


def test_short_writes_and_reads_are_continued(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, pwrite, read, preadv = os.write, os.pwrite, os.read, os.preadv
    monkeypatch.setattr(os, "write", lambda d, data: write(d, memoryview(data)[:7]))
    monkeypatch.setattr(os, "pwrite", lambda d, data, at: pwrite(d, memoryview(data)[:977], at))
    monkeypatch.setattr(os, "read", lambda d, n: read(d, min(n, 13)))
    monkeypatch.setattr(os, "preadv", lambda d, buffers, at: preadv(d, [buffers[0][:1009]], at))
    _convert(sources / "a", tmp_path / "dst")
    options = {"verify": "weights", "workers": 1}
    split_checkpoint(sources / "a", tmp_path / "ranks", Grid(tp=2), **options)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert _snapshot(tmp_path / "dst") == _snapshot(sources / "a-out")
    split_checkpoint(sources / "a", tmp_path / "expected", Grid(tp=2), **options)  # type: ignore[arg-type]
    assert _snapshot(tmp_path / "ranks") == _snapshot(tmp_path / "expected")
    import torch

    torch.load(tmp_path / "ranks" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)


CALLS = (
    "open", "mkdir", "write", "pwrite", "ftruncate", "fsync", "rename", "unlink", "rmdir", "stat", "fstat", "listdir",
    "read", "preadv", "lstat", "access", "pread",
)  # fmt: skip
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)


def _failing(real: Callable[..., object], number: int, step: int, mine: str) -> Callable[..., object]:
    calls = 0

    def call(*arguments: object, **named: object) -> object:
        nonlocal calls
        about = [named.get("dir_fd"), *arguments[:1]]
        if any(isinstance(one, int) or (isinstance(one, str | Path) and mine in str(one)) for one in about):
            calls += 1
            if calls == step:
                raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    return call


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_whatever_the_disk_refuses_ends_in_one_message(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, overwrite: bool
) -> None:
    """The k-th call of a kind fails, for many k, with each error in turn; whatever is no message of ours fails here."""
    destination, new = tmp_path / "dst", _tensors(sources / "a-out")
    before = _tensors(sources / "b-out") if overwrite else None
    for number, step in enumerate((*range(1, 13), *range(13, 100, 17))):
        shutil.rmtree(destination, ignore_errors=True)
        if overwrite:
            shutil.copytree(sources / "b-out", destination)
        published = False
        with monkeypatch.context() as patch:
            error = ERRORS[number % len(ERRORS)]
            patch.setattr(os, call, _failing(getattr(os, call), error, step, str(tmp_path)))
            with suppress(Usage, BadInput, ProofFailed, InputOutput):
                _convert(sources / "a", destination, verify="none", overwrite=overwrite)
                published = True
        there = _tensors(destination) if destination.exists() else None
        assert there == new if published else there in (before, new), (step, error)
        shutil.rmtree(work_directory(destination), ignore_errors=True)
    assert not [path for path in tmp_path.iterdir() if path.name != "dst" and "llmconvert-lock" not in path.name]


def test_an_unwritable_place(sources: Path, tmp_path: Path) -> None:
    for destination in (tmp_path / ("x" * 250), tmp_path / "file" / "dst", tmp_path / "loop" / "dst"):
        (tmp_path / "file").write_text("")
        with suppress(FileExistsError):
            (tmp_path / "loop").symlink_to("loop")
        with pytest.raises((InputOutput, Usage)):
            _convert(sources / "a", destination)


# -- checking ------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["llama", "canonical", "torch", "torch_dist"])
def test_check_sees_every_file(sources: Path, tmp_path: Path, kind: str) -> None:
    made = tmp_path / "made"
    if kind in ("llama", "canonical"):
        _convert(sources / "a", made, to=kind, max_shard_size="60KB", verify="none")
    else:
        split_checkpoint(sources / "a", made, Grid(), fmt=kind, verify="none", workers=1)
    found = check(made)
    names = [name for name in _snapshot(made) if name != "llmconvert.json"]
    assert found.files == len(names) > 6
    for name in names:
        for act in (_flip, Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 1)):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(made, tmp_path / "copy")
            act(tmp_path / "copy" / name)
            with pytest.raises(BadInput):
                check(tmp_path / "copy")
    (made / "README.md").write_text("What it is.")
    (made / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert check(made) == found
    shutil.copy(made / "llmconvert-report.json", tmp_path / "outside")
    (made / "llmconvert-report.json").unlink()
    (made / "llmconvert-report.json").symlink_to(tmp_path / "outside")
    with pytest.raises(BadInput, match="symlink"):
        check(made)
    for name in ("modeling_llama.py", "adapter_config.json", "hf/config.json", ".hidden.py"):
        if not (made / name).exists():
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(made, tmp_path / "copy")
            (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "copy" / name).write_text("{}")
            with pytest.raises(BadInput, match="was added"):
                check(tmp_path / "copy")


def test_check_sees_every_byte_outside_of_tensors(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "a-out", tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    raw = file.read_bytes()
    assert raw.count(b'"pt"') == 1
    file.write_bytes(raw.replace(b'"pt"', b'"np"'))
    with pytest.raises(BadInput, match="outside of its tensors"):
        check(tmp_path / "x")


MANIFESTS = {
    "no files": lambda m: m.pop("files"),
    "files is a list": lambda m: m.update(files=[]),
    "entries are numbers": lambda m: m.update(files=dict.fromkeys(m["files"], 5)),
    "tensors' entries are numbers": lambda m: m.update(tensors=dict.fromkeys(m["tensors"], 5)),
    "another file": lambda m: m["tensors"]["lm_head.weight"].update(file="config.json"),
    "no checksums": lambda m: [entry.pop("checksums") for entry in m["tensors"].values()],
    "few checksums": lambda m: [entry.update(checksums=[]) for entry in m["tensors"].values()],
    "runs of nothing": lambda m: [entry.update(rows_per_checksum=0) for entry in m["tensors"].values()],
    "names that leave": lambda m: m["files"].update({"../../etc/passwd": {"size": 1}, "/etc/passwd": {"size": 1}}),
    "impossible names": lambda m: m["files"].update({"a\0b": {"size": 1}, "\ud800": {"size": 1}, "": {}}),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest(sources: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(sources / "a-out", tmp_path / "x")
    manifest = json.loads((tmp_path / "x" / "llmconvert.json").read_text())
    MANIFESTS[damage](manifest)
    (tmp_path / "x" / "llmconvert.json").write_text(json.dumps(manifest))
    if damage == "no files":  # as versions before wrote it
        assert check(tmp_path / "x").files == 0
    else:
        with pytest.raises(BadInput):
            check(tmp_path / "x")
    with pytest.raises(Usage, match="not what this command makes"):
        _convert(sources / "a", tmp_path / "x", resume=True)
