"""What is said of checkpoints no spec reads: the true reason, the nearest spec by tensors, and no advice that leads back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from llmconvert.cli import app as commands
from llmconvert.converters.huggingface import convert
from llmconvert.converters.inspection import inspect
from llmconvert.converters.megatron.grid import Grid
from llmconvert.converters.megatron.split import split_checkpoint
from llmconvert.errors import LlmconvertError, Refused
from llmconvert.spec.registry import refused, registry
from llmconvert.spec.strangers import label, nearest, template

Shapes = dict[str, tuple[int, ...]]
H, F, V, LAYERS = 48, 104, 131, 3
_CONFIG = {
    "hidden_size": H, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "torch_dtype": "float32",
}  # fmt: skip


def _llama(prefix: str = "model.", biased: str = "") -> Shapes:
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (V, H), f"{prefix}norm.weight": (H,)}
    for i in range(LAYERS):
        own = f"{prefix}layers.{i}."
        for part, rows in (("q", H), ("k", 16), ("v", 16), ("o", H)):
            shapes[f"{own}self_attn.{part}_proj.weight"] = (rows, H)
            shapes |= {f"{own}self_attn.{part}_proj.bias": (rows,)} if part in biased else {}
        shapes |= {f"{own}mlp.{part}_proj.weight": (F, H) for part in ("gate", "up")}
        shapes |= {f"{own}mlp.down_proj.weight": (H, F)}
        shapes |= {f"{own}{norm}_layernorm.weight": (H,) for norm in ("input", "post_attention")}
    return shapes


HEAD: Shapes = {"lm_head.weight": (V, H)}


def _mtp() -> Shapes:
    """MiMo-7B's layer that predicts a further token."""
    layer = {n.replace("model.layers.0.", "model.mtp_layers.0."): s for n, s in _llama(biased="qkv").items() if ".0." in n}
    own = {f"model.mtp_layers.0.{n}.weight": (H,) for n in ("token_layernorm", "hidden_layernorm", "final_layernorm")}
    return {**layer, **own, "model.mtp_layers.0.input_proj.weight": (H, 2 * H)}


def _falcon() -> Shapes:
    shapes: Shapes = {"transformer.word_embeddings.weight": (V, H), "transformer.ln_f.weight": (H,), "transformer.ln_f.bias": (H,)}
    for i in range(LAYERS):
        own = f"transformer.h.{i}."
        shapes |= {f"{own}self_attention.query_key_value.weight": (H + 32, H), f"{own}self_attention.dense.weight": (H, H)}
        shapes |= {f"{own}mlp.dense_h_to_4h.weight": (4 * H, H), f"{own}mlp.dense_4h_to_h.weight": (H, 4 * H)}
        shapes |= {f"{own}input_layernorm.weight": (H,), f"{own}input_layernorm.bias": (H,)}
    return shapes


def _molmo() -> Shapes:
    shapes: Shapes = {"model.transformer.wte.embedding": (V, H), "model.transformer.ln_f.weight": (H,)}
    for i in range(LAYERS):
        own = f"model.transformer.blocks.{i}."
        shapes |= {f"{own}att_proj.weight": (H + 32, H), f"{own}attn_out.weight": (H, H), f"{own}ff_proj.weight": (2 * F, H)}
        shapes |= {f"{own}ff_out.weight": (H, F), f"{own}attn_norm.weight": (H,), f"{own}ff_norm.weight": (H,)}
    shapes |= {f"model.vision_backbone.image_vit.transformer.resblocks.{i}.attention.wq.weight": (24, 24) for i in range(2)}
    return shapes | {"model.vision_backbone.image_projector.w1.weight": (F, 24)}


def _gemma3(prefix: str) -> Shapes:
    shapes = _llama(prefix)
    for i in range(LAYERS):
        shapes |= {f"{prefix}layers.{i}.{norm}_feedforward_layernorm.weight": (H,) for norm in ("pre", "post")}
        shapes |= {f"{prefix}layers.{i}.self_attn.{part}_norm.weight": (8,) for part in "qk"}
    return shapes


def _vision(prefix: str) -> Shapes:
    return {f"{prefix}blocks.{i}.attn.qkv.weight": (72, 24) for i in range(2)} | {f"{prefix}merger.ln_q.weight": (24,)}


def _moe(name: str) -> Shapes:
    shapes = {n: s for n, s in _llama().items() if ".mlp." not in n}
    for i in range(LAYERS):
        own = f"model.layers.{i}.{name}."
        shapes |= {f"{own}input_linear.weight": (4, 2 * F, H), f"{own}output_linear.weight": (4, H, F)}
    return shapes | HEAD


