"""Which layers an argument of Megatron-LM speaks of, as it is typed: `moe_layer_freq`."""

from __future__ import annotations

import ast
from typing import Any

from llmconvert.errors import BadInput

_MOST_LAYERS = 10_000


def layer_list(text: str) -> int | list[int]:
    """`moe_layer_freq` as it is typed: a number, or a Python list such as `([0]*3+[1]*58)`.

    Raises:
        BadInput: it is neither, or speaks of more layers than any model has.
    """

    def times(left: Any, right: Any) -> Any:
        if any(isinstance(each, int) and each > _MOST_LAYERS for each in (left, right)):
            raise ValueError(text)
        return bounded(left * right)

    def bounded(value: Any) -> Any:
        if isinstance(value, list) and len(value) > _MOST_LAYERS:
            raise ValueError(text)
        return value

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.List(elts=entries):
                return [value(entry) for entry in entries]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return bounded(value(left) + value(right))
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return times(value(left), value(right))
        raise ValueError(text)

    try:
        found = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        found = None
    if isinstance(found, int) or (isinstance(found, list) and all(isinstance(entry, int) for entry in found)):
        return found
    raise BadInput(f"`moe_layer_freq` {text[:60]!r} is not understood", where="args")
