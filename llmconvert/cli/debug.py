"""`llmconvert debug`: look inside one checkpoint, or two side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmconvert.cli.output import Output, say
from llmconvert.errors import LlmconvertError, Usage

if TYPE_CHECKING:
    from llmconvert.debug.tables import Seen

app = typer.Typer(help="Look inside a checkpoint, layer by layer.", no_args_is_help=True, rich_markup_mode=None)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="a checkpoint directory, Hugging Face's or Megatron's")]
Prompt = Annotated[str | None, typer.Option(help="text; needs a tokenizer in SRC")]
InputIds = Annotated[str | None, typer.Option(metavar="5,17,42", help="token ids in place of text")]
Against = Annotated[Path | None, typer.Option(metavar="OTHER", help="a second checkpoint, shown beside the first")]
TokenizerOption = Annotated[Path | None, typer.Option(metavar="DIR", help="where the tokenizer is, if not in SRC")]
ComputeDtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda:1")]
Png = Annotated[Path | None, typer.Option(metavar="FILE", help="draw a plot")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


def _ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise Usage(f"`--input-ids {text}` is not a list of numbers", hint="such as `--input-ids 5,17,42`") from None


def _options(
    source: Path, prompt: str | None, input_ids: str | None, tokenizer: Path | None, dtype: str, device: str
) -> dict[str, Any]:
    """What all three commands are given; both models see the first's tokens."""
    from llmconvert.checkpoint.directory import require_directory
    from llmconvert.debug.prompts import make_prompt, read_tokenizer

    require_directory(source)
    reader = None if tokenizer is None else read_tokenizer(str(tokenizer))
    if tokenizer is not None and reader is None:
        raise Usage("there is no tokenizer that can be read", where=str(tokenizer))
    made = make_prompt(prompt, _ids(input_ids), reader, str(source))
    return {"input_ids": made.input_ids, "tokenizer": made.tokenizer, "dtype": dtype, "device": device}


def _each(look: Callable[[Path], Seen], source: Path, against: Path | None) -> list[Seen]:
    """What is seen of each checkpoint; an error says of which."""
    found = []
    for path in (source, against):
        if path is None:
            continue
        try:
            found.append(look(path))
        except LlmconvertError as error:
            error.where = error.where or str(path)
            raise
    return found


def _show(found: list[Seen], png: Path | None, json: bool) -> None:
    from llmconvert.debug import plots, tables

    if png is not None:
        if png.is_dir() or not png.absolute().parent.is_dir():
            raise Usage("the plot's file is a directory, or in one that does not exist", where=str(png.absolute()))
        note = plots.save(found, png)
        if note and not json:
            say(f"note: {note}")
    value = found[0].to_dict() if len(found) == 1 else {"a": found[0].to_dict(), "b": found[1].to_dict()}
    Output(json_mode=json).result(value, tables.table(found))


@app.command("cos-distance")
def cos_distance_command(
    source: Source,
    prompt: Prompt = None,
    input_ids: InputIds = None,
    layer: Annotated[int | None, typer.Option(help="one layer, from the end if negative; all if absent")] = None,
    against: Against = None,
    tokenizer: TokenizerOption = None,
    compute_dtype: ComputeDtype = "float32",
    device: Device = "auto",
    png: Png = None,
    json: Json = False,
) -> None:
    """The cosine between the hidden states each layer is given and those it gives."""
    from llmconvert.debug import cos_distance

    options = _options(source, prompt, input_ids, tokenizer, compute_dtype, device)
    _show(_each(lambda path: cos_distance(path, layer, **options), source, against), png, json)


@app.command("topk-token")
def topk_token_command(
    source: Source,
    prompt: Prompt = None,
    input_ids: InputIds = None,
    layer: Annotated[int | None, typer.Option(help="one layer, from the end if negative; all if absent")] = None,
    k: Annotated[int, typer.Option("-K", "--topk", min=1, help="how many tokens")] = 10,
    against: Against = None,
    tokenizer: TokenizerOption = None,
    compute_dtype: ComputeDtype = "float32",
    device: Device = "auto",
    png: Png = None,
    json: Json = False,
) -> None:
    """The likeliest next tokens after each layer, through the final norm and the head: the logit lens."""
    from llmconvert.debug import topk_token

    options = _options(source, prompt, input_ids, tokenizer, compute_dtype, device)
    _show(_each(lambda path: topk_token(path, layer, k, **options), source, against), png, json)


@app.command("attention")
def attention_command(
    source: Source,
    layer: Annotated[int, typer.Option(help="which layer, from the end if negative")],
    prompt: Prompt = None,
    input_ids: InputIds = None,
    token_a: Annotated[str | None, typer.Option(help="the query: a position, or the text of a token")] = None,
    token_b: Annotated[str | None, typer.Option(help="the key, likewise")] = None,
    against: Against = None,
    tokenizer: TokenizerOption = None,
    compute_dtype: ComputeDtype = "float32",
    device: Device = "auto",
    png: Png = None,
    json: Json = False,
) -> None:
    """The attention weights of a layer, a head: from one token to another, or the whole matrix."""
    from llmconvert.debug import attention_weights

    options = _options(source, prompt, input_ids, tokenizer, compute_dtype, device)
    query, key = (_place(token) for token in (token_a, token_b))
    _show(_each(lambda path: attention_weights(path, layer, query, key, **options), source, against), png, json)


def _place(token: str | None) -> int | str | None:
    if token is None:
        return None
    try:
        return int(token)
    except ValueError:
        return token
