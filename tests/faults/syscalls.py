"""Stop a process at chosen system calls, and let them happen, fail, fall short, or be its last.

Linux hands the calls of a filtered process to whoever holds the filter's listener (`SECCOMP_RET_USER_NOTIF`, see
seccomp(2) and seccomp_unotify(2)). What is met this way is met whoever makes the call: `os`, `io`, `pathlib`, `shutil`,
ctypes, an extension module, a thread, a child process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

_CONTINUE, _NOTIFY = 0x7FFF0000, 0x7FC00000
_NEW_LISTENER, _WAIT_KILLABLE = 1 << 3, 1 << 5
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTE, _REPLY = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI")
_MACHINES = {"x86_64": (0xC000003E, 317, 0), "aarch64": (0xC00000B7, 277, 1)}
"""Of each machine: its number in a filter, that of the call `seccomp`, and the column of `CALLS`."""
_PIDFD_GETFD = 438
_AT_FDCWD = -100


class Call(NamedTuple):
    """A system call.

    Attributes:
        numbers: on x86_64 and on aarch64; None where it is not there.
        kind: what it does.
        files: which arguments name files: a descriptor (n), or a path with the directory it starts from (d, n).
    """

    numbers: tuple[int | None, int | None]
    kind: str
    files: tuple[int | tuple[int | None, int], ...]


CALLS: dict[str, Call] = {
    "open": Call((2, None), "open", ((None, 0),)),
    "openat": Call((257, 56), "open", ((0, 1),)),
    "openat2": Call((437, 437), "open", ((0, 1),)),
    "creat": Call((85, None), "open", ((None, 0),)),
    "mkdir": Call((83, None), "make", ((None, 0),)),
    "mkdirat": Call((258, 34), "make", ((0, 1),)),
    "link": Call((86, None), "make", ((None, 0), (None, 1))),
    "linkat": Call((265, 37), "make", ((0, 1), (2, 3))),
    "symlink": Call((88, None), "make", ((None, 1),)),
    "symlinkat": Call((266, 36), "make", ((1, 2),)),
    "rmdir": Call((84, None), "remove", ((None, 0),)),
    "unlink": Call((87, None), "remove", ((None, 0),)),
    "unlinkat": Call((263, 35), "remove", ((0, 1),)),
    "rename": Call((82, None), "rename", ((None, 0), (None, 1))),
    "renameat": Call((264, 38), "rename", ((0, 1), (2, 3))),
    "renameat2": Call((316, 276), "rename", ((0, 1), (2, 3))),
    "write": Call((1, 64), "write", (0,)),
    "writev": Call((20, 66), "write", (0,)),
    "pwrite64": Call((18, 68), "write", (0,)),
    "pwritev": Call((296, 70), "write", (0,)),
    "pwritev2": Call((328, 287), "write", (0,)),
    "sendfile": Call((40, 71), "write", (0, 1)),
    "copy_file_range": Call((326, 285), "write", (2, 0)),
    "ftruncate": Call((77, 46), "size", (0,)),
    "truncate": Call((76, 45), "size", ((None, 0),)),
    "fallocate": Call((285, 47), "size", (0,)),
    "fsync": Call((74, 82), "sync", (0,)),
    "fdatasync": Call((75, 83), "sync", (0,)),
    "chmod": Call((90, None), "mode", ((None, 0),)),
    "fchmod": Call((91, 52), "mode", (0,)),
    "fchmodat": Call((268, 53), "mode", ((0, 1),)),
    "flock": Call((73, 32), "lock", (0,)),
    "read": Call((0, 63), "read", (0,)),
    "pread64": Call((17, 67), "read", (0,)),
    "preadv": Call((295, 69), "read", (0,)),
    "preadv2": Call((327, 286), "read", (0,)),
    "getdents64": Call((217, 61), "list", (0,)),
    "stat": Call((4, None), "look", ((None, 0),)),
    "lstat": Call((6, None), "look", ((None, 0),)),
    "newfstatat": Call((262, 79), "look", ((0, 1),)),
    "statx": Call((332, 291), "look", ((0, 1),)),
    "access": Call((21, None), "look", ((None, 0),)),
    "faccessat": Call((269, 48), "look", ((0, 1),)),
}
"""The calls that touch files, by kind: open (for reading), create (an open that writes), make, remove, rename, write,
size, sync, mode, lock, read, list, look."""

KINDS = frozenset({call.kind for call in CALLS.values()} | {"create"})
CHANGES = frozenset({"create", "make", "remove", "rename", "write", "size", "sync", "mode", "lock"})
"""The kinds that change something, or make it last."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FLAGS = {"open": 1, "openat": 2}


