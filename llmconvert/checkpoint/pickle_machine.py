"""Read a pickle without running it: a machine for the opcodes that `torch.save` writes, which calls nothing.

Python's own unpickler builds what a pickle asks for and can be kept from running code, but not from filling memory: an
index allocates a table of its size, a tuple of tuples of tuples takes for ever to hash, attributes are set on whatever
lies on the stack. This machine knows containers, plain values and names; a name is what the caller makes of it, and
doing something to it leaves a note. Memory and time are bounded by the pickle's length.

Opcodes: CPython's `Lib/pickletools.py`. Those of protocol 0 in text, of extensions and of buffers outside the pickle are
not among them: torch cannot write them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

_MAX_DEPTH = 100
_DEEP = f"it is nested more than {_MAX_DEPTH} deep"
_MAX_LONG_BYTES = 128
_SHARED, _SPARE = 8, 10_000
"""What a pickle may stand for when everything it shares is written out: so many values a byte, and these on top."""


class PickleError(ValueError):
    """The bytes are no pickle, or none that `torch.save` writes."""


class Known:
    """A name of which the reader knows what a call would give.

    Attributes:
        call: the function that gives it; it gets the arguments as one tuple.
    """

    __slots__ = ("call",)

    def __init__(self, call: Callable[[tuple[Any, ...]], Any]) -> None:
        self.call = call


class Inert:
    """What a name in a pickle becomes that is harmless and useless here: it does nothing, whatever is done to it.

    Attributes:
        name: in full.
        arguments: what it was called with; () for the bare name.
        state: what it was given as its state, or None.
    """

    __slots__ = ("arguments", "called", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] = (), *, called: bool = False) -> None:
        self.name, self.arguments, self.called = name, arguments, called
        self.state: Any = None


_PLAIN_KEYS = frozenset({str, int, float, bool, bytes, type(None), Inert})
_CONTAINERS = frozenset({list, dict, tuple, Inert})

_SIGNED = struct.Struct("<i").unpack_from
_UNSIGNED = struct.Struct("<I").unpack_from
_UNSIGNED64 = struct.Struct("<Q").unpack_from
_SHORT = struct.Struct("<H").unpack_from
_DOUBLE = struct.Struct(">d").unpack_from


def load_pickle(
    data: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None = None
) -> Any:  # fmt: skip
    """The object a pickle stands for; what is in its sets is left out.

    Args:
        data: the pickle, from its first byte on; what follows its end is ignored.
        find: a `Known` or an `Inert` for a module and a name; it raises to refuse.
        persistent: what a persistent id stands for; there must be none if None.

    Raises:
        PickleError: it is no pickle, is cut short, holds what `torch.save` does not write, contains itself, or is small
            and stands for something huge.
    """
    try:
        value = _run(data, find, persistent)
    except (IndexError, struct.error):
        raise PickleError("it is cut short, or takes what is not there") from None
    except KeyError:
        raise PickleError("it takes what it has not kept") from None
    except UnicodeDecodeError:
        raise PickleError("it holds text that is not UTF-8") from None
    check_tree(value, _SHARED * len(data) + _SPARE)
    return value


def _run(data: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None) -> Any:
    # One function, and the most frequent opcodes first: a rank file has some 40 opcodes a tensor.
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[int, Any] = {}
    names: dict[tuple[str, str], Any] = {}
    at = 0
    while True:
        op = data[at]
        at += 1
        if op == 0x71:  # BINPUT
            memo[data[at]] = stack[-1]
            at += 1
        elif op == 0x72:  # LONG_BINPUT
            memo[_UNSIGNED(data, at)[0]] = stack[-1]
            at += 4
        elif op == 0x68:  # BINGET
            stack.append(memo[data[at]])
            at += 1
        elif op == 0x4B:  # BININT1
            stack.append(data[at])
            at += 1
        elif op == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif op == 0x28:  # MARK
            if len(below) >= _MAX_DEPTH:
                raise PickleError(_DEEP)
            below.append(stack)
            stack = []
        elif op == 0x74:  # TUPLE
            stack, found = below.pop(), tuple(stack)
            stack.append(found)
        elif op == 0x58:  # BINUNICODE
            end = at + 4 + _UNSIGNED(data, at)[0]
            stack.append(_part(data, at + 4, end).decode())
            at = end
        elif op == 0x8C:  # SHORT_BINUNICODE
            end = at + 1 + data[at]
            stack.append(_part(data, at + 1, end).decode())
            at = end
        elif op == 0x52 or op == 0x81:  # REDUCE, NEWOBJ
            arguments = stack.pop()
            stack[-1] = _called(stack[-1], arguments)
        elif op == 0x6A:  # LONG_BINGET
            stack.append(memo[_UNSIGNED(data, at)[0]])
            at += 4
        elif op == 0x4D:  # BININT2
            stack.append(_SHORT(data, at)[0])
            at += 2
        elif op == 0x4A:  # BININT
            stack.append(_SIGNED(data, at)[0])
            at += 4
        elif op == 0x51:  # BINPERSID
            if persistent is None:
                raise PickleError("it refers to what lies outside it")
            stack[-1] = persistent(stack[-1])
        elif op == 0x85:  # TUPLE1
            stack[-1] = (stack[-1],)
        elif op == 0x86:  # TUPLE2
            second = stack.pop()
            stack[-1] = (stack[-1], second)
        elif op == 0x87:  # TUPLE3
            third, second = stack.pop(), stack.pop()
            stack[-1] = (stack[-1], second, third)
        elif op == 0x89:  # NEWFALSE
            stack.append(False)
        elif op == 0x88:  # NEWTRUE
            stack.append(True)
        elif op == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif op == 0x4E:  # NONE
            stack.append(None)
        elif op == 0x7D:  # EMPTY_DICT
            stack.append({})
        elif op == 0x75:  # SETITEMS
            stack, entries = below.pop(), stack
            _set_items(stack[-1], entries)
        elif op == 0x73:  # SETITEM
            item, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, item])
        elif op == 0x62:  # BUILD
            state = stack.pop()
            _build(stack[-1], state)
        elif op == 0x5D:  # EMPTY_LIST
            stack.append([])
        elif op == 0x8F:  # EMPTY_SET
            stack.append(Inert("builtins.set", called=True))
        elif op == 0x65 or op == 0x90:  # APPENDS, ADDITEMS
            stack, entries = below.pop(), stack
            _extend(stack[-1], entries)
        elif op == 0x61:  # APPEND
            entry = stack.pop()
            _extend(stack[-1], [entry])
        elif op == 0x91:  # FROZENSET
            stack = below.pop()
            stack.append(Inert("builtins.frozenset", called=True))
        elif op == 0x63 or op == 0x93:  # GLOBAL, STACK_GLOBAL
            if op == 0x63:
                end = data.find(b"\n", at)
                last = data.find(b"\n", end + 1)
                if end < 0 or last < 0:
                    raise PickleError("it is cut short")
                module, name = data[at:end].decode(), data[end + 1 : last].decode()
                at = last + 1
            else:
                name, module = stack.pop(), stack.pop()
                if type(name) is not str or type(module) is not str:
                    raise PickleError("a name in it is not text")
            if (module, name) not in names:
                names[module, name] = find(module, name)
            stack.append(names[module, name])
        elif op == 0x47:  # BINFLOAT
            stack.append(_DOUBLE(data, at)[0])
            at += 8
        elif op == 0x8A or op == 0x8B:  # LONG1, LONG4
            start = at + (1 if op == 0x8A else 4)
            size = data[at] if op == 0x8A else _UNSIGNED(data, at)[0]
            if size > _MAX_LONG_BYTES:
                raise PickleError(f"it holds a number of {size:,} bytes")
            at = start + size
            stack.append(int.from_bytes(_part(data, start, at), "little", signed=True))
        elif op == 0x55 or op == 0x43:  # SHORT_BINSTRING, SHORT_BINBYTES
            end = at + 1 + data[at]
            stack.append(_bytes(_part(data, at + 1, end), text=op == 0x55))
            at = end
        elif op == 0x42 or op == 0x54:  # BINBYTES, BINSTRING
            end = at + 4 + _UNSIGNED(data, at)[0]
            stack.append(_bytes(_part(data, at + 4, end), text=op == 0x54))
            at = end
        elif op == 0x8E or op == 0x96 or op == 0x8D:  # BINBYTES8, BYTEARRAY8, BINUNICODE8
            end = at + 8 + _UNSIGNED64(data, at)[0]
            part = _part(data, at + 8, end)
            stack.append(part.decode() if op == 0x8D else part)
            at = end
        elif op == 0x92:  # NEWOBJ_EX
            named, arguments = stack.pop(), stack.pop()
            if type(named) is not dict:
                raise PickleError("it gives named arguments that have no names")
            stack[-1] = _called(stack[-1], arguments)
        elif op == 0x30:  # POP
            if stack:
                stack.pop()
            else:
                stack = below.pop()
        elif op == 0x31:  # POP_MARK
            stack = below.pop()
        elif op == 0x32:  # DUP
            stack.append(stack[-1])
        elif op == 0x80:  # PROTO
            if data[at] > 5:
                raise PickleError(f"it is of protocol {data[at]}")
            at += 1
        elif op == 0x95:  # FRAME
            if at + 8 + _UNSIGNED64(data, at)[0] > len(data):
                raise PickleError("it is cut short")
            at += 8
        elif op == 0x2E:  # STOP
            if below or len(stack) != 1:
                raise PickleError("it ends in the middle")
            return stack[0]
        else:
            raise PickleError(f"it has the opcode 0x{op:02x}, which torch.save does not write")


def _part(data: bytes, start: int, end: int) -> bytes:
    if end > len(data):
        raise PickleError("it is cut short")
    return data[start:end]


def _bytes(part: bytes, *, text: bool) -> Any:
    """Bytes, or what Python 2 called text."""
    return part.decode("ascii") if text and part.isascii() else part


def _called(function: Any, arguments: Any) -> Any:
    if type(arguments) is not tuple:
        raise PickleError("it calls something with what are no arguments")
    if type(function) is Known:
        return function.call(arguments)
    if type(function) is Inert and not function.called:
        return Inert(function.name, arguments, called=True)
    raise PickleError("it calls what is no function")


def _build(target: Any, state: Any) -> None:
    if type(target) is Inert and target.called:
        target.state = state
    elif type(target) is not dict:  # attributes of a state dict: `_metadata`
        raise PickleError("it gives a state to what has none")


def _set_items(target: Any, entries: list[Any]) -> None:
    if len(entries) % 2:
        raise PickleError("it has a key without a value")
    if type(target) is dict:
        for k in range(0, len(entries), 2):
            target[_key(entries[k])] = entries[k + 1]
    elif type(target) is not Inert or not target.called:
        raise PickleError("it sets entries of what has none")


def _key(value: Any) -> Any:
    """A dictionary's key: plain, or a tuple of plain values, so that it takes no time to hash."""
    if type(value) not in _PLAIN_KEYS and not (
        type(value) is tuple and len(value) < _MAX_DEPTH and all(type(entry) in _PLAIN_KEYS for entry in value)
    ):
        raise PickleError("it has a key that is no plain value")
    return value


