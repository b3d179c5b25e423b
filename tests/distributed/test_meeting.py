from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.distributed.meeting import _meet

WAIT = timedelta(seconds=120)


def meet(store: dist.Store, order: list[int]) -> set[str]:
    """Return the names that ranks get if they arrive in this order."""
    with ThreadPoolExecutor(len(order)) as pool:
        heard = [pool.submit(_meet, store, rank, len(order), WAIT) for rank in order]
        return {future.result() for future in heard}


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 3).flatmap(lambda n: st.permutations(range(n))), max_size=3))
def test_every_attempt_has_a_name_that_its_ranks_share(attempts: list[list[int]]) -> None:
    store = dist.HashStore()  # that the agents keep from attempt to attempt
    names = [meet(store, order) for order in attempts]
    assert all(len(heard) == 1 for heard in names)
    assert len({name for heard in names for name in heard}) == len(attempts)


def test_a_rank_does_not_take_the_name_of_an_earlier_attempt() -> None:
    store = dist.HashStore()
    (old,) = meet(store, [0, 1])
    with pytest.raises(dist.DistStoreError, match="has waited"):
        _meet(store, 1, 2, timedelta(seconds=0))  # rank 0 of this attempt is not there yet
    assert meet(store, [1, 0]) != {old}
