"""Two checkpoints compared as models: the same is exactly the same, any difference is seen, memory is one block."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import checkpoints
import pytest
import tiny
import torch
from safetensors.torch import save_file
from slowly import slowly
from torch import Tensor

from llmconvert.debug.prompts import make_prompt
from llmconvert.errors import BadInput, LlmconvertError, Refused, Usage
from llmconvert.infer.engines.encode import encode, load_tokenizer
from llmconvert.infer.rows import BadRow
from llmconvert.verify import logits
from llmconvert.verify.float64 import float64_throughout
from llmconvert.verify.layerwise import LayerwiseModel
from llmconvert.verify.logits import BIT_EQUAL, DIFFERENT, NOT_FINITE, REORDERED, compare_logits
from llmconvert.verify.models import empty_model, load_model
from llmconvert.verify.probes import FAR_POSITION, make_probes

RUNNABLE = [arch for arch in tiny.ARCHITECTURES]


def _edit(directory: Path, name: str, amount: float) -> None:
    """Add to one element of one tensor, in a checkpoint of one file."""
    state = checkpoints.tensors(directory)
    state[name].view(-1)[3] += amount
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


def _logits(model: torch.nn.Module, probe: logits.Probe) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=probe.input_ids, attention_mask=probe.attention_mask, position_ids=probe.position_ids)
    found: Tensor = getattr(out, "logits", out)
    return found[probe.kept]


# Layer by layer against the whole model, run as it was written.


@pytest.mark.parametrize("arch", RUNNABLE)
@pytest.mark.parametrize("dtype", [*slowly([torch.float32]), torch.bfloat16])
def test_layer_by_layer_is_the_models_own_forward_bit_for_bit(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny.make(arch, tmp_path / "source")
    probes = make_probes((source,), 131, 256)
    plain = load_model(source, dtype, "cpu")
    for whole in (True, False):
        model = LayerwiseModel(source, dtype, "cpu", whole=whole)
        for probe, found in zip(probes, model.forward(probes), strict=True):
            assert torch.equal(found[probe.kept], _logits(plain, probe)), probe.name


def test_halves_are_found_in_every_build(tmp_path: Path) -> None:
    expected = {
        "llama": ("self_attn", "mlp", "post_attention_layernorm"), "qwen": ("attn", "mlp", "ln_2"),
        "internlm2": ("attention", "feed_forward", "ffn_norm"), "glm4": ("self_attn", "mlp", "post_attention_layernorm"),
        "chatglm2": ("self_attention", "mlp", "post_attention_layernorm"),
    }  # fmt: skip
    for arch, names in expected.items():
        model = LayerwiseModel(tiny.make(arch, tmp_path / arch), torch.float32, "cpu", whole=False)
        probes = make_probes((), 131, 256)
        model.begin(probes)
        with model.block(0):
            model.layer(0, model.begin(probes))
        halves = model.halves(0)
        assert halves is not None and (halves.attention, halves.mlp, halves.middle) == names


@pytest.mark.parametrize(
    ("cls", "parallel"), [*slowly([("OlmoConfig", False), ("OPTConfig", True)]), ("Olmo2Config", False), ("CohereConfig", True)]
)
def test_halves_of_post_norm_and_parallel_layers(cls: str, parallel: bool, tmp_path: Path) -> None:
    """Builds no spec knows: norms after the branches, and branches side by side."""
    import transformers

    own = {"ffn_dim": 104, "word_embed_proj_dim": 48} if cls == "OPTConfig" else {}
    config = getattr(transformers, cls)(**{**checkpoints.BASE, "pad_token_id": 0, **own})
    model = transformers.AutoModelForCausalLM.from_config(config)
    checkpoints.randomise(model, 0)
    model.save_pretrained(tmp_path / "one")
    changed = next(p for n, p in model.named_parameters() if "layers.1." in n and ("up_proj" in n or "fc1.weight" in n))
    changed.data *= 1.5
    model.save_pretrained(tmp_path / "two")
    assert compare_logits(tmp_path / "one", tmp_path / "one", device="cpu", greedy_tokens=0).verdict
    report = compare_logits(tmp_path / "one", tmp_path / "two", device="cpu", greedy_tokens=0)
    assert [d.place for d in report.departures] == ["layer 1, layer" if parallel else "layer 1, mlp"]


@pytest.mark.slow
def test_only_one_block_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.make("llama", tmp_path / "one", num_hidden_layers=6)
    held, most = [], []
    read = LayerwiseModel._read

    def counted(self: LayerwiseModel, name: str) -> torch.nn.Parameter:
        import gc
        import weakref

        gc.collect()
        tensor = read(self, name)
        held.append((weakref.ref(tensor), tensor.numel()))
        most.append(sum(n for ref, n in held if ref() is not None))
        return tensor

    monkeypatch.setattr(LayerwiseModel, "_read", counted)
    assert compare_logits(source, source, device="cpu", load="layers").verdict
    state = checkpoints.tensors(source)
    block = sum(t.numel() for n, t in state.items() if n.startswith("model.layers.0."))
    table = state["model.embed_tokens.weight"].numel()
    assert max(most) <= block + table + 48  # the first block while its input is recorded; then one or the other
    assert sum(t.numel() for t in state.values()) > 4 * max(most)


@pytest.mark.parametrize("arch", ["llama", "qwen", "chatglm2", "gemma"])
def test_float64_is_float64_throughout(arch: str, tmp_path: Path) -> None:
    """Rounding a weight by one float64 unit moves logits by so little only if nothing in between is float32."""
    source = tiny.make(arch, tmp_path / "source", dtype="float64")
    probes = make_probes((), 131, 256)
    with float64_throughout():
        assert empty_model(source, torch.float64).state_dict()
    exact = LayerwiseModel(source, torch.float64, "cpu", whole=False).forward(probes)
    plain = [_logits(load_model(source, torch.float64, "cpu"), probe) for probe in probes[-1:]]
    wide = exact[-1][probes[-1].kept]
    assert wide.dtype == torch.float64
    # transformers' own float64 rounds norms, rotary and softmax to float32 on the way.
    assert 0 < float((wide - plain[0]).abs().max() / wide.abs().max()) < 1e-5 or arch in ("qwen", "chatglm2")
    single = [_logits(load_model(source, torch.float32, "cpu"), probe) for probe in probes]
    for probe, a, b in zip(probes, exact, single, strict=True):
        assert float((a[probe.kept] - b).abs().max()) < 1e-4 * float(a[probe.kept].abs().max())


@pytest.mark.parametrize("arch, dtype", [
    *itertools.product(["llama", "qwen", "baichuan2", "glm4_9b", "gemma", "mixtral", "deepseek_v3"], ["float32"]),
    *slowly(itertools.product(["llama", "qwen", "baichuan2", "glm4_9b", "gemma", "mixtral"], ["float64", "bfloat16"])),
    ("deepseek_v3", "float64"), ("deepseek_v3", "bfloat16"),
])  # fmt: skip
def test_the_same_weights_give_exactly_zero(arch: str, dtype: str, tmp_path: Path) -> None:
    one, two = tiny.make(arch, tmp_path / "one"), tiny.make(arch, tmp_path / "two", shards=False, fmt="bin")
    report = compare_logits(one, two, dtype=dtype, device="cpu")
    assert report.verdict and report.kind == BIT_EQUAL
    assert report.relative == report.max_abs == report.mean_abs == 0.0
    assert abs(report.kl_divergence) < 1e-12
    assert report.top1_agreement == report.top5_agreement == report.greedy_agreement == 1.0
    assert report.num_tokens == 5 + 17 + 33 + 33 + 17


@pytest.mark.parametrize("arch", ["baichuan_13b", "yi_old", "internlm2", "chatglm3", "qwen_2023", "mistral_sliding"])
def test_every_loader_gives_finite_logits(arch: str, tmp_path: Path) -> None:
    one = tiny.make(arch, tmp_path / "one")
    report = compare_logits(one, one, device="cpu")
    assert report.verdict and math.isfinite(report.kl_divergence)


def test_both_forms_of_config_are_one_model(tmp_path: Path) -> None:
    one, two = tiny.make("llama", tmp_path / "one"), tiny.make("llama_rope5", tmp_path / "two")
    assert compare_logits(one, two, device="cpu").relative == 0.0


@pytest.mark.parametrize("arch, name", [
    ("llama", "model.layers.1.mlp.up_proj.weight"), ("qwen", "transformer.h.2.attn.c_attn.bias"),
    ("chatglm2", "transformer.encoder.layers.0.input_layernorm.weight"),
])  # fmt: skip
def test_one_changed_number_is_seen(arch: str, name: str, tmp_path: Path) -> None:
    one, two = (tiny.make(arch, tmp_path / side, shards=False) for side in ("one", "two"))
    _edit(two, name, 0.5)
    report = compare_logits(one, two, device="cpu")
    assert not report.verdict and report.kind == DIFFERENT and report.exact_relative > report.tolerance
    assert report.kl_divergence > 0 and report.mean_abs > 0
    assert compare_logits(one, two, device="cpu", max_abs=1e3).verdict
    assert not compare_logits(one, two, device="cpu", max_abs=report.max_abs / 2).verdict


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_number_that_is_not_finite_is_seen(dtype: str, tmp_path: Path) -> None:
    one, two = (tiny.make("llama", tmp_path / side, shards=False) for side in ("one", "two"))
    _edit(two, "model.norm.weight", math.inf)
    report = compare_logits(one, two, dtype=dtype, device="cpu")
    assert not report.verdict and report.kind == NOT_FINITE
    assert not compare_logits(one, two, dtype=dtype, device="cpu", max_abs=1e9).verdict


def test_a_difference_only_far_positions_show_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (tiny.make("llama", tmp_path / side, rope_theta=theta, max_position_embeddings=131072)
                for side, theta in (("one", 1e6), ("two", 1.00002e6)))  # fmt: skip
    assert not compare_logits(one, two, device="cpu").verdict
    make = logits.make_probes
    monkeypatch.setattr(
        logits, "make_probes", lambda *args, **kwargs: [p for p in make(*args, **kwargs) if "far" not in p.name]
    )
    near = compare_logits(one, two, device="cpu")
    assert (
        near.exact_relative is not None and near.exact_relative < 1e-5
    )  # without the far probe there is little to see


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_implementations_agree(dtype: str, tmp_path: Path) -> None:
    """One model under a reference class and under transformers' own, renamed here by hand."""
    one = tiny.make("yi_old", tmp_path / "one", shards=False)
    two = tiny.make("yi", tmp_path / "two", shards=False, head_dim=8)
    renamed = {name.replace(".ln1.", ".input_layernorm.").replace(".ln2.", ".post_attention_layernorm."): tensor
               for name, tensor in checkpoints.tensors(one).items()}  # fmt: skip
    save_file(renamed, two / "model.safetensors", metadata={"format": "pt"})
    report = compare_logits(one, two, dtype=dtype, device="cpu")
    assert report.verdict and report.kind == REORDERED and report.relative > 0, report


