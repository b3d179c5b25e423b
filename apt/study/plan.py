"""Plan what a rater sees, in order: pairs that need votes, attention checks and repeated pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from apt.rng import hash_key
from apt.study.document import Study

Kind = Literal["pair", "check", "repeat"]

MIN_GAP = 5
"""The fewest pairs from one to its repetition, so that the rater judges it afresh."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One showing of a pair.

    Attributes:
        kind: "pair" counts as a vote; "check" and "repeat" measure the rater's reliability.
        pair: name of the pair.
        flipped: whether the second sample is on the left.
    """

    kind: Kind
    pair: str
    flipped: bool


def plan_tasks(
    study: Study, rater: int, planned: Mapping[str, int], limit: int | None = None
) -> list[Task]:
    """Return the tasks of a rater; none if every pair has its votes.

    The sides of a pair are swapped from vote to vote, so that each sample is on the left equally
    often.

    Args:
        study: the study, whose seed determines order and sides.
        rater: number from 1.
        planned: votes that others have given or will give, by pair.
        limit: the most pairs for one rater; pairs with the fewest votes go first.
    """

    def draw(what: str, name: str | int) -> int:
        return hash_key(study.seed, what, rater, name)

    needed = [pair for pair in study.pairs if planned.get(pair.name, 0) < study.votes]
    needed.sort(key=lambda pair: (planned.get(pair.name, 0), draw("choice", pair.name)))
    chosen = sorted(needed[:limit], key=lambda pair: draw("order", pair.name))
    placed: list[tuple[float, Task]] = []
    for place, pair in enumerate(chosen):
        side = hash_key(study.seed, "side", pair.name) + planned.get(pair.name, 0)
        task = Task(kind="pair", pair=pair.name, flipped=bool(side & 1))
        placed.append((place, task))
        if (
            study.repeat_every
            and draw("repeated", place // study.repeat_every) % study.repeat_every
            == place % study.repeat_every
            and place + MIN_GAP < len(chosen)
        ):
            later = place + MIN_GAP + _share(draw("later", place)) * study.repeat_every
            repeat = Task(kind="repeat", pair=pair.name, flipped=not task.flipped)
            placed.append((later, repeat))
    if study.checks:
        for block in range(0, len(chosen), study.check_every):
            number = (block // study.check_every + draw("first check", 0)) % len(study.checks)
            check = study.checks[number]
            size = min(study.check_every, len(chosen) - block)
            place_in_block = block + _share(draw("place", block)) * size
            side_of_check = bool(draw("side of check", block) & 1)
            task = Task(kind="check", pair=check.name, flipped=side_of_check)
            placed.append((place_in_block, task))
    placed.sort(key=lambda entry: entry[0])
    return [task for _, task in placed]


def _share(draw: int) -> float:
    """Map 64 bits to [0, 1)."""
    return draw / 2**64
