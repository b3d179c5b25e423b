from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt.errors import InputError
from apt.losses import create_loss


def test_value_by_hand() -> None:
    seen = []

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        return torch.full_like(x_t, 0.5)

    x, z = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])
    value = create_loss("flow_matching")(predict, x, z, torch.tensor([0.25]))
    # v = z - x = (2, -4); (0.5 - 2)^2 = 2.25 and (0.5 + 4)^2 = 20.25.
    assert value.item() == pytest.approx(11.25)
    torch.testing.assert_close(seen[0][0], torch.tensor([[1.5, 1.0]]))
    assert seen[0][1].tolist() == [0.25]


def test_the_minimum_is_the_velocity_and_descent_goes_there() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 1, 4, 4, generator=generator)
    z = torch.randn(3, 2, 1, 4, 4, generator=generator)
    t = torch.tensor([0.1, 0.5, 0.9])
    loss = create_loss("flow_matching")
    assert loss(lambda x_t, t: z - x, x, z, t) == 0
    v = torch.zeros_like(x, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(lambda x_t, t: v, x, z, t), v)
    torch.testing.assert_close(grad, -2 * (z - x) / x.numel())


def test_half_precision_is_upcast() -> None:
    x, z = torch.tensor([[1.1, 2.3]]), torch.tensor([[3.2, -2.7]])

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        assert x_t.dtype == t.dtype == torch.float32
        return torch.full_like(x_t, 0.3, dtype=torch.bfloat16)

    loss = create_loss("flow_matching")
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(predict, x.bfloat16(), z.bfloat16(), torch.tensor([0.25]).bfloat16())
    assert value.dtype == torch.float32
    expected = torch.tensor(0.3).bfloat16().float() - (z.bfloat16().float() - x.bfloat16().float())
    torch.testing.assert_close(value, expected.square().mean())


def test_bad_input_is_refused() -> None:
    loss = create_loss("flow_matching")
    x = torch.zeros(2, 3)
    t = torch.zeros(2)
    with pytest.raises(InputError, match="same shape"):
        loss(lambda x_t, t: x_t, x, x[:1], t)
    with pytest.raises(InputError, match="same shape"):
        loss(lambda x_t, t: x_t[:1], x, x, t)
    with pytest.raises(InputError, match="one per sample"):
        loss(lambda x_t, t: x_t, x, x, t[:1])
    with pytest.raises(InputError, match="floating"):
        loss(lambda x_t, t: x_t, x, x, t.long())
    with pytest.raises(InputError, match="floating"):
        loss(lambda x_t, t: x_t, x.long(), x.long(), t)
