"""Find out which rank keeps the others waiting when a collective fails or times out.

A thread of every rank writes every few seconds where its main thread is. It writes to the
launcher's store, which outlives a rank. When a rank dies or hangs, the others read all entries.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import FrameType, TracebackType

import torch.distributed as dist

from apt.distributed.launch import restarts
from apt.distributed.meeting import attempt
from apt.distributed.recorder import last_collective
from apt.distributed.spokesman import open_store
from apt.errors import LostRankError, first_line

__all__ = ["LostRankError", "is_of_a_collective", "watched"]

PULSE = 2.0
"""Seconds between two entries of a rank."""

_FRAMES = 3

_MISSED = 3
"""Pulses that a rank may miss before it counts as dead."""


@contextlib.contextmanager
def watched(
    rank: int, world_size: int, place: Callable[[], str], *, pulse: float = PULSE
) -> Iterator[None]:
    """Turn a failed collective inside the block into an error that names the rank at fault.

    Args:
        rank: this process's rank.
        world_size: number of ranks.
        place: returns where this rank is in its work, in a few words; called from another thread.
        pulse: seconds between two entries of a rank.

    Raises:
        LostRankError: a rank is dead, stopped or out of reach, or is not in the collective in which
            the others wait for it.
    """
    shared = open_store() if world_size > 1 else None
    if shared is None:
        yield
        return
    diary = _Diary(shared, rank, place, pulse)
    with diary:
        try:
            yield
        except RuntimeError as error:
            if not is_of_a_collective(error):
                raise
            collective = _collective_of(error.__traceback__)
            try:
                diary.waits_in(collective)
                words = _blame(diary.entries(world_size))
            except dist.DistError:
                words = f"the rank that holds the store is dead or out of reach, in {collective}"
            raise LostRankError(f"{words} ({first_line(error)})") from error


@dataclass(frozen=True)
class _Entry:
    """The last entry that a rank wrote about itself.

    Attributes:
        place: where it is in its work.
        doing: the function that its main thread is in.
        waits: whether that function is a collective.
        beat: a number that differs from entry to entry.
        last: the collective that it began last; written once a rank has asked for it.
        alive: whether the rank still writes entries.
    """

    place: str
    doing: str
    waits: bool
    beat: int
    last: str = ""
    alive: bool = True


class _Diary:
    """The entries of all ranks in the store; a thread updates that of this rank."""

    def __init__(
        self, shared: dist.Store, rank: int, place: Callable[[], str], pulse: float
    ) -> None:
        self._store = shared
        self._rank = rank
        self._place = place
        self._pulse = pulse
        self._main = threading.get_ident()
        self._failed = ""  # the collective that failed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="watch", daemon=True)

    def __enter__(self) -> None:
        self._write(0)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def waits_in(self, collective: str) -> None:
        """Record that a collective of the main thread failed, and that it looks for the cause."""
        self._failed = collective
        self._store.set(self._asked, "")
        self._write(-1)

    def entries(self, world_size: int) -> dict[int, _Entry | None]:
        """Return each rank's entry, None if it has never written one. Takes a few pulses."""
        before = {number: self._read(number) for number in range(world_size)}
        time.sleep(_MISSED * self._pulse)
        found: dict[int, _Entry | None] = {}
        for number, earlier in before.items():
            now = self._read(number)
            alive = number == self._rank or earlier != now
            found[number] = now if now is None else replace(now, alive=alive)
        return found

    def _keep(self) -> None:
        beat = 0
        # Without the store, nobody can read the entries anyway.
        with contextlib.suppress(dist.DistError):
            while not self._ended.wait(self._pulse):
                beat += 1
                self._write(beat)

    def _write(self, beat: int) -> None:
        doing, waits = self._failed, True
        if not self._failed:
            doing, waits = _at(sys._current_frames().get(self._main))
        last = last_collective() if self._store.check([self._asked]) else ""
        entry = _Entry(self._place(), doing, waits, beat, last)
        self._store.set(self._key(self._rank), json.dumps(asdict(entry)))

    def _read(self, rank: int) -> _Entry | None:
        key = self._key(rank)
        return _Entry(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    @property
    def _asked(self) -> str:
        return self._key("asked")

    def _key(self, name: int | str) -> str:
        # The store outlives a restart, and earlier entries come from other processes.
        return f"apt/watch/{attempt() or restarts()}/{name}"


def is_of_a_collective(error: BaseException) -> bool:
    """Return whether an error comes from a collective, which leaves the process group broken."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def _collective_of(traceback: TracebackType | None) -> str:
    """Return the function of torch.distributed that raised an error."""
    while traceback is not None:
        if name := _collective(traceback.tb_frame):
            return name
        traceback = traceback.tb_next
    return "a collective"


def _at(frame: FrameType | None) -> tuple[str, bool]:
    """Return the function that a thread is in, and whether it waits for other ranks there."""
    chain: list[str] = []
    collective = ""
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back  # the main thread itself writes the first entry
    while frame is not None:
        code = frame.f_code
        if len(chain) < _FRAMES:
            chain.append(f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})")
        collective = _collective(frame) or collective  # keep the outermost, which was called
        frame = frame.f_back
    return collective or " of ".join(chain), bool(collective)


def _collective(frame: FrameType) -> str:
    """Return the name of a collective function; empty for any other."""
    module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
    together = ("torch.distributed.distributed_c10d", "torch.distributed.fsdp")
    if not module.startswith(together) or name.startswith("_") or name == "wrapper":
        return ""
    return name


def _blame(entries: dict[int, _Entry | None]) -> str:
    """Describe the ranks that are gone, or those that are elsewhere while the others wait."""
    gone = [r for r, entry in entries.items() if entry is None or not entry.alive]
    there = {r: entry for r, entry in entries.items() if entry is not None and entry.alive}
    elsewhere = [r for r, entry in there.items() if not entry.waits]
    waiting = [r for r in there if r not in elsewhere]
    said = []
    for number in gone:
        entry = entries[number]
        last = "it never began" if entry is None else f"last seen {_where(entry)}"
        said.append(f"rank {number} is dead, stopped or out of reach: {last}")
    for number in elsewhere if not gone else ():
        entry = there[number]
        began = f", after {entry.last}" if entry.last else ""
        said.append(f"rank {number} keeps the others waiting: it is {_where(entry)}{began}")
    if not said:
        said.append("a collective failed although all ranks are in one")
    return "; ".join([*said, *_of_the_others(there, waiting)])


def _of_the_others(there: dict[int, _Entry], waiting: Sequence[int]) -> list[str]:
    places: dict[str, list[int]] = {}
    for number in waiting:
        entry = there[number]
        began = f" ({entry.last})" if entry.last else ""
        places.setdefault(f"{_where(entry)}{began}", []).append(number)
    return [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
        f"{' and more' if len(ranks) > 8 else ''}: {place}"
        for place, ranks in places.items()
    ]


def _where(entry: _Entry) -> str:
    return f"in {entry.doing}, {entry.place}"
