"""The folder a trial happens in: a source, a place for the destination, and what belongs to others and must stay."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

OLD = 1_500_000_000
"""When all that is there before a trial was last changed, in seconds since 1970; and when it was last read."""


class Entry(NamedTuple):
    """What is known of a file, folder or link without changing it."""

    kind: str
    mode: int
    size: int
    content: str
    changed: int
    read: int
    inode: int
    owner: int


Tree = dict[str, Entry]
"""A folder's entries by their paths within it; its own is ``."."``."""

_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link", stat.S_IFIFO: "pipe"}
_PREVIEW = 400_000


def entry(path: Path) -> Entry:
    """Look at a path; reading it leaves no trace."""
    found = path.lstat()
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "device")
    content = ""
    if kind == "link":
        content = os.readlink(path)
    elif kind == "file":
        content = _digest(path, found.st_size)
    return Entry(
        kind, stat.S_IMODE(found.st_mode), 0 if kind == "folder" else found.st_size, content, found.st_mtime_ns,
        found.st_atime_ns, found.st_ino, found.st_uid,
    )  # fmt: skip


def _digest(path: Path, size: int) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | getattr(os, "O_NOATIME", 0))
    try:
        if size > 64 << 20:  # a hole, put there by a trial
            return hashlib.sha1(os.pread(descriptor, _PREVIEW, 0)).hexdigest()
        hasher = hashlib.sha1()
        while block := os.read(descriptor, 1 << 20):
            hasher.update(block)
        return hasher.hexdigest()
    finally:
        os.close(descriptor)


def look(folder: Path) -> Tree | None:
    """All that is in a folder, or the one entry of what is no folder; None where there is nothing."""
    if not os.path.lexists(folder):
        return None
    tree = {".": entry(folder)}
    if tree["."].kind == "folder":
        for place, folders, files in os.walk(folder):
            for name in (*folders, *files):
                path = Path(place, name)
                tree[str(path.relative_to(folder))] = entry(path)
    return tree


CONTENT = ("kind", "mode", "content")
UNTOUCHED = ("kind", "mode", "size", "content", "changed", "inode", "owner")


def differences(before: Tree, after: Tree | None, what: Iterable[str], *, folders: bool = True) -> list[str]:
    """How two trees differ in the fields named, in words; with `folders` False, a folder's own times are not looked at."""
    if after is None:
        return ["it is gone"]
    found = [f"`{name}` is gone" for name in sorted(before.keys() - after.keys())]
    found += [f"`{name}` is new" for name in sorted(after.keys() - before.keys())]
    for name in sorted(before.keys() & after.keys()):
        one, two = before[name], after[name]
        for part in what:
            if part == "changed" and one.kind == "folder" and not folders:
                continue
            if getattr(one, part) != getattr(two, part):
                found.append(f"`{name}` differs in {part}: {getattr(one, part)} was, {getattr(two, part)} is")
                break
    return found


def age(folder: Path, *, read: int | None = None) -> None:
    """Give all in a folder the time `OLD`, of change and of last reading (or `read`)."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.utime(Path(place, name), (read or OLD, OLD), follow_symlinks=False)
    os.utime(folder, (read or OLD, OLD), follow_symlinks=False)


NEIGHBOURS = {
    "notes.txt": "mine\n",
    "other/config.json": "{}",
    "other/model.safetensors": "weights of another",
    "dst.bak/notes.txt": "an old one\n",
    ".dst": "hidden\n",
    ".dst.mine-partial/x": "not llmconvert's\n",
    "dst2": "begins alike\n",
}
OUTSIDE = {
    "config.json": "{}",
    "model.safetensors": "weights of somebody else",
    "secret.txt": "a secret, not to be read",
    "folder/deep.txt": "deep",
}


@dataclass
class World:
    """A trial's folder.

    Attributes:
        root: commands run here, with relative paths.
        logs: what they print.
        sources: names of folders in it that are only read.
        killed: a run was ended in a way it could not tidy up after.
        before: how folders were when the trial began, by their paths in `root`.
        kept: what a stranger put there since, which must stay.
    """

    root: Path
    logs: Path
    sources: list[str]
    killed: bool = False
    before: dict[str, Tree] = field(default_factory=dict)
    kept: dict[str, Tree] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        """Where destinations are made."""
        return self.root / "place"

    @property
    def dst(self) -> Path:
        """The destination."""
        return self.place / "dst"

    @property
    def canary(self) -> Path:
        """A file that only code of a checkpoint would make."""
        return self.root.parent / "canary"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for runs here."""
        return {"HOME": str(self.root / "home"), "TMPDIR": str(self.root / "temporary")}

    @classmethod
    def make(cls, folder: Path, sources: dict[str, Path]) -> World:
        """Make the folder of a trial.

        Args:
            folder: made; what was there is removed.
            sources: folders to copy in, by name.
        """
        shutil.rmtree(folder, ignore_errors=True)
        world = cls(folder / "root", folder / "logs", list(sources))
        for path in (world.logs, world.place, world.root / "home", world.root / "temporary"):
            path.mkdir(parents=True)
        for name, template in sources.items():
            shutil.copytree(template, world.root / name, symlinks=True)
        for parent, files in ((world.place, NEIGHBOURS), (world.root / "outside", OUTSIDE)):
            for name, text in files.items():
                (parent / name).parent.mkdir(parents=True, exist_ok=True)
                (parent / name).write_text(text)
        return world

    def begin(self) -> None:
        """Note how things are; call it when all is as the trial wants it."""
        for name in self.sources:
            age(self.root / name)
        for name in self.others():
            path = self.place / name
            if path.is_dir() and not path.is_symlink():
                age(path)
            os.utime(path, (OLD, OLD), follow_symlinks=False)
        age(self.root / "outside")
        for name in (*self.sources, "outside", *(f"place/{other}" for other in self.others())):
            tree = look(self.root / name)
            assert tree is not None
            self.before[name] = tree
        destination = look(self.dst)
        if destination is not None:
            self.before["place/dst"] = destination

    def others(self) -> list[str]:
        """Entries beside the destination that are nobody's business here."""
        return sorted({name.split("/")[0] for name in NEIGHBOURS})

    def strange(self, path: Path, make: Callable[[Path], object]) -> None:
        """Let a stranger put something there, which must stay as it is."""
        make(path)
        tree = look(path)
        assert tree is not None
        self.kept[str(path.relative_to(self.root))] = tree

    def remove(self) -> None:
        """Remove the trial's folder."""
        for place, folders, _ in os.walk(self.root):
            for name in folders:
                path = Path(place, name)
                if not path.is_symlink():
                    with contextlib.suppress(OSError):
                        path.chmod(0o700)
        shutil.rmtree(self.root.parent, ignore_errors=True)
