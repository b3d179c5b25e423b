from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from apt.data.digits import MovingDigits
from apt.errors import InputError
from apt.metrics import PatchFrechet, power_spectrum, spectrum_distance
from apt.metrics.detail import _dct_matrix

NUM = 192


def real_clips(seed: int, num: int = NUM) -> Tensor:
    dataset = MovingDigits(seed, "test")
    return torch.stack([dataset[i].pixels for i in range(num)])


@pytest.fixture(scope="module")
def real() -> Tensor:
    return real_clips(seed=1, num=2 * NUM)


@pytest.fixture(scope="module")
def fresh() -> Tensor:
    return real_clips(seed=2)


def blur(clips: Tensor) -> Tensor:
    """Binomial 3x3 blur of each frame."""
    for axis in (3, 4):
        clips = (clips.roll(1, axis) + 2 * clips + clips.roll(-1, axis)) / 4
    return clips


def ghost(clips: Tensor) -> Tensor:
    """Mean of two copies, one of them shifted by two pixels."""
    return (clips + clips.roll(2, 4)) / 2


def half_grey(clips: Tensor) -> Tensor:
    """Every pixel halfway to mid-grey, as where two colours have been averaged."""
    return clips / 2


def some_grey(clips: Tensor) -> Tensor:
    """One pixel in ten replaced by mid-grey."""
    chosen = torch.rand(clips[:, :1].shape, generator=torch.Generator().manual_seed(0)) < 0.1
    return torch.where(chosen, 0.0, clips)


def half_of_them_blurred(clips: Tensor) -> Tensor:
    return torch.cat([blur(clips[: NUM // 2]), clips[NUM // 2 :]])


def smear_over_time(clips: Tensor) -> Tensor:
    """Mean of a frame and the next one."""
    return torch.cat([(clips[:, :, 1:] + clips[:, :, :-1]) / 2, clips[:, :, -1:]], dim=2)


SPATIAL_FLAWS = [blur, ghost, half_grey, some_grey, half_of_them_blurred]


@pytest.fixture(scope="module")
def patches(real: Tensor) -> PatchFrechet:
    return PatchFrechet(real)


@pytest.fixture(scope="module")
def patch_floor(patches: PatchFrechet, fresh: Tensor) -> float:
    return patches(fresh)


def test_resampling_real_clips_changes_little(
    real: Tensor, patches: PatchFrechet, patch_floor: float
) -> None:
    other = real_clips(seed=3)
    assert 0.5 < patches(other) / patch_floor < 2
    assert spectrum_distance(power_spectrum(other), power_spectrum(real)).spatial < 0.6


@pytest.mark.parametrize("flaw", SPATIAL_FLAWS)
def test_patches_see_flaws(
    patches: PatchFrechet, patch_floor: float, fresh: Tensor, flaw: Callable[[Tensor], Tensor]
) -> None:
    assert patches(flaw(fresh)) > 2.5 * patch_floor


@pytest.mark.parametrize("flaw", SPATIAL_FLAWS)
def test_spatial_spectrum_sees_flaws(
    real: Tensor, fresh: Tensor, flaw: Callable[[Tensor], Tensor]
) -> None:
    assert spectrum_distance(power_spectrum(flaw(fresh)), power_spectrum(real)).spatial > 1.5


@pytest.mark.parametrize("flaw", [smear_over_time, half_grey])
def test_temporal_spectrum_sees_smearing(
    real: Tensor, fresh: Tensor, flaw: Callable[[Tensor], Tensor]
) -> None:
    reference = power_spectrum(real)
    floor = spectrum_distance(power_spectrum(fresh), reference).temporal
    smeared = spectrum_distance(power_spectrum(flaw(fresh)), reference).temporal
    assert floor is not None
    assert smeared is not None
    assert smeared > 2.5 * floor


def test_rounding_to_8_bits_is_no_flaw(
    patches: PatchFrechet, patch_floor: float, fresh: Tensor
) -> None:
    """Half a level shows in patches of clear sky, but far less than any flaw (2.5 floors)."""
    rounded = ((fresh + 1) * 127.5).round() / 127.5 - 1
    assert patch_floor < patches(rounded) < 1.2 * patch_floor


def test_equal_clips_have_no_distance(fresh: Tensor) -> None:
    assert PatchFrechet(fresh)(fresh) == pytest.approx(0, abs=1e-6)
    spectrum = power_spectrum(fresh)
    found = spectrum_distance(spectrum, spectrum)
    assert (found.spatial, found.temporal) == (0, 0)


def test_clips_in_batches_have_the_distance_of_all(real: Tensor, fresh: Tensor) -> None:
    whole = PatchFrechet(real[:64])(fresh)
    batches = PatchFrechet(real[:64].split(10))(iter(fresh.split(7)))
    assert batches == pytest.approx(whole, rel=1e-4)
    sizes = [fresh[:8], fresh[8:16, ..., :24, :16]]
    assert PatchFrechet(sizes)(sizes) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="no real clips"):
        PatchFrechet([])


def test_dct_is_scipys() -> None:
    x = np.random.default_rng(0).normal(size=8)
    np.testing.assert_allclose(
        _dct_matrix(8).numpy() @ x, scipy.fft.dct(x, norm="ortho"), atol=1e-5
    )


def test_a_wave_shows_at_its_frequency() -> None:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    phases = torch.linspace(0, 6, 4)[:, None, None]
    wave = torch.sin(2 * torch.pi * (3 * x + 4 * y) / 32 + phases)  # radius 5
    clips = wave[:, None, None].expand(4, 3, 9, 32, 32)
    spectrum = power_spectrum(clips)
    assert spectrum.spatial.argmax().item() == 5 - 1
    # Nothing moves, so every temporal frequency holds the floor of 8-bit rounding alone.
    torch.testing.assert_close(spectrum.temporal, torch.full((4,), spectrum.temporal[0].item()))
    t = torch.arange(9.0)[:, None, None]
    blinking = torch.sin(2 * torch.pi * 2 * t / 9 + phases[:, None, None]).expand(4, 3, 9, 32, 32)
    assert power_spectrum(blinking).temporal.argmax().item() == 2 - 1


def test_images_have_no_temporal_spectrum(fresh: Tensor) -> None:
    images = fresh[:, :, :1]
    found = spectrum_distance(power_spectrum(images), power_spectrum(blur(images)))
    assert found.temporal is None
    assert found.spatial > 1


@pytest.mark.parametrize(
    "shape", [(4, 3, 9, 32), (4, 1, 9, 32, 32), (0, 3, 9, 32, 32), (4, 3, 9, 6, 32)]
)
def test_rejects_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected"):
        PatchFrechet(torch.zeros(shape))


def test_rejects_spectra_of_other_sizes(fresh: Tensor) -> None:
    with pytest.raises(InputError, match="different sizes"):
        spectrum_distance(power_spectrum(fresh), power_spectrum(fresh[..., :16, :16]))