_TEXT = {**_CONFIG, "model_type": "gemma3_text"}
STRANGERS: dict[str, tuple[dict[str, Any], Shapes]] = {
    "mimo": ({**_CONFIG, "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1},
             _llama(biased="qkv") | HEAD | _mtp()),
    "pangu": ({**_CONFIG, "model_type": "PanguEmbedded", "architectures": ["PanguEmbeddedForCausalLM"], "bias": True},
              _llama(biased="qkvo") | HEAD),
    "novel": ({**_CONFIG, "model_type": "novel", "architectures": ["NovelForCausalLM"]}, _llama() | HEAD),
    "falcon": ({"model_type": "falcon", "architectures": ["FalconForCausalLM"], "hidden_size": H, "num_attention_heads": 6,
                "num_hidden_layers": LAYERS, "vocab_size": V, "multi_query": True, "alibi": False}, _falcon()),
    "molmo": ({**_CONFIG, "model_type": "molmo", "architectures": ["MolmoForCausalLM"]}, _molmo()),
    "gemma3_text": ({**_TEXT, "architectures": ["Gemma3ForCausalLM"], "head_dim": 8}, _gemma3("model.")),
    "gemma3": ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": _TEXT,
                "vision_config": {"model_type": "siglip_vision_model"}},
               _gemma3("language_model.model.") | _vision("vision_tower.vision_model.")),
    "qwen2_5_vl": ({**_CONFIG, "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
                    "vision_config": {"depth": 2}, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
                   _llama(biased="qkv") | HEAD | _vision("visual.")),
    "kimi": ({"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "vision_config": {"a": 1},
              "text_config": {**_CONFIG, "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}},
             _llama("language_model.model.") | {"language_model.lm_head.weight": (V, H)} | _vision("vision_tower.")),
    "granitemoe": ({**_CONFIG, "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "num_local_experts": 4},
                   _moe("block_sparse_moe")),
    "visual chatglm": ({**_CONFIG, "model_type": "chatglm", "architectures": ["ChatGLMModel"]},
                       {"transformer.embedding.word_embeddings.weight": (V, H)} | _vision("transformer.vision.")),
    "visual llama": ({**_CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "mm_vision_tower": "a/b"},
                     _llama() | HEAD | _vision("model.vision_tower.")),
    "omni": ({"model_type": "omni", "architectures": ["Omni"], "thinker_config": {
        "audio_config": {"a": 1}, "text_config": {**_CONFIG, "model_type": "omni_text"}}},
             _llama("thinker.model.") | {"thinker.lm_head.weight": (V, H)}),
    "phi3_v": ({**_CONFIG, "model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"], "img_processor": {"name": "clip"}},
               _llama() | HEAD),
}  # fmt: skip


def _make(name: str, directory: Path) -> Path:
    config, shapes = STRANGERS[name]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _refusal(source: Path, tmp_path: Path) -> Refused:
    """What convert, split and inspect say alike."""
    said = []
    for target in ("llama", "canonical"):
        with pytest.raises(Refused) as caught:
            convert(source, tmp_path / "out", to=target)
        said.append(caught.value)
    with pytest.raises(Refused) as caught:
        split_checkpoint(source, tmp_path / "out", Grid())
    found = inspect(source)
    assert {(each.what, each.hint) for each in (*said, caught.value)} == {(found["problem"], found["hint"])}
    assert found["architecture"] is None and found["named"] and found["parameters"] is not None
    return caught.value


SAID = {
    "mimo": r"^no spec reads `mimo` \(MiMoForCausalLM\); by its tensors it comes nearest to `qwen2`, which has 15 of their 31 "
            r"kinds; unknown there: `model\.mtp_layers.*but config\.json sets `num_nextn_predict_layers` = 1",
    "pangu": r"^no spec reads `PanguEmbedded` .*; its tensors are those of `llama` in name and shape; but config.json sets `bias`",
    "novel": r"^no spec reads `novel` \(NovelForCausalLM\); its tensors are those of `llama` in name and shape$",
    "falcon": r"^no spec reads `falcon` \(FalconForCausalLM\); nor is any spec near by its tensors$",
    "molmo": r"^`molmo` \(MolmoForCausalLM\) is multimodal \(vision\), and language models alone are read; nor is any spec near",
    "gemma3_text": r"^Gemma 3 is known and not read: windowed layers have another rotary base than the others$",
    "gemma3": r"^`gemma3` \(Gemma3ForConditionalGeneration\) is multimodal \(vision\), .* its language model `gemma3_text` is not "
              r"read either: Gemma 3 is known and not read: windowed layers",
    "qwen2_5_vl": r"^`qwen2_5_vl` .* is multimodal \(vision\), .*; its tensors are those of `qwen2` in name and shape; but .*mrope",
    "kimi": r"^`kimi_k25` .* is multimodal \(vision\), .*; its language model `kimi_k2` \(DeepseekV3ForCausalLM\) is what spec "
            r"`deepseek_v3` reads$",
    "granitemoe": r"^Granite MoE is known and not read: its experts lie in one tensor a layer",
    "visual chatglm": r"^`chatglm` \(ChatGLMModel\) is multimodal \(vision\), .*; its language model is what spec `chatglm` reads$",
    "visual llama": r"^`llama` \(LlamaForCausalLM\) is multimodal \(vision\), .*; its language model is what spec `llama` reads$",
    "omni": r"^`omni` \(Omni\) is multimodal \(audio\), .*no spec reads its language model `omni_text`",
    "phi3_v": r"^`phi3_v` \(Phi3VForCausalLM\) is multimodal \(vision\)",
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_the_true_reason_is_said_by_all(name: str, tmp_path: Path) -> None:
    error = _refusal(_make(name, tmp_path / "src"), tmp_path)
    assert re.search(SAID[name], error.what), error.what
    assert error.exit_code == 3 and error.hint and error.where == "config.json"
    assert ("--from llama" in error.hint) == (name == "novel")


def test_what_looks_like_llama_can_be_taken_for_it(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "novel", "architectures": ["NovelForCausalLM"]}))
    with pytest.raises(Refused, match="those of `llama`") as caught:
        convert(source, tmp_path / "out", to="mistral")
    assert "convert it with `--from llama`" in (caught.value.hint or "")
    convert(source, tmp_path / "out", to="mistral", source_name="llama", verify="weights")


@pytest.mark.parametrize("arch", checkpoints.ALL)
def test_a_checkpoint_comes_nearest_to_its_own_kind(arch: str, tmp_path: Path) -> None:
    """By tensors alone: its own spec is among those that differ in nothing, and none differs in less."""
    from llmconvert.checkpoint.directory import open_checkpoint
    from llmconvert.spec.fused import unfused

    opened = unfused(open_checkpoint(checkpoints.make(arch, tmp_path)))
    known = registry()
    own = known.detect(opened.config)
    alone = nearest([own], opened.config, opened.tensors)
    best = nearest(known.specs.values(), opened.config, opened.tensors)
    assert alone is not None and best is not None
    assert alone.differences == best.differences == 0 and alone.fault is None


def test_kinds_of_names() -> None:
    assert template("model.layers.11.mlp.experts.7.up_proj.weight") == "model.layers.{i}.mlp.experts.{j}.up_proj.weight"
    assert template("transformer.h.3.ln_1.weight") == "transformer.h.{i}.ln_1.weight"
    assert template("model.norm.weight") == "model.norm.weight"
    assert label({"model_type": "x", "architectures": ["A", 5]}) == "`x` (A)"
    assert label({"architectures": ["A"]}) == "`A`" and label({"model_type": 5, "architectures": 5}) == ""


def test_reasons_hold_whatever_the_target() -> None:
    for refusal in registry().refusals:
        error = refused(refusal)
        assert refusal.why and "llama" not in refusal.why.lower() and error.hint
        assert error.what.startswith(f"{refusal.name} is known and not read: ")
        assert "split" not in error.what + (error.hint or "")


COMMANDS = {
    "convert": ("SRC", "OUT", "--to", "llama", "--dry-run"), "llama-to-qwen": ("SRC", "OUT", "--dry-run"),
    "qwen-to-llama": ("SRC", "OUT", "--dry-run"), "split": ("SRC", "OUT", "--dry-run"), "merge": ("SRC", "OUT", "--dry-run"),
    "reshard": ("SRC", "OUT", "--dry-run"), "megatron-args": ("SRC",), "inspect": ("SRC", "--json"), "new-spec": ("SRC",),
    "roundtrip": ("SRC", "--verify", "none"), "to-reward": ("SRC", "OUT", "--dry-run"),
}  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources that cannot be read, and some that cannot be converted to Llama."""
    folder = tmp_path_factory.mktemp("zoo")
    made = {name: _make(name, folder / name) for name in STRANGERS}
    for arch in ("mixtral", "deepseek_v3", "gemma2", "baichuan_13b", "qwen3", "qwen2"):
        made[arch] = checkpoints.make(arch, folder / arch)
    split_checkpoint(made["qwen2"], folder / "megatron", Grid(tp=2), verify="none")
    made |= {"megatron": folder / "megatron", "around": folder, "nowhere": folder / "nowhere"}
    quantised = checkpoints.make("qwen2", folder / "quantised", quantization_config={"quant_method": "gptq", "bits": 4})
    return {**made, "quantised": quantised}


@pytest.mark.parametrize("command", COMMANDS)
def test_advice_never_leads_back(command: str, zoo: dict[str, Path], tmp_path: Path) -> None:
    if not any(each.name == "convert" for each in commands.app.registered_commands):
        commands._register(registry())
    refusals = 0
    for name, source in zoo.items():
        own = [{"SRC": str(source), "OUT": str(tmp_path / f"out-{name}")}.get(word, word) for word in COMMANDS[command]]
        done = CliRunner().invoke(commands.app, [command, *own])
        error = done.exception
        if isinstance(error, LlmconvertError):
            advice = error.hint or ""
        elif command == "inspect" and done.exit_code == 0:
            advice = json.loads(done.stdout).get("hint") or ""
        else:
            continue
        refusals += 1
        assert f"llmconvert {command}" not in advice, (name, advice)
    assert refusals >= 3


def test_a_list_in_a_message_is_short(tmp_path: Path) -> None:
    config = {**_CONFIG, "model_type": "smol", "architectures": ["Smol"], "no_rope_layers": [1, 0] * 500}
    source = _make("novel", tmp_path / "src")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="no_rope_layers") as caught:
        convert(source, tmp_path / "out", to="llama")
    assert len(caught.value.what) < 500
