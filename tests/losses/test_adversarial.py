from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import InputError
from apt.losses import AdversarialObjective, create_loss

OBJECTIVES = ["non_saturating", "hinge", "least_squares", "relativistic"]
UNPAIRED = OBJECTIVES[:3]


def softplus(a: float) -> float:
    return math.log1p(math.exp(a))


# D's loss on real (2, 0.5) against fake (-1, 3), and G's on the same, written out by hand.
BY_HAND = {
    "non_saturating": (
        (softplus(-2) + softplus(-0.5)) / 2 + (softplus(-1) + softplus(3)) / 2,
        (softplus(1) + softplus(-3)) / 2,
    ),
    "hinge": ((0 + 0.5) / 2 + (0 + 4) / 2, -(-1 + 3) / 2),
    "least_squares": ((1 + 0.25) / 4 + (1 + 9) / 4, (4 + 4) / 4),
    "relativistic": ((softplus(-3) + softplus(2.5)) / 2, (softplus(3) + softplus(-2.5)) / 2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_by_hand(name: str) -> None:
    objective = create_loss(name)
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-1.0, 3.0])
    expected_d, expected_g = BY_HAND[name]
    assert objective.discriminator(real, fake).item() == pytest.approx(expected_d, rel=1e-6)
    assert objective.generator(fake, real).item() == pytest.approx(expected_g, rel=1e-6)


LOGITS = st.lists(
    st.tuples(st.floats(-80, 80, width=32), st.floats(-80, 80, width=32)), min_size=1, max_size=9
)


@settings(max_examples=50, deadline=None)
@given(LOGITS)
def test_non_saturating_is_binary_cross_entropy(pairs: list[tuple[float, float]]) -> None:
    objective = create_loss("non_saturating")
    real, fake = (torch.tensor(side) for side in zip(*pairs, strict=True))
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        objective.discriminator(real, fake), bce(real, ones) + bce(fake, zeros)
    )
    torch.testing.assert_close(objective.generator(fake), bce(fake, ones))


@settings(max_examples=50, deadline=None)
@given(LOGITS)
def test_relativistic_is_binary_cross_entropy_of_the_margin(
    pairs: list[tuple[float, float]],
) -> None:
    objective = create_loss("relativistic")
    real, fake = (torch.tensor(side) for side in zip(*pairs, strict=True))
    ones = torch.ones_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(objective.discriminator(real, fake), bce(real - fake, ones))
    torch.testing.assert_close(objective.generator(fake, real), bce(fake - real, ones))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_descent_separates_for_d_and_deceives_for_g(name: str) -> None:
    objective = create_loss(name)
    real = torch.tensor([-0.3, 0.2, 0.5], requires_grad=True)
    fake = torch.tensor([0.4, -0.1, 0.3], requires_grad=True)
    grad_real, grad_fake = torch.autograd.grad(objective.discriminator(real, fake), (real, fake))
    assert (grad_real < 0).all(), "a descent step of D must raise the logits of real samples"
    if name == "least_squares":  # pulls fakes towards 0 from either side
        assert torch.equal(grad_fake.sign(), fake.sign())
    else:
        assert (grad_fake > 0).all(), "a descent step of D must lower the logits of fakes"
    (grad,) = torch.autograd.grad(objective.generator(fake, real), fake)
    assert (grad < 0).all(), "a descent step of G must raise the logits of fakes"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_stay_finite(name: str) -> None:
    objective = create_loss(name)
    real = torch.tensor([1e4, -1e4], requires_grad=True)
    fake = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = objective.discriminator(real, fake) + objective.generator(fake, real)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (real, fake)))


def test_non_saturating_generator_learns_from_a_confident_discriminator() -> None:
    # log(sigmoid + eps) and the saturating loss both have a zero gradient here.
    fake = torch.tensor([-200.0], requires_grad=True)
    create_loss("non_saturating").generator(fake).backward()
    assert fake.grad is not None and fake.grad.item() == -1.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_mean_over_the_batch_makes_accumulation_exact(name: str) -> None:
    objective = create_loss(name)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(8, generator=generator, dtype=torch.float64)
    fake = torch.randn(8, generator=generator, dtype=torch.float64)
    whole = objective.discriminator(real, fake)
    halves = [objective.discriminator(real[i : i + 4], fake[i : i + 4]) for i in (0, 4)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast(name: str, dtype: torch.dtype) -> None:
    objective = create_loss(name)
    real = torch.tensor([2.3, 1.1, 0.4], dtype=dtype)
    fake = torch.tensor([-1.7, 0.6, 0.9], dtype=dtype)
    for half, full in (
        (objective.discriminator(real, fake), objective.discriminator(real.float(), fake.float())),
        (objective.generator(fake, real), objective.generator(fake.float(), real.float())),
    ):
        assert half.dtype == torch.float32
        assert half == full


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_does_not_lower_the_loss(name: str) -> None:
    objective = create_loss(name)
    real, fake = torch.tensor([2.3, 1.1]), torch.tensor([-1.7, 0.6])
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective.discriminator(real, fake), objective.generator(fake, real)
    assert inside == (objective.discriminator(real, fake), objective.generator(fake, real))


BAD_LOGITS = {
    "integers": torch.tensor([1, 2]),
    "booleans": torch.tensor([True, False]),
    "a scalar": torch.tensor(1.0),
    "a column": torch.zeros(2, 1),
    "no samples": torch.zeros(0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bad", BAD_LOGITS.values(), ids=BAD_LOGITS)
def test_bad_logits_are_refused(name: str, bad: torch.Tensor) -> None:
    objective = create_loss(name)
    good = torch.zeros(2)
    for call in (
        lambda: objective.discriminator(bad, bad),
        lambda: objective.discriminator(good, bad),
        lambda: objective.discriminator(bad, good),
        lambda: objective.generator(bad, bad),
    ):
        with pytest.raises(InputError, match="logits"):
            call()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_that_differ_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="same shape"):
        create_loss(name).discriminator(torch.zeros(3), torch.zeros(2))


def test_relativistic_needs_real_logits_and_says_so() -> None:
    assert create_loss("relativistic").needs_real
    with pytest.raises(InputError, match="logits_real"):
        create_loss("relativistic").generator(torch.zeros(2))
    with pytest.raises(InputError, match="same shape"):
        create_loss("relativistic").generator(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("name", UNPAIRED)
def test_other_generators_do_without_real_logits(name: str) -> None:
    objective: AdversarialObjective = create_loss(name)
    fake = torch.tensor([0.5, -1.0])
    assert not objective.needs_real
    assert objective.generator(fake) == objective.generator(fake, torch.tensor([7.0, 8.0]))


@pytest.mark.parametrize("name", UNPAIRED)
def test_mismatched_condition_is_the_fake_term(name: str) -> None:
    mismatched = create_loss("mismatched_condition", weight=0.5, objective=name)
    logits = torch.tensor([1.5, -0.5], requires_grad=True)
    value = mismatched(logits)
    expected = {
        "non_saturating": (softplus(1.5) + softplus(-0.5)) / 2,
        "hinge": (2.5 + 0.5) / 2,
        "least_squares": (2.25 + 0.25) / 4,
    }[name]
    assert value.item() == pytest.approx(0.5 * expected, rel=1e-6)
    (grad,) = torch.autograd.grad(value, logits)
    assert grad[0] > 0, "D must lower a logit that is high under a wrong caption"
    with pytest.raises(InputError, match="shape"):
        mismatched(torch.zeros(2, 2))
