"""What a rater sees, and in which order."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from apt.study.document import DEGRADED, INTACT, Pair, Study
from apt.study.plan import MIN_GAP, plan_tasks


def study(
    pairs: int, *, checks: int = 2, check_every: int = 7, repeat_every: int = 4, seed: int = 0
) -> Study:
    def pair(name: str, first: str, second: str) -> Pair:
        return Pair(
            name=name, first=first, second=second, prompt="p", seed=0, files=("a.png", "b.png")
        )

    return Study(
        title="",
        note="",
        seed=seed,
        votes=3,
        check_every=check_every,
        repeat_every=repeat_every,
        models={"a": {}, "b": {}},
        pairs=tuple(pair(f"p{n}", "a", "b") for n in range(pairs)),
        checks=tuple(pair(f"c{n}", INTACT, DEGRADED) for n in range(checks if check_every else 0)),
    )


@settings(max_examples=40)
@given(
    pairs=st.integers(1, 60),
    check_every=st.integers(0, 9),
    repeat_every=st.integers(0, 9),
    rater=st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_every_pair_once_with_checks_and_repetitions(
    pairs: int, check_every: int, repeat_every: int, rater: int, seed: int
) -> None:
    made = study(pairs, check_every=check_every, repeat_every=repeat_every, seed=seed)
    tasks = plan_tasks(made, rater, {})
    assert tasks == plan_tasks(made, rater, {})
    shown = [task.pair for task in tasks if task.kind == "pair"]
    assert sorted(shown) == sorted(pair.name for pair in made.pairs)
    checks = [task for task in tasks if task.kind == "check"]
    assert len(checks) == (-(-pairs // check_every) if check_every else 0)
    first = {task.pair: (place, task) for place, task in enumerate(tasks) if task.kind == "pair"}
    repeats = [(place, task) for place, task in enumerate(tasks) if task.kind == "repeat"]
    assert len(repeats) <= (-(-pairs // repeat_every) if repeat_every else 0)
    assert repeat_every == 0 or len(repeats) >= (pairs - MIN_GAP) // repeat_every
    for place, task in repeats:
        before, original = first[task.pair]
        assert place - before >= MIN_GAP
        assert task.flipped != original.flipped


def test_sides_are_balanced_over_votes_and_orders_differ_by_rater() -> None:
    made = study(40, check_every=0, repeat_every=0)
    planned: Counter[str] = Counter()
    sides: dict[str, list[bool]] = {pair.name: [] for pair in made.pairs}
    orders = []
    for rater in (1, 2, 3):
        tasks = plan_tasks(made, rater, planned)
        orders.append([task.pair for task in tasks])
        for task in tasks:
            sides[task.pair].append(task.flipped)
        planned.update(orders[-1])
    assert all(side in ([True, False, True], [False, True, False]) for side in sides.values())
    assert 10 < sum(side[0] for side in sides.values()) < 30
    assert len({tuple(order) for order in orders}) == 3
    assert plan_tasks(made, 4, planned) == []


def test_a_limit_gives_pairs_with_the_fewest_votes() -> None:
    made = study(30, check_every=0, repeat_every=0)
    planned: Counter[str] = Counter()
    for rater in range(1, 10):
        tasks = plan_tasks(made, rater, planned, limit=10)
        assert len(tasks) == 10
        planned.update(task.pair for task in tasks)
        assert max(planned.values()) - min(planned[p.name] for p in made.pairs) <= 1
    assert set(planned.values()) == {3}
