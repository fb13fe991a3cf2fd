"""Arguments for Megatron-LM: what its parser takes, what it cannot take, and what a run's own arguments mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import megatron_options as options
import pytest
import torch

from llmconvert.converters.megatron import arguments
from llmconvert.converters.megatron.described import from_arguments
from llmconvert.converters.megatron.grid import Grid, chunks
from llmconvert.converters.megatron.merge import merge_checkpoint
from llmconvert.converters.megatron.split import arguments_for, split_checkpoint
from llmconvert.errors import BadInput, LlmconvertError, Refused, Usage

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "llama_bias": {}, "llama_tied": {}, "llama_mha": {}, "qwen": {}, "qwen2": {}, "qwen3": {}, "glm": {},
    "chatglm2": {}, "internlm2": {"bias": True}, "granite": {}, "seed_oss": {}, "ernie4_5": {}, "mixtral": {},
    "qwen2_moe": {}, "qwen3_moe": {}, "deepseek_moe": {}, "deepseek_v2": {}, "deepseek_v2_lite": {}, "deepseek_v3": {},
    "moonlight": {}, "glm4_moe": {},
    "llama_llama3": {"rope_scaling": _LLAMA3, "max_position_embeddings": 16384},
}  # fmt: skip
GRIDS = {
    "one": Grid(), "tp2pp3": Grid(tp=2, pp=3), "first": Grid(pp=2, first=1), "last": Grid(tp=2, pp=2, last=2),
    "loss": Grid(pp=2, loss_counts=True), "both": Grid(tp=6, pp=5, embedding_counts=True, loss_counts=True),
    "layout": Grid(pp=2, layout="Et|ttL"), "layout_mtp": Grid(pp=2, layout="Et,|t*2,mL"), "vpp": Grid(pp=3, vpp=1),
    "ep": Grid(ep=2), "tp2ep2": Grid(tp=2, ep=2, etp=1, pp=2, last=1),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every model."""
    folder = tmp_path_factory.mktemp("models")
    return {name: checkpoints.make(name, folder / name, dtype=torch.bfloat16, **more) for name, more in MODELS.items()}


def scripts(source: Path, folder: Path) -> list[Path]:
    """The args files of a model over every grid it can be cut by, for both implementations."""
    folder.mkdir(exist_ok=True)
    found = []
    for name, grid in GRIDS.items():
        for implementation in ("transformer_engine", "local"):
            try:
                args = arguments_for(source, grid, fmt="torch_dist", transformer_impl=implementation)
            except Usage:
                continue
            found.append(folder / f"{name}-{implementation}.sh")
            found[-1].write_text(arguments.script(args, "DIR"))
    return found


def test_the_parser_takes_every_args_file(made: dict[str, Path], tmp_path: Path) -> None:
    given: list[list[str]] = []
    for name, source in made.items():
        files, config = scripts(source, tmp_path / name), json.loads((source / "config.json").read_text())
        assert len(files) >= 8
        epsilon = next(
            config[key] for key in config if key in ("rms_norm_eps", "layernorm_epsilon", "layer_norm_epsilon")
        )
        for file, own in zip(files, options.words(*files), strict=True):
            given.append(own)
            args = options.validated(options.parsed(own))
            assert args["transformer_impl"] == file.stem.split("-")[1] and args["vocab_size"] == 131
            assert args["layernorm_epsilon"] == epsilon
    if options.CHECKOUT:
        for words, real in zip(given, options.real_parser(given), strict=True):
            assert "error" not in real, (words, real)
            options.assert_same(words, real)


BROKEN: dict[str, list[str]] = {
    "an unknown option": ["--beta-fast", "1"],
    "a list with spaces": ["--moe-layer-freq", "[0, 1, 1]"],
    "a base that is not whole": ["--rotary-base", "10000.5"],
    "another embedding": ["--position-embedding-type", "yarn"],
    "yarn without latents": ["--rope-type", "yarn"],
    "too short a context": ["--max-position-embeddings", "8"],
    "a layer too many": ["--num-layers", "4", "--pipeline-model-parallel-size", "3"],
    "layouts without m": ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et|ttL",
                          "--mtp-num-layers", "1"],
    "one expert, normalised": ["--num-experts", "4", "--moe-router-topk", "1"],
    "a bias for softmax": ["--num-experts", "4", "--moe-router-enable-expert-bias"],
    "a list of another length": ["--num-experts", "4", "--moe-layer-freq", "[0,1]"],
}  # fmt: skip


def test_the_rules_stop_what_the_parser_stops(made: dict[str, Path], tmp_path: Path) -> None:
    """Each of these is one change of a file that is taken."""
    (file, *_) = scripts(made["llama"], tmp_path / "args")
    (sound,) = options.words(file)
    options.validated(options.parsed(sound))
    for what, change in BROKEN.items():
        with pytest.raises((AssertionError, KeyError, ValueError)):
            options.validated(options.parsed([*sound, *change]))
            pytest.fail(what)
    if options.CHECKOUT:
        answers = options.real_parser([[*sound, *change] for change in BROKEN.values()])
        lenient = {"a list of another length"}  # only the layers' builder looks
        assert {what for what, answer in zip(BROKEN, answers, strict=True) if "error" not in answer} <= lenient