class Note(NamedTuple):
    """A call that waits for an answer.

    Attributes:
        ident: the kernel's number of it.
        thread: whose it is.
        name: of `CALLS`.
        kind: likewise.
        files: the files it names, as absolute paths, links not followed; what cannot be told is left out.
        arguments: of the call.
    """

    ident: int
    thread: int
    name: str
    kind: str
    files: tuple[str, ...]
    arguments: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.files)})"


@dataclass(frozen=True)
class Answer:
    """What becomes of a call: it happens, unless an error or a value takes its place.

    Attributes:
        error: such as errno.EIO.
        value: what the call is to return.
    """

    error: int = 0
    value: int | None = None


PROCEED = Answer()


@lru_cache
def unavailable() -> str | None:
    """Why calls cannot be stopped here, or None where they can."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return f"system calls are stopped on Linux on {' or '.join(_MACHINES)} only"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if not child:
            try:
                filter_calls(frozenset({"sync"}), theirs)
            except OSError:
                os._exit(1)
            os._exit(0)
        theirs.close()
        listener = receive_listener(ours)
        if listener is not None:
            os.close(listener)
        os.waitpid(child, 0)
    return None if listener is not None else "the kernel lets nobody listen to system calls (seccomp)"


def filter_calls(kinds: frozenset[str], channel: socket.socket) -> None:
    """In a process that is to be stopped: install the filter, and send its listener through a socket.

    Args:
        kinds: the kinds of calls to stop it at.
        channel: to whoever holds `receive_listener`'s end.

    Raises:
        OSError: the kernel refuses.
    """
    machine, seccomp, column = _MACHINES[platform.machine()]
    # Load the machine's number and return "let it happen" for another's; then compare the call's number with each.
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, machine), (0x06, 0, 0, _CONTINUE), (0x20, 0, 0, 0)]
    for name, call in CALLS.items():
        number = call.numbers[column]
        if number is None or not kinds & ({call.kind, "create"} if call.kind == "open" else {call.kind}):
            continue
        if name in _FLAGS and "open" not in kinds:
            # An open for reading is let be here, which spares most of the stops: look at the flags.
            flags = 16 + 8 * _FLAGS[name]
            program += [(0x15, 0, 4, number), (0x20, 0, 0, flags), (0x45, 0, 1, _WRITING), (0x06, 0, 0, _NOTIFY)]
            program.append((0x06, 0, 0, _CONTINUE))
        else:
            program += [(0x15, 0, 1, number), (0x06, 0, 0, _NOTIFY)]
    program.append((0x06, 0, 0, _CONTINUE))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    described = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, without which one must be root
        raise OSError(ctypes.get_errno(), "prctl")
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE, _NEW_LISTENER):
        listener = libc.syscall(seccomp, 1, flags, ctypes.c_char_p(described))
        if listener >= 0:
            break
    else:
        raise OSError(ctypes.get_errno(), "seccomp")
    socket.send_fds(channel, [b"x"], [listener])
    os.close(listener)


def receive_listener(channel: socket.socket) -> int | None:
    """The listener that `filter_calls` sent, or None where the process ended instead."""
    _, listeners, _, _ = socket.recv_fds(channel, 1, 1)
    return listeners[0] if listeners else None


@lru_cache
def _names() -> dict[int, str]:
    column = _MACHINES[platform.machine()][2]
    return {number: name for name, call in CALLS.items() if (number := call.numbers[column]) is not None}


def receive(listener: int) -> Note | None:
    """The next call that waits, or None if it has gone (its process was ended)."""
    buffer = bytearray(_NOTE.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except OSError:
        return None
    ident, thread, _, number, _, _, *arguments = _NOTE.unpack(buffer)
    name = _names()[number]
    call = CALLS[name]
    kind = "create" if call.kind == "open" and _writes(thread, name, arguments) else call.kind
    files = [_file(thread, where, arguments) for where in call.files]
    return Note(ident, thread, name, kind, tuple(file for file in files if file), tuple(arguments))


def _writes(thread: int, name: str, arguments: list[int]) -> bool:
    if name == "creat":
        return True
    if name == "openat2":
        return bool(int.from_bytes(_memory(thread, arguments[2], 8), "little") & _WRITING)
    return bool(arguments[_FLAGS[name]] & _WRITING)


def _memory(thread: int, address: int, length: int) -> bytes:
    try:
        with open(f"/proc/{thread}/mem", "rb", 0) as memory:
            memory.seek(address)
            return memory.read(length)
    except OSError:
        return b""


def _text(thread: int, address: int) -> str:
    """A string of the process, read page by page: what lies behind it may not be there."""
    found = b""
    while len(found) < 8192 and b"\0" not in found:
        page = _memory(thread, address + len(found), 4096 - (address + len(found)) % 4096)
        if not page:
            break
        found += page
    return os.fsdecode(found.partition(b"\0")[0])


def _behind(thread: int, descriptor: int) -> str:
    link = f"/proc/{thread}/cwd" if descriptor == _AT_FDCWD else f"/proc/{thread}/fd/{descriptor}"
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _file(thread: int, where: int | tuple[int | None, int], arguments: list[int]) -> str:
    def signed(number: int) -> int:
        return ctypes.c_int(number & 0xFFFFFFFF).value

    if isinstance(where, int):
        return _behind(thread, signed(arguments[where]))
    start, text = where
    path = _text(thread, arguments[text])
    if path.startswith("/"):
        return path
    folder = _behind(thread, _AT_FDCWD if start is None else signed(arguments[start]))
    return os.path.join(folder, path) if path else folder


def answer(listener: int, note: Note, answer: Answer) -> None:
    """Let a waiting call go on; nothing happens if its process has ended."""
    happens = not answer.error and answer.value is None
    reply = bytearray(_REPLY.pack(note.ident, answer.value or 0, -answer.error, int(happens)))
    try:
        fcntl.ioctl(listener, _SEND, reply)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINPROGRESS):
            raise


def waits(listener: int) -> bool:
    """Whether a call waits now."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))


