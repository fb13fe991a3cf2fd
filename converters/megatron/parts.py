"""The one table of how a model lies in a Megatron checkpoint.

It says which tensors a chunk of layers has, what each is made of, how it is cut, and which ranks hold the pieces.
Names are megatron-core's. Layers that predict further tokens lie with the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmconvert.canonical import model as canonical
from llmconvert.canonical.model import CanonicalConfig
from llmconvert.checkpoint.megatron import Place, ranks
from llmconvert.converters.megatron.grid import Chunk, Grid
from llmconvert.errors import Usage

TRANSFORMER_ENGINE, LOCAL = "transformer_engine", "local"
IMPLEMENTATIONS = (TRANSFORMER_ENGINE, LOCAL)

EMBEDDING, OUTPUT, FINAL_NORM = (
    "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight",
)  # fmt: skip
ATTENTION, MLP, EXPERTS, SHARED = "self_attention.", "mlp.", "mlp.experts.", "mlp.shared_experts."
FC1, FC2 = "linear_fc1", "linear_fc2"

WHOLE, ROWS, COLUMNS, GATED, QKV, VOCABULARY = "whole", "rows", "columns", "gated", "qkv", "vocabulary"
"""Ways to cut: a copy on every rank; rows or columns in equal parts; the gate's rows over the projection's, each cut;
query, key and value fused by group, [its query heads, its key, its value], group after group, and the rows cut in equal
parts whatever the number of ranks; rows of the vocabulary, padded."""


@dataclass(frozen=True)
class Cut:
    """How a model is cut.

    Attributes:
        chunks: in order of depth.
        tp, ep, etp: tensor ranks, expert ranks, and tensor ranks of an expert.
        padded_vocab_size: rows of embedding and head over all ranks.
        implementation: whose names norms have.
        grouped: experts are named as in a grouped matrix product.
        dist: names and shapes are those of `torch_dist`, where one place holds everything.
    """

    chunks: Sequence[Chunk]
    tp: int
    ep: int
    etp: int
    padded_vocab_size: int
    implementation: str
    grouped: bool = False
    dist: bool = False

    def places(self, chunk: Chunk) -> list[Place]:
        """Every rank's share of a chunk."""
        return [Place(chunk.pp_rank, chunk.vpp_chunk, t, e) for t, e in ranks(self.tp, self.ep, self.etp)]


@dataclass(frozen=True, slots=True)
class Part:
    """One Megatron tensor, over all ranks.

    Attributes:
        name: as it is in a shard.
        sources: the canonical tensors in it.
        how: how it is cut.
        places: for each piece the places that hold a copy of it.
    """

    name: str
    sources: tuple[str, ...]
    how: str
    places: tuple[tuple[Place, ...], ...]


def parts(config: CanonicalConfig, cut: Cut, chunk: Chunk) -> Iterator[Part]:
    """Every tensor of a chunk, in the order megatron-core has them."""
    everywhere = cut.places(chunk)
    whole = (tuple(everywhere),)
    cuts = tuple(tuple(place for place in everywhere if place.tp_rank == t) for t in range(cut.tp))
    predicts = bool(config.num_nextn_predict_layers) and chunk.head
    if chunk.embedding or (predicts and not cut.dist):
        yield Part(EMBEDDING, (f"{canonical.EMBED}.weight",), VOCABULARY, cuts)
    for local, i in enumerate(chunk.layers):
        yield from _Layer(config, cut, everywhere, whole, cuts, i, f"decoder.layers.{local}.").parts()
    if chunk.head:
        yield Part(FINAL_NORM, (f"{canonical.NORM}.weight",), WHOLE, whole)
        if not config.tie_word_embeddings:
            yield Part(OUTPUT, (f"{canonical.HEAD}.weight",), VOCABULARY, cuts)
        elif len(cut.chunks) > 1:
            # Tied, a last stage that is not the first carries a copy of the embedding as its head.
            yield Part(OUTPUT, (f"{canonical.EMBED}.weight",), VOCABULARY, cuts)
    if predicts:
        for k, i in enumerate(config.layers[config.num_hidden_layers :]):
            prefix = f"mtp.layers.{k}."
            for name, module, how, places in (
                ("enorm", canonical.MTP_EMBED_NORM, WHOLE, whole), ("hnorm", canonical.MTP_HIDDEN_NORM, WHOLE, whole),
                ("eh_proj", canonical.MTP_PROJ, ROWS, cuts),
            ):  # fmt: skip
                yield Part(f"{prefix}{name}.weight", (f"{module.replace('{i}', str(i))}.weight",), how, places)
            yield from _Layer(config, cut, everywhere, whole, cuts, i, f"{prefix}transformer_layer.").parts()
            norm = f"{canonical.MTP_NORM.replace('{i}', str(i))}.weight"
            yield Part(f"{prefix}final_layernorm.weight", (norm,), WHOLE, whole)


