"""Plots of what is looked at: all that was asked for is drawn, named and measured; tokens are shown as what they are."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import byte_tokenizer
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from llmconvert.debug import plots, tables
from llmconvert.debug.measures import AttentionWeights, TopkToken
from llmconvert.debug.prompts import Prompt, make_prompt, piece_bytes
from llmconvert.errors import Refused
from llmconvert.terminal import console
from llmconvert.training import curves


def _lens(layers: int, tokens: int, k: int) -> TopkToken:
    text = [[[f"{layer}.{place}.{rank}" for rank in range(k)] for place in range(tokens)] for layer in range(layers)]
    probability = [[[1 / (rank + 2) for rank in range(k)] for _ in range(tokens)] for _ in range(layers)]
    ids = [[[0] * k] * tokens] * layers
    return TopkToken("a/model", [f"t{i}" for i in range(tokens)], list(range(layers)), ids, text, probability)


def _texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(("layers", "tokens", "k"), [(1, 3, 10), (3, 2, 4), (2, 5, 1)])
def test_all_tokens_asked_for_are_drawn(layers: int, tokens: int, k: int) -> None:
    found = _lens(layers, tokens, k)
    figure = plots._topk(Figure, [found])
    axes, bar = figure.axes
    assert set(_texts(axes)) == {text for row in found.text for place in row for text in place}
    # Best on top, the last layer above the others; where the token stands is its column.
    places = {text.get_text(): text.get_position() for text in axes.texts}
    for layer in range(layers):
        for rank in range(k):
            assert places[f"{layer}.1.{rank}"] == (1, (layers - 1 - layer) * k + rank)
    assert axes.get_xlabel() == "token" and [t.get_text() for t in axes.get_xticklabels()] == found.tokens
    wanted = [str(rank + 1) for rank in range(k)] if layers == 1 else [str(layer) for layer in reversed(range(layers))]
    assert [t.get_text() for t in axes.get_yticklabels()] == wanted
    assert ("layer 0" in axes.get_title()) == (layers == 1) and "probability" in bar.get_ylabel()


def test_more_than_there_is_room_for_is_said() -> None:
    axes = plots._topk(Figure, [_lens(80, 50, 10)]).axes[0]
    assert len(axes.texts) == 80 * 40 * 2
    assert "the likeliest 2 of 10" in axes.get_title() and "the last 40 of 50 tokens" in axes.get_title()
    two = plots._topk(Figure, [_lens(3, 2, 4), _lens(2, 2, 4)])
    assert [len(axes.texts) for axes in two.axes if axes.get_xlabel() == "token"] == [24, 16]


def _weights(count: int, *places: int) -> AttentionWeights:
    weights = [[[1 / (q + 1) if key <= q else 0.0 for key in range(count)] for q in range(count)] for _ in range(3)]
    between = [head[places[0]][places[1]] for head in weights] if places else None
    return AttentionWeights("a/model", [f"t{i}" for i in range(count)], 5, weights, *(places or (None, None)), between)


def test_attention_has_a_scale_and_names() -> None:
    figure = plots._attention(Figure, [_weights(6)])
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["mean", "head 0", "head 1", "head 2"]
    assert any(axes.get_ylabel() == "attention weight" for axes in figure.axes)
    assert panels[0].get_ylabel() == "query" and all(axes.get_xlabel() == "key" for axes in panels)
    assert [t.get_text() for t in panels[1].get_yticklabels()] == [f"t{i}" for i in range(6)]
    assert not any(isinstance(patch, Rectangle) for axes in panels for patch in axes.patches)


@pytest.mark.parametrize("count", [6, 60])
def test_the_two_tokens_are_marked(count: int) -> None:
    a, b = count - 2, 1
    figure = plots._attention(Figure, [_weights(count, a, b), _weights(count, a, b)])
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 8
    for axes in panels:
        (box,) = axes.patches
        assert (box.get_x(), box.get_y(), box.get_width()) == (b - 0.5, a - 0.5, 1)
        names = {label.get_text(): label.get_fontweight() for label in axes.get_yticklabels()}
        assert names[f"A t{a}"] == "bold" and f"A t{b}" not in names
        names = {label.get_text(): label.get_fontweight() for label in axes.get_xticklabels()}
        assert names[f"B t{b}"] == "bold" and names["t0" if count == 6 else "t8"] == "normal"
        assert axes.get_title().endswith(f": {1 / (a + 1):.3f}")
    titles = [part._suptitle.get_text() for part in figure.subfigs]
    assert all(f"A = {a}:t{a} (query), B = {b}:t{b} (key)" in title for title in titles)


def test_tokens_in_a_plot_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    assert plots._plain(" fox") == "␣fox" and plots._plain("\n") == r"\n" and plots._plain("") == "∅"
    assert plots._plain("$x$") == r"\$x\$" and plots._plain("\u202ea") == r"\u202ea" and plots._plain("\ud800") == r"\ud800"
    assert len(plots._plain("x" * 99)) < 20
    found = _lens(1, 2, 2)
    found.text[0][0][:] = ["$\\frac$", "\x1b\ud800"]
    plots.save([found], tmp_path / "odd.png")
    assert (tmp_path / "odd.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Prompt:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer.write(folder)
    return make_prompt("the fox\n东模型 é", None, None, str(folder))


def test_tokens_of_a_byte_level_vocabulary(prompt: Prompt) -> None:
    assert prompt.tokens == ["the", " fox", "\n", "<E4>", "<B8>", "<9C>", "模型", " ", "<C3>", "<A9>"]
    shown = [prompt.show(number) for number in range(byte_tokenizer.write.__defaults__[0] - 100)]
    assert not any(set(text) & set("ĠĊæäÃ©¸ľ") for text in shown)
    assert len(set(shown)) == len(shown)  # each is told from all others
    assert "<FF>" in shown and "<|endoftext|>" in shown
    assert prompt.position("\n") == 2 and prompt.position("<B8>") == 4 and prompt.position("fox") == 1


def test_bytes_of_pieces() -> None:
    """Against the alphabet of the library that made byte-level vocabularies common."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for char in (*map(chr, range(0x100)), "模", "é", "\U0001f600"):
        pieces = "".join(piece for piece, _ in level.pre_tokenize_str(char))
        assert piece_bytes(pieces) == char.encode()
    assert piece_bytes("<0xE6><0x98>") == b"\xe6\x98" and piece_bytes(b"\xff") == b"\xff"
    assert piece_bytes("模") is None and piece_bytes("") is None and piece_bytes(None) is None


def test_tables_show_odd_tokens(prompt: Prompt, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = prompt.tokens
    found = TopkToken("m", tokens, [0], [[[0]] * len(tokens)], [[[token] for token in tokens]], [[[0.5]] * len(tokens)])
    console().print(tables.table([found]))
    out = capsys.readouterr().out
    assert r"'\n'" in out and "'<E4>'" in out and "' fox'" in out


def test_without_matplotlib_the_hint_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("matplotlib", "tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Refused) as caught:
        plots.save([_lens(1, 1, 1)], tmp_path / "x.png")
    assert caught.value.hint == "pip install 'llmconvert[plot]'"
    with pytest.raises(Exception, match="matplotlib") as other:
        curves.plot([], tmp_path / "x.png", 0.9)
    assert getattr(other.value, "hint", None) == "pip install 'llmconvert[plot]'"
