"""Looking inside: against transformers' own hidden states, logits and attention weights, in memory and from disk."""

import json
from pathlib import Path

import checkpoints
import pytest
import tiny
import torch
import transformers
from typer.testing import CliRunner

from llmconvert.cli.app import app
from llmconvert.converters.huggingface import convert
from llmconvert.debug import (
    attention_weights,
    cos_distance,
    show_attention,
    show_cos_distance,
    show_topk_token,
    topk_token,
)
from llmconvert.errors import Refused, Usage
from llmconvert.models import CanonicalForCausalLM
from llmconvert.verify.models import load_model

IDS = [3, 14, 15, 92, 65, 35, 89]
ARCHS = ("llama_bias", "gemma2", "granite", "baichuan_13b", "deepseek_v3", "chatglm2", "qwen2_moe", "glm4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("debug")
    for arch in ARCHS:
        checkpoints.make(arch, made / arch)
    return made


@pytest.mark.parametrize("arch", ARCHS)
def test_the_lens_after_the_last_layer_is_the_model(arch: str, folder: Path) -> None:
    model = load_model(folder / arch, torch.float32, "cpu")
    out = model(input_ids=torch.tensor([IDS]))
    wanted = getattr(out, "logits", out)[0].softmax(-1).topk(4, -1)
    for source in (model, folder / arch):
        found = topk_token(source, -1, 4, input_ids=IDS)
        assert found.ids == [wanted.indices.tolist()]
        assert torch.allclose(torch.tensor(found.probability[0]), wanted.values, atol=1e-5)
    all_layers = topk_token(folder / arch, None, 2, input_ids=IDS)
    assert all_layers.layers == [0, 1, 2] and all_layers.ids[-1] == [row[:2] for row in found.ids[0]]
    assert all_layers.ids[0] != all_layers.ids[-1]


@pytest.mark.parametrize("arch", ["llama_bias", "gemma2", "glm4"])
def test_cosines_are_those_of_the_models_hidden_states(arch: str, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / arch)
    ids, seen = torch.tensor([IDS]), []
    model.model.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    states = [*model(ids, output_hidden_states=True).hidden_states[:-1], seen[0]]
    wanted = [torch.cosine_similarity(a[0], b[0], dim=-1) for a, b in zip(states, states[1:], strict=False)]
    for source in (model, folder / arch):
        found = cos_distance(source, input_ids=IDS)
        assert torch.allclose(torch.tensor(found.cosine), torch.stack(wanted), atol=1e-5)
        assert found.layers == [0, 1, 2] and found.mean[1] == pytest.approx(float(wanted[1].mean()), abs=1e-5)
        assert cos_distance(source, 1, input_ids=IDS).cosine[0] == pytest.approx(found.cosine[1], abs=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_rows_sum_to_one_and_are_causal(arch: str, folder: Path) -> None:
    weights = torch.tensor(attention_weights(folder / arch, 1, input_ids=IDS).weights)
    assert weights.shape == (6, 7, 7)
    assert torch.allclose(weights.sum(-1), torch.ones(1), atol=1e-5)
    assert not weights.triu(1).any()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", ["llama_bias", "qwen2_moe", "deepseek_v3"])
def test_attention_is_what_eager_attention_says(arch: str, implementation: str, folder: Path) -> None:
    eager = transformers.AutoModelForCausalLM.from_pretrained(folder / arch, attn_implementation="eager")
    wanted = eager(torch.tensor([IDS]), output_attentions=True).attentions
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / arch, attn_implementation=implementation).train()
    before = model(torch.tensor([IDS])).logits
    for layer in range(3):
        found = torch.tensor(attention_weights(model, layer, input_ids=IDS).weights)
        assert torch.allclose(found, wanted[layer][0], atol=1e-5)
    assert attention_weights(model, -1, 4, 2, input_ids=IDS).between == pytest.approx(
        wanted[2][0, :, 4, 2].tolist(), abs=1e-5
    )
    # The model is left as it was found.
    assert model.training and model.config._attn_implementation == implementation
    assert torch.equal(model(torch.tensor([IDS])).logits, before)


def test_the_canonical_class_shows_itself(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(folder / "gemma2", tmp_path / "canonical", to="canonical", verify="weights")
    model = CanonicalForCausalLM.from_pretrained(tmp_path / "canonical", dtype=torch.bfloat16)
    shown = model.show_cos_distance(input_ids=IDS, png=tmp_path / "a.png")
    assert shown.mean == pytest.approx(cos_distance(folder / "gemma2", input_ids=IDS).mean, abs=0.02)
    # Weights of a model that runs with SDPA, too.
    convert(folder / "llama_bias", tmp_path / "llama", to="canonical", verify="weights")
    other = CanonicalForCausalLM.from_pretrained(tmp_path / "llama")
    assert other.attention == "sdpa"
    seen = attention_weights(other, 2, input_ids=IDS)
    assert torch.allclose(
        torch.tensor(seen.weights),
        torch.tensor(attention_weights(folder / "llama_bias", 2, input_ids=IDS).weights),
        atol=1e-5,
    )
    assert other.attention == "sdpa"
    model.show_topk_token(1, K=2, input_ids=IDS, png=tmp_path / "b.png")
    model.show_attention(1, 4, 2, input_ids=IDS, png=tmp_path / "c.png")
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "cosine" in printed and "logit lens" in printed and "from 4:'65' to 2:'15'" in printed


def test_megatron_shards_are_looked_at_alike(folder: Path, tmp_path: Path) -> None:
    from llmconvert.converters.megatron.grid import Grid
    from llmconvert.converters.megatron.merge import merge_checkpoint
    from llmconvert.converters.megatron.split import split_checkpoint

    split_checkpoint(folder / "llama_bias", tmp_path / "shards", Grid(tp=2, pp=3), verify="weights")
    merge_checkpoint(tmp_path / "shards", tmp_path / "canonical", to="canonical", verify="weights")
    assert (tmp_path / "canonical/modeling_canonical.py").is_file()
    assert CanonicalForCausalLM.from_pretrained(tmp_path / "canonical")(torch.tensor([IDS])).logits.shape == (1, 7, 131)
    for look in (cos_distance, topk_token):
        a, b = (look(source, input_ids=IDS) for source in (folder / "llama_bias", tmp_path / "shards"))
        assert a.layers == b.layers
        if look is cos_distance:
            assert a.mean == pytest.approx(b.mean, abs=1e-6)
        else:
            assert a.ids == b.ids
    a, b = (attention_weights(s, 2, input_ids=IDS) for s in (folder / "llama_bias", tmp_path / "shards"))
    assert torch.allclose(torch.tensor(a.weights), torch.tensor(b.weights), atol=1e-6)


def test_text_is_read_and_tokens_are_found_by_text_or_place(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path, tokenizer=True)
    model = load_model(tmp_path, torch.float32, "cpu")
    text = "the quick brown fox jumps over the lazy dog"
    found = attention_weights(model, 0, "fox", "quick", prompt=text)
    places = [found.tokens.index(word) for word in ("fox", "quick")]
    assert [found.token_a, found.token_b] == places and len(found.between or []) == 6
    assert found.weights[2][places[0]][places[1]] == found.between[2]
    with pytest.raises(Usage, match="stands at positions"):
        attention_weights(model, 0, "the", "quick", prompt=text)
    with pytest.raises(Usage, match="no token of the prompt"):
        attention_weights(model, 0, "cat", "quick", prompt=text)


@pytest.mark.parametrize(("call", "match"), [
    (lambda m: cos_distance(m, 3, input_ids=IDS), "no layer 3"),
    (lambda m: cos_distance(m, prompt="hello"), "no tokenizer"),
    (lambda m: cos_distance(m), "either a prompt or input ids"),
    (lambda m: cos_distance(m, input_ids=[]), "at least one token"),
    (lambda m: cos_distance(m, input_ids=[[1, 2], [3, 4]]), "one row"),
    (lambda m: cos_distance(m, input_ids=[131]), "from 0 to 130"),
    (lambda m: attention_weights(m, 0, 2, 4, input_ids=IDS), "comes after"),
    (lambda m: attention_weights(m, 0, 2, input_ids=IDS), "both tokens"),
    (lambda m: attention_weights(m, 0, 9, 2, input_ids=IDS), "no position 9"),
    (lambda m: topk_token(m, 0, 0, input_ids=IDS), "at least 1"),
])  # fmt: skip
def test_what_cannot_be_shown_is_said(call: object, match: str, folder: Path) -> None:
    for source in (load_model(folder / "llama_bias", torch.float32, "cpu"), folder / "llama_bias"):
        with pytest.raises((Usage, Refused), match=match):
            call(source)  # type: ignore[operator]


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["debug", *map(str, arguments)])
        error = result.exception
        assert getattr(error, "exit_code", result.exit_code) == code, (result.output, error)
        return result.stdout

    ids, llama, gemma = "3,14,15,92,65", folder / "llama_bias", folder / "gemma2"
    profile = json.loads(run("cos-distance", llama, "--input-ids", ids, "--json", "--png", tmp_path / "p.png"))
    assert profile["layers"] == [0, 1, 2] and (tmp_path / "p.png").is_file()
    two = json.loads(run("cos-distance", llama, "--input-ids", ids, "--json", "--against", gemma))
    assert two["a"] == profile and two["b"]["mean"] != profile["mean"]
    assert "A − B" in run("cos-distance", llama, "--input-ids", ids, "--against", gemma)
    lens = json.loads(run("topk-token", llama, "--layer", 2, "-K", 5, "--input-ids", ids, "--json"))
    assert len(lens["ids"][0][0]) == 5
    assert "layer" in run("topk-token", llama, "--input-ids", ids, "--against", gemma, "--png", tmp_path / "t.png")
    heads = json.loads(
        run("attention", llama, "--layer", 1, "--token-a", 4, "--token-b", 2, "--input-ids", ids, "--json")
    )
    assert heads["between"] == [head[4][2] for head in heads["weights"]]
    assert "head" in run("attention", llama, "--layer", 1, "--token-a", 4, "--token-b", 2, "--input-ids", ids,
                         "--against", gemma, "--png", tmp_path / "h.png")  # fmt: skip
    assert "most to" in run("attention", llama, "--layer", -1, "--input-ids", ids)
    run("cos-distance", llama, "--input-ids", "a,b", code=2)
    run("cos-distance", tmp_path / "none", "--input-ids", ids, code=2)
    run("cos-distance", llama, "--input-ids", ids, "--png", tmp_path / "no" / "p.png", code=2)


def test_layers_on_disk_are_held_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint larger than memory is looked at too: no block is read before the one before is let go."""
    from llmconvert.verify.layerwise import LayerwiseModel

    held: list[int] = []
    block = LayerwiseModel.block

    def watched(self: LayerwiseModel, index: int):  # type: ignore[no-untyped-def]
        held.append(sum(p.device.type != "meta" for layer in self.layers for p in layer.parameters()))
        return block(self, index)

    monkeypatch.setattr(LayerwiseModel, "block", watched)
    cos_distance(folder / "llama_bias", input_ids=IDS)
    assert len(held) >= 3 and set(held) == {0}


def test_free_functions_show_any_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=131, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.GPTNeoXForCausalLM(config)
    show_cos_distance(model, input_ids=IDS)
    show_topk_token(model, 1, input_ids=IDS)
    assert torch.tensor(show_attention(model, 1, input_ids=IDS).weights).shape == (4, 7, 7)
    assert "GPTNeoXForCausalLM" in capsys.readouterr().out


def test_long_prompts_and_odd_files(folder: Path, tmp_path: Path) -> None:
    long = ",".join(str(3 + i % 100) for i in range(120))
    run = CliRunner().invoke(
        app, ["debug", "topk-token", str(folder / "llama_bias"), "--input-ids", long, "--png", str(tmp_path / "a.svg")]
    )
    assert run.exit_code == 0 and "the last 10 of 120 tokens" in run.stdout and "119" in run.stdout
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")
    run = CliRunner().invoke(
        app, ["debug", "attention", str(folder / "llama_bias"), "--layer", "0", "--input-ids", long]
    )
    assert run.exit_code == 0 and "keys 0" not in run.stdout and "most to" in run.stdout
    for options in (
        ["--png", str(tmp_path)],
        ["--png", str(tmp_path / "a.xyz")],
        ["--device", "cuda:77"],
        ["--input-ids", "9" * 30],
    ):
        given = [] if "--input-ids" in options else ["--input-ids", "3,4"]
        run = CliRunner().invoke(app, ["debug", "cos-distance", str(folder / "llama_bias"), *given, *options])
        assert isinstance(run.exception, Usage), (options, run.exception)