def _extend(target: Any, entries: list[Any]) -> None:
    if type(target) is list:
        target += entries
    elif type(target) is not Inert or not target.called:
        raise PickleError("it adds to what is no list")


def check_tree(value: Any, limit: int) -> None:
    """Check that a value can be walked: it does not contain itself, and is neither deep nor huge when written out.

    Args:
        value: of lists, dictionaries, tuples and `Inert`; anything else counts as one.
        limit: of the values in it, each counted wherever it is reached.

    Raises:
        PickleError: it cannot.
    """
    done: dict[int, tuple[int, int]] = {}  # how many values it is when written out, and how deep
    open_now: set[int] = set()
    pending: list[tuple[Any, list[Any] | None]] = [(value, None)]
    while pending:
        container, within = pending.pop()
        own = id(container)
        if within is None:
            if type(container) not in _CONTAINERS or own in done:
                continue
            if own in open_now:
                raise PickleError("it contains itself")
            entries = _entries(container)
            within = [entry for entry in entries if type(entry) in _CONTAINERS]
            if within:
                open_now.add(own)
                if len(open_now) >= _MAX_DEPTH:
                    raise PickleError(_DEEP)
                pending.append((container, within))
                pending += [(entry, None) for entry in within]
                continue
            size, depth = 1 + len(entries), 1
        else:
            open_now.discard(own)
            known = [done[id(entry)] for entry in within]
            size = 1 + len(_entries(container)) + sum(count for count, _ in known)
            depth = 1 + max(deep for _, deep in known)
        if depth > _MAX_DEPTH:
            raise PickleError(_DEEP)
        if size > limit:
            raise PickleError("it is small and stands for something huge")
        done[own] = (size, depth)


def _entries(container: Any) -> list[Any] | tuple[Any, ...]:
    if type(container) is dict:
        return [*container, *container.values()]
    if type(container) is Inert:
        return [*container.arguments, container.state]
    return container  # type: ignore[no-any-return]