def test_the_probes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    one, two = (tiny.make("llama", tmp_path / f"{seed}", seed=seed) for seed in (1, 2))
    first, again, other = (compare_logits(one, two, device="cpu", seed=seed) for seed in (0, 0, 1))
    assert first.max_abs == again.max_abs and first.layers == again.layers and first.max_abs != other.max_abs


def test_the_report_is_json(tmp_path: Path) -> None:
    one = tiny.make("llama", tmp_path / "one")
    found = json.loads(json.dumps(compare_logits(one, one, device="cpu").to_dict()))
    assert found["verdict"] is True and found["devices"] == ["cpu", "cpu"] and len(found["layers"]) == 3


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = tiny.make("llama", tmp_path / "one", shards=False)
    with pytest.raises(Usage, match="float8"):
        compare_logits(one, one, dtype="float8")
    with pytest.raises(Usage, match="131 and 137"):
        compare_logits(one, tiny.make("llama", tmp_path / "wide", vocab_size=137))
    with pytest.raises(LlmconvertError):
        compare_logits(one, tmp_path / "nowhere")
    for options in ({"device": "abacus"}, {"device": "cuda:77"}, {"device": "cpu,cpu,cpu"}, {"load": "some"}):
        with pytest.raises(Usage):
            compare_logits(one, one, **options)


