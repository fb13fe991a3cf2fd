"""How many parameters a model has, part by part, and the memory they take: arithmetic on shapes, nothing is read.

Memory of training is that of the model's states under AdamW in mixed precision, as Rajbhandari et al. count it (ZeRO,
arXiv:1910.02054, section 3.1): 16-bit weights and gradients, and 12 bytes a parameter of optimizer states (a float32
copy of the weights and two float32 moments): 16 bytes a parameter, 112 GB for 7e9. Activations, buffers of
communication and the allocator's slack come on top.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig, shapes

EMBEDDING, ATTENTION, MLP, NORMS, HEAD, MTP = "embedding", "attention", "mlp", "norms", "head", "mtp"
ROUTED_EXPERTS, SHARED_EXPERTS, ROUTER = "routed_experts", "shared_experts", "router"
ROUTER_BIAS, MTP_COPIES = "router_bias", "mtp_copies"

PARTS = (
    EMBEDDING, ATTENTION, MLP, ROUTED_EXPERTS, SHARED_EXPERTS, ROUTER, NORMS, HEAD, MTP, ROUTER_BIAS, MTP_COPIES,
)  # fmt: skip
"""Parts of a model, each tensor in one. `norms` are all RMSNorms; `mtp` is all of the layers that predict further
tokens, but for copies of embedding and head (`mtp_copies`). `router_bias` is no trained parameter: it is set by a rule
(DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""

_MODULES: dict[str, tuple[str, ...]] = {
    EMBEDDING: (canonical.EMBED,),
    ATTENTION: (canonical.Q, canonical.Q_A, canonical.Q_B, canonical.K, canonical.V, canonical.KV_A, canonical.KV_B, canonical.O),
    MLP: (canonical.GATE, canonical.UP, canonical.DOWN),
    ROUTED_EXPERTS: (canonical.EXPERT_GATE, canonical.EXPERT_UP, canonical.EXPERT_DOWN),
    SHARED_EXPERTS: (canonical.SHARED_GATE, canonical.SHARED_UP, canonical.SHARED_DOWN, canonical.SHARED_EXPERT_GATE),
    ROUTER: (canonical.ROUTER,),
    NORMS: (canonical.NORM, canonical.INPUT_NORM, canonical.POST_NORM, canonical.Q_NORM, canonical.K_NORM, canonical.Q_A_NORM,
            canonical.KV_A_NORM, canonical.POST_ATTENTION_NORM, canonical.POST_MLP_NORM),
    HEAD: (canonical.HEAD,),
    MTP: (canonical.MTP_EMBED_NORM, canonical.MTP_HIDDEN_NORM, canonical.MTP_PROJ, canonical.MTP_NORM),
    MTP_COPIES: (canonical.MTP_EMBED, canonical.MTP_HEAD),
}  # fmt: skip
_PART = {module: part for part, modules in _MODULES.items() for module in modules}
_LAYER, _EXPERT = re.compile(r"\.layers\.(\d+)\."), re.compile(r"\.experts\.\d+\.")

WEIGHT_BYTES, OPTIMIZER_BYTES = 2, 12
"""Of a parameter in training: its bfloat16 weight; a float32 copy of it and two float32 moments."""

GRADIENT_BYTES = {"bfloat16": 2, "float32": 4}
"""Of a parameter's gradient, by the dtype gradients are kept in."""


def part_of(name: str, config: CanonicalConfig) -> str:
    """Which of `PARTS` a canonical tensor belongs to."""
    module, _, param = name.rpartition(".")
    if param == canonical.ROUTER_BIAS:
        return ROUTER_BIAS
    layer = _LAYER.search(module)
    part = _PART[_EXPERT.sub(".experts.{j}.", _LAYER.sub(".layers.{i}.", module))]
    further = layer is not None and int(layer[1]) >= config.num_hidden_layers
    return MTP if further and part != MTP_COPIES else part


def parameters_by_part(config: CanonicalConfig) -> dict[str, int]:
    """Elements of each part a model has, in the order of `PARTS`; together those of all its tensors."""
    counts = Counter[str]()
    for name, shape in shapes(config).items():
        counts[part_of(name, config)] += prod(shape)
    return {part: counts[part] for part in PARTS if counts[part]}


def active_parameters(config: CanonicalConfig) -> int:
    """Parameters that take part in predicting one token: all but experts not chosen, and what predicts further tokens.

    Embedding and head count whole, as in the 12.9B of Mixtral-8x7B.
    """
    counts = parameters_by_part(config)
    routed = counts.get(ROUTED_EXPERTS, 0)
    left_out = sum(counts.get(part, 0) for part in (MTP, MTP_COPIES, ROUTER_BIAS, ROUTED_EXPERTS))
    chosen = routed // config.num_experts * config.num_experts_per_tok if routed else 0
    return sum(counts.values()) - left_out + chosen


@dataclass(frozen=True)
class Cache:
    """What one layer caches for a token, in elements.

    Attributes:
        expanded: keys and values of all heads.
        latent: with latent attention, what keys and values are computed from: the latent and the rotated part of the
            keys, which heads share (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). None without.
    """

    expanded: int
    latent: int | None

    @property
    def held(self) -> int:
        """The latent where there is one, as transformers from 5.20 on and inference engines hold it; else keys and values.

        transformers 4 caches keys and values expanded.
        """
        return self.expanded if self.latent is None else self.latent


def cache(config: CanonicalConfig, tp: int = 1) -> Cache:
    """What one layer caches for a token on one of `tp` tensor ranks.

    Ranks share the key/value heads; where there are more ranks than heads, each has one. All have the whole latent.
    """
    c = config
    if c.kv_lora_rank is None:
        return Cache(2 * max(c.num_key_value_heads // tp, 1) * c.head_dim, None)
    head = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    return Cache(c.num_attention_heads // tp * head, c.kv_lora_rank + c.qk_rope_head_dim)


@dataclass(frozen=True)
class Held:
    """Parameters that one rank holds.

    Attributes:
        dense: trained, but for routed experts. Ranks with the same ones are `dp`.
        experts: of routed experts. Ranks with the same ones are `expert_dp`.
        untrained: that no optimizer has states for, the routers' biases.
    """

    dense: int
    experts: int = 0
    untrained: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts + self.untrained


def held(config: CanonicalConfig) -> Held:
    """Parameters of one rank that holds a whole model, without copies: whoever trains shares those."""
    counts = parameters_by_part(config)
    counts.pop(MTP_COPIES, None)
    experts, untrained = counts.pop(ROUTED_EXPERTS, 0), counts.pop(ROUTER_BIAS, 0)
    return Held(sum(counts.values()), experts, untrained)


@dataclass(frozen=True)
class States:
    """Bytes of a model's states in training on one rank."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def model_states(
    held: Held, *, zero: int = 0, dp: int = 1, expert_dp: int | None = None, gradient_bytes: int = 2
) -> States:
    """Bytes of a rank's model states under AdamW in mixed precision.

    ZeRO shares out over the ranks that would hold copies: from stage 1 on the optimizer states, from 2 on the gradients,
    in 3 the weights (section 5 of the paper, and its table 1). A share that does not come out even is rounded up.

    Args:
        held: what the rank holds without ZeRO.
        zero: the stage, 0 to 3.
        dp: data-parallel ranks.
        expert_dp: ranks with the same experts; `dp` if None.
        gradient_bytes: of one element of a gradient.
    """

    def share(dense: int, experts: int, stage: int) -> int:
        over, experts_over = (dp, expert_dp or dp) if zero >= stage else (1, 1)
        return -(-dense // over) - (-experts // experts_over)

    return States(
        WEIGHT_BYTES * share(held.dense + held.untrained, held.experts, 3),
        gradient_bytes * share(held.dense, held.experts, 2),
        OPTIMIZER_BYTES * share(held.dense, held.experts, 1),
    )
