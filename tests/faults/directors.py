"""What runs meet at their calls: one thing, several, or one another."""

from __future__ import annotations

import errno
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from faults import syscalls
from faults.runs import Director, Run
from faults.syscalls import PROCEED, Answer, Note


@dataclass
class Fault(Director):
    """One thing that happens to one run at one of its calls.

    Attributes:
        at: which call, counted from 0 among those that matter.
        what: a signal's name (SIGKILL, SIGINT, SIGTERM), an error's (EIO, …), or `short`.
        kinds: the kinds of calls that matter.
        lasting: it happens at all further such calls too.
        names: the names of calls that matter; all of those kinds if empty.
        share: of a call's bytes that are done, where it falls short.
        other: done by somebody else just before, if any.
    """

    at: int
    what: str
    kinds: frozenset[str]
    lasting: bool = False
    names: frozenset[str] = frozenset()
    share: float = 0.5
    other: Callable[[], object] | None = None
    seen: int = 0
    last: set[tuple[int, int]] = field(default_factory=set)

    def decide(self, waiting: list[tuple[Run, Note]], alive: list[Run]) -> list[tuple[Run, Note, Answer]]:
        """See `Director`."""
        return [(run, note, verdict) for run, note in waiting if (verdict := self.meets(run, note)) is not None]

    def meets(self, run: Run, note: Note) -> Answer | None:
        """What becomes of a call; None where its process is no more."""
        if (run.number, note.ident) in self.last:
            return None
        if note.kind not in self.kinds or (self.names and note.name not in self.names):
            return PROCEED
        number, self.seen = self.seen, self.seen + 1
        if number != self.at and not (self.lasting and number > self.at):
            return PROCEED
        if number == self.at and self.other is not None:
            self.other()
        if not self.what:
            return PROCEED
        run.met.append(f"{self.what} at call {number}: {note}")
        if self.what.startswith("SIG"):
            run.signal(getattr(signal, self.what), syscalls.process_of(note.thread))
            if self.what == "SIGKILL":
                self.last.add((run.number, note.ident))
                return None
            return PROCEED
        if self.what == "short":
            return syscalls.fall_short(note, self.share)
        return Answer(error=getattr(errno, self.what))


@dataclass
class Several(Director):
    """Some faults at once: the first that has something in store for a call decides."""

    faults: list[Fault]

    def decide(self, waiting: list[tuple[Run, Note]], alive: list[Run]) -> list[tuple[Run, Note, Answer]]:
        """See `Director`."""
        answers = []
        for run, note in waiting:
            verdicts = [fault.meets(run, note) for fault in self.faults]
            if None not in verdicts:
                answers.append((run, note, next((found for found in verdicts if found is not PROCEED), PROCEED)))
        return answers


@dataclass
class Turns(Director):
    """Lets one run at a time go on: with the same changes of turns, the same order of calls.

    Attributes:
        dice: decide whose turn it is next.
        matters: which calls count; others happen at once.
        changes: after which of its calls that count, by their number, a run gives its turn away.
    """

    dice: random.Random
    matters: Callable[[Note], bool]
    changes: dict[int, frozenset[int]]
    patience: float = 0.1
    _turn: int | None = None
    _counts: dict[int, int] = field(default_factory=dict)
    _since: float = 0.0

    def decide(self, waiting: list[tuple[Run, Note]], alive: list[Run]) -> list[tuple[Run, Note, Answer]]:
        """See `Director`: who has the turn and makes no call, because it waits for another or computes, loses it."""
        free = [(run, note, PROCEED) for run, note in waiting if not self.matters(note)]
        waiting = [(run, note) for run, note in waiting if self.matters(note)]
        here, now = sorted({run.number for run, _ in waiting}), time.monotonic()
        if self._turn not in here:
            waited = now - self._since > 0.5
            # All are to be at a call before the dice fall, or the order would depend on who comes first.
            if not here or (not waited and (self._turn in {r.number for r in alive} or len(here) < len(alive))):
                self._since = self._since or now
                return free
            self._turn = self.dice.choice(here)
        self._since = now
        run, note = next((run, note) for run, note in waiting if run.number == self._turn)
        count = self._counts.get(run.number, 0)
        self._counts[run.number] = count + 1
        if count in self.changes.get(run.number, ()) and len(alive) > 1:
            self._turn = self.dice.choice(sorted(other.number for other in alive if other is not run))
        return [*free, (run, note, PROCEED)]
