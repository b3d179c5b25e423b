from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from apt.errors import InputError
from apt.losses import create_loss

FINITE_DIFFERENCES = ["approximate_r1", "approximate_r2"]


@pytest.mark.parametrize("name", FINITE_DIFFERENCES)
def test_values_by_hand(name: str) -> None:
    base, perturbed = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    # Squared differences 0.25 and 1.
    assert create_loss(name, weight=100.0)(base, perturbed).item() == pytest.approx(62.5)
    normalized = create_loss(name, weight=3.0, sigma=0.5, normalize="sigma2")
    assert normalized(base, perturbed).item() == pytest.approx(3.0 * 0.625 / 0.25)
    half = create_loss(name, weight=2.0, fraction=0.5)
    assert half(base, perturbed[:1]).item() == pytest.approx(2.0 * 0.25)


@pytest.mark.parametrize("name", FINITE_DIFFERENCES)
def test_gradient_flows_through_both_branches(name: str) -> None:
    base = torch.tensor([1.0, 2.0], requires_grad=True)
    perturbed = torch.tensor([1.5, 1.0], requires_grad=True)
    create_loss(name, weight=10.0)(base, perturbed).backward()
    # d/da of 10 * mean((a - b)^2) = 10 * (a - b), and its negative for b.
    assert base.grad is not None and perturbed.grad is not None
    torch.testing.assert_close(base.grad, torch.tensor([-5.0, 10.0]))
    torch.testing.assert_close(perturbed.grad, torch.tensor([5.0, -10.0]))


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(1, 1000), fraction=st.floats(1e-3, 1.0))
def test_num_perturbed_is_the_rounded_fraction(batch: int, fraction: float) -> None:
    penalty = create_loss("approximate_r1", fraction=fraction)
    count = penalty.num_perturbed(batch)
    assert 1 <= count <= batch
    assert count == 1 or abs(count - fraction * batch) <= 0.5 + 1e-9
    assert create_loss("approximate_r1").num_perturbed(batch) == batch
    penalty(torch.zeros(batch), torch.zeros(count))


@pytest.mark.parametrize("name", FINITE_DIFFERENCES)
def test_bad_logits_are_refused(name: str) -> None:
    penalty = create_loss(name)
    good = torch.zeros(4)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(InputError, match="fp32"):
            penalty(good.to(dtype), good)
        with pytest.raises(InputError, match="fp32"):
            penalty(good, good.to(dtype))
    with pytest.raises(InputError, match="floating"):
        penalty(good.long(), good.long())
    with pytest.raises(InputError, match=r"\(B,\)"):
        penalty(good[:, None], good[:, None])
    with pytest.raises(InputError, match="4 perturbed"):
        penalty(good, good[:3])
    with pytest.raises(InputError, match="1 perturbed"):
        create_loss(name, fraction=0.25)(good, good)
    with pytest.raises(InputError, match="at least 1"):
        penalty.num_perturbed(0)


def test_exact_r1_by_hand() -> None:
    # D(x) = a . x^2 has the gradient 2 a x, so R1 = 4 sum (a x)^2 and dR1/da = 8 a x^2.
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.tensor([[1.0, 3.0], [2.0, 0.5]], requires_grad=True)
    value = create_loss("r1", weight=0.5)((a * x.square()).sum(1), x)
    assert value.item() == pytest.approx(0.5 * (4 * (1 + 36) + 4 * (4 + 1)) / 2)
    (grad,) = torch.autograd.grad(value, a)
    # The batch means of x^2 are 2.5 and 4.625.
    torch.testing.assert_close(grad, 0.5 * 8 * torch.tensor([1 * 2.5, 2 * 4.625]))


def test_exact_r1_flattens_what_follows_the_batch() -> None:
    w = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x = torch.zeros(5, 2, 3, 4, requires_grad=True)
    value = create_loss("r1")((w * x).flatten(1).sum(1), x)
    torch.testing.assert_close(value, w.square().sum())


def test_exact_r1_refuses_what_it_cannot_differentiate() -> None:
    r1 = create_loss("r1")
    w = torch.ones(3, requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(InputError, match="requires_grad_"):
        r1((w * x.detach()).sum(1), x.detach())
    with pytest.raises(InputError, match="do not depend"):
        r1((w * x.clone().detach()).sum(1), x)
    with torch.no_grad(), pytest.raises(InputError, match="no graph"):
        r1((w * x).sum(1), x)
    with pytest.raises(InputError, match="samples"):
        r1((w * x).sum(1)[:1], x)
    with pytest.raises(InputError, match="double backward"):
        r1(_DropsGraph.apply(x, w), x)


class _DropsGraph(torch.autograd.Function):
    """A fused op as people write them: right first derivatives, constants to the second."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return (w * x).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        with torch.no_grad():
            return grad[:, None] * w, (grad[:, None] * x).sum(0)


class _RaisesOnDouble(_DropsGraph):
    """The same op, declared for one backward: the error must come through."""

    backward = staticmethod(once_differentiable(_DropsGraph.backward))


def test_exact_r1_lets_the_error_of_a_fused_op_through() -> None:
    w, v = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    # In the second one v alone would get a gradient, and w be taken for a constant.
    for logits in (_RaisesOnDouble.apply(x, w), _RaisesOnDouble.apply(v * x, w)):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            create_loss("r1")(logits, x).backward()


def _attention_logits(x: Tensor, w: Tensor, backend: SDPBackend) -> Tensor:
    heads = (x @ w)[:, None]
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    return out.flatten(1).sum(1)


def test_exact_r1_needs_reference_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 8, generator=generator, requires_grad=True)
    x = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    create_loss("r1")(_attention_logits(x, w, SDPBackend.MATH), x).backward()
    assert w.grad is not None and w.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"derivative|double"):
        create_loss("r1")(_attention_logits(x, w, SDPBackend.FLASH_ATTENTION), x).backward()


def test_logit_centring_by_hand() -> None:
    centring = create_loss("logit_centring", weight=0.01)
    real = torch.tensor([3.0, 1.0], requires_grad=True)
    fake = torch.tensor([-1.0, 0.0], requires_grad=True)
    value = centring(real, fake)
    assert value.item() == pytest.approx(0.01 * (4 + 1) / 2)
    for grad in torch.autograd.grad(value, (real, fake)):
        torch.testing.assert_close(grad, torch.tensor([0.02, 0.01]))
    with pytest.raises(InputError, match="same shape"):
        centring(real, fake[:1])
    with pytest.raises(InputError, match="floating"):
        centring(real.long(), fake.long())
