"""Compare two checkpoints as models: the same tokens through both, the logits side by side."""

from __future__ import annotations

import gc
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmconvert.checkpoint.directory import open_checkpoint
from llmconvert.errors import Usage
from llmconvert.verify.models import load_model

_LENGTHS = (5, 17, 33)
_GREEDY_TOKENS = 16
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LogitsReport:
    """How far two models' logits are apart.

    Attributes:
        verdict: whether every logit is finite and `relative` is within `tolerance`.
        reason: the verdict in words.
        max_abs, mean_abs: differences of logits.
        relative: max_abs over the largest logit of the first model.
        kl_divergence: mean KL(first || second) a token, in nats.
        top1_agreement, top5_agreement: share of tokens whose best one, and set of five best, agree.
        greedy_agreement: share of 16 greedily continued tokens that agree.
        num_tokens: tokens compared.
        tolerance: the largest `relative` allowed.
        dtype, device: how it was computed.
    """

    verdict: bool
    reason: str
    max_abs: float
    mean_abs: float
    relative: float
    kl_divergence: float
    top1_agreement: float
    top5_agreement: float
    greedy_agreement: float
    num_tokens: int
    tolerance: float
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class _Probe:
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def _probes(vocab_size: int, longest: int, seed: int, padded: bool = True) -> list[_Probe]:
    """Seeded random ids: a left-padded batch of several lengths, and a row whose positions reach far.

    Without `padded` the rows of the batch come one by one, the longest first.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(n for n in _LENGTHS if n <= longest or n == min(_LENGTHS))
    lengths = [n for n in _LENGTHS if n <= width]
    ids = torch.randint(0, vocab_size, (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    spread = torch.linspace(0, longest - 1, width).long()[None]
    far = torch.randint(0, vocab_size, (1, width), generator=generator)
    batch = [_Probe(ids, mask, places)]
    if not padded:
        batch = [_Probe(ids[i : i + 1, -n:], mask[i : i + 1, -n:], places[i : i + 1, -n:])
                 for i, n in reversed(list(enumerate(lengths)))]  # fmt: skip
    return [*batch, _Probe(far, torch.ones_like(far), spread)]


def _forward(model: torch.nn.Module, probe: _Probe, device: str) -> Tensor:
    out = model(
        input_ids=probe.input_ids.to(device),
        attention_mask=probe.attention_mask.to(device),
        position_ids=probe.position_ids.to(device),
    )
    logits: Tensor = getattr(out, "logits", out)
    return logits[probe.attention_mask.bool().to(logits.device)].double().cpu()


def _greedy(model: torch.nn.Module, prompt: Tensor, device: str, common: int) -> list[int]:
    ids = prompt.to(device)
    for _ in range(_GREEDY_TOKENS):
        out = model(input_ids=ids)
        logits: Tensor = getattr(out, "logits", out)
        ids = torch.cat((ids, logits[:, -1:, :common].argmax(-1)), dim=1)
    return [int(token) for token in ids[0, prompt.shape[1] :]]


@torch.no_grad()
def _run(
    directory: Path, probes: list[_Probe], dtype: torch.dtype, device: str, common: int
) -> tuple[list[Tensor], list[int]]:
    model = load_model(directory, dtype, device)
    logits = [_forward(model, probe, device)[:, :common] for probe in probes]
    greedy = _greedy(model, probes[0].input_ids[-1:, -min(_LENGTHS) :], device, common)
    del model
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return logits, greedy


def _limits(directory: Path) -> tuple[int, int]:
    config = open_checkpoint(directory).config
    vocab = config.get("vocab_size") or config.get("padded_vocab_size")
    if "padded_vocab_size" in config:
        vocab = config["padded_vocab_size"]
    keys = ("seq_length", "n_positions", "max_position_embeddings", "model_max_length", "max_sequence_length")
    longest = next((config[key] for key in keys if config.get(key)), 2048)
    return int(vocab or 0), int(longest)


def compare_logits(
    left: str | os.PathLike[str],
    right: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    device: str = "auto",
    rtol: float = 1e-4,
    seed: int = 0,
) -> LogitsReport:
    """Run the same tokens through two checkpoints, one after the other, and compare.

    Args:
        left: a checkpoint directory of any architecture transformers or the reference models know.
        right: another.
        dtype: float32, float64 or bfloat16.
        device: auto, cpu, cuda or cuda:N.
        rtol: the largest difference allowed, relative to the first model's largest logit.
        seed: of the random tokens.

    Raises:
        Usage: an unknown dtype, or vocabularies of different size.
        LlmconvertError: a checkpoint cannot be loaded.
    """
    if dtype not in _DTYPES:
        raise Usage(f"`{dtype}` is not a dtype to compute in", hint=f"choose {', '.join(_DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = Path(left), Path(right)
    (vocab, longest), (other, other_longest) = _limits(left), _limits(right)
    if vocab != other:
        raise Usage(f"the vocabularies differ: {vocab} and {other} tokens", where=f"{left}, {right}")
    # transformers takes the softmax in float32, where the lowest float64 is -inf: a row of padding would give NaN.
    probes = _probes(vocab, min(longest, other_longest), seed, padded=dtype != "float64")
    first, greedy = _run(left, probes, _DTYPES[dtype], device, vocab)
    second, other_greedy = _run(right, probes, _DTYPES[dtype], device, vocab)
    return _compare(torch.cat(first), torch.cat(second), greedy, other_greedy, rtol, dtype, device)


def _compare(
    a: Tensor, b: Tensor, greedy: list[int], other_greedy: list[int], rtol: float, dtype: str, device: str
) -> LogitsReport:
    difference = (a - b).abs()
    scale = float(a.abs().max())
    relative = float(difference.max()) / scale if scale else float(difference.max())
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    five = min(5, a.shape[-1])
    same_five = (a.topk(five).indices.sort(-1).values == b.topk(five).indices.sort(-1).values).all(-1)
    agree = sum(x == y for x, y in zip(greedy, other_greedy, strict=True)) / len(greedy)
    finite = bool(a.isfinite().all() and b.isfinite().all())
    verdict = finite and relative <= rtol
    if not finite:
        reason = "some logits are not finite"
    elif relative == 0.0:
        reason = "every logit is bit-equal"
    elif verdict:
        reason = f"logits agree to {relative:.1e} of their scale (at most {rtol:.1e} allowed)"
    else:
        reason = f"logits differ by {relative:.1e} of their scale (at most {rtol:.1e} allowed)"
    return LogitsReport(
        verdict=verdict,
        reason=reason,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        relative=relative,
        kl_divergence=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        top1_agreement=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        top5_agreement=float(same_five.double().mean()),
        greedy_agreement=agree,
        num_tokens=a.shape[0],
        tolerance=rtol,
        dtype=dtype,
        device=device,
    )
