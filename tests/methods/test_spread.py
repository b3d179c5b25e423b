from __future__ import annotations

import pytest
import torch

from apt.methods.spread import Spread, compared


def gathered(*batches: torch.Tensor) -> Spread:
    spread = Spread()
    for batch in batches:
        spread.add(batch)
    return spread


def test_micro_batches_one_by_one_are_the_whole_batch() -> None:
    x = torch.randn(6, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = gathered(x), gathered(*x.split(1))
    assert parts.contrast == pytest.approx(float(whole.contrast), rel=1e-5)
    assert parts.diversity == pytest.approx(float(whole.diversity), rel=1e-5)  # type: ignore[arg-type]
    by_hand = x.flatten(2).std(dim=2, correction=0).mean()
    assert float(whole.contrast) == pytest.approx(float(by_hand), rel=1e-5)
    variance = x.var(dim=0, correction=0).mean()
    assert float(whole.diversity) == pytest.approx(float(variance.sqrt()), rel=1e-4)  # type: ignore[arg-type]


def test_what_each_collapse_looks_like() -> None:
    real = torch.randn(8, 4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    plain = real.mean(dim=(2, 3, 4), keepdim=True).expand_as(real)
    one = real[:1].expand_as(real)
    healthy, flat, same = (compared(gathered(x), gathered(real)) for x in (real, plain, one))
    assert healthy["samples/relative_contrast"] == healthy["samples/relative_diversity"] == 1
    assert flat["samples/relative_contrast"] < 1e-3
    assert same["samples/relative_diversity"] < 1e-3 < same["samples/relative_contrast"]


def test_a_single_sample_says_nothing_of_diversity() -> None:
    x = torch.randn(1, 4, 2, 3, 3)
    assert compared(gathered(x), gathered(x)).keys() == {"samples/relative_contrast"}