@pytest.mark.skipif(not options.CHECKOUT, reason="needs MEGATRON_LM, a checkout of Megatron-LM")
def test_what_is_not_carried_is_what_its_loader_leaves_out() -> None:
    import re

    text = (Path(str(options.CHECKOUT)) / "megatron" / "training" / "checkpointing.py").read_text()
    carried = set(re.findall(r"_set_arg\('(\w+)'", text))
    assert len(carried) > 40
    assert {name for name in arguments.NOT_CARRIED if options.sets(f"--{name}") in carried} == set()


def test_the_comment_names_the_options_of_this_model_that_are_lost(made: dict[str, Path]) -> None:
    for name, lost in (("llama", "--norm-epsilon, --transformer-impl"),
                       ("qwen3", "--norm-epsilon, --qk-layernorm, --transformer-impl")):  # fmt: skip
        text = arguments.script(arguments_for(made[name], Grid()), "DIR")
        assert f"does not take {lost} from a checkpoint" in text


def test_the_tokenizer_is_left_to_the_user(made: dict[str, Path], tmp_path: Path) -> None:
    """`--use-tokenizer-model-from-checkpoint-args`, which is on by default, takes whatever stands there."""
    split_checkpoint(made["llama"], tmp_path / "ranks", Grid(), verify="weights")
    args = torch.load(next((tmp_path / "ranks").rglob("*.pt")), weights_only=False)["args"]
    assert getattr(args, "tokenizer_type", None) is None and getattr(args, "tokenizer_model", None) is None


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
def test_megatron_args_prints_what_split_writes(fmt: str, made: dict[str, Path], tmp_path: Path, root: Path) -> None:
    options_ = ["--tp", "2", "--ep", "2", "--format", fmt, "--transformer-impl", "local", "--moe-grouped-gemm"]
    options_ += ["--dtype", "float16"]
    command = [sys.executable, "-m", "llmconvert", "split", made["qwen3_moe"], tmp_path / "ranks", *options_]
    subprocess.run([*map(str, command), "--verify", "none"], cwd=root, check=True, capture_output=True)
    command = [sys.executable, "-m", "llmconvert", "megatron-args", made["qwen3_moe"], *options_]
    shown = subprocess.run([*map(str, command)], cwd=root, check=True, capture_output=True, text=True).stdout
    assert shown == (tmp_path / "ranks" / "megatron-args.sh").read_text()
    assert f"--ckpt-format {fmt}" in shown and "--fp16" in shown and "--moe-grouped-gemm" in shown
    (args,) = options.check(tmp_path / "ranks" / "megatron-args.sh")
    assert args["transformer_impl"] == "local"


def test_megatron_args_takes_the_format_split_takes(made: dict[str, Path]) -> None:
    assert "--ckpt-format torch " in arguments.script(arguments_for(made["llama"], Grid()), "DIR")


_YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
         "original_max_position_embeddings": 4096}  # fmt: skip
_ROUTED_ALIKE = {"num_experts_per_tok": 2, "max_position_embeddings": 16384}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("beta_fast", 1, "beta_fast 1, there 32"), ("beta_slow", 2, "beta_slow 2, there 1"),
     ("original_max_position_embeddings", 64, "original_max_position_embeddings 64, there 4096")],
)  # fmt: skip
def test_what_no_option_says_of_yarn_is_told(key: str, value: float, words: str, tmp_path: Path) -> None:
    """Kimi-K2 has a beta_fast of 1; megatron-core's own is 32 unless code says otherwise."""
    source = checkpoints.make("deepseek_v3", tmp_path / "source", rope_scaling={**_YARN, key: value}, **_ROUTED_ALIKE)
    with pytest.raises(Refused, match=words) as refusal:
        split_checkpoint(source, tmp_path / "ranks", Grid())
    assert "--verify weights" in (refusal.value.hint or "")
    report = split_checkpoint(source, tmp_path / "ranks", Grid(), verify="weights")
    assert any(words in note and "no option does" in note for note in report.notes)
    assert not any("beta" in flag or "original" in flag for flag in arguments.flags(report.config))
    report = merge_checkpoint(tmp_path / "ranks", tmp_path / "merged", verify="weights")
    assert any(words in note for note in report.notes)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "merged"))
    assert after == before
    if options.CHECKOUT:
        (real,) = options.real_parser(options.words(tmp_path / "ranks" / "megatron-args.sh"))
        trained = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
        assert {name: real["config"][name] for name in trained} == trained


def test_yarn_as_megatron_trains_it_is_proved(tmp_path: Path) -> None:
    source = checkpoints.make("deepseek_v3", tmp_path / "source", rope_scaling=_YARN, **_ROUTED_ALIKE)
    report = split_checkpoint(source, tmp_path / "ranks", Grid())
    assert report.logits is not None and not any("YaRN" in note for note in report.notes)


