from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import ConfigError, InputError
from apt.models import create_codec
from apt.models.codecs import PatchifyCodec, PatchifyConfig, lapped_basis
from apt.pixels import LatentCodec


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(0, 3),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    temporal=st.integers(1, 4),
    spatial=st.integers(1, 4),
    mean=st.floats(-1, 1),
    std=st.floats(0.1, 2),
)
def test_nothing_is_lost(
    blocks: int, height: int, width: int, temporal: int, spatial: int, mean: float, std: float
) -> None:
    codec = PatchifyConfig(temporal=temporal, spatial=spatial, mean=mean, std=std).build()
    clip = pixels(2, 3, blocks * temporal + 1, height * spatial, width * spatial)
    latents = codec.encode(clip)
    shape = codec.latent_shape(*clip.shape[2:])
    assert latents.shape == (2, codec.channels, *shape)
    assert shape == (blocks + 1, height, width)
    torch.testing.assert_close(codec.decode(latents), clip, rtol=1e-4, atol=1e-5)


def test_digits_have_the_shapes_of_a_video_vae() -> None:
    codec = create_codec("patchify")
    assert isinstance(codec, LatentCodec)
    assert (codec.channels, codec.temporal_compression, codec.spatial_compression) == (768, 4, 8)
    assert codec.latent_shape(9, 32, 32) == (3, 4, 4)
    assert codec.encode(pixels(1, 3, 9, 32, 32)).shape == (1, 768, 3, 4, 4)


def test_time_is_causal_and_space_is_local() -> None:
    codec = create_codec("patchify", spatial=4)
    clip = pixels(1, 3, 9, 8, 8)
    base = codec.encode(clip)
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        changed = clip.clone()
        changed[:, :, frame, 5, 2] += 1
        places = (codec.encode(changed) != base).nonzero()[:, 2:].unique(dim=0)
        assert places.tolist() == [[latent, 1, 0]]


def test_an_image_is_a_video_of_one_frame() -> None:
    codec = create_codec("patchify", spatial=4)
    clip = pixels(1, 3, 9, 8, 8)
    assert torch.equal(codec.encode(clip)[:, :, :1], codec.encode(clip[:, :, :1]))
    # What a network makes of the first frame's repeats is averaged.
    latents = codec.encode(clip[:, :, :1]) + torch.linspace(-1, 1, 192).view(1, -1, 1, 1, 1)
    parts = (latents * 0.5).reshape(1, 3, 4, 4, 4, 1, 2, 2).mean(dim=2)
    expected = parts.permute(0, 1, 4, 5, 2, 6, 3).reshape(1, 3, 1, 8, 8)
    torch.testing.assert_close(codec.decode(latents), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(1, 5), half=st.integers(1, 8))
def test_the_lapped_basis_is_orthogonal(blocks: int, half: int) -> None:
    size = 2 * half * blocks
    basis = lapped_basis(size, 2 * half)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size).double())


def test_the_lapped_basis_is_the_mdct() -> None:
    """The definition's windowed cosines, read backwards in time, in a block with two neighbours."""
    m = 8
    n, k = torch.arange(2 * m).double(), torch.arange(m).double()[:, None]
    window = (torch.pi / (2 * m) * (n + 0.5)).sin()
    cosine = (torch.pi / m * (n + 0.5 - m / 2) * (k + 0.5)).cos()
    expected = torch.zeros(m, 4 * m).double()
    expected[:, m // 2 : m // 2 + 2 * m] = (2 / m) ** 0.5 * window * cosine
    torch.testing.assert_close(lapped_basis(4 * m, m)[m : 2 * m], expected)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 4), width=st.integers(1, 4), half=st.integers(1, 3))
def test_lapped_latents_lose_nothing(height: int, width: int, half: int) -> None:
    p = 2 * half
    codec = PatchifyConfig(spatial=p, lapped=True, mean=-0.3, std=0.7).build()
    clip = pixels(2, 3, 5, height * p, width * p)
    latents = codec.encode(clip)
    torch.testing.assert_close(codec.decode(latents), clip, rtol=1e-4, atol=1e-5)
    # Orthogonal: white noise in latents is white noise in pixels, and errors keep their size.
    repeats = torch.tensor([4.0, 1.0]).view(1, 1, 2, 1, 1)
    energy = (latents**2 / repeats).sum()
    torch.testing.assert_close(energy, ((clip + 0.3) / 0.7).square().sum(), rtol=1e-4, atol=1e-4)


