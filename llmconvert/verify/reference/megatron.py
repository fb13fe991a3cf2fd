"""Megatron shards run as they are, rank by rank, from the definitions of tensor and pipeline parallelism.

Nothing is merged: each tensor-parallel rank computes with its own rows and columns, and what Megatron would all-reduce
or gather is summed or concatenated here (Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053). Tensor names are those
of megatron-core, in its local and its Transformer Engine spelling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmconvert.errors import BadInput, Refused
from llmconvert.verify.reference.common import (
    attend,
    frequencies,
    positions,
    rms_norm,
    rotate_halves,
    rotate_neighbours,
)
from llmconvert.verify.reference.megatron_experts import MixtureOfExperts, layers_with_experts
from llmconvert.verify.reference.megatron_latent import LatentAttention
from llmconvert.verify.reference.shards import Chunk, Read, Shards

# What the forward computes, by argument of Megatron-LM; None stands for an absent argument.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "squared_relu": (None, False),
    "quick_geglu": (None, False),
    "apply_layernorm_1p": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "qk_l2_norm": (None, False),
    "attention_output_gate": (None, False),
    "softmax_type": (None, "vanilla"),
    "softmax_scale": (None,),
    "window_size": (None,),
    "no_rope_freq": (None,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "glu_linear_offset": (None, 0),
    "activation_func_clamp_value": (None,),
    "linear_attention_freq": (None,),
    "experimental_attention_variant": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "moe_router_score_function": (None, "softmax", "sigmoid"),
    "moe_apply_probs_on_input": (None, False),
    "moe_router_force_load_balancing": (None, False),
    "moe_latent_size": (None,),
    "is_hybrid_model": (None, False),
    "hybrid_override_pattern": (None,),
}


class _Sizes(NamedTuple):
    tp: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    eps: float
    qkv_bias: bool
    biases: bool
    head_norms: bool
    latent: bool


def _sizes(args: Mapping[str, Any], tp: int) -> _Sizes:
    """The model's sizes, with Megatron-LM's rules for what may be absent.

    Raises:
        Refused: it is no model this module computes.
        BadInput: a needed argument is absent, or the sizes cannot be cut in `tp` parts.
    """
    wrong = [f"`{key}` {args.get(key)!r}" for key, allowed in _COMPUTED.items() if args.get(key) not in allowed]
    if args.get("position_embedding_type") not in ("rope", "yarn") and not args.get("use_rotary_position_embeddings"):
        wrong.append(f"`position_embedding_type` {args.get('position_embedding_type')!r}")
    if wrong:
        raise Refused(
            f"the Megatron reference does not compute {', '.join(wrong)}",
            where="args",
            hint="its logits would prove nothing; verify the weights alone",
        )

    def get(*keys: str) -> Any:
        found = next((args[key] for key in keys if args.get(key) is not None), None)
        if found is None:
            raise BadInput(f"the checkpoint's args lack `{keys[0]}`", where="args")
        return found

    hidden, heads = get("hidden_size"), get("num_attention_heads")
    # Megatron-LM reads the number of groups only where grouping is on; it is 1 by default.
    grouped = args.get("group_query_attention", True)
    sizes = _Sizes(
        tp=tp,
        hidden=hidden,
        intermediate=get("ffn_hidden_size"),
        heads=heads,
        groups=(args.get("num_query_groups") or heads) if grouped else heads,
        head_dim=args.get("kv_channels") or hidden // heads,
        vocab=get("padded_vocab_size"),
        eps=get("norm_epsilon", "layernorm_epsilon"),
        biases=bool(args.get("add_bias_linear")),
        qkv_bias=bool(args.get("add_qkv_bias") or args.get("add_bias_linear")),
        head_norms=bool(args.get("qk_layernorm")),
        latent=bool(args.get("multi_latent_attention")),
    )
    cut = [("heads", heads), ("padded_vocab_size", sizes.vocab)]
    cut += [] if args.get("num_experts") else [("ffn_hidden_size", sizes.intermediate)]
    uneven = [f"{name} {size}" for name, size in cut if size % tp]
    if not sizes.latent and (heads % sizes.groups or (sizes.groups % tp and tp % sizes.groups)):
        uneven.append(f"num_query_groups {sizes.groups}")
    if uneven:
        raise BadInput(f"{tp} tensor-parallel ranks cannot share {', '.join(uneven)}", where="args")
    return sizes


class _Rotary:
    """Megatron's rotary embedding: of the first part of a head, by halves or by neighbours."""

    def __init__(self, args: Mapping[str, Any], head_dim: int) -> None:
        share = args.get("rotary_percent")
        self.dims = head_dim if share is None or share >= 1.0 else int(head_dim * share)
        self.base = float(args.get("rotary_base") or 10000)
        self.rotate = rotate_neighbours if args.get("rotary_interleaved") else rotate_halves
        self.factor = float(args.get("rope_scaling_factor") or 8.0) if args.get("use_rope_scaling") else None

    def angles(self, position_ids: Tensor) -> Tensor:
        """Float64 [batch, tokens, dims / 2]."""
        speed = frequencies(self.dims, self.base, position_ids.device)
        if self.factor is not None:
            # Llama 3.1's rule with the constants megatron-core fixes: a context of 8192, low 1, high 4.
            turns = 8192 * speed / (2 * math.pi)
            blend = ((turns - 1) / 3).clamp(0, 1)
            speed = (1 - blend) * speed / self.factor + blend * speed
        return (position_ids.float()[..., None] * speed).double()

    def __call__(self, x: Tensor, angle: Tensor) -> Tensor:
        """Rotate x, [batch, heads, tokens, head_dim]."""
        return torch.cat((self.rotate(x[..., : self.dims], angle), x[..., self.dims :]), -1)