def run_args(source: Path, **changes: Any) -> dict[str, Any]:
    """Arguments as a training run saves them, of which some are changed."""
    args = arguments_for(source, Grid(), transformer_impl="local")
    for key in ("original_max_position_embeddings", "beta_fast", "beta_slow", "tokenizer_type", "tokenizer_model"):
        args.pop(key, None)  # the parser has no such arguments
    return args | changes


def test_a_run_without_rope_type_trained_yarn_with_cores_own_settings(tmp_path: Path) -> None:
    """`--rope-type` is None by default, which is YaRN with latent attention (MLATransformerConfig)."""
    source = checkpoints.make("deepseek_v3", tmp_path / "source", rope_scaling=_YARN, **_ROUTED_ALIKE)
    args = run_args(source, rope_type=None, rotary_scaling_factor=40.0, mscale=0.7, mscale_all_dim=0.9)
    assert from_arguments(args).rope_scaling == {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 0.9,
    }  # fmt: skip
    plain = run_args(source, rope_type=None, rotary_scaling_factor=1.0, mscale=1.0, mscale_all_dim=0.0)
    assert from_arguments(plain).rope_scaling is None
    assert from_arguments(plain | {"rope_type": "rope", "rotary_scaling_factor": 40.0}).rope_scaling is None
    with pytest.raises(Refused, match="mscale_all_dim"):
        from_arguments(args | {"rope_type": "rope"})


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1", (True,) * 3), ("2", (True, False, True)), ("([0]*1+[1]*2)", (False, True, True)), ("[0, 1, 1]", (False, True, True)),
     ("([1]+[0])*1+[1]", (True, False, True))],
)  # fmt: skip
def test_layers_with_experts_as_they_are_typed(text: str, layers: tuple[bool, ...], made: dict[str, Path]) -> None:
    assert from_arguments(run_args(made["mixtral"], moe_layer_freq=text)).moe_layers == layers
    for wrong in ("[0]*", "import os", "[0]+1", "[1]*2", "[0]*999999999", "(" * 5000):
        with pytest.raises(BadInput, match="moe_layer_freq"):
            from_arguments(run_args(made["mixtral"], moe_layer_freq=wrong))


def test_one_sigmoid_score_is_not_divided_by_itself(made: dict[str, Path]) -> None:
    args = run_args(made["glm4_moe"])
    assert from_arguments(args).norm_topk_prob
    assert not from_arguments(args | {"moe_router_topk": 1}).norm_topk_prob


JUNK = ("x", -1, 0, 1.5, [], [1], ["a"], [0, 10**30], True, 10**30, float("nan"), float("inf"), {"a": 1})


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "glm4_moe"])
def test_senseless_arguments_are_bad_input(name: str, made: dict[str, Path]) -> None:
    args = run_args(made[name])
    from_arguments(args)
    for key in args:
        for junk in JUNK:
            changed = args | {key: junk}
            try:
                config = from_arguments(changed)
                grid = arguments.grid_of(changed, 1, 1, 1, 1, 1)
                chunks(config.num_hidden_layers, grid, config.num_nextn_predict_layers)
            except LlmconvertError:
                pass
    for junk in ("x", 1.5, 10**30, [1]):
        with pytest.raises(BadInput, match="`num_layers`"):
            from_arguments(args | {"num_layers": junk})


def test_yarn_without_latents_is_not_read_as_none(made: dict[str, Path]) -> None:
    with pytest.raises(Refused, match="YaRN without latent attention"):
        from_arguments(run_args(made["llama"], position_embedding_type="yarn"))


def test_a_rotary_base_the_parser_does_not_take_is_told(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "source", rope_theta=10000.5)
    report = split_checkpoint(source, tmp_path / "ranks", Grid(), verify="weights")
    assert any("`--rotary-base` takes whole numbers" in note and "10000.5" in note for note in report.notes)
    (words,) = options.words(tmp_path / "ranks" / "megatron-args.sh")
    assert "--use-checkpoint-args" in words and "--rotary-base" not in words
    args = torch.load(next((tmp_path / "ranks").rglob("*.pt")), weights_only=False)["args"]
    assert args.rotary_base == 10000.5  # `load_args_from_checkpoint` takes it in any case (`force=True`)
    if options.CHECKOUT:
        (real,) = options.real_parser([words])
        assert real["use_checkpoint_args"] is True


def test_one_expert_that_always_weighs_one_is_refused(tmp_path: Path) -> None:
    source = checkpoints.make("mixtral", tmp_path / "source", num_experts_per_tok=1)
    with pytest.raises(Refused, match="weighs 1 whatever the router says"):
        split_checkpoint(source, tmp_path / "ranks", Grid(), verify="weights")


@pytest.mark.parametrize("command", ["split", "merge"])
def test_help_offers_what_is_taken(command: str, root: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "llmconvert", command, "--help"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    assert "fp8-block128" not in shown and "bfloat16" in shown
