from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import ConfigError, InputError
from apt.models import create_codec
from apt.models.codecs import PatchifyCodec, PatchifyConfig
from apt.models.protocols import LatentCodec


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
    assert (codec.channels, codec.temporal_compression, codec.spatial_compression) == (192, 4, 4)
    assert codec.latent_shape(9, 32, 32) == (3, 8, 8)
    assert codec.encode(pixels(1, 3, 9, 32, 32)).shape == (1, 192, 3, 8, 8)


def test_time_is_causal_and_space_is_local() -> None:
    codec = create_codec("patchify")
    clip = pixels(1, 3, 9, 8, 8)
    base = codec.encode(clip)
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        changed = clip.clone()
        changed[:, :, frame, 5, 2] += 1
        places = (codec.encode(changed) != base).nonzero()[:, 2:].unique(dim=0)
        assert places.tolist() == [[latent, 1, 0]]


def test_an_image_is_a_video_of_one_frame() -> None:
    codec = create_codec("patchify")
    clip = pixels(1, 3, 9, 8, 8)
    assert torch.equal(codec.encode(clip)[:, :, :1], codec.encode(clip[:, :, :1]))
    # What a network makes of the first frame's repeats is averaged.
    latents = codec.encode(clip[:, :, :1]) + torch.linspace(-1, 1, 192).view(1, -1, 1, 1, 1)
    parts = (latents * 0.5).reshape(1, 3, 4, 4, 4, 1, 2, 2).mean(dim=2)
    expected = parts.permute(0, 1, 4, 5, 2, 6, 3).reshape(1, 3, 1, 8, 8)
    torch.testing.assert_close(codec.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_statistics_give_unit_variance() -> None:
    clip = pixels(4, 3, 5, 8, 8) * 0.3 - 0.4
    codec = create_codec("patchify", mean=clip.mean().item(), std=clip.std().item())
    latents = codec.encode(clip)
    assert latents.mean().abs() < 0.1 and latents.std() == pytest.approx(1, abs=0.1)


def test_gradients_pass_through() -> None:
    codec = create_codec("patchify")
    clip = pixels(1, 3, 5, 4, 4).requires_grad_()
    codec.decode(codec.encode(clip)).sum().backward()
    assert clip.grad is not None
    torch.testing.assert_close(clip.grad, torch.ones_like(clip))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 32, 32), "use 5 or 9"),
        ((0, 32, 32), "use 1 or 5"),
        ((9, 30, 32), "height 30 does not fit; use a multiple of 4, such as 28"),
        ((9, 32, 2), "width 2 does not fit; use a multiple of 4, such as 4"),
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
    with pytest.raises(InputError, match=r"\(B, 192, T, H, W\)"):
        codec.decode(torch.zeros(1, 16, 3, 8, 8))


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'spatial'"):
        create_codec("patchify", spacial=2)
    assert isinstance(create_codec("patchify", spatial=2), PatchifyCodec)
