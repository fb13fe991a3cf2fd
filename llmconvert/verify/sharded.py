"""Run a Megatron checkpoint as its shards, with what `LayerwiseModel` offers: layer by layer, half by half."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmconvert.checkpoint.megatron import MegatronCheckpoint, Place, open_megatron, ranks
from llmconvert.errors import BadInput
from llmconvert.tensors.evaluate import Reader, evaluate, to_torch
from llmconvert.tensors.tiles import assemble
from llmconvert.verify.float64 import float64_throughout
from llmconvert.verify.layerwise import disturb
from llmconvert.verify.probes import Probe
from llmconvert.verify.reference.megatron import MegatronForCausalLM, MegatronLayer
from llmconvert.verify.reference.shards import Chunk
from llmconvert.verify.runnable import Halves, Seen

_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\..*|\w+\.weight(\d+))")
_HALVES = Halves("attention", "mlp", "mlp")


def describe(directory: Path) -> dict[str, Any]:
    """A Megatron checkpoint's sizes under the names config.json has for them.

    Its args may not say how many tokens of the padded vocabulary are real; then `vocab_size` is 0.

    Raises:
        LlmconvertError: it cannot be opened.
    """
    args = open_megatron(directory, trust_pickle=True).args
    return {
        "vocab_size": args.get("vocab_size") or 0,
        "rows": args.get("padded_vocab_size") or 0,
        "max_position_embeddings": args.get("max_position_embeddings") or args.get("seq_length"),
    }


class ShardedModel:
    """A Megatron checkpoint run rank by rank; see `LayerwiseModel`, whose methods it has.

    Args:
        directory: the checkpoint.
        dtype: of the computation; float64 is float64 throughout.
        device: where.
        vocab_size: logits beyond it are those of padding and are cut off.
        rounded: tensors to disturb by a rounding to the dtype named.

    Raises:
        BadInput: shards are missing or misshapen.
        Refused: the arguments describe a model that is not computed here.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: str, *, vocab_size: int,
        rounded: Mapping[str, torch.dtype] | None = None,
    ) -> None:  # fmt: skip
        """See the class."""
        self.directory, self.dtype, self.device, self.vocab_size = directory, dtype, torch.device(device), vocab_size
        self.norms: dict[str, float] = {}
        self.checkpoint = open_megatron(directory, trust_pickle=True)
        self._rounded, self._reader = rounded or {}, Reader()
        chunks = depth(self.checkpoint)
        with self._arithmetic():
            self.module = MegatronForCausalLM(
                self.checkpoint.args, chunks, self._tensor, tp_size=self.checkpoint.tp, ep_size=self.checkpoint.ep,
                etp_size=self.checkpoint.etp, dtype=dtype, device=device,
            )  # fmt: skip
        self.layers = [layer for layer in self.module.layers if isinstance(layer, MegatronLayer)]
        further = {tile.stored.name for named in self.checkpoint.tensors.values() for name, tiles in named.items()
                   for tile in tiles if name.startswith("mtp.")}  # fmt: skip
        self.unused = sorted(further)
        self._places = [(chunk, local) for chunk in chunks for local in range(chunk.num_layers)]

    def _arithmetic(self) -> AbstractContextManager[None]:
        return float64_throughout() if self.dtype == torch.float64 else nullcontext()

    def _tensor(self, pp_rank: int, vpp_chunk: int, tp_rank: int, ep_rank: int, name: str) -> Tensor:
        tiles = self.checkpoint.tensors[Place(pp_rank, vpp_chunk, tp_rank, ep_rank)][name]
        expression = assemble(name, tiles)
        with torch._C.DisableTorchFunction():
            block = evaluate(expression, 0, expression.rows, self._reader)
            value = to_torch(np.ascontiguousarray(block), expression.dtype).to(self.device, self.dtype)
        stored = tiles[0].stored.name
        if stored not in self.norms:
            self.norms[stored] = math.sqrt(float(value.double().square().sum()))
        rounded = self._rounded.get(stored) or self._rounded.get(stored.rpartition("/")[0])
        if rounded is not None:
            # Copies on other ranks must stay copies: what is drawn depends on the name within the rank alone.
            value = disturb(value, rounded, sum(name.encode()))
        return value

    def block(self, index: int) -> AbstractContextManager[None]:
        """Nothing: shards are read as they are used."""
        return nullcontext()

    @torch.no_grad()
    def begin(self, probes: Sequence[Probe]) -> list[Tensor]:
        """Embed the probes."""
        self._probes = list(probes)
        with self._arithmetic():
            return [self.module.embed(probe.input_ids.to(self.device)) for probe in probes]

    @torch.no_grad()
    def layer(
        self, index: int, streams: Sequence[Tensor], middles: Sequence[Tensor | None] | None = None
    ) -> list[Seen]:
        """Run one layer; see `LayerwiseModel.layer`."""
        layer, results = self.layers[index], []
        for k, (probe, stream) in enumerate(zip(self._probes, streams, strict=True)):
            with self._arithmetic():
                middle = layer.first_half(
                    stream, probe.position_ids.to(self.device), probe.attention_mask.to(self.device)
                )
                given = middles[k] if middles else None
                out = layer.second_half(middle if given is None else given)
            results.append(
                Seen(out, middle, routed=layer.routed, num_experts=layer.num_experts, experts=dict(layer.outputs))
            )
        return results

    def halves(self, index: int) -> Halves | None:
        """Attention and MLP."""
        return _HALVES

    @torch.no_grad()
    def end(self, streams: Sequence[Tensor], normed: Sequence[Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Norm and head; see `LayerwiseModel.end`."""
        for k, stream in enumerate(streams):
            with self._arithmetic():
                head_input = self.module.final_norm(stream)
                logits = self.module.logits(head_input if normed is None else normed[k])
            yield head_input, logits[..., : self.vocab_size]

    def forward(self, probes: Sequence[Probe]) -> list[Tensor]:
        """Logits [batch, tokens, vocabulary] of each probe."""
        streams = self.begin(probes)
        for index in range(len(self.layers)):
            streams = [seen.out for seen in self.layer(index, streams)]
        return [logits for _, logits in self.end(streams)]

    def part_tensors(self, index: int, part: str) -> list[str]:
        """The stored tensors of a layer, or of its attention or MLP with the norm before it, or of an expert (`…/7`)."""
        chunk, local = self._places[index]
        prefix, own = f"decoder.layers.{local}.", []
        each = self.layers[index].num_experts // self.checkpoint.ep
        for place in self._ranks(chunk):
            for name, tiles in self.checkpoint.tensors[place].items():
                if not name.startswith(prefix):
                    continue
                rest = name.removeprefix(prefix)
                half = "mlp" if rest.startswith(("mlp.", "pre_mlp")) else "attention"
                found = _EXPERT.fullmatch(rest)
                expert = f"mlp.experts/{place.ep_rank * each + int(found[1] or found[2])}" if found else None
                if part in ("", half, expert):
                    own.append(tiles[0].stored.name)
        return own

    def _ranks(self, chunk: Chunk) -> list[Place]:
        c = self.checkpoint
        return [Place(chunk.pp_rank, chunk.vpp_chunk, t, e) for t, e in ranks(c.tp, c.ep, c.etp)]

    def _named(self, chunk: Chunk, *names: str) -> list[str]:
        held = [self.checkpoint.tensors[place] for place in self._ranks(chunk)]
        return [named[name][0].stored.name for named in held for name in names if name in named]

    def late_tensors(self) -> tuple[list[str], list[str]]:
        """The stored tensors used after the layers: the norm's, and the head's."""
        last = self.module.chunks[-1]
        heads = self._named(last, "output_layer.weight") or self.early_tensors()
        return self._named(last, "decoder.final_layernorm.weight"), heads

    def early_tensors(self) -> list[str]:
        """The stored tensors used before the layers."""
        return self._named(self.module.chunks[0], "embedding.word_embeddings.weight")


def depth(checkpoint: MegatronCheckpoint) -> list[Chunk]:
    """A checkpoint's chunks in order of depth: virtual chunks are dealt to pipeline ranks in turn.

    Raises:
        BadInput: a chunk's layers are not numbered from 0 without a gap.
    """
    chunks = []
    for v in range(checkpoint.vpp):
        for p in range(checkpoint.pp):
            names = checkpoint.tensors[Place(p, v, 0)]
            numbers = sorted({int(name.split(".")[2]) for name in names if name.startswith("decoder.layers.")})
            if numbers != list(range(len(numbers))):
                raise BadInput(f"pipeline rank {p}, chunk {v} holds layers {numbers}", where=str(checkpoint.release))
            chunks.append(Chunk(p, v, len(numbers)))
    return chunks
