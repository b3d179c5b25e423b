from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.distributed.mesh import Layout, ParallelConfig
from apt.errors import ConfigError
from tests.processes import run_main

SIZES = st.integers(1, 6)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks found in each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    run_main("tests.distributed.layouts", folder, folder=folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize(
    ("layout", "name", "expected"),
    [
        ("default", "states", [[0, 1, 2, 3]]),
        ("default", "data", [[0, 1, 2, 3]]),
        ("default", "sequence", [[0], [1], [2], [3]]),
        ("replicated", "replicate", [[0, 2], [1, 3]]),
        ("replicated", "states", [[0, 1], [2, 3]]),
        ("replicated", "data", [[0, 1, 2, 3]]),
        ("sequence", "sequence", [[0, 1], [2, 3]]),
        ("sequence", "data", [[0, 2], [1, 3]]),
        ("sequence", "states", [[0, 1, 2, 3]]),
        ("both", "states", [[0, 1], [2, 3]]),
        ("both", "sequence", [[0, 1], [2, 3]]),
        ("both", "replicate", [[0, 2], [1, 3]]),
        ("all sequence", "data", [[0], [1], [2], [3]]),
    ],
)
def test_groups(
    found: list[dict[str, Any]], layout: str, name: str, expected: list[list[int]]
) -> None:
    of_rank = {rank: group for group in expected for rank in group}
    assert [rank[layout]["groups"][name] for rank in found] == [of_rank[r] for r in range(4)]


def test_ranks_of_a_sequence_group_have_the_same_samples(found: list[dict[str, Any]]) -> None:
    def data(layout: str) -> list[list[int]]:
        return [rank[layout]["data"] for rank in found]

    assert data("default") == [[0, 4], [1, 4], [2, 4], [3, 4]]
    assert data("sequence") == [[0, 2], [0, 2], [1, 2], [1, 2]]
    assert data("all sequence") == [[0, 1]] * 4


def test_sizes_that_do_not_make_the_ranks_are_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "sequence 3 does not fit 4 ranks" in rank["refused"]["message"]
        assert "\n" not in rank["refused"]["message"]


@given(SIZES, SIZES, SIZES)
def test_every_rank_has_one_place(replicate: int, shard: int, sequence: int) -> None:
    layout = ParallelConfig(replicate=replicate, sequence=sequence).layout(
        replicate * shard * sequence
    )
    assert layout == Layout(replicate, shard, sequence)
    assert layout.states * layout.replicate == layout.data * layout.sequence == layout.world_size
    groups = Counter(layout.data_rank(r) for r in range(layout.world_size))
    assert groups == dict.fromkeys(range(layout.data), sequence)


@pytest.mark.parametrize(
    ("config", "world"),
    [
        (ParallelConfig(replicate=3), 4),
        (ParallelConfig(sequence=2), 1),
        (ParallelConfig(shard=2), 4),
        (ParallelConfig(replicate=2, shard=2, sequence=2), 4),
    ],
)
def test_other_numbers_of_ranks_are_refused(config: ParallelConfig, world: int) -> None:
    with pytest.raises(ConfigError, match=f"does not fit {world} rank"):
        config.layout(world)


@pytest.mark.parametrize("name", ["replicate", "shard", "sequence"])
def test_sizes_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.{name} must be at least"):
        ParallelConfig(**{name: -1})


def test_what_rank_0_makes_or_fails_to_make_reaches_all(found: list[dict[str, Any]]) -> None:
    told = [rank["told"] for rank in found]
    assert all(rank["made"] == {"clips": list(range(1000)), "from": 0} for rank in told)
    assert [rank["worked"] for rank in told] == [[0, 0], [], [], []]
    kinds = ["ConfigError", "PeerError", "PeerError", "PeerError"]
    assert [rank["error"] for rank in told] == [[kind, "no such folder"] for kind in kinds]
    assert all(rank["sum"] == 1.5 for rank in told)
