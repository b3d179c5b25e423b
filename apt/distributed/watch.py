"""Which rank keeps the others waiting, told when a collective fails or waits too long.

A thread of every rank writes down every few seconds where its main thread is: in the launcher's
store, which outlives a rank. Whoever is left by a dead or hung rank reads there what all say.
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
"""Pulses that a rank may miss before it counts as gone."""


@contextlib.contextmanager
def watched(
    rank: int, world_size: int, place: Callable[[], str], *, pulse: float = PULSE
) -> Iterator[None]:
    """Turns a failed collective inside the block into an error that names the rank to blame.

    Args:
        rank: of this process; world_size: of all.
        place: where this rank is in its work, in a few words; asked from another thread.
        pulse: seconds between two entries of a rank.

    Raises:
        LostRankError: a rank is dead, stopped or out of reach, or does something else than all
            the others, which wait for it in a collective.
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
                words = f"the rank that has the store is dead or out of reach, in {collective}"
            raise LostRankError(f"{words} ({first_line(error)})") from error


@dataclass(frozen=True)
class _Entry:
    """What a rank last said of itself.

    Attributes:
        place: in its work.
        doing: the function that its main thread is in.
        waits: whether that is a collective.
        beat: another one in each entry.
        last: the collective that it began last; told once a rank has asked.
        alive: whether it still writes any.
    """

    place: str
    doing: str
    waits: bool
    beat: int
    last: str = ""
    alive: bool = True


class _Diary:
    """The entries of all ranks in the store; a thread keeps this rank's."""

    def __init__(
        self, shared: dist.Store, rank: int, place: Callable[[], str], pulse: float
    ) -> None:
        self._store = shared
        self._rank = rank
        self._place = place
        self._pulse = pulse
        self._main = threading.get_ident()
        self._failed = ""  # the collective
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="watch", daemon=True)

    def __enter__(self) -> None:
        self._write(0)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def waits_in(self, collective: str) -> None:
        """The main thread has come out of a collective that failed, and looks for the reason."""
        self._failed = collective
        self._store.set(self._asked, "")
        self._write(-1)

    def entries(self, world_size: int) -> dict[int, _Entry | None]:
        """Of each rank, None if it has never written any; takes a few pulses."""
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
        # Without the store nobody reads it either.
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
        # The store outlives a restart, and what was noted before it is of other processes.
        return f"apt/watch/{attempt() or restarts()}/{name}"


def is_of_a_collective(error: BaseException) -> bool:
    """Whether ranks did not come together, which leaves their process group broken."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def _collective_of(traceback: TracebackType | None) -> str:
    """The function of torch.distributed that an error came out of."""
    while traceback is not None:
        if name := _collective(traceback.tb_frame):
            return name
        traceback = traceback.tb_next
    return "a collective"


def _at(frame: FrameType | None) -> tuple[str, bool]:
    """The function that a thread is in, and whether it waits for other ranks there."""
    chain: list[str] = []
    collective = ""
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back  # the first entry is written by the main thread itself
    while frame is not None:
        code = frame.f_code
        if len(chain) < _FRAMES:
            chain.append(f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})")
        collective = _collective(frame) or collective  # the outermost is what was called
        frame = frame.f_back
    return collective or " of ".join(chain), bool(collective)


def _collective(frame: FrameType) -> str:
    """The name of a function that ranks call together; empty for any other."""
    module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
    together = ("torch.distributed.distributed_c10d", "torch.distributed.fsdp")
    if not module.startswith(together) or name.startswith("_") or name == "wrapper":
        return ""
    return name


def _blame(entries: dict[int, _Entry | None]) -> str:
    """In words: the ranks that are gone, or those that are elsewhere while the others wait."""
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
        said.append("a collective failed, and every rank is in one")
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
