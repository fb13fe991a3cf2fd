"""Files that wait, have no end, lead elsewhere or say what nobody can mean: bad input, at once, in little memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archives
import bounded
import checkpoints
import mutations
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from llmconvert.checkpoint.config import CONFIG, MAX_LAYERS, check_config
from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.checkpoint.dtypes import TO_NAME
from llmconvert.checkpoint.files import MAX_JSON_BYTES, MAX_JSON_DEPTH, read_json, shown
from llmconvert.checkpoint.megatron import open_megatron
from llmconvert.checkpoint.safetensors import read_header
from llmconvert.converters.huggingface import convert
from llmconvert.converters.inspection import inspect
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.merge import open_model
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.converters.planning import plan_conversion
from llmconvert.engine import manifest
from llmconvert.errors import BadInput, Refused, Usage
from llmconvert.training.curves import read_curves
from llmconvert.verify.logits import compare_logits
from llmconvert.verify.models import weight_files
from llmconvert.verify.reference.megatron_experts import layers_with_experts

SHARD = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
OFTEN = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by what they are; tests work on copies."""
    folder = tmp_path_factory.mktemp("made")
    found = {arch: checkpoints.make(arch, folder / arch) for arch in ("qwen2", "deepseek_v3", "chatglm2", "phi3")}
    found["bin"] = checkpoints.make("qwen2", folder / "bin", fmt="bin")
    convert(found["qwen2"], folder / "converted", to="llama", verify="none")
    split_checkpoint(found["qwen2"], folder / "ranks", Grid(tp=2), verify="none")
    split_checkpoint(found["qwen2"], folder / "dist", Grid(), fmt="torch_dist", verify="none")
    return found | {name: folder / name for name in ("converted", "ranks", "dist")}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint."""
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_text('{"secret": 1}')
    path.symlink_to(outside)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


PLACES = [
    ("qwen2", "config.json"), ("qwen2", INDEX), ("qwen2", SHARD), ("qwen2", "generation_config.json"),
    ("qwen2", "tokenizer_config.json"), ("converted", "llmconvert.json"), ("bin", "pytorch_model-00001-of-00003.bin"),
    ("ranks", "latest_checkpointed_iteration.txt"), ("ranks", "llmconvert.json"),
    ("ranks", "release/mp_rank_01/model_optim_rng.pt"), ("dist", "release/.metadata"), ("dist", "release/common.pt"),
    ("dist", "release/metadata.json"), ("dist", "release/__0_0.distcp"),
]  # fmt: skip


@pytest.mark.parametrize("kind", [_fifo, _device, _folder])
@pytest.mark.parametrize(("name", "file"), PLACES)
def test_what_is_no_file_is_not_opened(
    name: str, file: str, kind: Callable[[Path], None], copy: Callable[[str], Path]
) -> None:
    directory = copy(name)
    (directory / file).unlink(missing_ok=True)
    kind(directory / file)
    absent = kind is _folder and file in (
        "latest_checkpointed_iteration.txt",
        "release/metadata.json",
        "release/common.pt",
    )
    found, message = bounded.run(lambda: inspect(directory) if name not in ("ranks", "dist") else open_model(directory))
    assert found == "BadInput" or (absent and found in ("BadInput", "returned")), (found, message)


@pytest.mark.parametrize("file", ["tokenizer.json", "modeling.py", "notes.txt"])
def test_nothing_in_a_checkpoint_waits(file: str, copy: Callable[[str], Path]) -> None:
    """Files we do not read are read by libraries, which would wait."""
    directory = copy("qwen2")
    _fifo(directory / file)
    for run in (lambda: inspect(directory), lambda: compare_logits(directory, directory, device="cpu")):
        assert bounded.run(run)[0] == "BadInput"


@pytest.mark.parametrize("pickled", [
    b"\x80\x02}(" + b")q\0" + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(60)) + b"Nu.",
    b"\x80\x02Nr\xff\xff\xff\xff.", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
], ids=["hash", "memo", "depth"])  # fmt: skip
def test_no_pickle_reaches_a_library_unseen(pickled: bytes, copy: Callable[[str], Path]) -> None:
    directory = copy("bin")
    archives.write(directory / "pytorch_model-00002-of-00003.bin", pickled)
    found, message = bounded.run(lambda: compare_logits(directory, directory, device="cpu"))
    assert found == "BadInput" and "pickle" in message


@pytest.mark.parametrize("file", ["config.json", INDEX, SHARD, "tokenizer_config.json"])
def test_a_link_out_of_the_checkpoint_is_not_followed(file: str, copy: Callable[[str], Path]) -> None:
    directory = copy("qwen2")
    (directory / file).unlink(missing_ok=True)
    _link(directory / file)
    with pytest.raises(BadInput, match="symlink"):
        inspect(directory)
    (directory / file).unlink()
    _loop(directory / file)
    if file != "tokenizer_config.json":  # which nobody asked for
        with pytest.raises(BadInput):
            inspect(directory)


def test_a_snapshot_of_the_hub_is_all_links(copy: Callable[[str], Path], tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/main"
    shutil.copytree(copy("qwen2"), blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert inspect(snapshot)["architecture"] == "qwen2"


JSON = {
    "a number of 4,300 digits": ('{"hidden_size": ' + "9" * 4300 + "}", "4,300 digits"),
    "a number of 4,301 digits": ('{"hidden_size": ' + "9" * 4301 + "}", "4,301 digits"),
    "deep lists": ('{"a": ' + "[" * 900 + "]" * 900 + "}", "deep"),
    "deeper lists": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "deep"),
    "lists just too deep": ('{"a": ' + "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH + "}", "deep"),
    "half a surrogate pair": ('{"a": ["\\ud800"]}', "surrogate"),
    "half a surrogate pair as a key": ('{"a": {"\\udfff": 1}}', "surrogate"),
    "a list": ("[1]", "object"),
    "nothing": ("", "JSON"),
}


@pytest.mark.parametrize("file", ["config.json", INDEX, "llmconvert.json", "tokenizer_config.json"])
@pytest.mark.parametrize("case", JSON)
def test_json_that_takes_for_ever_or_cannot_be_written_again(case: str, file: str, copy: Callable[[str], Path]) -> None:
    directory = copy("qwen2")
    text, words = JSON[case]
    (directory / file).write_text(text)
    found, message = bounded.run(lambda: plan_conversion(directory, "llama"))
    assert found == "BadInput" and words in message and file in message, message


def test_json_of_other_encodings_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(BadInput, match="not valid JSON"):
        read_json(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": 1' + b"0" * 30 + b"}")
    assert read_json(path) == {"a": "\U0001f600", "b": 10**30}
    path.write_text('{"a": ' + "[" * (MAX_JSON_DEPTH - 2) + "]" * (MAX_JSON_DEPTH - 2) + "}")
    read_json(path)
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    found, message = bounded.run(lambda: read_json(path))
    assert found == "BadInput" and "bytes long" in message


BAD_VALUES: list[tuple[str, Any]] = [
    ("architectures", 5), ("architectures", "Qwen2ForCausalLM"), ("architectures", [5]), ("model_type", ["qwen2"]),
    ("torch_dtype", ["bfloat16"]), ("dtype", {"a": 1}), ("rope_theta", "10000"), ("rope_theta", 0), ("rope_theta", math.inf),
    ("pad_token_id", {"a": 1}), ("pad_token_id", 1.5), ("pad_token_id", math.inf), ("bos_token_id", "1"),
    ("eos_token_id", math.inf), ("eos_token_id", [math.nan]), ("eos_token_id", [[1]]), ("num_hidden_layers", 10**7),
    ("num_hidden_layers", MAX_LAYERS + 1), ("num_hidden_layers", 2.0), ("num_hidden_layers", True), ("hidden_size", 0),
    ("hidden_size", 1 << 40), ("hidden_size", -48), ("vocab_size", [1]), ("num_attention_heads", {}), ("head_dim", "12"),
    ("rms_norm_eps", "1e-6"), ("rms_norm_eps", math.nan), ("tie_word_embeddings", "false"), ("hidden_act", 1),
    ("rope_scaling", "yarn"), ("rope_scaling", {"type": 5}), ("rope_scaling", {"type": "yarn", "factor": "4"}),
    ("rope_scaling", {"type": "linear", "factor": math.inf}), ("rope_scaling", {"type": "linear", "factor": 0}),
    ("rope_scaling", {"type": "longrope", "short_factor": 1, "long_factor": [1.0]}),
    ("rope_scaling", {"type": "llama3", "original_max_position_embeddings": 0.5}), ("rope_parameters", [1]),
    ("rope_parameters", {"rope_theta": [1]}), ("rope_parameters", {"full_attention": {"rope_theta": "x"}}),
    ("layer_types", "full_attention"), ("layer_types", [[]]), ("quantization_config", "fp8"), ("auto_map", ["x"]),
    ("__class__", "x"), ("use_cache", "bfloat16"), ("pad_token_id", True), ("architectures", [["x"]]),
    ("id2label", 5), ("initializer_range", "0.02"), ("transformers_version", 5), ("sliding_window", "all"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=lambda value: json.dumps(value))
def test_a_senseless_value_is_named(key: str, value: Any, copy: Callable[[str], Path]) -> None:
    directory = copy("qwen2")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, key: value}))
    for run in (
        lambda: plan_conversion(directory, "llama"),
        lambda: inspect(directory),
        lambda: compare_logits(directory, directory, device="cpu"),
    ):
        with pytest.raises(BadInput, match=f"`{key}`"):
            run()


@pytest.mark.parametrize(
    "key", ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "num_nextn_predict_layers"]
)
@pytest.mark.parametrize("value", [10**7, 10**5, 1 << 31, -1, "8", [8], 1.5, True])
def test_mixtures_of_any_size_end_at_once(key: str, value: Any, copy: Callable[[str], Path]) -> None:
    directory = copy("deepseek_v3")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, key: value}))
    found, _ = bounded.run(lambda: plan_conversion(directory, "canonical"))
    assert found == "BadInput"


@pytest.mark.parametrize("key", ["freq", "notes"])
def test_numbers_that_are_not_json_are_not_carried(key: str, copy: Callable[[str], Path]) -> None:
    directory = copy("qwen2")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, key: [0.0, math.inf]}))
    with pytest.raises(BadInput, match=f"`{key}` holds NaN or Infinity"):
        plan_conversion(directory, "llama")
    (directory / "config.json").write_text(
        json.dumps({**config, "model_type": "new", "architectures": ["New"], key: math.inf})
    )
    with pytest.raises(Refused, match="new"):  # the true reason
        plan_conversion(directory, "llama")


@pytest.mark.parametrize(("file", "value"), [
    ("generation_config.json", {"pad_token_id": {"a": 1}}), ("generation_config.json", {"eos_token_id": "2"}),
    ("generation_config.json", {"temperature": math.nan}), ("tokenizer_config.json", {"tokenizer_class": 5}),
    ("tokenizer_config.json", {"auto_map": 5}), ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ("tokenizer_config.json", {"bos_token": 1}),
])  # fmt: skip
def test_what_lies_beside_the_config_is_checked_too(file: str, value: Any, copy: Callable[[str], Path]) -> None:
    directory = copy("qwen2")
    (directory / file).write_text(json.dumps(value))
    with pytest.raises(BadInput, match=f"`{next(iter(value))}`") as caught:
        inspect(directory)
    assert file in (caught.value.where or "")


def test_every_published_config_is_let_through() -> None:
    published = json.loads((Path(__file__).parent / "published/checkpoints.json").read_text())
    assert len(published) > 20
    for name, entry in published.items():
        check_config(entry["config"], name)
    assert {"hidden_size", "rope_scaling", "eos_token_id", "architectures"} < set(CONFIG)


@pytest.mark.parametrize("arch", ["qwen2", "phi3", "chatglm2", "deepseek_v3"])
@OFTEN
@given(data=st.data())
def test_a_changed_config_is_refused_or_understood(
    arch: str, data: st.DataObject, made: dict[str, Path], tmp_path: Path
) -> None:
    """And what its own class in transformers takes, the class of what is written takes too."""
    import transformers

    source, written = tmp_path / arch, tmp_path / "written"
    if not source.exists():
        shutil.copytree(made[arch], source)
        written.mkdir()
    config = data.draw(mutations.mutated(json.loads((made[arch] / "config.json").read_text())))
    (source / "config.json").write_text(json.dumps(config))
    try:
        text = plan_conversion(source, "canonical" if arch == "deepseek_v3" else "llama").plan.texts["config.json"]
    except (BadInput, Refused):
        return
    if arch in ("qwen2", "phi3") and _is_taken(source):
        (written / "config.json").write_bytes(text)
        transformers.AutoConfig.from_pretrained(written)


def _is_taken(directory: Path) -> bool:
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(directory)
    except Exception:  # of several libraries
        return False
    return True


@OFTEN
@given(data=st.data())
def test_a_changed_header_is_refused_or_is_one_the_library_takes(data: st.DataObject, tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(5).half(),
        "c": torch.zeros(0, 2),
        "d": torch.tensor(1.0),
    }
    header, body, at = {"__metadata__": {"format": "pt"}}, b"", 0
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        code = "F16" if tensor.dtype == torch.float16 else "F32"
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + len(raw)]}  # type: ignore[dict-item]
        at, body = at + len(raw), body + raw
    path = tmp_path / "x.safetensors"
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(mutations.mutated(header)))
    else:
        text = json.dumps(header)
        place = data.draw(st.integers(0, len(text) - 1))
        text = text[:place] + data.draw(st.sampled_from(list('0123456789.-e"[]{},: x\u00e4'))) + text[place + 1 :]
    raw = text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    try:
        ours = read_header(path)
    except BadInput:
        return
    with safe_open(path, framework="pt") as theirs:
        assert set(theirs.keys()) == set(ours)
        for name, tensor in ours.items():
            found = theirs.get_tensor(name)
            assert tuple(found.shape) == tensor.shape
            assert TO_NAME.get(tensor.dtype) in (None, str(found.dtype).removeprefix("torch."))
            stored = path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
            assert stored == (found.reshape(-1).view(torch.uint8).numpy().tobytes() if found.numel() else b"")


HEADERS = [
    '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', '{"a": {"dtype": {}, "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}', '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, NaN]}}', '{"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}',
    '{"a": {"dtype": "F32", "shape": [' + "9" * 4300 + '], "data_offsets": [0, 4]}}', '{"a": [1], "b": 2}', '{"a": null}',
    '{"a": {"dtype": "F32", "shape": [18446744073709551616, 0], "data_offsets": [0, 4]}}', '{"__metadata__": 5}', '["a"]',
    '{"__metadata__": {"a": 1}}',
 '{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "[" * 100_000, "{" * 9,
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_senseless_header_is_bad_input_here_and_in_the_library(header: str, encoding: str, tmp_path: Path) -> None:
    path, raw = tmp_path / "x.safetensors", header.encode(encoding)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    assert bounded.run(lambda: read_header(path))[0] == "BadInput"
    with pytest.raises((SafetensorError, ValueError, OverflowError)), safe_open(path, framework="pt"):
        pass


@OFTEN
@given(data=st.data())
def test_a_changed_index_is_refused_or_read(data: st.DataObject, made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "qwen2"
    if not source.exists():
        shutil.copytree(made["qwen2"], source)
    whole = open_checkpoint(made["qwen2"])
    index = data.draw(mutations.mutated(json.loads((made["qwen2"] / INDEX).read_text())))
    (source / INDEX).write_text(json.dumps(index))
    try:
        found = open_checkpoint(source)
    except BadInput:
        return
    for name, tensor in found.tensors.items():
        assert tensor._replace(path=whole.tensors[name].path) == whole.tensors[name]


@OFTEN
@given(data=st.data())
def test_a_changed_manifest_is_bad_input_or_without_harm(
    data: st.DataObject, made: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "converted"
    if not source.exists():
        shutil.copytree(made["converted"], source)
    value = data.draw(mutations.mutated(json.loads((made["converted"] / manifest.MANIFEST).read_text())))
    (source / manifest.MANIFEST).write_text(json.dumps(value))
    for run in (lambda: manifest.check(source), lambda: plan_conversion(source, "qwen"), lambda: inspect(source)):
        try:
            run()
        except (BadInput, Refused, Usage):
            continue


@pytest.mark.parametrize(("key", "value"), [
    ("files", {"x": 5}), ("files", {"x": {"size": "1"}}), ("files", {"x": {"size": 1, "xxh3_128": 5}}), ("run", 5),
    ("source_files", [1]),
    ("source", 5), ("source", []), ("tensors", []), ("tensors", {"a": 5}), ("tensors", {"a": {"file": "x"}}), ("steps", {}),
    ("dtype", []), ("source", {"spec": 5}), ("source", {"config": 5}), ("source", {"spec": "qwen2", "config": {"hidden_size": "x"}}),
    ("tensors", {"a": {"file": "x", "dtype": [], "shape": [1], "rows_per_checksum": 1, "checksums": ["x"]}}),
    ("tensors", {"a": {"file": "x", "dtype": "F32", "shape": "1", "rows_per_checksum": 1, "checksums": ["x"]}}),
    ("tensors", {"a": {"file": "x", "dtype": "F32", "shape": [9], "rows_per_checksum": 0, "checksums": ["x"]}}),
    ("tensors", {"a": {"file": "x", "dtype": "F32", "shape": [9], "rows_per_checksum": 4, "checksums": ["x"]}}),
])  # fmt: skip
def test_a_mistyped_manifest_is_bad_input(key: str, value: Any, copy: Callable[[str], Path]) -> None:
    directory = copy("converted")
    path = directory / manifest.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    for run in (
        lambda: manifest.check(directory),
        lambda: plan_conversion(directory, "qwen"),
        lambda: inspect(directory),
    ):
        with pytest.raises(BadInput) as caught:
            run()
        assert manifest.MANIFEST in (caught.value.where or "")


def _edit_args(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    for path in sorted(directory.rglob("model_optim_rng.pt")):
        value = torch.load(path, weights_only=False)
        edit(vars(value["args"]))
        torch.save(value, path)


@pytest.mark.parametrize(("key", "value"), [
    ("num_layers", 10**7), ("num_layers", "3"), ("hidden_size", None), ("hidden_size", 48.0), ("num_experts", 10**9),
    ("expert_model_parallel_size", 10**9), ("expert_model_parallel_size", "2"), ("tensor_model_parallel_size", [2]),
    ("moe_layer_freq", "([0]*999999999999)"), ("rotary_base", "10000"), ("rotary_base", math.nan), ("norm_epsilon", []),
    ("pipeline_model_parallel_layout", 5), ("num_attention_heads", 0), ("vocab_size", 1 << 40), ("mtp_num_layers", 10**8),
    ("rotary_percent", math.inf), ("padded_vocab_size", -4), ("make_vocab_size_divisible_by", 0),
])  # fmt: skip
def test_senseless_arguments_are_bad_input(key: str, value: Any, copy: Callable[[str], Path]) -> None:
    ranks = copy("ranks")
    (ranks / manifest.MANIFEST).unlink()
    shutil.rmtree(ranks / "hf")  # it says what args leave out
    _edit_args(ranks, lambda args: args.update({key: value}))
    found, message = bounded.run(lambda: open_model(ranks))
    assert found == "BadInput" and (key in message or "2,000,000,000 ranks" in message), message


@pytest.mark.parametrize("text", ["[0]*9999*9999*9999", "[[0]]*3", "9999*9999*9", "(" * 300, "[0]*3+"])
def test_a_senseless_list_of_layers_is_bad_input_to_the_reference_model_too(text: str) -> None:
    found, message = bounded.run(lambda: layers_with_experts({"num_experts": 4, "moe_layer_freq": text}, 3))
    assert found == "BadInput" and "moe_layer_freq" in message, message


def test_arguments_that_are_not_json_are_left_out(copy: Callable[[str], Path]) -> None:
    ranks = copy("ranks")
    odd = {"a": [torch.float32], "b": [{(1, 2): 3}], "c": 1 << 900, "d": b"x", "e": {"f": 1}, 5: 6}
    _edit_args(ranks, lambda args: args.update({**odd, "kept": [1, ["x", None]], "name": "ä"}))  # type: ignore[arg-type]
    found = open_megatron(ranks).args
    assert not {*odd} & {*found} and found["kept"] == [1, ["x", None]] and found["name"] == "ä"
    json.dumps(found)


@pytest.mark.parametrize("text", ["9" * 5000, "²", "١٢", "-1", "1.5", "release\0", "x" * 10_000_000, "../x"])
def test_a_senseless_tracker_is_bad_input(text: str, copy: Callable[[str], Path]) -> None:
    ranks = copy("ranks")
    (ranks / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(BadInput):
        open_megatron(ranks)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_arguments_are_refused_or_understood(
    data: st.DataObject, made: dict[str, Path], tmp_path: Path
) -> None:
    ranks = tmp_path / "ranks"
    if not ranks.exists():
        shutil.copytree(made["ranks"], ranks)
        (ranks / manifest.MANIFEST).unlink()
    path = ranks / "release/mp_rank_00/model_optim_rng.pt"
    value = torch.load(made["ranks"] / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    args = data.draw(mutations.mutated(vars(value["args"])))
    vars(value["args"]).clear()
    vars(value["args"]).update(args)
    torch.save(value, path)
    try:
        open_model(ranks)
    except (BadInput, Refused, Usage):
        return


@OFTEN
@given(data=st.data())
def test_damaged_metadata_is_refused_or_leads_to_chunks(
    data: st.DataObject, made: dict[str, Path], tmp_path: Path
) -> None:
    dist = tmp_path / "dist"
    if not dist.exists():
        shutil.copytree(made["dist"], dist)
    raw = bytearray((made["dist"] / "release/.metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        width = data.draw(st.sampled_from([0, 0, 0, 1, 5, 40]))
        raw[place : place + width + 1] = data.draw(st.binary(min_size=1 if width == 0 else 0, max_size=width + 1))
    (dist / "release/.metadata").write_bytes(bytes(raw))
    try:
        found = open_megatron(dist)
    except (BadInput, Refused):
        return
    for tensor in found.stored.values():
        assert tensor.path.parent == dist / "release" and tensor.offset + tensor.nbytes <= tensor.path.stat().st_size


STATES = [
    "[]", "{}", '{"global_step": "x", "log_history": []}', '{"global_step": 1, "log_history": {}}',
    '{"global_step": 1, "log_history": [5]}', '{"global_step": 1, "log_history": [{"step": "x", "loss": 1}]}',
    '{"global_step": 1, "log_history": [{"step": [1], "loss": 1}]}', '{"global_step": Infinity, "log_history": []}',
    '{"global_step": 1, "log_history": [{"step": Infinity, "loss": 1}]}', '{"global_step": 1, "log_history": ' + "[" * 90_000,
    '{"global_step": 1, "log_history": [{"step": 1, "loss/a": ' + "9" * 4000 + "}]}",
]  # fmt: skip


@pytest.mark.parametrize("state", STATES, ids=range(len(STATES)))
def test_a_senseless_log_is_bad_input(state: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(state)
    assert bounded.run(lambda: read_curves(tmp_path))[0] == "BadInput"


@pytest.mark.parametrize("name", ["trainer_state.json", "events.out.tfevents.1.x"])
def test_a_log_that_is_no_file_is_bad_input(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    assert bounded.run(lambda: read_curves(tmp_path))[0] == "BadInput"


def test_event_files_of_noise_are_bad_input(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.x").write_bytes(os.urandom(4000))
    with pytest.raises(BadInput):
        read_curves(tmp_path)


@pytest.mark.parametrize("name", ["x" * 1001, "model.layers." + "9" * 5000 + ".mlp.up_proj.weight"])
def test_a_name_nobody_gives_a_tensor_is_bad_input(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    raw = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(BadInput, match="malformed"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="not a tensor"):
        open_checkpoint(tmp_path)


def test_values_are_shown_short() -> None:
    assert shown([{(1, 2): 3}, b"x"]) == '[{}, "bytes"]'
    assert shown(10**70) == "a number of more than 60 digits"
    assert len(shown("x" * 10**6)) < 100 and len(shown({"a": "x" * 10**6})) < 100
    assert shown([1] * 1000) == "a list of 1,000" and shown({"a": math.nan}) == '{"a": NaN}'


def test_the_judge_sees_what_takes_long_or_much_and_what_is_unexpected() -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        bounded.run(lambda: 1 / 0)
    with pytest.raises(AssertionError, match="MemoryError"):
        bounded.run(lambda: bytearray(2 * bounded.MEMORY))
    assert bounded.run(lambda: read_json(Path("/nonexistent/x.json"))) == (
        "BadInput",
        "`x.json` is missing (/nonexistent)",
    )


@pytest.mark.parametrize("arch", ["qwen2", "bin"])
def test_two_sets_of_weights_are_refused(copy: Callable[[str], Path], arch: str) -> None:
    """Transformers would load the one, and what the index names would be converted."""
    source = copy(arch)
    single, index = ("model.safetensors", INDEX) if arch == "qwen2" else ("pytorch_model.bin", "pytorch_model.bin.index.json")
    shard = json.loads((source / index).read_text())["weight_map"]["lm_head.weight"]
    shutil.copy(source / shard, source / single)
    for command in (open_checkpoint, weight_files):
        with pytest.raises(BadInput, match="two sets of weights"):
            command(source)


def test_an_index_that_names_the_single_file_is_one_set(copy: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints.make("qwen2", tmp_path / "one", shards=1)
    names = dict.fromkeys(open_checkpoint(source).tensors, "model.safetensors")
    (source / INDEX).write_text(json.dumps({"weight_map": names}))
    assert open_checkpoint(source).index == INDEX


def test_a_config_that_names_other_weights_is_refused() -> None:
    with pytest.raises(BadInput, match="transformers_weights"):
        check_config({"transformers_weights": "other.safetensors"}, "config.json")


def test_a_number_of_labels_is_bounded() -> None:
    """Transformers writes out a name for each."""
    with pytest.raises(BadInput, match="num_labels"):
        check_config({"num_labels": 10**6}, "config.json")


@pytest.mark.parametrize(
    ("arch", "name"),
    [("ranks", "release"), ("ranks", "release/mp_rank_01"), ("ranks", "release/mp_rank_00/model_optim_rng.pt"),
     ("ranks", "latest_checkpointed_iteration.txt"), ("dist", "release"), ("dist", "release/common.pt"),
     ("dist", "release/.metadata")],
)  # fmt: skip
def test_a_megatron_checkpoint_with_parts_elsewhere_is_refused(
    copy: Callable[[str], Path], tmp_path: Path, arch: str, name: str
) -> None:
    source, outside = copy(arch), tmp_path / "outside"
    (source / name).rename(outside)
    (source / name).symlink_to(outside)
    with pytest.raises(BadInput, match="leaves the checkpoint"):
        open_megatron(source)
    inside = source / "moved"
    (source / name).unlink()
    outside.rename(inside)
    (source / name).symlink_to(inside)
    if arch == "ranks" and name.startswith("release/"):
        with pytest.raises(BadInput, match="leaves the checkpoint"):
            open_megatron(source)  # of this iteration
    elif name in ("release", "latest_checkpointed_iteration.txt"):
        open_megatron(source)
