"""sample_shifted_timesteps and perturbed_batch: the ops that draw random numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import InputError
from apt.kernels import perturbed_batch, sample_shifted_timesteps
from apt.rng import Draw

KEY = Draw(seed=3, step=5)


@settings(deadline=None)
@given(st.floats(0.05, 50))
def test_shift_follows_eq_7(shift):
    u = sample_shifted_timesteps(6, KEY, shift=1).double()
    t = sample_shifted_timesteps(6, KEY, shift=shift).double()
    torch.testing.assert_close(t, shift * u / (1 + (shift - 1) * u), rtol=1e-5, atol=1e-7)
    assert ((t >= 0) & (t <= 1)).all()


def test_timesteps_have_the_shifted_distribution():
    shift = 12.0
    t = sample_shifted_timesteps(4000, KEY, shift=shift)
    assert t.dtype == torch.float32
    undone = t.double() / (shift - (shift - 1) * t.double())  # Eq. 7 solved for u
    sorted_u = undone.sort().values
    steps = torch.linspace(0, 1, 4001, dtype=torch.float64)
    distance = torch.maximum((sorted_u - steps[:-1]).abs(), (sorted_u - steps[1:]).abs()).max()
    assert distance < 1.63 / 4000**0.5  # Kolmogorov-Smirnov at 1 %


def test_draws_are_the_same_for_ever():
    key = Draw(0, 5, 8)
    t = sample_shifted_timesteps(3, key.named("timesteps"), shift=12)
    assert t.tolist() == [0.9675341844558716, 0.9884034991264343, 0.24135856330394745]
    noise = perturbed_batch(torch.zeros(1, 3), torch.zeros(0, 3), 1.0, key.named("perturbation"))[1]
    assert noise.tolist() == [-1.431465983390808, -1.5098768472671509, 0.06745760887861252]


def test_timesteps_do_not_depend_on_splits():
    whole = sample_shifted_timesteps(8, KEY, shift=12)
    parts = [
        sample_shifted_timesteps(num, Draw(3, 5, offset), shift=12)
        for offset, num in ((0, 3), (3, 0), (3, 5))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.unique().numel() == 8
    for other in ({"step": 6}, {"seed": 4}, {"stream": "another"}):
        another = dataclasses.replace(KEY, **other)
        assert not torch.isin(sample_shifted_timesteps(8, another, shift=12), whole).any()


def test_layout_and_noise():
    real, fake = torch.randn(4, 2, 3, 5), torch.randn(3, 2, 3, 5)
    batch = perturbed_batch(real, fake, 0.1, KEY)
    assert batch.shape == (11, 2, 3, 5)
    assert torch.equal(batch[:4], real) and torch.equal(batch[8:], fake)
    double = perturbed_batch(real, fake, 0.2, KEY)
    noise = (batch[4:8] - real) / 0.1
    torch.testing.assert_close((double[4:8] - real) / 0.2, noise, rtol=1e-4, atol=1e-4)
    assert torch.equal(perturbed_batch(real, fake, 0.0, KEY)[4:8], real)


def test_noise_is_standard_normal():
    real = torch.zeros(50, 1000)
    noise = perturbed_batch(real, real[:0], 1.0, KEY)[50:]
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert noise.flatten().unique().numel() > 49_000


def test_only_the_first_samples_are_perturbed():
    real, fake = torch.randn(4, 6), torch.randn(2, 6)
    full = perturbed_batch(real, fake, 0.1, KEY)
    some = perturbed_batch(real, fake, 0.1, KEY, num_perturbed=1)
    assert torch.equal(some, torch.cat((real, full[4:5], fake)))
    none = perturbed_batch(real, fake, 0.1, KEY, num_perturbed=0)
    assert torch.equal(none, torch.cat((real, fake)))


def test_noise_does_not_depend_on_splits():
    real, fake = torch.randn(5, 6), torch.randn(5, 6)
    whole = perturbed_batch(real, fake, 0.1, KEY)[5:10]
    first = perturbed_batch(real[:2], fake[:2], 0.1, Draw(3, 5, 0))[2:4]
    rest = perturbed_batch(real[2:], fake[2:], 0.1, Draw(3, 5, 2))[3:6]
    assert torch.equal(torch.cat((first, rest)), whole)


def test_gradients_reach_both_inputs_and_both_copies():
    real = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3 + 2 + 2, 4, dtype=torch.float64)
    batch = perturbed_batch(real, fake, 0.1, KEY, num_perturbed=2)
    (batch * weights).sum().backward()
    both = weights[:3].clone()
    both[:2] += weights[3:5]
    torch.testing.assert_close(real.grad, both)
    torch.testing.assert_close(fake.grad, weights[5:])


def test_half_precision_is_rounded_once():
    real, fake = torch.randn(4, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    batch = perturbed_batch(real, fake, 0.01, KEY)
    assert batch.dtype == torch.bfloat16
    exact = perturbed_batch(real.float(), fake.float(), 0.01, KEY)
    assert torch.equal(batch, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -0.1}, "sigma must be"),
        ({"sigma": float("nan")}, "sigma must be"),
        ({"num_perturbed": 4}, r"num_perturbed must be in \[0, 3\]"),
        ({"num_perturbed": -1}, "num_perturbed"),
        ({"x_fake": torch.zeros(3, 5)}, "agree in sample shape"),
        ({"x_fake": torch.zeros(3, 4, dtype=torch.float64)}, "dtype"),
        ({"x_fake": torch.zeros(3, 4, device="meta")}, "device"),
        ({"x_real": torch.zeros(3, 4).int(), "x_fake": torch.zeros(3, 4).int()}, "floating point"),
        ({"x_real": torch.zeros(3), "x_fake": torch.zeros(())}, "agree in sample shape"),
        ({"sigma": float("inf")}, "finite"),
        ({"draw": Draw(3, 5, -1)}, "offset must be"),
        ({"draw": Draw(2**63)}, "seed must be a signed 64-bit"),
        ({"backend": "fused"}, "no backend 'fused'"),
    ],
)
def test_bad_batches_are_refused(change, message):
    given_ = {"x_real": torch.zeros(3, 4), "x_fake": torch.zeros(3, 4), "sigma": 0.1, "draw": KEY}
    with pytest.raises(InputError, match=message):
        perturbed_batch(**(given_ | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 0}, "shift must be above 0"),
        ({"shift": -1.0}, "shift must be above 0"),
        ({"shift": float("nan")}, "shift must be above 0"),
        ({"shift": float("inf")}, "finite"),
        ({"num": -1}, "num must be"),
        ({"draw": Draw(0, -(2**63) - 1)}, "step must be a signed 64-bit"),
        ({"draw": Draw(0, 0, 2**63)}, "offset must be"),
        ({"backend": "fused"}, "no backend 'fused'"),
    ],
)
def test_bad_draws_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        sample_shifted_timesteps(**({"num": 2, "shift": 1.0, "draw": KEY} | change))
