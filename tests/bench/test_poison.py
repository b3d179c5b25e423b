"""Unwritten memory is NaN, and torch's settings are restored afterwards."""

from __future__ import annotations

import pytest
import torch

from apt.bench.poison import poisoned_memory


def test_new_memory_is_nan():
    with poisoned_memory():
        x = torch.empty(3, dtype=torch.bfloat16)
        made = [x, x.new_empty(2), torch.empty_like(x), torch.empty_strided((2,), (1,))]
        counts = torch.empty(2, dtype=torch.int64)
    assert all(values.isnan().all() for values in made)
    assert (counts == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_what_was_set_is_restored_also_after_an_error(before, monkeypatch):
    enabled, warn_only = before
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with pytest.raises(ZeroDivisionError), poisoned_memory():
            assert torch.is_deterministic_algorithms_warn_only_enabled()  # refuses no kernel
            assert torch.utils.deterministic.fill_uninitialized_memory
            _ = 1 // 0
        assert torch.are_deterministic_algorithms_enabled() is enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_kernels_that_repeat_only_nearly_run_and_say_nothing(recwarn):
    index = torch.tensor([0, 0])
    with poisoned_memory():
        torch.zeros(2).put_(index, torch.ones(2), accumulate=False)
    assert not recwarn.list
