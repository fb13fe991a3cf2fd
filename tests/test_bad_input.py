"""Bad input: one clear message, the documented exit code, the source untouched, nothing at the destination."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmconvert.converters import huggingface, running
from llmconvert.converters.huggingface import convert
from llmconvert.converters.roundtrip import round_trip
from llmconvert.engine.journal import work_directory
from llmconvert.errors import BadInput, InputOutput, LlmconvertError, ProofFailed, Refused, Usage

ROOT = Path(__file__).resolve().parent.parent


def _snapshot(directory: Path) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in directory.rglob("*")
        if p.is_file()
    }


def _shard(directory: Path, number: int = 1) -> Path:
    return directory / f"model-{number:05d}-of-00003.safetensors"


def _rewrite_header(path: Path, edit: Callable[[dict], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    body = json.dumps(header).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + raw[8 + length :])


def _edit_shard(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def _edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


INDEX = "model.safetensors.index.json"
_FIRST = "lm_head.weight"  # the first name in order, so in the first shard


def truncate(src: Path) -> None:
    os.truncate(_shard(src), _shard(src).stat().st_size - 1)


def long_header(src: Path) -> None:
    raw = _shard(src).read_bytes()
    _shard(src).write_bytes((1 << 40).to_bytes(8, "little") + raw[8:])


def header_not_json(src: Path) -> None:
    raw = bytearray(_shard(src).read_bytes())
    raw[8] = ord("!")
    _shard(src).write_bytes(raw)


def overlap(src: Path) -> None:
    def edit(header: dict) -> None:
        names = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
        begin, end = header[names[1]]["data_offsets"]
        header[names[1]]["data_offsets"] = [begin - 4, end - 4]

    _rewrite_header(_shard(src), edit)


def out_of_range(src: Path) -> None:
    def edit(header: dict) -> None:
        name = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + 1000, end + 1000]

    _rewrite_header(_shard(src), edit)


def missing_file(src: Path) -> None:
    _shard(src, 2).unlink()


def index_names_absent_tensor(src: Path) -> None:
    _edit_json(src / INDEX, lambda i: i["weight_map"].update({"model.extra.weight": _shard(src).name}))


def index_escapes(src: Path) -> None:
    _edit_json(src / INDEX, lambda i: i["weight_map"].update({_FIRST: "../secret.safetensors"}))


def index_absolute(src: Path) -> None:
    _edit_json(src / INDEX, lambda i: i["weight_map"].update({_FIRST: "/etc/passwd"}))


def symlink_out(src: Path) -> None:
    outside = src.parent / "outside.safetensors"
    shutil.move(_shard(src), outside)
    _shard(src).symlink_to(outside)


def missing_tensor(src: Path) -> None:
    _edit_shard(_shard(src), lambda s: s.pop(_FIRST))
    _edit_json(src / INDEX, lambda i: i["weight_map"].pop(_FIRST))


def extra_tensor(src: Path) -> None:
    _edit_shard(_shard(src), lambda s: s.update({"model.layers.0.mystery.weight": torch.ones(3)}))


def wrong_shape(src: Path) -> None:
    _edit_shard(_shard(src), lambda s: s.update({_FIRST: torch.ones(7, 5)}))


def duplicate_tensor(src: Path) -> None:
    _edit_shard(_shard(src, 2), lambda s: s.update({_FIRST: torch.ones(131, 48)}))


def no_config(src: Path) -> None:
    (src / "config.json").unlink()


def config_not_json(src: Path) -> None:
    (src / "config.json").write_text("{")


def config_contradicts(src: Path) -> None:
    _edit_json(src / "config.json", lambda c: c.update(num_hidden_layers=4))


def integer_weights(src: Path) -> None:
    _edit_shard(_shard(src), lambda s: s.update({_FIRST: torch.ones(131, 48, dtype=torch.int32)}))


def sizes_senseless(src: Path) -> None:
    _edit_json(src / "config.json", lambda c: c.update(hidden_size="wide"))


BAD = {
    truncate: "truncated", long_header: "header claims", header_not_json: "not valid JSON", overlap: "overlaps",
    out_of_range: "gap", missing_file: "is not there", index_names_absent_tensor: "model.extra.weight",
    index_escapes: "outside the checkpoint", index_absolute: "outside the checkpoint", symlink_out: "symlink",
    missing_tensor: "missing", extra_tensor: "mystery", wrong_shape: r"\[7, 5\]", duplicate_tensor: "two shards",
    no_config: "config.json", config_not_json: "not valid JSON", config_contradicts: "missing", integer_weights: "I32",
    sizes_senseless: "hidden_size",
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD, ids=lambda f: f.__name__)
def test_damage_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    damage(source)
    before = _snapshot(source)
    with pytest.raises(BadInput, match=BAD[damage]) as caught:
        convert(source, tmp_path / "dst", to="llama")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "dst").exists()
    assert not work_directory(tmp_path / "dst").exists()
    assert _snapshot(source) == before


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src", shards=1)

    def damage(state: dict[str, torch.Tensor]) -> None:
        del state["lm_head.weight"]
        for i in range(3):
            del state[f"model.layers.{i}.mlp.up_proj.weight"]
        state["model.norm.weight"] = torch.ones(3)
        state["odd.weight"] = torch.ones(3)

    _edit_shard(source / "model.safetensors", damage)
    with pytest.raises(BadInput) as caught:
        convert(source, tmp_path / "dst", to="llama")
    for fragment in ("4 missing", "lm_head.weight", "up_proj.weight` and 2 more", "[3], expected [48]", "odd.weight"):
        assert fragment in caught.value.what


class _Attack:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.path,))


def test_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src", fmt="bin", shards=1)
    state = checkpoints.tensors(source)
    state["boom"] = _Attack(str(tmp_path / "owned"))  # type: ignore[assignment]
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(Refused, match=r"posix\.mkdir"):
        convert(source, tmp_path / "dst", to="llama")
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(_Attack(str(tmp_path / "owned"))))  # the control: the attack does work
    assert (tmp_path / "owned").exists()


def test_truncated_bin(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src", fmt="bin", shards=1)
    path = source / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(BadInput, match="truncated"):
        convert(source, tmp_path / "dst", to="llama")


REFUSED = {
    "baichuan_13b": "alibi", "qwen3": "qk_norm", "glm4": "branch_output_norm", "mixtral": "moe", "qwen2_moe": "moe",
    "qwen3_moe": "qk_norm", "deepseek_moe": "moe", "deepseek_v2": "mla", "deepseek_v3": "mtp", "glm4_moe": "moe",
}  # fmt: skip


@pytest.mark.parametrize("arch", REFUSED)
def test_unrepresentable_is_refused_with_its_trait(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src")
    with pytest.raises(Refused, match=REFUSED[arch]) as caught:
        convert(source, tmp_path / "dst", to="llama")
    assert caught.value.hint
    assert not (tmp_path / "dst").exists()


def _sliding(config: dict) -> None:
    config.update(use_sliding_window=True, max_window_layers=1, sliding_window=16, layer_types=None)


CANNOT_HOLD = {
    "active sliding window": ("qwen2", _sliding, "llama", "sliding_window"),
    "biases to mistral": ("llama_bias", None, "mistral", "qkv_bias"),
    "o bias to qwen2": ("llama_bias", None, "qwen2", "o_proj"),
    "theta to baichuan": ("llama_mha", lambda c: c.update(rope_theta=5e5), "baichuan", "rope_theta"),
    "rescaled rotary to glm": ("llama_llama3", None, "glm", "rope_scaling"),
    "norms of its own to gemma": ("llama", None, "gemma", "unit_offset_norm"),
    "unknown target": ("llama", None, "lama", "lama"),
    "gptq": ("qwen2", lambda c: c.update(quantization_config={"quant_method": "gptq"}), "llama", "gptq"),
    "soft caps": ("llama", lambda c: c.update(final_logit_softcapping=30.0), "mistral", "softcapping"),
    "residual after the norm": ("chatglm2", lambda c: c.update(apply_residual_connection_post_layernorm=True), "llama",
                                "apply_residual"),
    "half rotary Qwen": ("qwen", lambda c: c.update(rotary_pct=0.5), "llama", "rotary_pct"),
    "unknown architecture": ("llama", lambda c: c.update(model_type="qwen9", architectures=["Q9"]), "llama", "new|qwen"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_HOLD)
def test_what_the_target_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    arch, edit, target, fragment = CANNOT_HOLD[case]
    source = checkpoints.make(arch, tmp_path / "src")
    if edit is not None:
        _edit_json(source / "config.json", edit)
    with pytest.raises(Refused, match=fragment) as caught:
        convert(source, tmp_path / "dst", to=target)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert not (tmp_path / "dst").exists()


def test_adapter_without_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(Refused, match="LoRA"):
        convert(tmp_path, tmp_path.parent / "never", to="llama")


def test_destinations(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("keep me")
    for destination in (source, source / "inside", tmp_path, full):
        with pytest.raises(Usage) as caught:
            convert(source, destination, to="llama")
        assert caught.value.exit_code == 2
    assert (full / "precious").read_text() == "keep me"
    with pytest.raises(Usage, match="not a checkpoint"):
        convert(source, full, to="llama", overwrite=True)
    assert (full / "precious").read_text() == "keep me"
    convert(source, tmp_path / "dst", to="llama")
    with pytest.raises(Usage, match="--overwrite|not empty"):
        convert(source, tmp_path / "dst", to="llama")
    (tmp_path / "dst" / "stale.bin").write_text("")
    convert(source, tmp_path / "dst", to="llama", overwrite=True)
    assert not (tmp_path / "dst" / "stale.bin").exists()
    assert not list(tmp_path.glob(".dst*"))


def test_overflow_names_the_tensor(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src", dtype=torch.bfloat16)
    _edit_shard(_shard(source), lambda s: s[_FIRST].view(-1).__setitem__(0, 1e38))
    with pytest.raises(Refused, match="lm_head.weight.*overflow"):
        convert(source, tmp_path / "dst", to="llama", dtype="float16")
    assert not (tmp_path / "dst").exists()


def test_disk_full_half_way_then_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    real, calls = os.pwrite, 0

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(InputOutput, match="disk is full") as caught:
        convert(source, tmp_path / "dst", to="llama", workers=1)
    assert caught.value.exit_code == 6
    assert not (tmp_path / "dst").exists()
    monkeypatch.undo()
    with pytest.raises(Usage, match="unfinished"):
        convert(source, tmp_path / "dst", to="llama")
    convert(source, tmp_path / "dst", to="llama", resume=True)
    convert(source, tmp_path / "undisturbed", to="llama")
    assert _snapshot(tmp_path / "dst") == _snapshot(tmp_path / "undisturbed")


def test_too_small_a_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(InputOutput, match="needs"):
        convert(source, tmp_path / "dst", to="llama")
    assert not (tmp_path / "dst").exists()
    assert not work_directory(tmp_path / "dst").exists()


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputOutput, match="permission"):
        convert(source, tmp_path / "dst", to="llama")


def _command(source: Path, destination: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "llmconvert", "qwen-to-llama", str(source), str(destination), *extra]


@pytest.mark.parametrize(
    "moment", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(20, marks=pytest.mark.slow)]
)
def test_killed_and_resumed(moment: int, tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src", vocab_size=20011, num_hidden_layers=9)
    destination = tmp_path / "dst"
    # The child stops itself, so that the kill surely falls in the middle of the work.
    script = (
        "import os, sys, time\n"
        "real, calls = os.pwrite, 0\n"
        "def slow(*a):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    if calls > {moment}: print('now', flush=True); time.sleep(60)\n"
        "    return real(*a)\n"
        "os.pwrite = slow\n"
        "from llmconvert.cli.app import main\n"
        f"main(['qwen-to-llama', {str(source)!r}, {str(destination)!r}, '--workers', '1'])\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "now\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not destination.exists()
    done = subprocess.run(_command(source, destination, "--resume"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subprocess.run(_command(source, tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    assert _snapshot(destination) == _snapshot(tmp_path / "whole")


def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    script = (
        "import os, signal\n"
        # In the background of a shell interrupts are ignored, and what is ignored stays so in a child.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real, calls = os.pwrite, 0\n"
        "def slow(*a):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 10: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*a)\n"
        "os.pwrite = slow\n"
        "from llmconvert.cli.app import main\n"
        f"main(['qwen-to-llama', {str(source)!r}, {str(tmp_path / 'dst')!r}, '--workers', '1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "--resume" in done.stderr
    assert not (tmp_path / "dst").exists()


@pytest.mark.slow
def test_two_runs_into_one_destination(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    holder = (
        "import os, time\n"
        "real = os.pwrite\n"
        "def slow(*a): print('now', flush=True); time.sleep(60)\n"
        "os.pwrite = slow\n"
        "from llmconvert.cli.app import main\n"
        f"main(['qwen-to-llama', {str(source)!r}, {str(tmp_path / 'dst')!r}])\n"
    )
    child = subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        for extra in ((), ("--resume",), ("--overwrite",)):
            done = subprocess.run(_command(source, tmp_path / "dst", *extra), cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 2
            assert "another llmconvert run" in done.stderr
    finally:
        child.kill()
        child.wait()


def test_resume_notices_another_conversion(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "publish", lambda *a, **k: (_ for _ in ()).throw(ProofFailed("stop here")))
        with pytest.raises(ProofFailed):
            convert(source, tmp_path / "dst", to="llama")
    with pytest.raises(Usage, match="another conversion"):
        convert(source, tmp_path / "dst", to="llama", dtype="bfloat16", resume=True)


def test_source_changed_after_planning_is_noticed(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    convert(source, tmp_path / "dst", to="llama")
    written = tmp_path / "dst" / "model.safetensors"
    raw = bytearray(written.read_bytes())
    raw[-1] ^= 1
    written.write_bytes(raw)
    from llmconvert.engine.manifest import check

    with pytest.raises(BadInput, match="has changed"):
        check(tmp_path / "dst")


def test_a_round_trip_leaves_the_source_untouched(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src")
    (tmp_path / "link").symlink_to(source)
    before = source.stat().st_mtime_ns
    for work in (source, tmp_path / "link"):
        with pytest.raises(Usage, match="inside the source"):
            round_trip(source, "mistral", work_dir=work, verify="none")
    assert source.stat().st_mtime_ns == before


def test_round_trip_catches_one_flipped_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    opened = huggingface.open_checkpoint

    def flip(path: Path) -> object:
        if "partial" in str(path):
            file = next(Path(path).glob("*.safetensors"))
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)
        return opened(path)

    monkeypatch.setattr(huggingface, "open_checkpoint", flip)
    with pytest.raises(ProofFailed, match="round trip") as caught:
        convert(source, tmp_path / "dst", to="llama")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "dst").exists()
    assert work_directory(tmp_path / "dst").exists()


def test_messages_on_the_command_line(tmp_path: Path) -> None:
    source = checkpoints.make("baichuan_13b", tmp_path / "src")
    command = [sys.executable, "-m", "llmconvert", "baichuan-to-llama", str(source), str(tmp_path / "dst"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "Refused" and "alibi" in error["what"] and error["hint"]
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr


def test_every_error_has_its_documented_code() -> None:
    codes = {cls.__name__: cls.exit_code for cls in LlmconvertError.__subclasses__()}
    assert codes == {"Usage": 2, "Refused": 3, "BadInput": 4, "ProofFailed": 5, "InputOutput": 6, "Interrupted": 130,
                     "Elsewhere": 1}  # fmt: skip  # with the code of the process that failed