def fall_short(note: Note, share: float) -> Answer:
    """Do part of a read or a write in the process's place, as a disk, a quota or a signal may.

    Args:
        note: the call, of a child of this process or of a child's child.
        share: of its bytes, at least one.

    Returns:
        The answer that tells the process; `PROCEED` for calls that cannot be done in part.
    """
    length = note.arguments[2]
    if note.name in ("preadv", "preadv2"):
        base, length = struct.unpack("QQ", _memory(note.thread, note.arguments[1], 16))
    elif note.name in ("read", "pread64", "write", "pwrite64"):
        base = note.arguments[1]
    else:
        return PROCEED
    part = max(1, int(length * share))
    if part >= length:
        return PROCEED
    descriptor = _descriptor(process_of(note.thread), note.arguments[0])
    try:
        if note.kind == "write":
            data = _memory(note.thread, base, part)
            done = os.write(descriptor, data) if note.name == "write" else os.pwrite(descriptor, data, note.arguments[3])
            return Answer(value=done)
        data = os.read(descriptor, part) if note.name == "read" else os.pread(descriptor, part, note.arguments[3])
        with open(f"/proc/{note.thread}/mem", "r+b", 0) as memory:
            memory.seek(base)
            memory.write(data)
        return Answer(value=len(data))
    except OSError as error:
        return Answer(error=error.errno or errno.EIO)
    finally:
        os.close(descriptor)


def process_of(thread: int) -> int:
    """The process a thread belongs to; the thread itself if it has ended."""
    try:
        with open(f"/proc/{thread}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Tgid:"))
    except (OSError, StopIteration):
        return thread


def _descriptor(process: int, number: int) -> int:
    """Another process's descriptor, as one of ours: with the same position in the same file."""
    of_process = os.pidfd_open(process)
    try:
        found: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, of_process, number, 0)
    finally:
        os.close(of_process)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found
