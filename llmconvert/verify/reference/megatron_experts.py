"""A mixture of experts over Megatron shards, by megatron-core's rules for routers (`moe_utils`, 0.16).

Experts are dealt to expert ranks in order and cut over tensor ranks of their own; the shared experts are cut as a dense MLP.
Sources: Switch Transformers (arXiv:2101.03961), DeepSeekMoE (arXiv:2401.06066), DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmconvert.checkpoint.layer_lists import layer_list
from llmconvert.errors import BadInput
from llmconvert.verify.reference.shards import Chunk, Shards


def layers_with_experts(args: Mapping[str, Any], num_layers: int) -> list[bool]:
    """For each layer whether it is a mixture of experts (`moe_layer_freq`: every so many, or a list).

    Raises:
        BadInput: the list is of another length, or not understood.
    """
    if not args.get("num_experts"):
        return [False] * num_layers
    every = args.get("moe_layer_freq", 1)
    if isinstance(every, str):
        every = layer_list(every)
    if isinstance(every, int):
        return [i % every == 0 for i in range(num_layers)]
    if len(every) != num_layers:
        raise BadInput(f"`moe_layer_freq` speaks of {len(every)} layers, `num_layers` of {num_layers}", where="args")
    return [bool(entry) for entry in every]


class MixtureOfExperts(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, shards: Shards, chunk: Chunk, prefix: str, args: Mapping[str, Any], hidden: int) -> None:
        """Look at the sizes.

        Raises:
            BadInput: they cannot be shared by the ranks.
        """
        super().__init__()
        self.shards, self.chunk, self.prefix, self.hidden = shards, chunk, prefix + "mlp.", hidden
        self.num_experts, self.chosen = int(args["num_experts"]), int(args.get("moe_router_topk") or 2)
        self.width = int(args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"])
        self.shared = int(args.get("moe_shared_expert_intermediate_size") or 0)
        self.gated = bool(args.get("moe_shared_expert_gate"))
        self.sigmoid = args.get("moe_router_score_function") == "sigmoid"
        self.before = bool(args.get("moe_router_pre_softmax"))
        self.factor = float(args.get("moe_router_topk_scaling_factor") or 1.0)
        self.biased = bool(args.get("moe_router_enable_expert_bias"))
        self.groups, self.best = args.get("moe_router_num_groups"), args.get("moe_router_group_topk")
        if self.num_experts % shards.ep or self.width % shards.etp or self.shared % shards.tp:
            sizes = f"num_experts {self.num_experts}, moe_ffn_hidden_size {self.width}, shared experts {self.shared}"
            raise BadInput(f"the ranks cannot share {sizes}", where="args")

    def _best(self, scores: Tensor) -> Tensor:
        """The chosen experts' numbers, [tokens, chosen]: of all, or of those in the best groups."""
        if self.best:
            apart = scores.reshape(len(scores), int(self.groups or 1), -1)
            worth = apart.topk(self.chosen // self.best, -1).values.sum(-1)
            kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(self.best, -1).indices, True)
            scores = apart.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.chosen, -1).indices

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For [tokens, hidden] the chosen experts' weights and numbers, [tokens, chosen]."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        router = self.shards.copy(self.chunk, (self.num_experts, self.hidden), self.prefix + "router.weight")
        logits = functional.linear(x.to(wide), router.to(wide))
        if self.sigmoid:
            scores = logits.sigmoid()
            bias = (
                self.shards.copy(self.chunk, (self.num_experts,), self.prefix + "router.expert_bias")
                if self.biased
                else 0
            )
            experts = self._best(scores + bias)
            weights = scores.gather(-1, experts)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.chosen > 1 else weights
        elif self.before:
            scores = logits.softmax(-1)
            experts = self._best(scores)
            weights = scores.gather(-1, experts)
        else:
            experts = self._best(logits)
            weights = logits.gather(-1, experts).softmax(-1)
        return weights * self.factor, experts

    def _expert(self, x: Tensor, number: int) -> Tensor:
        rank, local = divmod(number, self.num_experts // self.shards.ep)
        share, total = self.width // self.shards.etp, torch.zeros_like(x)
        for t in range(self.shards.etp):
            first, second = (
                (
                    f"{self.prefix}experts.local_experts.{local}.{linear}.weight",
                    f"{self.prefix}experts.{linear}.weight{local}",
                )
                for linear in ("linear_fc1", "linear_fc2")
            )
            weight = self.shards.expert(self.chunk, rank, t, (2 * share, self.hidden), *first)
            gate, up = functional.linear(x, weight).chunk(2, -1)
            weight = self.shards.expert(self.chunk, rank, t, (self.hidden, share), *second)
            total = total + functional.linear(functional.silu(gate) * up, weight)
        return total

    def _shared(self, x: Tensor) -> Tensor:
        prefix, share, total = self.prefix + "shared_experts.", self.shared // self.shards.tp, torch.zeros_like(x)
        for rank in range(self.shards.tp):
            weight = self.shards.part(self.chunk, rank, (2 * share, self.hidden), prefix + "linear_fc1.weight")
            gate, up = functional.linear(x, weight).chunk(2, -1)
            weight = self.shards.part(self.chunk, rank, (self.hidden, share), prefix + "linear_fc2.weight")
            total = total + functional.linear(functional.silu(gate) * up, weight)
        if self.gated:
            gate = self.shards.copy(self.chunk, (1, self.hidden), prefix + "gate_weight")
            total = total * functional.linear(x, gate).sigmoid()
        return total

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """What the layer adds to the residual stream, who went where, and each expert's tokens and what it gave them.

        Args:
            x: [batch, tokens, hidden].
        """
        flat = x.flatten(0, -2)
        weights, experts = self.route(flat)
        total, outputs = torch.zeros_like(flat), {}
        for number in sorted(set(experts.flatten().tolist())):
            slots, tokens = torch.where(experts.T.eq(number))
            output = self._expert(flat[tokens], number)
            outputs[f"mlp.experts/{number}"] = tokens, output
            total.index_add_(0, tokens, output * weights[tokens, slots, None].to(output.dtype))
        if self.shared:
            total = total + self._shared(flat)
        return total.view_as(x), experts, outputs