def norm_names(implementation: str, *, dist: bool, latent: bool, experts: bool) -> tuple[str, str]:
    """Names of the norm before attention and of the one before the MLP.

    Transformer Engine fuses a norm with the linear map after it where there is one; in `torch_dist` the local layers'
    norms are stored under the fused names, but not with latent attention.
    """
    fused = f"{ATTENTION}linear_qkv.layer_norm_weight", f"{MLP}{FC1}.layer_norm_weight"
    apart = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    if implementation == TRANSFORMER_ENGINE:
        return apart[0] if latent else fused[0], apart[1] if experts else fused[1]
    return fused if dist and not latent else apart


def states_beside(name: str, engine: bool) -> tuple[str, ...]:
    """Keys under which modules keep state of their own (`_extra_state`), for the module a tensor belongs to.

    megatron-core's linear maps have such a key whichever implementation they are of. Of Transformer Engine's modules
    norms have one too (from 1.13 on, when they became operations), and attention itself, which has no tensor.

    Args:
        name: of a tensor.
        engine: with what Transformer Engine's modules alone have.
    """
    module = name.rpartition(".")[0]
    own = module.rpartition(".")[2]
    linear, norm = own.startswith("linear_") or own == "eh_proj", own.endswith("norm")
    found = [module] if linear or (norm and engine) else []
    if engine and module.endswith(f"{ATTENTION}linear_proj"):
        found.append(f"{module.removesuffix('linear_proj')}core_attention")
    return tuple(f"{each}._extra_state" for each in found)


class _Layer:
    def __init__(
        self, config: CanonicalConfig, cut: Cut, everywhere: list[Place], whole: tuple[tuple[Place, ...], ...],
        cuts: tuple[tuple[Place, ...], ...], i: int, prefix: str,
    ) -> None:  # fmt: skip
        self.config, self.cut, self.everywhere, self.whole, self.cuts = config, cut, everywhere, whole, cuts
        self.stem, self.prefix, self.experts = f"model.layers.{i}.", prefix, config.has_experts(i)

    def _part(self, name: str, how: str, *modules: str, param: str = "weight") -> Part:
        sources = tuple(f"{self.stem}{m.removeprefix(canonical.LAYER)}.{param}" for m in modules)
        return Part(self.prefix + name, sources, how, self.whole if how == WHOLE else self.cuts)

    def parts(self) -> Iterator[Part]:
        c, te = self.config, self.cut.implementation == TRANSFORMER_ENGINE
        latent = c.kv_lora_rank is not None
        before, between = norm_names(
            self.cut.implementation, dist=self.cut.dist, latent=latent, experts=self.experts
        )  # fmt: skip
        yield self._part(before, WHOLE, canonical.INPUT_NORM)
        yield from self._latent(te) if latent else self._attention()
        yield self._part(ATTENTION + "linear_proj.weight", COLUMNS, canonical.O)
        if c.o_bias:
            yield self._part(ATTENTION + "linear_proj.bias", WHOLE, canonical.O, param="bias")
        yield self._part(between, WHOLE, canonical.POST_NORM)
        yield from self._mixture() if self.experts else self._mlp()

    def _attention(self) -> Iterator[Part]:
        for kind in ("weight", "bias") if self.config.qkv_bias else ("weight",):
            yield self._part(f"{ATTENTION}linear_qkv.{kind}", QKV, canonical.Q, canonical.K, canonical.V, param=kind)
        if self.config.qk_norm:
            yield self._part(ATTENTION + "q_layernorm.weight", WHOLE, canonical.Q_NORM)
            yield self._part(ATTENTION + "k_layernorm.weight", WHOLE, canonical.K_NORM)

    def _latent(self, te: bool) -> Iterator[Part]:
        # Transformer Engine's layers have a copy of the down projections on every rank, the local ones cut them.
        down = WHOLE if te else ROWS
        if self.config.q_lora_rank is None:
            yield self._part(ATTENTION + "linear_q_proj.weight", ROWS, canonical.Q)
        else:
            yield self._part(ATTENTION + "linear_q_down_proj.weight", down, canonical.Q_A)
            norm = "linear_q_up_proj.layer_norm_weight" if te else "q_layernorm.weight"
            yield self._part(ATTENTION + norm, WHOLE, canonical.Q_A_NORM)
            yield self._part(ATTENTION + "linear_q_up_proj.weight", ROWS, canonical.Q_B)
        yield self._part(ATTENTION + "linear_kv_down_proj.weight", down, canonical.KV_A)
        norm = "linear_kv_up_proj.layer_norm_weight" if te else "kv_layernorm.weight"
        yield self._part(ATTENTION + norm, WHOLE, canonical.KV_A_NORM)
        yield self._part(ATTENTION + "linear_kv_up_proj.weight", ROWS, canonical.KV_B)

    def _mlp(self) -> Iterator[Part]:
        for kind in ("weight", "bias") if self.config.mlp_bias else ("weight",):
            yield self._part(f"{MLP}{FC1}.{kind}", GATED, canonical.GATE, canonical.UP, param=kind)
            how = COLUMNS if kind == "weight" else WHOLE
            yield self._part(f"{MLP}{FC2}.{kind}", how, canonical.DOWN, param=kind)

    def _mixture(self) -> Iterator[Part]:
        c, cut = self.config, self.cut
        yield self._part(MLP + "router.weight", WHOLE, canonical.ROUTER)
        if c.router_bias:
            yield self._part(MLP + "router.expert_bias", WHOLE, canonical.ROUTER, param=canonical.ROUTER_BIAS)
        each = c.num_experts // cut.ep
        modules = [
            m.removeprefix(canonical.LAYER) for m in (canonical.EXPERT_GATE, canonical.EXPERT_UP, canonical.EXPERT_DOWN)
        ]
        for expert in range(c.num_experts):
            rank, local = divmod(expert, each)
            places = tuple((place,) for place in self.everywhere[rank * cut.etp : (rank + 1) * cut.etp])
            gate, up, down = (f"{self.stem}{m.replace('{j}', str(expert))}.weight" for m in modules)
            yield Part(self.prefix + expert_name(FC1, local, grouped=cut.grouped), (gate, up), GATED, places)
            yield Part(self.prefix + expert_name(FC2, local, grouped=cut.grouped), (down,), COLUMNS, places)
        if c.shared_expert_intermediate_size:
            yield self._part(f"{SHARED}{FC1}.weight", GATED, canonical.SHARED_GATE, canonical.SHARED_UP)
            yield self._part(f"{SHARED}{FC2}.weight", COLUMNS, canonical.SHARED_DOWN)
        if c.shared_expert_gate:
            yield self._part(SHARED + "gate_weight", WHOLE, canonical.SHARED_EXPERT_GATE)


