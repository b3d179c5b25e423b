from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from apt import philox

WORD = 2**32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: str, key: int, expected: str) -> None:
    """Those of the authors' library Random123."""
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    found = philox.philox((c0, c1, c2, c3), key)
    assert " ".join(f"{word.item():08x}" for word in found) == expected


def test_values_are_the_same_for_ever_and_on_every_machine() -> None:
    """Runs resume and ranks may differ: instruction sets, threads and libraries must not matter."""
    assert philox.normal(0, 1, 4, first=0).tolist() == [
        [-0.25581595301628113, 1.17759108543396, 0.6301836371421814, 0.26756224036216736]
    ]
    many = philox.normal(-1, 3, 50_001, first=2**33).numpy().tobytes()
    assert hashlib.sha256(many).hexdigest().startswith("d941ea41033039fb")


def words() -> torch.Tensor:
    """Random words, both ends, and both sides of each change of formula or sign."""
    generator = torch.Generator().manual_seed(0)
    near = torch.arange(-2000, 2000)
    seams = [round(0.075 * WORD), round(0.925 * WORD), WORD // 2]
    return torch.cat(
        [
            torch.randint(WORD, (1_000_000,), generator=generator),
            torch.arange(2000),
            WORD - 1 - torch.arange(2000),
            *(seam + near for seam in seams),
            2 ** torch.arange(32),
        ]
    )


def test_normal_values_are_quantiles() -> None:
    w = words()
    z = philox.to_normal(w).double().numpy()
    exact = special.ndtri((w.double().numpy() + 0.5) / WORD)
    assert np.all(np.abs(z - exact) <= 5e-7 * np.abs(exact))
    assert np.isfinite(z).all() and np.abs(z).min() > 0 and 6.3 < np.abs(z).max() < 6.34


def test_normal_values_are_symmetric() -> None:
    w = words()
    assert torch.equal(philox.to_normal(WORD - 1 - w), -philox.to_normal(w))


def test_uniform_values_are_the_upper_bits() -> None:
    w = words()
    u = philox.to_uniform(w)
    assert u.dtype == torch.float32 and u.max() < 1
    assert torch.equal((u.double() * 2**24).long(), w >> 8)


def test_a_sample_of_the_distributions() -> None:
    z = philox.normal(12345, 300, 1001, first=7)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    wide = z.double()
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(wide.pow(power).mean() - moment) < 4 * (deviation / z.numel()) ** 0.5
    u = philox.uniform(12345, 100_000, first=7)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01


def test_neighbours_are_independent() -> None:
    """In elements, samples, and keys."""
    z, other = (philox.normal(key, 101, 1001, first=0).double() for key in (1, 2))
    pairs = [(z[:, :-1], z[:, 1:]), (z[:, :-4], z[:, 4:]), (z[:-1], z[1:]), (z, other)]
    for left, right in pairs:
        assert abs((left * right).mean()) < 4 / left.numel() ** 0.5


@settings(max_examples=20, deadline=None)
@given(
    num=st.integers(0, 5),
    size=st.integers(0, 50),
    first=st.sampled_from([0, 3, 2**32 - 2, 2**40]),
    cut=st.floats(0, 1),
)
def test_a_value_depends_on_its_place_alone(num: int, size: int, first: int, cut: float) -> None:
    whole = philox.normal(5, num, size, first=first)
    assert whole.shape == (num, size) and whole.isfinite().all()
    rows, columns = int(cut * num), int(cut * size)
    assert torch.equal(whole[rows:], philox.normal(5, num - rows, size, first=first + rows))
    assert torch.equal(whole[:, :columns], philox.normal(5, num, columns, first=first))
    uniform = philox.uniform(5, num, first=first)
    assert torch.equal(uniform[rows:], philox.uniform(5, num - rows, first=first + rows))


@pytest.mark.parametrize(("num", "size"), [(3, 70_003), (40, 5_001), (70_000, 3)])
def test_pieces_of_work_do_not_show(num: int, size: int) -> None:
    whole = philox.normal(5, num, size, first=0)
    row = num - 2
    assert torch.equal(whole[row:], philox.normal(5, 2, size, first=row))
    assert whole.unique().numel() > 0.99 * whole.numel()
