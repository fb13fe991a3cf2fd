"""Golden logits: what the modelling files published with the weights compute, run by transformers 4.46.3 on tiny models.

Nobody who wrote a spec or a reference model here wrote those files. `golden/NAME.json` holds a config and the names and
shapes of the tensors, `golden/NAME.npz` token ids, and logits at a few positions for several lengths;
`golden/weights.py` draws the weights from the tensors' names. docs/verification.md says how to add a case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.weights import draw
from safetensors.torch import load_file, save_file

from llmconvert.converters.huggingface import convert
from llmconvert.errors import Refused
from llmconvert.verify.reference import find_reference

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))

# What a converted model may differ by, as a share of the largest logit; a mistake is over a hundredth.
BOUND = 1e-5

# Cases of which readers compute different functions, or that config.json does not tell apart; by what is said of them.
REFUSED = {
    "bc2_13_vocab331": "--from", "bc2_7_v1vocab": "--from", "v3_ms707_only": "YaRN", "v3_all_only": "YaRN",
    "v3_no_original": "YaRN", "v3_top1norm": "`num_experts_per_tok` 1", "v3_negbias": "routing biases",
}  # fmt: skip
SAID = {"bc2_13_vocab331": "baichuan2_13b", "bc2_7_v1vocab": "baichuan2"}
"""The specs of those cases that the user has to name."""

NOT_LLAMA = ("bc2_13", "b13", "dsmoe", "v3")


class Case:
    """A golden case."""

    def __init__(self, name: str) -> None:
        described = json.loads((FOLDER / f"{name}.json").read_text())
        self.config: dict[str, Any] = described["config"]
        self.state = {
            key: torch.from_numpy(draw(key, tuple(shape), described["seed"], described["bias_mean"]))
            for key, shape in described["tensors"]
        }
        self.logits = dict(np.load(FOLDER / f"{name}.npz"))

    def write(self, directory: Path) -> Path:
        """The checkpoint, in three shards."""
        directory.mkdir()
        names, index = list(self.state), {}
        for number in range(3):
            file = f"model-{number + 1:05d}-of-00003.safetensors"
            part = {name: self.state[name] for name in names[number::3]}
            save_file(part, directory / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (directory / "config.json").write_text(json.dumps(self.config))
        return directory

    @torch.no_grad()
    def distance(self, model: Any, *, longest: int) -> float:
        """The largest difference of a model's logits, relative to the largest logit of each length up to `longest`."""
        found = []
        for key, ids in self.logits.items():
            length = int(key.partition("_")[2])
            if not key.startswith("ids_") or length > longest:
                continue
            out = model(input_ids=torch.from_numpy(ids.astype(np.int64)))
            wanted = self.logits[f"logits_{length}"]
            logits = getattr(out, "logits", out)[:, self.logits[f"pos_{length}"].tolist(), : wanted.shape[-1]]
            found.append(float(np.abs(logits.float().numpy() - wanted).max() / self.logits[f"scale_{length}"]))
        assert len(found) > 1
        return max(found)

    @property
    def longest(self) -> int:
        """Qwen v1 rescales beyond `seq_length`; a converted model does not, and says so."""
        return self.config.get("seq_length", 10**9) if self.config["model_type"] == "qwen" else 10**9


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("v3")])
def test_the_reference_models_are_the_published_ones(name: str) -> None:
    case = Case(name)
    told = {
        "bc2_13_vocab331": {"position_embedding": "ALIBI", "norm_head": True},
        "bc2_7_v1vocab": {"position_embedding": "ROPE", "norm_head": True},
    }
    config = case.config | told.get(name, {})
    reference = find_reference(config)
    assert reference is not None
    model = reference(config)
    missing, unexpected = model.load_state_dict(case.state, strict=False)
    model.tie_weights()
    assert not unexpected and all("inv_freq" in key or key in (model.tied or ())[:1] for key in missing) or model.tied
    assert case.distance(model.eval(), longest=case.longest - 1) < BOUND


def _load(directory: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=True, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["llama", "canonical"])
def test_conversions_compute_what_the_published_code_does(name: str, target: str, tmp_path: Path) -> None:
    if target == "llama" and name.startswith(NOT_LLAMA):
        pytest.skip("Llama cannot hold it: refused, as other tests show")
    case = Case(name)
    source = case.write(tmp_path / "source")
    options: dict[str, Any] = {"to": target, "verify": "weights", "sync": False}
    if name in REFUSED:
        with pytest.raises(Refused) as caught:
            convert(source, tmp_path / "out", **options)
        assert REFUSED[name] in f"{caught.value.what} {caught.value.hint}"
        if name not in SAID:
            return
        options["source_name"] = SAID[name]
    convert(source, tmp_path / "out", **options)
    assert case.distance(_load(tmp_path / "out"), longest=case.longest) < BOUND


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED or name in SAID])
@pytest.mark.parametrize("through", ["llama", "canonical"])
def test_home_again_bit_for_bit(name: str, through: str, tmp_path: Path) -> None:
    if through == "llama" and name.startswith((*NOT_LLAMA, "bc2")):
        pytest.skip("Llama cannot hold it, or holds a head folded for good")
    case = Case(name)
    source = case.write(tmp_path / "source")
    options: dict[str, Any] = {"verify": "weights", "sync": False}
    there = convert(source, tmp_path / "there", to=through, source_name=SAID.get(name), **options)
    convert(tmp_path / "there", tmp_path / "home", to=there.source_architecture, **options)
    home = {
        key: tensor for path in (tmp_path / "home").glob("*.safetensors") for key, tensor in load_file(path).items()
    }
    assert home.keys() == case.state.keys()
    assert all(torch.equal(home[key], tensor) for key, tensor in case.state.items())
    assert json.loads((tmp_path / "home" / "config.json").read_text()) == case.config


@pytest.mark.parametrize(
    "name", ["glm2_nomqa", "glm2", "qwen_absent", "ilm2_tied", "v3_bias", "dsmoe_top1norm", "b13_v1"]
)
def test_the_logits_proof_agrees(name: str, tmp_path: Path) -> None:
    source = Case(name).write(tmp_path / "source")
    report = convert(source, tmp_path / "out", to="canonical", verify="logits", sync=False)
    assert report.logits is not None and report.logits["verdict"]


def test_a_wrong_reading_is_seen() -> None:
    """The control: packing of another kind, a plain head and a scaled score are over a hundredth off."""
    for name, changes in (
        ("glm2_nomqa", {"multi_query_attention": True, "multi_query_group_num": 6}), ("bc2_7", {"norm_head": False}),
        ("dsmoe_norm", {"norm_topk_prob": False}), ("qwen_off", {"rotary_emb_base": 20000}),
        ("ilm2", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ):  # fmt: skip
        case = Case(name)
        config = {**case.config, **changes, **({"position_embedding": "ROPE"} if name == "bc2_7" else {})}
        reference = find_reference(config)
        assert reference is not None
        model = reference(config)
        model.load_state_dict(case.state, strict=False)
        assert case.distance(model.eval(), longest=100) > 1e-2, name
