"""Where programs that read one and the same checkpoint compute different functions of it.

Some architectures have the modelling code published with the weights and a class in transformers. Where the two part, no
conversion can be equal to both, so that it is refused; a checkpoint that stays in its own dialect is read by them as
before. Each rule looks at what the programs make of the settings, not at the model's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.errors import Refused
from llmconvert.spec.language import Spec
from llmconvert.tensors.evaluate import Reader, as_floats, evaluate
from llmconvert.tensors.expressions import Expression


def refuse_disagreements(
    spec: Spec, config: CanonicalConfig, tensors: Mapping[str, Expression], stated: Mapping[str, Any], *,
    trained: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Refuse a checkpoint of which its readers compute different functions.

    Args:
        spec: its dialect.
        config: the model.
        tensors: canonical; biases of routers are read.
        stated: its config.json.
        trained: it comes from Megatron, which masks as transformers 5 does: what routers' biases make of readers that do
            not is a remark, since the model is what it is.

    Returns:
        Remarks on what may differ for rare inputs.

    Raises:
        Refused: naming each setting, and how to say it so that all agree.
    """
    found = [*_one_expert(config), *_yarn(config, stated)] if spec.published_code else []
    routers = _reachable_masks(config, tensors, -_SMALL_SCORE)
    masked = (
        f"{_listed(routers)}: routing biases so negative that experts of groups not chosen, which count 0 in the "
        "published code and in transformers 4 and nothing in transformers 5, are chosen"
    ) if routers else ""  # fmt: skip
    if masked and not trained:
        found.append((
            masked,
            "add a constant to each layer's biases that makes them positive, if nothing is meant: it changes no choice",
        ))  # fmt: skip
    if found:
        whats, hints = zip(*found, strict=True)
        raise Refused("; ".join(whats), hint="; ".join(dict.fromkeys(hints)))
    if masked:
        return (f"{masked}; transformers 5 computes what was trained",)
    rare = _reachable_masks(config, tensors, 0.0)
    if not rare:
        return ()
    return (
        f"{_listed(rare)}: some routing biases are negative; should all experts of the chosen groups score below 0, the "
        "published code and transformers 4 choose others, transformers 5 and the result do not",
    )


_SMALL_SCORE = 0.25
"""A sigmoid that few of the experts of chosen groups fall below."""


def _listed(names: list[str]) -> str:
    return f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _one_expert(c: CanonicalConfig) -> Iterator[tuple[str, str]]:
    """Published DeepSeek code divides by the sum of scores for more than one expert only (`MoEGate.forward`)."""
    if c.num_experts_per_tok == 1 and c.norm_topk_prob:
        yield (
            "`num_experts_per_tok` 1 with `norm_topk_prob` true: the published code then weighs the expert by its score, "
            "transformers by 1",
            "set `norm_topk_prob` to false in a copy of config.json if the published code's function is meant",
        )


def _yarn(c: CanonicalConfig, stated: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    scaling = c.rope_scaling
    if scaling is None or scaling.get("rope_type") != "yarn":
        return
    published, ours = _published_yarn(scaling), _transformers_yarn(scaling, c.max_position_embeddings)
    apart = [
        f"{name} {published[name]:.6g} and {ours[name]:.6g}"
        for name in published if not math.isclose(published[name], ours[name], rel_tol=1e-9)
    ]  # fmt: skip
    if apart:
        yield (
            f"YaRN as `rope_scaling` states it means two things, in the published code and in transformers: {', '.join(apart)}",
            "state `mscale`, `mscale_all_dim`, `original_max_position_embeddings`, `beta_fast` and `beta_slow` in a copy of "
            f"config.json, and `attention_factor` {published['attention factor']:.9g} if the published code's function is meant",
        )


def _published_yarn(scaling: Mapping[str, Any]) -> dict[str, float]:
    """Defaults of `DeepseekV3YarnRotaryEmbedding`, which does not read `attention_factor` and `truncate`."""
    defaults = {
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    found = {key: default if scaling.get(key) is None else scaling[key] for key, default in defaults.items()}
    factor = float(scaling["factor"])
    return {
        "attention factor": _mscale(factor, found["mscale"]) / _mscale(factor, found["mscale_all_dim"]),
        "original length": found["original_max_position_embeddings"],
        "beta_fast": found["beta_fast"],
        "beta_slow": found["beta_slow"],
        "truncate": 1,
    }


def _transformers_yarn(scaling: Mapping[str, Any], max_position_embeddings: int) -> dict[str, float]:
    """`_compute_yarn_parameters` of transformers 4.57 and 5."""
    factor, mscale, all_dims = float(scaling["factor"]), scaling.get("mscale"), scaling.get("mscale_all_dim")
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = _mscale(factor, mscale) / _mscale(factor, all_dims) if mscale and all_dims else _mscale(factor, 1)
    return {
        "attention factor": attention,
        "original length": scaling.get("original_max_position_embeddings") or max_position_embeddings,
        "beta_fast": scaling.get("beta_fast") or 32,
        "beta_slow": scaling.get("beta_slow") or 1,
        "truncate": int(scaling.get("truncate", True)),
    }


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature (arXiv:2309.00071, section 3.4), scaled as in DeepSeek-V2."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _reachable_masks(c: CanonicalConfig, tensors: Mapping[str, Expression], least: float) -> list[str]:
    """Routers that can be made to choose experts outside the best groups, if those count 0 and not −∞.

    They are not chosen as long as any choice of groups holds enough experts that score above 0. Scores are a sigmoid plus
    the bias; an expert is taken to score above 0 if its bias is at least `least`.
    """
    if not c.router_bias or c.n_group <= c.topk_group or c.topk_method != "noaux_tc":
        return []
    found = []
    with Reader() as reader:
        for router in canonical.names(c, canonical.ROUTER):
            name = f"{router}.{canonical.ROUTER_BIAS}"
            if name in tensors:
                bias = as_floats(evaluate(tensors[name], 0, c.num_experts, reader), tensors[name].dtype)
                fewest = sorted((bias >= least).reshape(c.n_group, -1).sum(1))[: c.topk_group]
                if sum(fewest) < c.num_experts_per_tok:
                    found.append(name)
    return found
