from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apt.condition import Condition
from apt.errors import InputError
from apt.flow import euler_sample
from apt.losses import Relativistic
from apt.methods.apt import generate, generator_loss
from apt.models.discriminator import DiscriminatorOutput
from tests.models.nets import inputs, tiny_mmdit


def test_equation_5() -> None:
    model = tiny_mmdit()
    z, _, c = inputs(3, lengths=[5, 2, 4])
    expected = z - model(z, torch.ones(3), c)
    assert torch.equal(generate(model, z, c), expected)


def test_it_is_one_euler_step() -> None:
    model = tiny_mmdit()
    z, _, c = inputs(2)
    step = euler_sample(lambda x, t: model(x, t, c), z, [1.0, 0.0])
    torch.testing.assert_close(generate(model, z, c), step)


def test_gradients_reach_noise_weights_and_text() -> None:
    model = tiny_mmdit()
    z, _, c = inputs(2)
    z.requires_grad_()
    tokens = c.text.tokens.requires_grad_()
    generate(model, z, c).square().sum().backward()
    assert z.grad is not None and z.grad.any()
    assert tokens.grad is not None and tokens.grad.any()
    assert model.patch_in.weight.grad is not None and model.patch_in.weight.grad.any()


def test_any_network_with_a_velocity_will_do() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, c: Condition, *, rows: Tensor | None = None) -> Tensor:
        seen.append(t)
        return 0.25 * x

    z, _, c = inputs(2)
    z = z.to(torch.bfloat16)
    out = generate(network, z, c)
    assert out.dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], torch.ones(2))
    torch.testing.assert_close(out, 0.75 * z, rtol=1e-2, atol=1e-2)


def test_a_loss_that_compares_with_real_samples_needs_them() -> None:
    def discriminator(
        x: Tensor, t: Tensor, c: object, *, rows: Tensor | None = None
    ) -> DiscriminatorOutput:
        return DiscriminatorOutput(x.sum(1), [])

    x, t = torch.randn(2, 3), torch.rand(2)
    with pytest.raises(InputError, match="pass x"):
        generator_loss(discriminator, x, t, None, objective=Relativistic())
    loss, _ = generator_loss(discriminator, x, t, None, objective=Relativistic(), x=x)
    assert loss.item() == pytest.approx(math.log(2))
