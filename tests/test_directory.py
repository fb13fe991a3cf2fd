"""Everything around the weights: other files, hub ids, manifests, dtypes, the command line's manners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from slowly import slowly

from llmconvert.checkpoint import open_checkpoint
from llmconvert.converters.huggingface import convert
from llmconvert.converters.inspection import inspect
from llmconvert.errors import InputOutput, Usage
from llmconvert.verify.logits import compare_logits

ROOT = Path(__file__).resolve().parent.parent


def _cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmconvert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _furnish(source: Path) -> None:
    """The files a published Qwen v1 repository holds beside its weights."""
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "QWenTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            }
        )
    )
    (source / "tokenization_qwen.py").write_text("from .qwen_words import WORDS\n")
    (source / "qwen_words.py").write_text("WORDS = ()\n")
    (source / "modeling_qwen.py").write_text("import torch\n")
    (source / "configuration_qwen.py").write_text("")
    (source / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    (source / "LICENSE").write_text("licence")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "training_args.bin").write_bytes(b"x")
    (source / "assets").mkdir()
    (source.parent / "secret").write_text("not yours")
    (source / "NOTES.md").symlink_to(source.parent / "secret")


def test_companions(tmp_path: Path) -> None:
    source = checkpoints.make("qwen", tmp_path / "src", fmt="bin")
    _furnish(source)
    report = convert(source, tmp_path / "dst", to="llama", max_shard_size="100KB")
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    for kept in ("tokenizer_config.json", "tokenization_qwen.py", "qwen_words.py", "qwen.tiktoken", "LICENSE",
                 "chat_template.jinja", "generation_config.json"):  # fmt: skip
        assert (tmp_path / "dst" / kept).read_bytes() == (source / kept).read_bytes()
    assert not names & {"modeling_qwen.py", "configuration_qwen.py", "training_args.bin", "assets", "NOTES.md"}
    assert not any("pytorch_model" in name for name in names)
    assert set(report.not_carried) == {
        "modeling_qwen.py",
        "configuration_qwen.py",
        "training_args.bin",
        "assets/",
        "NOTES.md",
    }
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "auto_map" not in config
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    written = checkpoints.tensors(tmp_path / "dst")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in written.values())
    assert set(index["weight_map"]) == set(written)
    assert set(index["weight_map"].values()) <= names
    from safetensors import safe_open

    with safe_open(tmp_path / "dst" / next(iter(index["weight_map"].values())), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tokenizer_map_in_config_moves(tmp_path: Path) -> None:
    source = checkpoints.make("qwen", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"]["AutoTokenizer"] = ["tokenization_qwen.QWenTokenizer", None]
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenization_qwen.py").write_text("")
    convert(source, tmp_path / "dst", to="llama")
    settings = json.loads((tmp_path / "dst" / "tokenizer_config.json").read_text())
    assert settings["auto_map"] == {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    assert (tmp_path / "dst" / "tokenization_qwen.py").exists()


def test_hub_id_from_the_cache(tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / ("a" * 40)
    (blobs.parent / "refs").mkdir(parents=True)
    (blobs.parent / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    made = checkpoints.make("qwen2", tmp_path / "made")
    blobs.mkdir()
    for number, path in enumerate(sorted(made.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    code = "import sys; from llmconvert.cli.app import main; main(sys.argv[1:])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    for name in ("owner/name", "owner/name@main"):
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", name, "--json"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["architecture"] == "qwen2"


def test_unknown_sources() -> None:
    with pytest.raises(Usage, match="no such directory"):
        open_checkpoint("nowhere")
    with pytest.raises(InputOutput, match="hub"):
        open_checkpoint("nobody/nothing-at-all")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_equals_torch(dtype: str, stored: torch.dtype, tmp_path: Path) -> None:
    source = checkpoints.make("mistral", tmp_path / "src", dtype=stored)
    report = convert(source, tmp_path / "dst", to="llama", dtype=dtype)
    assert report.dtype == {dtype: len(checkpoints.tensors(source))}
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["torch_dtype"] == dtype
    after = checkpoints.tensors(tmp_path / "dst")
    for name, tensor in checkpoints.tensors(source).items():
        assert torch.equal(tensor.to(getattr(torch, dtype)), after[name])
    narrowed = dtype != "float32" and getattr(torch, dtype) != stored
    assert any("rounded" in note for note in report.notes) == narrowed


@pytest.mark.parametrize("arch", ["gemma", *slowly(["granite"])])
def test_folding_in_bfloat16_rounds_once(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src", dtype=torch.bfloat16)
    convert(source, tmp_path / "exact", to="llama", dtype="float32")
    convert(source, tmp_path / "rounded", to="llama")
    assert compare_logits(source, tmp_path / "exact", rounded="float32").verdict
    exact, rounded = checkpoints.tensors(tmp_path / "exact"), checkpoints.tensors(tmp_path / "rounded")
    for name, tensor in exact.items():
        if arch == "granite" or "embed" not in name:
            assert torch.equal(tensor.to(torch.bfloat16), rounded[name]), name
    if arch == "gemma":  # as the code does in bfloat16: the constant is rounded first
        embed = checkpoints.tensors(source)["model.embed_tokens.weight"]
        assert torch.equal(rounded["model.embed_tokens.weight"], embed * torch.tensor(48**0.5).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    from llmconvert.checkpoint.dtypes import FROM_NAME, in_dtype

    code = FROM_NAME[str(dtype).removeprefix("torch.")]
    for value in (0.0, 1.0, 48**0.5, 3072**0.5, 1 / 3, -2.00390625, 1.001953125, 6.1e-5):
        assert in_dtype(value, code) == torch.tensor(value, dtype=torch.float64).to(torch.float32).to(dtype).item()


def test_norm_head_is_torch_normalize_in_the_stored_dtype(tmp_path: Path) -> None:
    source = checkpoints.make("baichuan2", tmp_path / "src", dtype=torch.bfloat16)
    report = convert(source, tmp_path / "dst", to="llama")
    head = checkpoints.tensors(source)["lm_head.weight"]
    assert torch.equal(checkpoints.tensors(tmp_path / "dst")["lm_head.weight"], torch.nn.functional.normalize(head))
    assert report.roundtrip is not None and report.roundtrip["one_way"] == 1


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = checkpoints.make("qwen2", tmp_path / "src", shards=1, dtype=torch.bfloat16)
    state = checkpoints.tensors(source)
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(source, tmp_path / "dst", to="llama")
    assert report.dtype == {"bfloat16": len(state) - 1 + 3, "float32": 1}


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = checkpoints.make("glm", tmp_path / "src")
    before = sorted(tmp_path.rglob("*"))
    done = _cli("glm-to-llama", source, tmp_path / "dst", "--dry-run")
    assert done.returncode == 0
    assert "reorder rotary pairs" in done.stdout and "bit-exact" in done.stdout and "needed" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_json_is_one_object_and_humans_read_stderr(tmp_path: Path) -> None:
    source = checkpoints.make("glm", tmp_path / "src")
    done = _cli("convert", source, tmp_path / "dst", "--to", "llama", "--json", "--verify", "logits")
    report = json.loads(done.stdout)
    assert report["published"] and report["roundtrip"]["bitwise"] > 0
    for command in (("inspect", tmp_path / "dst"), ("specs",), ("inspect", tmp_path / "dst", "--check"),
                    ("verify", source, tmp_path / "dst"), ("specs", "qwen2")):  # fmt: skip
        done = _cli(*command, "--json")
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict)


@pytest.mark.slow
def test_verify_tells_models_apart(tmp_path: Path) -> None:
    one = checkpoints.make("llama", tmp_path / "one", seed=1)
    two = checkpoints.make("llama", tmp_path / "two", seed=2)
    done = _cli("verify", one, two)
    assert done.returncode == 5
    assert "NOT the same" in done.stdout
    assert _cli("verify", one, one).returncode == 0


@pytest.mark.slow
def test_family_commands(tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "src")
    done = _cli("glm-to-llama", source, tmp_path / "dst")
    assert done.returncode == 3 and "qwen-to-llama" in done.stderr
    yi = checkpoints.make("llama", tmp_path / "yi")
    assert _cli("yi-to-llama", yi, tmp_path / "yi-llama").returncode == 0
    help_text = _cli("--help").stdout
    for family in ("qwen", "baichuan", "yi", "deepseek", "chatglm", "glm", "mistral", "internlm2", "phi", "granite"):
        assert f"{family}-to-llama" in help_text and f"llama-to-{family}" in help_text


def test_help_needs_nothing_heavy() -> None:
    for arguments in (["--help"], ["specs"], ["nonsense"]):
        code = (
            "import sys\nfrom llmconvert.cli.app import main\n"
            f"try: main({arguments!r})\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'accelerate', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
            "print('HEAVY', sorted(heavy))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert "HEAVY []" in done.stdout


@pytest.mark.parametrize("installed", [True, False])
def test_a_byte_move_needs_no_torch(installed: bool, tmp_path: Path) -> None:
    """Where it is, the one proof that runs it is of the result's class; where it is not, that is said."""
    source = checkpoints.make("internlm2", tmp_path / "src", dtype=torch.bfloat16)
    verify = "none" if installed else "weights"
    code = (
        f"import sys\nsys.modules |= dict() if {installed} else dict.fromkeys(['torch', 'transformers'])\n"
        "from llmconvert.cli.app import main\n"
        f"try: main(['internlm2-to-llama', {str(source)!r}, {str(tmp_path / 'dst')!r}, '--verify', {verify!r}])\n"
        "except SystemExit as e: print(e.code)\n"
        "print(bool(sys.modules.get('torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("0\nFalse\n"), done.stdout + done.stderr
    assert installed or "not loaded: torch and transformers are not installed" in done.stdout + done.stderr


def _relabelled(directory: Path) -> Path:
    config = json.loads((directory / "config.json").read_text())
    kind = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    (directory / "config.json").write_text(json.dumps({**config, **kind}))
    return directory


def test_inspect_describes(tmp_path: Path) -> None:
    found = inspect(checkpoints.make("qwen2", tmp_path / "src"))
    assert found["architecture"] == "qwen2"
    assert found["targets"]["llama"] == "yes"
    assert found["targets"]["mistral"].startswith("if: ")
    assert "rope_theta" in found["targets"]["baichuan"]
    assert found["parameters"] == sum(t.numel() for t in checkpoints.tensors(tmp_path / "src").values())
    experts = inspect(checkpoints.make("mixtral", tmp_path / "moe"))
    assert "moe" in experts["traits"] and "`moe`" in experts["targets"]["llama"]
    broken = inspect(_relabelled(checkpoints.make("mixtral", tmp_path / "odd")))
    assert broken["architecture"] is None and "GPT-OSS is known and not read" in broken["problem"]


def test_tied_head_stored_after_all(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from llmconvert.errors import LlmconvertError

    source = checkpoints.make("qwen2_tied", tmp_path / "src", shards=1)
    state = checkpoints.tensors(source)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(source, tmp_path / "dst", to="llama")
    assert "lm_head.weight" in report.dropped
    assert "lm_head.weight" not in checkpoints.tensors(tmp_path / "dst")
    state["lm_head.weight"][0, 0] += 1
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmconvertError, match="lm_head"):
        convert(source, tmp_path / "other", to="llama")


def test_manifest_records_what_was_done(tmp_path: Path) -> None:
    source = checkpoints.make("baichuan2", tmp_path / "src")
    convert(source, tmp_path / "dst", to="llama")
    manifest = json.loads((tmp_path / "dst" / "llmconvert.json").read_text())
    assert manifest["source"]["spec"] == "baichuan2" and manifest["target"]["spec"] == "llama"
    assert [step["name"] for step in manifest["steps"]] == ["fold NormHead into lm_head"]
    assert set(manifest["tensors"]) == set(checkpoints.tensors(tmp_path / "dst"))
    assert all(entry["size"] for entry in manifest["source_files"].values())
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("arch", ["gemma", "granite", "baichuan2", "glm"])
def test_logits_are_proved_in_bfloat16_too(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(arch, tmp_path / "src", dtype=torch.bfloat16)
    report = convert(source, tmp_path / "dst", to="llama", verify="logits")
    assert report.logits is not None and report.logits["verdict"]
    assert report.logits["kind"] == ("equal to rounding" if arch == "glm" else "weights rounded")
    record = json.loads((tmp_path / "dst" / "llmconvert-report.json").read_text())
    assert record["published"] and record["logits"]["verdict"] and record["ledger"] and record["roundtrip"]
    assert str(tmp_path) not in json.dumps(record)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "odd",
                "vocab_size": 9,
                "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
            }
        )
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()\n")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "llmconvert", "verify", str(tmp_path), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, input="y\n" * 9,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_mixed_dtypes_that_would_be_packed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from llmconvert.errors import Refused

    source = checkpoints.make("llama_mha", tmp_path / "src", shards=1, dtype=torch.bfloat16)
    state = checkpoints.tensors(source)
    state["model.layers.1.self_attn.k_proj.weight"] = state["model.layers.1.self_attn.k_proj.weight"].float()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match="different dtypes"):
        convert(source, tmp_path / "dst", to="phi3")
    for dtype in ("float32", "bfloat16"):
        report = convert(source, tmp_path / dtype, to="phi3", dtype=dtype)
        assert report.roundtrip is not None and report.roundtrip["bitwise"] == len(state)


def test_a_folded_head_is_checked_under_any_name(tmp_path: Path) -> None:
    source = checkpoints.make("baichuan2", tmp_path / "src")
    report = convert(source, tmp_path / "dst", to="internlm2")
    assert report.roundtrip is not None and report.roundtrip["one_way"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [None, "bfloat16", "float32"])
def test_small_norms_fold_too(dtype: torch.dtype, out: str | None, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = checkpoints.make("gemma", tmp_path / "src", shards=1, dtype=dtype)
    state = {n: t * 0.001 if t.ndim == 1 else t for n, t in checkpoints.tensors(source).items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(source, tmp_path / "dst", to="llama", dtype=out)
    assert report.roundtrip is not None and report.roundtrip["rounded"] == 8
