"""What is looked at: cosines between layers' inputs and outputs, the logit lens, attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from llmconvert.debug.passes import Pass, open_pass
from llmconvert.debug.prompts import Prompt, make_prompt
from llmconvert.errors import Usage

Model = nn.Module | str | Path


@dataclass(frozen=True)
class CosDistance:
    """How little each layer turns the residual stream.

    Attributes:
        model: the model's name.
        tokens: as text.
        layers: their numbers.
        cosine: for each layer and token the cosine between the layer's input and output, [layers][tokens].
        mean: over tokens, [layers].
    """

    model: str
    tokens: list[str]
    layers: list[int]
    cosine: list[list[float]]
    mean: list[float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TopkToken:
    """The tokens a model would give if it ended after a layer: the logit lens (nostalgebraist, 2020).

    Attributes:
        model: the model's name.
        tokens: as text.
        layers: their numbers.
        ids: the likeliest next tokens, best first, [layers][tokens][k].
        text: the same as text.
        probability: theirs.
    """

    model: str
    tokens: list[str]
    layers: list[int]
    ids: list[list[list[int]]]
    text: list[list[list[str]]]
    probability: list[list[list[float]]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class AttentionWeights:
    """Attention weights of one layer; each row of a head sums to one.

    Attributes:
        model: the model's name.
        tokens: as text.
        layer: its number.
        weights: [heads][queries][keys].
        token_a, token_b: positions of the query and the key looked at, or None.
        between: the weight from the one to the other, a head; None where they are not given.
    """

    model: str
    tokens: list[str]
    layer: int
    weights: list[list[list[float]]]
    token_a: int | None = None
    token_b: int | None = None
    between: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _name(model: Model) -> str:
    if isinstance(model, nn.Module):
        return str(getattr(model, "name_or_path", "") or type(model).__name__)
    return str(model)


def look(
    model: Model, prompt: str | None, input_ids: Sequence[int] | Tensor | None, tokenizer: Any, dtype: str, device: str
) -> tuple[Pass, Prompt]:
    """A model and a prompt, ready to be looked at; see `cos_distance` for the arguments."""
    folder = str(getattr(model, "name_or_path", "")) if isinstance(model, nn.Module) else str(model)
    made = make_prompt(prompt, input_ids, tokenizer, folder)
    return open_pass(model, made.input_ids, dtype=dtype, device=device), made


def layer_number(layer: int, count: int) -> int:
    """A layer's number, counted from the end where negative.

    Raises:
        Usage: there is no such layer.
    """
    if not -count <= layer < count:
        raise Usage(f"there is no layer {layer}: the model has {count}, from 0 to {count - 1}")
    return layer % count


def cos_distance(
    model: Model, layer: int | None = None, *, prompt: str | None = None,
    input_ids: Sequence[int] | Tensor | None = None, tokenizer: Any = None, dtype: str = "float32", device: str = "auto",
) -> CosDistance:  # fmt: skip
    """The cosine between the hidden states a layer is given and those it gives.

    Args:
        model: a model in memory, or a checkpoint directory, Hugging Face's or Megatron's, which is read layer by layer.
        layer: one layer, from the end where negative; all where None.
        prompt: text; or
        input_ids: one row of ids.
        tokenizer: of the model; looked for in its directory where None.
        dtype: of the computation, for a directory.
        device: for a directory.

    Raises:
        LlmconvertError: there is no such layer, or the model cannot be run on the prompt.
    """
    run, made = look(model, prompt, input_ids, tokenizer, dtype, device)
    layers = list(range(run.num_layers)) if layer is None else [layer_number(layer, run.num_layers)]
    streams = run.streams(layers[-1] + 1)
    # The last layer's output is taken before the final norm, which would change the angle.
    cosine = [
        functional.cosine_similarity(streams[i][0].double(), streams[i + 1][0].to(streams[i].device).double(), dim=-1)
        for i in layers
    ]
    values = [each.tolist() for each in cosine]
    return CosDistance(_name(model), made.tokens, layers, values, [float(each.mean()) for each in cosine])


def topk_token(
    model: Model, layer: int | None = None, k: int = 10, *, prompt: str | None = None,
    input_ids: Sequence[int] | Tensor | None = None, tokenizer: Any = None, dtype: str = "float32", device: str = "auto",
) -> TopkToken:  # fmt: skip
    """The likeliest next tokens at each position, read off after a layer through the final norm and the head.

    After the last layer they are the model's own. Arguments as of `cos_distance`, and:

    Args:
        model: see there.
        layer: see there.
        k: how many.
        prompt: see there.
        input_ids: see there.
        tokenizer: see there.
        dtype: see there.
        device: see there.

    Raises:
        LlmconvertError: as there, or `k` is not positive.
    """
    if k < 1:
        raise Usage(f"the number of tokens to show is {k}, and must be at least 1")
    run, made = look(model, prompt, input_ids, tokenizer, dtype, device)
    layers = list(range(run.num_layers)) if layer is None else [layer_number(layer, run.num_layers)]
    streams = run.streams(layers[-1] + 1)
    ids, probability = [], []
    for logits in run.logits([streams[i + 1] for i in layers]):
        best = logits.float().softmax(-1).topk(min(k, logits.shape[-1]), -1)
        ids.append(best.indices.tolist())
        probability.append(best.values.tolist())
    text = [[[made.show(number) for number in place] for place in row] for row in ids]
    return TopkToken(_name(model), made.tokens, layers, ids, text, probability)


def attention_weights(
    model: Model, layer: int, token_a: int | str | None = None, token_b: int | str | None = None, *,
    prompt: str | None = None, input_ids: Sequence[int] | Tensor | None = None, tokenizer: Any = None,
    dtype: str = "float32", device: str = "auto",
) -> AttentionWeights:  # fmt: skip
    """The attention weights of one layer, whatever implementation the model runs with.

    That layer alone is computed once more with eager attention. Arguments as of `cos_distance`, and:

    Args:
        model: see there.
        layer: see there.
        token_a: the query: a position, or the text of a token that stands once.
        token_b: the key, likewise; not after the query.
        prompt: see there.
        input_ids: see there.
        tokenizer: see there.
        dtype: see there.
        device: see there.

    Raises:
        LlmconvertError: as there, or only one of two tokens is given, or the key comes after the query.
    """
    run, made = look(model, prompt, input_ids, tokenizer, dtype, device)
    if (token_a is None) != (token_b is None):
        raise Usage("give both tokens, or none for the whole matrix")
    number = layer_number(layer, run.num_layers)
    places = None if token_a is None or token_b is None else (made.position(token_a), made.position(token_b))
    if places is not None and places[1] > places[0]:
        raise Usage(f"position {places[0]} does not see position {places[1]}, which comes after it",
                    hint="the first token is the query, the second the key")  # fmt: skip
    weights = run.attention(number)
    if places is None:
        return AttentionWeights(_name(model), made.tokens, number, weights.tolist())
    between = weights[:, places[0], places[1]].tolist()
    return AttentionWeights(_name(model), made.tokens, number, weights.tolist(), *places, between)