def test_probes_take_text_far_positions_and_padding(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "one", tokenizer=True, vocab_size=200)
    text, random, far, still = make_probes((source,), 200, 131072)
    assert text.name == "text" and text.input_ids.shape[0] >= 4
    assert not random.attention_mask[0, 0] and random.attention_mask[-1].all(), "padded on the left"
    assert int(far.position_ids.max()) == 131071 > FAR_POSITION and far.input_ids.shape[1] <= 64
    assert not still.position_ids.any()
    assert len(make_probes((), 200, 131072)) == 3


@pytest.mark.parametrize("fault", ["panic", "length"])
def test_a_tokenizer_that_fails_is_done_without(fault: str, tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "one", tokenizer=True, vocab_size=200)
    name = "tokenizer.json" if fault == "panic" else "tokenizer_config.json"
    held = json.loads((source / name).read_text())
    if fault == "panic":  # of Rust, on a regular expression that takes too many tries: no `Exception`
        pattern = {"Regex": r"(a|a|aa|aaa)*b(?=c)|(.*)*\1x"}
        held["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    else:
        held["model_max_length"] = "long"
    (source / name).write_text(json.dumps(held))
    assert [probe.name for probe in make_probes((source,), 200, 131072)][0] == "random tokens"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox jumps over the lazy dog; 3.14159 is not 22/7, and 1,024 = 2^10.")
    with pytest.raises(BadInput, match="the tokenizer cannot read it"):
        make_probes((source,), 200, 256, prompts=prompts)
    with pytest.raises(BadInput, match="the tokenizer cannot read the prompt"):
        make_prompt(prompts.read_text(), None, None, str(source))
    with pytest.raises(BadRow, match="the prompt cannot be tokenised"):
        encode(load_tokenizer(str(source)), prompts.read_text(), None)


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "one", tokenizer=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('the quick fox\n{"text": "the lazy dog"}\n\n{"input_ids": [5, 6, 7, 8]}\n')
    probe = make_probes((source,), 131, 256, prompts=prompts)[0]
    assert probe.name == "prompts" and probe.input_ids.shape[0] == 3
    assert probe.input_ids[2][probe.kept[2]].tolist() == [5, 6, 7, 8]
    assert compare_logits(source, source, device="cpu", prompts=prompts).verdict
    for bad in ("", '{"input_ids": "x"', '{"other": 1}'):
        prompts.write_text(bad)
        with pytest.raises(BadInput):
            make_probes((source,), 131, 256, prompts=prompts)
    prompts.write_text("words")
    with pytest.raises(BadInput, match="tokenizer"):
        make_probes((tiny.make("llama", tmp_path / "two"),), 131, 256, prompts=prompts)


def test_a_config_that_ties_what_the_tensors_do_not(tmp_path: Path) -> None:
    one = tiny.make("llama_tied", tmp_path / "one", shards=False)
    state = checkpoints.tensors(one)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2
    save_file(state, one / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="ties"):
        compare_logits(one, one, device="cpu", load="layers")
    with pytest.raises(BadInput, match="ties"):
        compare_logits(one, one, device="cpu", load="whole")


@pytest.mark.parametrize("load", ["whole", "layers"])
def test_a_tensor_of_another_shape_is_bad_input(load: str, tmp_path: Path) -> None:
    one = tiny.make("qwen", tmp_path / "one", shards=False)
    state = checkpoints.tensors(one)
    state["transformer.h.1.mlp.w1.weight"] = torch.zeros(3, 48)
    save_file(state, one / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="w1.weight"):
        compare_logits(one, one, device="cpu", load=load)


def test_layers_are_read_when_models_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiny.make("llama", tmp_path / "one")
    monkeypatch.setattr(logits, "_free", lambda device: 1000)
    report = compare_logits(one, one, device="cpu")
    assert report.load == "layers" and report.greedy_agreement is None
    assert compare_logits(one, one, device="cpu", greedy_tokens=2).greedy_agreement == 1.0


@pytest.mark.parametrize("arch, name", [("llama", "model.norm.weight"), ("qwen", "transformer.ln_f.weight")])
def test_a_missing_tensor_is_bad_input(arch: str, name: str, tmp_path: Path) -> None:
    one = tiny.make(arch, tmp_path / "one", shards=False)
    state = checkpoints.tensors(one)
    del state[name]
    save_file(state, one / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput):
        load_model(one, torch.float32, "cpu")


def test_a_tensor_too_many_is_bad_input_for_a_reference_model(tmp_path: Path) -> None:
    one = tiny.make("chatglm2", tmp_path / "one", shards=False)
    state = checkpoints.tensors(one) | {"transformer.encoder.layers.0.mlp.dense_h_to_4h.bias": torch.zeros(208)}
    save_file(state, one / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="dense_h_to_4h.bias"):
        load_model(one, torch.float32, "cpu")


def test_a_tensor_no_code_uses_is_told(tmp_path: Path) -> None:
    one = tiny.make("llama", tmp_path / "one", shards=False)
    save_file(checkpoints.tensors(one) | {"stray.weight": torch.zeros(3)}, one / "model.safetensors", {"format": "pt"})
    assert "stray.weight" in compare_logits(one, one, device="cpu", greedy_tokens=0).note


def test_a_model_nobody_knows_is_refused(tmp_path: Path) -> None:
    one = tiny.make("llama", tmp_path / "one")
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    with pytest.raises(Refused):
        load_model(one, torch.float32, "cpu")
