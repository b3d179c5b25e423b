from __future__ import annotations

import pytest
import torch

from apt.errors import InputError
from apt.losses import create_loss


def test_layers_count_alike_whatever_their_size() -> None:
    fake = [torch.tensor([[1.0, 2.0]], requires_grad=True), torch.zeros(1, 3, requires_grad=True)]
    real = [torch.tensor([[0.0, 4.0]], requires_grad=True), torch.ones(1, 3, requires_grad=True)]
    value = create_loss("feature_matching", weight=2.0)(fake, real)
    # Means of absolute differences: 1.5 and 1; their mean is 1.25.
    assert value.item() == pytest.approx(2.5)
    value.backward()
    assert fake[0].grad is not None and real[0].grad is None and real[1].grad is None
    torch.testing.assert_close(fake[0].grad, torch.tensor([[0.5, -0.5]]))


def test_half_precision_features_are_compared_in_fp32() -> None:
    fake, real = [torch.full((2, 3), 1.01).bfloat16()], [torch.full((2, 3), 1.0).bfloat16()]
    value = create_loss("feature_matching")(fake, real)
    assert value.dtype == torch.float32
    assert value == fake[0][0, 0].float() - 1


def test_layers_that_do_not_match_are_refused() -> None:
    loss = create_loss("feature_matching")
    with pytest.raises(InputError, match="at least one"):
        loss([], [])
    with pytest.raises(InputError, match="1 and 2"):
        loss([torch.zeros(2, 3)], [torch.zeros(2, 3)] * 2)
    with pytest.raises(InputError, match="same shape"):
        loss([torch.zeros(2, 3)], [torch.zeros(1, 3)])
    with pytest.raises(InputError, match="floating"):
        loss([torch.zeros(2, 3).long()], [torch.zeros(2, 3).long()])
