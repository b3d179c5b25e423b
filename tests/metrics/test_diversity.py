from __future__ import annotations

import pytest
import torch

from apt.errors import InputError
from apt.metrics import Diversity, pairwise_diversity


def test_hand_computed() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    found = pairwise_diversity(features, ["a", "a", "b"])
    assert found.within == pytest.approx(5.0)
    assert found.across == pytest.approx((0.0 + 5.0) / 2)


def test_collapse_within_a_prompt_is_exactly_zero() -> None:
    one_per_prompt = 100 + torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    features = one_per_prompt.repeat_interleave(8, dim=0)
    found = pairwise_diversity(features, [i // 8 for i in range(32)])
    assert found.within == 0.0
    assert found.across > 1.0


def test_relative_to_real() -> None:
    relative = Diversity(1.0, 3.0).relative_to(Diversity(2.0, 4.0))
    assert (relative.within, relative.across) == (0.5, 0.75)
    with pytest.raises(InputError, match="no diversity"):
        Diversity(1.0, 1.0).relative_to(Diversity(0.0, 1.0))


@pytest.mark.parametrize("prompts", [["a", "b", "c"], ["a", "a", "a"], ["a", "b"]])
def test_rejects_prompts_that_leave_nothing_to_compare(prompts: list[str]) -> None:
    with pytest.raises(InputError):
        pairwise_diversity(torch.zeros(3, 2), prompts)
