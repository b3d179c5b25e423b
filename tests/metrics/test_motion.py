from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.errors import InputError
from apt.metrics.motion import flicker, frame_change, motion, sharpness


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth patches of grey, (H, W, 3) uint8 in 40..215."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, height // 4 + 2, width // 4 + 2, generator=generator)
    grey = F.interpolate(coarse, (height, width), mode="bilinear")[0, 0]
    return (40 + 175 * grey).round().to(torch.uint8)[..., None].expand(-1, -1, 3)


def moving(step: tuple[int, int], frames: int = 3, size: int = 48) -> Tensor:
    """A texture that moves by so many pixels per frame, (T, size, size, 3)."""
    y, x = step
    large = texture(size + 2 * 40, size + 2 * 40)
    return torch.stack(
        [
            large[40 - t * y : 40 - t * y + size, 40 - t * x : 40 - t * x + size]
            for t in range(frames)
        ]
    )


def grey(levels: list[float], size: int = 16) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, size, size, 3)


class TestMotion:
    @settings(max_examples=8, deadline=None)
    @given(st.integers(-8, 8), st.integers(-8, 8))
    def test_a_known_speed_is_found(self, y: int, x: int) -> None:
        assert motion(moving((y, x))) == pytest.approx((y * y + x * x) ** 0.5 / 48)

    def test_slow_motion_is_found_between_pixels(self) -> None:
        fast = F.avg_pool2d(moving((1, 2), size=96).permute(0, 3, 1, 2).float(), 2)
        slow = fast.permute(0, 2, 3, 1)
        assert motion(slow) == pytest.approx((0.25 + 1) ** 0.5 / 48)

    def test_large_frames_are_measured_by_their_side(self) -> None:
        clip = moving((0, 4), size=128)
        double = clip.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        assert motion(double) == pytest.approx(motion(clip)) == pytest.approx(4 / 128)

    def test_a_small_thing_over_a_still_background_counts(self) -> None:
        clip = texture(48, 48)[None].repeat(4, 1, 1, 1).clone()
        thing = texture(20, 20, seed=1)
        for t in range(4):
            clip[t, 14:34, 8 + 3 * t : 28 + 3 * t] = thing
        assert motion(clip) == pytest.approx(3 / 48)

    def test_what_is_frozen_has_none(self) -> None:
        still = texture(48, 48)[None].repeat(6, 1, 1, 1)
        assert motion(still) == 0 and frame_change(still) == 0 and flicker(still) == 0

    def test_flicker_and_noise_are_no_motion(self) -> None:
        still = texture(48, 48)[None].repeat(4, 1, 1, 1).float()
        generator = torch.Generator().manual_seed(0)
        assert motion(still + torch.tensor([0.0, 30, 0, 30]).view(4, 1, 1, 1)) == 0
        assert motion(still + 8 * torch.randn(still.shape, generator=generator)) == 0


class TestFlicker:
    @settings(max_examples=20, deadline=None)
    @given(st.floats(0, 100), st.integers(3, 9))
    def test_alternation_gives_its_amplitude(self, amplitude: float, frames: int) -> None:
        clip = grey([120 + amplitude * (-1) ** t for t in range(frames)])
        assert flicker(clip) == pytest.approx(amplitude, abs=1e-3)
        assert frame_change(clip) == pytest.approx(2 * amplitude, abs=1e-3)

    def test_a_steady_fade_is_none(self) -> None:
        fade = grey([10.0 * t for t in range(8)])
        assert flicker(fade) == pytest.approx(0, abs=1e-4)
        assert frame_change(fade) == pytest.approx(10, abs=1e-4)

    def test_opposite_halves_do_not_cancel(self) -> None:
        clip = grey([100, 140, 100, 140]).clone()
        clip[:, :, 8:] = 240 - clip[:, :, 8:]
        assert flicker(clip) == pytest.approx(20, abs=1e-3)

    def test_motion_within_a_cell_is_none(self) -> None:
        clip = torch.zeros(5, 32, 32, 3)
        for t in range(5):
            clip[t, 2:4, 1 + t : 3 + t] = 255
        assert flicker(clip) == pytest.approx(0, abs=1e-3)
        assert frame_change(clip) > 0


class TestSharpness:
    def test_columns_of_two_levels(self) -> None:
        """The Laplacian of alternating 0 and 100 is ±200."""
        clip = torch.zeros(2, 10, 10, 3)
        clip[0, :, ::2] = 100
        torch.testing.assert_close(sharpness(clip), torch.tensor([40_000.0, 0.0]))

    def test_falls_with_blur(self) -> None:
        sharp = texture(32, 32)[None].float()
        soft = F.avg_pool2d(sharp.permute(0, 3, 1, 2), 5, 1, 2, count_include_pad=False)
        assert sharpness(soft.permute(0, 2, 3, 1)) < 0.3 * sharpness(sharp)


def test_bad_clips() -> None:
    two = torch.zeros(2, 16, 16, 3)
    with pytest.raises(InputError, match="at least 3 frames, got 2"):
        flicker(two)
    with pytest.raises(InputError, match="at least 2 frames, got 1"):
        motion(two[:1])
    with pytest.raises(InputError, match="at least 2 frames, got 1"):
        frame_change(two[:1])
    with pytest.raises(InputError, match="at least 8x8"):
        motion(two[:, :7])
    with pytest.raises(InputError, match="at least 3x3"):
        sharpness(two[:, :, :2])
    with pytest.raises(InputError, match=r"expected \(T, H, W, 3\)"):
        sharpness(two[..., 0])