def expert_name(linear: str, local: int, *, grouped: bool) -> str:
    """An expert's tensor, by its number on its rank."""
    return f"{EXPERTS}{linear}.weight{local}" if grouped else f"{EXPERTS}local_experts.{local}.{linear}.weight"


def check_cut(config: CanonicalConfig, grid: Grid, fmt: str, implementation: str) -> None:
    """Check that a model can be shared by the ranks of a grid.

    Raises:
        Usage: a size is not a multiple, or the format cannot hold the ranks.
    """
    c, tp, ep, etp = config, grid.tp, grid.ep, grid.expert_tp
    latent, dense = c.kv_lora_rank is not None, not all(map(c.has_experts, c.layers))
    sizes = {"num_attention_heads": c.num_attention_heads}
    sizes |= {"intermediate_size": c.intermediate_size} if dense else {}
    sizes |= {"shared_expert_intermediate_size": c.shared_expert_intermediate_size} if c.num_experts else {}
    sizes |= {"hidden_size": c.hidden_size} if c.num_nextn_predict_layers else {}
    if latent and implementation == LOCAL and fmt == "torch":
        sizes |= {
            "q_lora_rank": c.q_lora_rank or 0,
            "kv_lora_rank + qk_rope_head_dim": (c.kv_lora_rank or 0) + c.qk_rope_head_dim,
        }
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tp]
    groups = c.num_key_value_heads
    if not latent and groups % tp and tp % groups:
        wrong.append(f"num_key_value_heads {groups}")
    if wrong:
        raise Usage(f"{tp} tensor ranks cannot share {' and '.join(wrong)} evenly", hint="choose another `--tp`")
    if not c.num_experts:
        if ep > 1 or grid.etp is not None:
            raise Usage(
                "`--ep` and `--etp` are for mixtures of experts, and this model is dense", hint="leave them out"
            )
        return
    if c.num_experts % ep:
        raise Usage(f"{ep} expert ranks cannot share {c.num_experts} experts evenly", hint="choose another `--ep`")
    if c.moe_intermediate_size % etp:
        raise Usage(
            f"{etp} tensor ranks of an expert cannot share its moe_intermediate_size {c.moe_intermediate_size} evenly",
            hint="choose another `--etp`; it is `--tp` if absent",
        )
    if fmt == "torch" and (tp % etp or ep * etp % tp):
        raise Usage(
            f"the `torch` format names a rank file by tensor and expert rank alone, which does not tell the ranks of TP "
            f"{tp}, EP {ep}, ETP {etp} apart or leaves some out",
            hint="write `--format torch_dist`, or choose ETP to divide TP, and EP x ETP to be a multiple of TP",
        )