def test_lapped_latents_lose_nothing_in_autocast() -> None:
    codec = create_codec("patchify", lapped=True)
    clip = pixels(1, 3, 9, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = codec.decode(codec.encode(clip))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, clip, rtol=1e-4, atol=1e-5)


def test_a_lapped_basis_does_not_depend_on_its_first_user() -> None:
    lapped_basis.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        lapped_basis(16, 8)
    basis = lapped_basis(16, 8)
    assert basis.device.type == "cpu"
    assert not basis.is_inference()


def test_a_lapped_basis_is_made_once_for_each_dtype_and_device() -> None:
    lapped_basis.cache_clear()
    codec = create_codec("patchify", lapped=True)
    clip = pixels(1, 3, 5, 16, 24)
    with torch.inference_mode():
        latents = codec.encode(clip)
    for _ in range(2):
        codec.decode(codec.encode(clip.requires_grad_())).sum().backward()
    assert lapped_basis.cache_info().misses == 2  # 16 and 24
    for size in (16, 24):
        elsewhere = lapped_basis(size, 8, torch.float32, torch.device("meta"))
        assert elsewhere.device.type == "meta"
    double = codec.encode(clip.double())
    assert double.dtype == torch.float64
    assert lapped_basis.cache_info().misses == 6
    torch.testing.assert_close(latents, double.float())
    assert torch.equal(codec.encode(clip), latents)
    assert lapped_basis.cache_info().misses == 6


def test_the_error_of_a_lapped_block_fades_out() -> None:
    """One block's error crosses its border without a jump; folded blocks end in one."""

    def jump(*, lapped: bool) -> float:
        codec = create_codec("patchify", lapped=lapped)
        clip = pixels(1, 3, 9, 32, 32)
        latents = codec.encode(clip)
        # The lowest frequencies are wrong, as if the network had missed the block's colour.
        wrong = codec.encode(clip * 0 + 0.2)
        latents[:, :, :, 1, 1] += wrong[:, :, :, 1, 1]
        error = (codec.decode(latents) - clip).abs()
        across = (error[..., 8:16, 16] - error[..., 8:16, 15]).abs().mean()
        return (across / error.amax()).item()

    assert jump(lapped=False) == pytest.approx(1, abs=1e-3)
    assert jump(lapped=True) < 0.25


def test_lapped_blocks_need_an_even_size() -> None:
    with pytest.raises(ConfigError, match="spatial must be even, got 3"):
        create_codec("patchify", spatial=3, lapped=True)


def test_statistics_give_unit_variance() -> None:
    clip = pixels(4, 3, 5, 8, 8) * 0.3 - 0.4
    codec = create_codec("patchify", mean=clip.mean().item(), std=clip.std().item())
    latents = codec.encode(clip)
    assert latents.mean().abs() < 0.1 and latents.std() == pytest.approx(1, abs=0.1)


def test_gradients_pass_through() -> None:
    codec = create_codec("patchify", lapped=True)
    clip = pixels(1, 3, 5, 8, 16).requires_grad_()
    codec.decode(codec.encode(clip)).sum().backward()
    assert clip.grad is not None
    torch.testing.assert_close(clip.grad, torch.ones_like(clip))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 32, 32), "use 5 or 9"),
        ((0, 32, 32), "use 1 or 5"),
        ((9, 30, 32), "height 30 does not fit; use a multiple of 8, such as 24"),
        ((9, 32, 2), "width 2 does not fit; use a multiple of 8, such as 8"),
    ],
)
def test_sizes_that_do_not_fit(size: tuple[int, int, int], message: str) -> None:
    codec = create_codec("patchify")
    with pytest.raises(InputError, match=message):
        codec.latent_shape(*size)
    with pytest.raises(InputError, match=message):
        codec.encode(torch.zeros(1, 3, *size))


def test_other_tensors_are_refused() -> None:
    codec = create_codec("patchify")
    with pytest.raises(InputError, match=r"\(B, 3, T, H, W\)"):
        codec.encode(torch.zeros(1, 4, 9, 32, 32))
    with pytest.raises(InputError, match=r"\(B, 3, T, H, W\)"):
        codec.encode(torch.zeros(3, 9, 32, 32))
    with pytest.raises(InputError, match=r"\(B, 768, T, H, W\)"):
        codec.decode(torch.zeros(1, 16, 3, 8, 8))


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'spatial'"):
        create_codec("patchify", spacial=2)
    assert isinstance(create_codec("patchify", spatial=2), PatchifyCodec)