class MegatronLayer(nn.Module):
    """One layer, read from its shards each time it is called: two tensors of one rank are in memory at a time.

    Attributes:
        routed: the experts each token of the last call was sent to, int64 [batch · tokens, chosen]; None if dense.
        outputs: by its name in the layer, each expert's tokens and what it gave them before that was weighed.
        num_experts: how many there are.
    """

    def __init__(
        self,
        shards: Shards,
        sizes: _Sizes,
        rotary: _Rotary,
        chunk: Chunk,
        index: int,
        args: Mapping[str, Any],
        experts: bool,
    ) -> None:
        """Layer `index` of `chunk`, counted within it."""
        super().__init__()
        self.shards, self.sizes, self.rotary, self.chunk = shards, sizes, rotary, chunk
        self.prefix = f"decoder.layers.{index}."
        place = (shards, chunk, self.prefix, args)
        self.latent = LatentAttention(*place, sizes.hidden, sizes.heads, sizes.eps) if sizes.latent else None
        self.mixture = MixtureOfExperts(*place, sizes.hidden) if experts else None
        self.num_experts = self.mixture.num_experts if self.mixture else 0
        self.routed: Tensor | None = None
        self.outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def _part(self, rank: int, name: str, *shape: int) -> Tensor:
        return self.shards.part(self.chunk, rank, shape, self.prefix + name)

    def _copy(self, size: int, *spellings: str) -> Tensor:
        return self.shards.copy(self.chunk, (size,), *(self.prefix + name for name in spellings))

    def forward(self, hidden: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states after the layer, for those before it: [batch, tokens, hidden_size]."""
        return self.second_half(self.first_half(hidden, position_ids, attention_mask))

    def first_half(self, hidden: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream after attention: [batch, tokens, hidden_size]."""
        norm = self._copy(self.sizes.hidden, "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        attention: Callable[..., Tensor] = self.latent or self._attention
        return hidden + attention(rms_norm(hidden, norm, self.sizes.eps), position_ids, attention_mask)

    def second_half(self, hidden: Tensor) -> Tensor:
        """The residual stream after the MLP: [batch, tokens, hidden_size]."""
        norm = self._copy(self.sizes.hidden, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        normed = rms_norm(hidden, norm, self.sizes.eps)
        if self.mixture is None:
            return hidden + self._mlp(normed)
        added: Tensor
        added, self.routed, self.outputs = self.mixture(normed)
        return hidden + added

    def _query_key_value(self, x: Tensor) -> list[Tensor]:
        """Each rank's fused activations, [batch, tokens, groups it uses, heads a group + 2, head_dim].

        The rows of the fused weight are ordered by group, [its query heads, its key, its value]. With more ranks than
        groups they are cut all the same, and the ranks that share a group gather its activations.
        """
        s = self.sizes
        rows = (s.heads + 2 * s.groups) * s.head_dim // s.tp
        fused = []
        for rank in range(s.tp):
            bias = self._part(rank, "self_attention.linear_qkv.bias", rows) if s.qkv_bias else None
            fused.append(
                functional.linear(x, self._part(rank, "self_attention.linear_qkv.weight", rows, s.hidden), bias)
            )
        if s.tp > s.groups:
            share = s.tp // s.groups
            whole = [torch.cat(fused[first : first + share], -1) for first in range(0, s.tp, share)]
            fused = [whole[rank // share] for rank in range(s.tp)]
        return [part.reshape(*part.shape[:-1], -1, s.heads // s.groups + 2, s.head_dim) for part in fused]

    def _attention(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        s = self.sizes
        norms = [self._copy(s.head_dim, f"self_attention.{kind}_layernorm.weight") for kind in "qk" if s.head_norms]
        angle, own, total = self.rotary.angles(position_ids), s.heads // s.tp, torch.zeros_like(x)
        for rank, fused in enumerate(self._query_key_value(x)):
            # Of a group it shares, a rank takes its own query heads.
            first = rank * own % (s.heads // s.groups) if s.tp > s.groups else 0
            q = fused[..., :-2, :].flatten(2, 3)[:, :, first : first + own].transpose(1, 2)
            k, v = fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)
            if norms:
                q, k = rms_norm(q, norms[0], s.eps), rms_norm(k, norms[1], s.eps)
            mixed = attend(self.rotary(q, angle), self.rotary(k, angle), v, attention_mask)
            weight = self._part(rank, "self_attention.linear_proj.weight", s.hidden, own * s.head_dim)
            total = total + functional.linear(mixed, weight)
        return total + self._copy(s.hidden, "self_attention.linear_proj.bias") if s.biases else total

    def _mlp(self, x: Tensor) -> Tensor:
        s, total = self.sizes, torch.zeros_like(x)
        rows = s.intermediate // s.tp
        for rank in range(s.tp):
            bias = self._part(rank, "mlp.linear_fc1.bias", 2 * rows) if s.biases else None
            weight = self._part(rank, "mlp.linear_fc1.weight", 2 * rows, s.hidden)
            gate, up = functional.linear(x, weight, bias).chunk(2, -1)
            weight = self._part(rank, "mlp.linear_fc2.weight", s.hidden, rows)
            total = total + functional.linear(functional.silu(gate) * up, weight)
        return total + self._copy(s.hidden, "mlp.linear_fc2.bias") if s.biases else total


class MegatronForCausalLM(nn.Module):
    """A Megatron checkpoint of a decoder (RMSNorm, rotary embedding, SwiGLU), run as shards.

    Queries are grouped, or attention is latent; layers are dense or mixtures of experts.

    It has no parameters: every call reads the shards again, a tensor at a time, so memory stays at about one tensor of
    one rank and the activations. `layers` are the decoder's layers in order of depth: a forward hook on one of them
    sees the hidden states [batch, tokens, hidden_size] after it, and a layer may be called alone as
    `layer(hidden, position_ids, attention_mask)`. Dtype and device are those given here, `.to()` changes nothing.

    Attributes:
        layers: an nn.ModuleList of `MegatronLayer`.
        read: every (pipeline rank, chunk, tensor rank, expert rank, name) read so far: of what else a checkpoint holds
            the logits say nothing (layers that predict further tokens, and experts that no token was sent to).
    """

    def __init__(
        self,
        args: Mapping[str, Any],
        chunks: Sequence[Chunk],
        tensor: Read,
        *,
        tp_size: int,
        ep_size: int = 1,
        etp_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Look at the sizes; no tensor is read yet.

        Args:
            args: the checkpoint's `args` as a mapping, named as Megatron-LM names them.
            chunks: all chunks in order of depth; the first has the embedding, the last the final norm and the head.
            tensor: see `Read`. Global tensors, as of `torch_dist`, are those of one pipeline and one tensor rank.
            tp_size: tensor-parallel ranks.
            ep_size: expert-parallel ranks.
            etp_size: tensor-parallel ranks of an expert; `tp_size` if None.
            dtype: float32, float64 or bfloat16, to compute in; tensors are converted as they are read.
            device: where to compute.

        Raises:
            Refused: another norm or activation, or anything else not computed.
            BadInput: the args lack a size, or contradict themselves or `chunks`.
        """
        super().__init__()
        self.sizes = _sizes(args, tp_size)
        layers = sum(chunk.num_layers for chunk in chunks)
        if args.get("num_layers") != layers:
            raise BadInput(f"the args say {args.get('num_layers')} layers, the shards hold {layers}", where="args")
        self.shards = Shards(tensor, tp_size, ep_size, etp_size or tp_size, dtype, torch.device(device))
        self.chunks, self.tied = list(chunks), not args.get("untie_embeddings_and_output_weights")
        rotary = _Rotary(args, self.sizes.head_dim)
        places = [(chunk, index) for chunk in chunks for index in range(chunk.num_layers)]
        experts = layers_with_experts(args, layers)
        self.layers = nn.ModuleList(
            MegatronLayer(self.shards, self.sizes, rotary, *place, args, mixture)
            for place, mixture in zip(places, experts, strict=True)
        )

    @property
    def read(self) -> set[tuple[int, int, int, int, str]]:
        """See the class."""
        return self.shards.read

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, tokens, padded_vocab_size] for ids [batch, tokens], on the device given to the class.

        Args:
            input_ids: int64.
            attention_mask: [batch, tokens], 0 at padding; or None.
            position_ids: [batch, tokens]; by default counted from the first token that is not padding.

        Raises:
            BadInput: a shard lacks a tensor, has one of another shape, or ranks differ in one they should share.
        """
        device = self.shards.device
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        place = positions(input_ids, attention_mask, None if position_ids is None else position_ids.to(device))
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, place, attention_mask)
        return self.logits(self.final_norm(hidden))

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the head is given: [batch, tokens, hidden_size]."""
        norm = self.shards.copy(self.chunks[-1], (self.sizes.hidden,), "decoder.final_layernorm.weight")
        return rms_norm(hidden, norm, self.sizes.eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """The sum over ranks of look-ups in their rows, zero for the ids of others."""
        rows = self.sizes.vocab // self.sizes.tp
        shape = (rows, self.sizes.hidden)
        total = torch.zeros(*input_ids.shape, shape[1], dtype=self.shards.dtype, device=self.shards.device)
        for rank in range(self.sizes.tp):
            local = input_ids - rank * rows
            others = (local < 0) | (local >= rows)
            weight = self.shards.part(self.chunks[0], rank, shape, "embedding.word_embeddings.weight")
            looked_up = functional.embedding(local.masked_fill(others, 0), weight)
            total = total + looked_up.masked_fill(others[..., None], 0.0)
        return total

    def logits(self, hidden: Tensor) -> Tensor:
        """Each rank's rows of the vocabulary, gathered."""
        # With tied embeddings a pipeline's last chunk has a copy of its own; only a lone chunk has none.
        name = "output_layer.weight"
        if self.tied and len(self.chunks) == 1:
            name = "embedding.word_embeddings.weight"
        shape = (self.sizes.vocab // self.sizes.tp, self.sizes.hidden)
        parts = (self.shards.part(self.chunks[-1], rank, shape, name) for rank in range(self.sizes.tp))
        return torch.cat([functional.linear(hidden, part) for part in parts], -1)
