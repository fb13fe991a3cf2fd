"""What people hand over first: misspelt paths, ids of the hub, pointers in place of files, directories around checkpoints."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest

from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.cli.app import main
from llmconvert.errors import BadInput, LlmconvertError, Refused, Usage

ROOT = Path(__file__).resolve().parent.parent


def _inspect(source: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    online = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    own = {**online, "PYTHONPATH": str(ROOT), "HF_HOME": str(cwd / "home"), **environment}
    command = [sys.executable, "-m", "llmconvert", "inspect", source]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=own)


NOWHERE = "http://127.0.0.1:9"


def test_a_misspelt_path_is_no_id_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "pub" / "Qwen2.5-7B").mkdir(parents=True)
    for source, hint in (
        ("pub/Qwen2.5-7b", "there is `pub/Qwen2.5-7B`"),
        ("pub/nosuch", "`pub` is there, `nosuch` in it is not; for a model of the hub, name its revision too: `pub/nosuch@main`"),
        ("./nosuch", "give a directory"),
        ("pub/nosuch/deeper", "`pub` is there, `nosuch` in it is not"),
        (str(tmp_path / "pub" / "x" / "y"), "pub` is there, `x` in it is not"),
    ):  # fmt: skip
        done = _inspect(source, tmp_path, HF_ENDPOINT=NOWHERE)
        assert done.returncode == 2 and done.stderr.startswith("error: no such directory\n"), done.stderr
        assert hint in done.stderr and len(done.stderr.splitlines()) == 3
    (tmp_path / "link").symlink_to("gone")
    assert "a link to `gone`, which is not there" in _inspect("link", tmp_path).stderr


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    for source in ("nobody/nothing", "owner/name@main"):
        started = time.monotonic()
        done = _inspect(source, tmp_path, HF_ENDPOINT=NOWHERE)
        assert done.returncode == 6 and "could not be asked" in done.stderr
        assert len(done.stderr.splitlines()) == 3, done.stderr
        assert time.monotonic() - started < 10


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an id needs: what a revision holds, and its files."""

    files: dict[str, bytes] = {}

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        sha = "a" * 40
        if self.path.startswith("/api/models/owner/name"):
            if "/revision/wrong" in self.path:
                return self._answer(404, b'{"error": "x"}', X_Error_Code="RevisionNotFound")
            listed = [{"rfilename": name, "size": len(raw)} for name, raw in self.files.items()]
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": e["rfilename"], "size": e["size"], "oid": "0" * 40} for e in listed]
                return self._answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            found = {"id": "owner/name", "sha": sha, "siblings": listed}
            return self._answer(200, json.dumps(found).encode(), Content_Type="application/json")
        if self.path.startswith("/api/models/owner/gated"):
            return self._answer(403, b'{"error": "x"}', X_Error_Code="GatedRepo")
        if self.path.startswith("/owner/name/resolve/"):
            name = self.path.rpartition("/")[2]
            body = self.files[name]
            return self._answer(200, body, ETag=f'"{name}"', X_Repo_Commit=sha, Accept_Ranges="bytes")
        return self._answer(404, b'{"error": "x"}', X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    made = checkpoints.make("qwen2", tmp_path / "made", shards=1)
    _Hub.files = {path.name: path.read_bytes() for path in made.iterdir()} | {"pytorch_model.bin": b"not wanted"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_the_hub_says_is_told(hub: str, tmp_path: Path) -> None:
    for source, fragment in (
        ("owner/absent", "the hub has no such model, or a private one"),
        ("owner/gated", "accepted its terms"),
        ("owner/name@wrong", "has no revision `wrong`"),
    ):
        done = _inspect(source, tmp_path, HF_ENDPOINT=hub)
        assert done.returncode == 6 and fragment in done.stderr and "Retrying" not in done.stderr, done.stderr
    done = _inspect("owner/name", tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 0 and "architecture  qwen2" in done.stdout, done.stderr
    assert not list((tmp_path / "home").rglob("*.bin"))
    # From then on it needs no network, even where a directory of the owner's name stands.
    (tmp_path / "owner").mkdir()
    assert _inspect("owner/name", tmp_path, HF_ENDPOINT=NOWHERE).returncode == 0


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 2336927755350992246\n".format("0" * 64)


@pytest.mark.parametrize("names", [
    ("model-00002-of-00003.safetensors",), ("config.json",), ("model.safetensors.index.json",), ("tokenizer.json",),
    ("tokenizer.model", "model-00001-of-00003.safetensors"),
])  # fmt: skip
def test_a_pointer_is_not_the_file(names: tuple[str, ...], tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src")
    (source / "figure.png").write_text(POINTER)  # pictures are not needed
    open_checkpoint(source)
    for name in names:
        (source / name).write_text(POINTER)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(source)
    assert "Git LFS pointer" in caught.value.what and "git lfs pull" in (caught.value.hint or "")
    assert any(name in caught.value.what for name in names)


def test_a_pointer_to_a_single_file(tmp_path: Path) -> None:
    for fmt, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        source = checkpoints.make("llama", tmp_path / fmt, shards=1, fmt=fmt)
        (source / name).write_text(POINTER)
        with pytest.raises(BadInput, match=f"`{name}` is a Git LFS pointer"):
            open_checkpoint(source)


def _hint(directory: Path) -> LlmconvertError:
    with pytest.raises(LlmconvertError) as caught:
        open_checkpoint(directory)
    assert caught.value.where == str(directory)
    return caught.value


def test_directories_around_a_checkpoint(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B"
    snapshot = checkpoints.make("qwen2", repository / "snapshots" / ("a" * 40))
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    for cache in (tmp_path, tmp_path / "hub"):
        error = _hint(cache)
        assert isinstance(error, Usage) and "`Qwen/Qwen2.5-7B`" in error.what and "id" in (error.hint or "")
    for around in (repository, repository / "snapshots"):
        error = _hint(around)
        assert isinstance(error, Usage) and error.hint == f"give `{snapshot}`"
    run = tmp_path / "run"
    checkpoints.make("llama", run / "checkpoint-5")
    (run / "logs").mkdir()
    assert _hint(run).hint == f"give `{run / 'checkpoint-5'}`"


@pytest.mark.parametrize(("names", "fragment", "hint"), [
    (("consolidated.safetensors", "params.json"), "Mistral's own form", "model*.safetensors"),
    (("consolidated-00001-of-00002.safetensors", "config.json"), "Mistral's own form", "model*.safetensors"),
    (("consolidated.00.pth", "params.json"), "Meta's own form", "Hugging Face's form"),
    (("model.gguf",), "GGUF", "safetensors"),
    (("zero_to_fp32.py", "latest"), "DeepSpeed", "zero_to_fp32.py . OUT"),
    ((".metadata", "__0_0.distcp"), "torch.distributed", "save_pretrained"),
    (("config.json", "tf_model.h5"), "TensorFlow", "save_pretrained"),
])  # fmt: skip
def test_weights_in_another_form(names: tuple[str, ...], fragment: str, hint: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    error = _hint(tmp_path)
    assert isinstance(error, Refused) and fragment in error.what and hint in (error.hint or "")


def test_a_checkpoint_in_both_forms_is_read(tmp_path: Path) -> None:
    source = checkpoints.make("mistral", tmp_path)
    (source / "consolidated.safetensors").write_text("another form of the same")
    assert open_checkpoint(source).tensors


@pytest.mark.parametrize("command", [("verify", "SRC", "SRC"), ("debug", "topk-token", "SRC", "--input-ids", "1,2"),
                                     ("merge", "SRC", "out"), ("reshard", "SRC", "out"), ("roundtrip", "SRC")])  # fmt: skip
def test_every_command_has_the_same_door(command: tuple[str, ...], tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src")
    (source / "model-00002-of-00003.safetensors").write_text(POINTER)
    for path, fragments in (
        (str(source)[:-1] + "k", ("no such directory", f"there is `{source}`")),
        (str(source), ("mp_rank_", "split") if command[0] in ("merge", "reshard") else ("LFS pointer", "git lfs pull")),
    ):
        own = [path if word == "SRC" else word for word in command]
        done = subprocess.run([sys.executable, "-m", "llmconvert", *own], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == (2 if "such" in fragments[0] else 4), done.stderr
        assert fragments[0] in done.stderr and fragments[1] in done.stderr, done.stderr


DOORS = [("verify", "SRC", "SRC"), ("debug", "cos-distance", "SRC", "--input-ids", "1,2"), ("inspect", "SRC"),
         ("debug", "topk-token", "SRC", "--prompt", "text"), ("inspect", "--check", "SRC")]  # fmt: skip


@pytest.mark.parametrize("command", DOORS)
def test_what_is_no_checkpoint_is_told_at_every_door(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = checkpoints.make("qwen2", tmp_path / "hub" / "models--Qwen--Q" / "snapshots" / "a")
    mistral = tmp_path / "mistral"
    mistral.mkdir()
    (mistral / "consolidated.safetensors").write_text("")
    places = {tmp_path / "nowhere" / "x": "no such directory"}
    if "--check" not in command and "--prompt" not in command:
        places |= {tmp_path / "hub": "the hub's cache", snapshot.parent: f"`{snapshot}`", mistral: "Mistral's own form"}
    for path, said in places.items():
        with pytest.raises(SystemExit) as done:
            main([str(path) if word == "SRC" else word for word in command])
        assert said in capsys.readouterr().err and done.value.code == (3 if path == mistral else 2)


@pytest.mark.parametrize("command", DOORS[:2])
def test_weights_beside_a_config_in_another_form(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.make("mistral", tmp_path / "src")
    for path in source.glob("model*"):
        path.unlink()
    (source / "consolidated.safetensors").write_text("")
    with pytest.raises(SystemExit) as done:
        main([str(source) if word == "SRC" else word for word in command])
    assert "Mistral's own form" in capsys.readouterr().err and done.value.code == 3
