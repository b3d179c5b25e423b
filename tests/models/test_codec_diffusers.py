"""Latent codecs against diffusers' own classes: tiny, with random weights and no download."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from apt.checkpoints.info import CodecInfo
from apt.checkpoints.load import NO_SIZE, component_info, describe, load_codec
from apt.errors import CheckpointError, ConfigError, InputError
from apt.models.architectures import CODECS
from apt.models.codec_diffusers import DiffusersCodecConfig
from apt.models.create import create_codec, describe_codec
from apt.pixels import LatentCodec

diffusers = pytest.importorskip("diffusers")


def tiny_wan():
    return diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def tiny_kl(**options):
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 8),
        norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4,
        **options,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("codecs")
    torch.manual_seed(0)
    tiny_wan().save_pretrained(root / "wan" / "vae")
    tiny_kl().save_pretrained(root / "kl")
    tiny_kl(scaling_factor=1.5, shift_factor=0.06).save_pretrained(root / "shifted")
    tiny_kl(latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(0.5, 1.0, 2.0, 3.0)).save_pretrained(
        root / "vectors"
    )
    diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
    ).save_pretrained(root / "cogvideox" / "vae")
    return root


@pytest.fixture(scope="module")
def wan(folders):
    return create_codec("wan_vae", repo=str(folders / "wan"))


@pytest.fixture(scope="module")
def kl(folders):
    return create_codec("kl_vae", repo=str(folders / "kl"))


def video(frames, height=16, width=24, batch=2):
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_wan_equals_the_peer(folders, wan, frames):
    peer = diffusers.AutoencoderKLWan.from_pretrained(folders / "wan" / "vae").eval()
    x = video(frames)
    shape = (-1, 1, 1, 1)
    mean = torch.tensor(peer.config.latents_mean).view(shape)
    std = torch.tensor(peer.config.latents_std).view(shape)
    with torch.no_grad():
        raw = peer.encode(x).latent_dist.mode()
        expected_pixels = peer.decode(raw).sample
    z = wan.encode(x)
    assert z.shape == (2, 16, *wan.latent_shape(frames, 16, 24))
    torch.testing.assert_close(z, (raw - mean) / std)
    torch.testing.assert_close(wan.decode(z), expected_pixels, atol=1e-5, rtol=0)


def test_wan_geometry(wan):
    assert isinstance(wan, LatentCodec)
    assert (wan.channels, wan.temporal_compression, wan.spatial_compression) == (16, 4, 8)
    assert wan.latent_shape(49, 720, 1280) == (13, 90, 160)
    assert wan.latent_shape(1, 8, 8) == (1, 1, 1)


def test_an_image_is_the_first_frame_of_a_causal_video(wan):
    x = video(5)
    torch.testing.assert_close(wan.encode(x)[:, :, :1], wan.encode(x[:, :, :1]))


@pytest.mark.parametrize("frames", [1, 3])
def test_kl_equals_the_peer_frame_by_frame(folders, kl, frames):
    peer = diffusers.AutoencoderKL.from_pretrained(folders / "kl").eval()
    x = video(frames)
    z = kl.encode(x)
    assert z.shape == (2, 4, frames, 4, 6) == (2, 4, *kl.latent_shape(frames, 16, 24))
    pixels = kl.decode(z)
    for frame in range(frames):
        with torch.no_grad():
            raw = peer.encode(x[:, :, frame]).latent_dist.mode()
            decoded = peer.decode(raw).sample
        torch.testing.assert_close(z[:, :, frame], raw * peer.config.scaling_factor)
        torch.testing.assert_close(pixels[:, :, frame], decoded.clamp(-1, 1), atol=1e-5, rtol=0)


def test_shift_factor(folders):
    codec = create_codec("kl_vae", repo=str(folders / "shifted"))
    peer = diffusers.AutoencoderKL.from_pretrained(folders / "shifted").eval()
    x = video(1)
    with torch.no_grad():
        raw = peer.encode(x[:, :, 0]).latent_dist.mode()
    torch.testing.assert_close(codec.encode(x)[:, :, 0], (raw - 0.06) * 1.5)


def test_statistics_from_the_checkpoint_or_from_us(folders):
    stored = create_codec("kl_vae", repo=str(folders / "vectors"))
    plain = create_codec(
        "kl_vae", repo=str(folders / "vectors"), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
    )
    x = video(1)
    mean, std = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.5, 1, 2, 3])
    expected = (plain.encode(x) - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    torch.testing.assert_close(stored.encode(x), expected)
    torch.testing.assert_close(stored.decode(expected), plain.decode(plain.encode(x)))


def test_measured_statistics_give_unit_variance(folders):
    # The statistics are meant as those of the raw latents: using them must normalise
    raw = create_codec(
        "kl_vae", repo=str(folders / "kl"), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
    ).encode(video(9))
    mean, std = raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4))
    codec = create_codec(
        "kl_vae",
        repo=str(folders / "kl"),
        latents_mean=tuple(mean.tolist()),
        latents_std=tuple(std.tolist()),
    )
    z = codec.encode(video(9))
    torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3, 4)), torch.ones(4), atol=1e-4, rtol=0)


def test_any_causal_autoencoder_by_its_class(folders):
    options = {
        "class_name": "AutoencoderKLCogVideoX",
        "repo": str(folders / "cogvideox"),
        "spatial_compression": 8,
    }
    codec = create_codec("wan_vae", **options)
    assert codec.temporal_compression == 4
    x = video(9)
    z = codec.encode(x)
    assert z.shape == (2, 4, 3, 2, 3)
    assert codec.decode(z).shape == x.shape
    assert codec.encode(x[:, :, :1]).shape == (2, 4, 1, 2, 3)
    with pytest.raises(ConfigError, match="set temporal_compression and spatial_compression"):
        create_codec("wan_vae", **(options | {"spatial_compression": 4})).encode(x)
    with pytest.raises(ConfigError, match="does not state its spatial_compression"):
        create_codec("wan_vae", **(options | {"spatial_compression": None}))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 16, 16), r"8 frames do not fit; use 5 or 9 \(4k \+ 1\)"),
        ((0, 16, 16), "0 frames do not fit; use 1 or 5"),
        ((5, 20, 16), "height 20 does not fit; use a multiple of 8, such as 16 or 24"),
        ((5, 16, 4), "width 4 does not fit; use a multiple of 8, such as 8 or 16"),
    ],
)
def test_sizes_that_do_not_fit(wan, size, message):
    with pytest.raises(InputError, match=message):
        wan.latent_shape(*size)
    with pytest.raises(InputError, match=message):
        wan.encode(torch.zeros(1, 3, *size))


def test_tensors_that_do_not_fit(wan, kl):
    with pytest.raises(InputError, match=r"pixels must be \(B, 3, T, H, W\)"):
        wan.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match=r"latents must be \(B, 4, T, H, W\)"):
        kl.decode(torch.zeros(1, 16, 1, 2, 2))


def test_frozen_and_fp32_outside(folders):
    codec = create_codec("wan_vae", repo=str(folders / "wan"), dtype="bfloat16")
    codec.train()
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert codec.vae.dtype == torch.bfloat16
    x = video(5)
    z = codec.encode(x.requires_grad_())
    assert z.dtype == codec.decode(z).dtype == torch.float32 and not z.requires_grad
    exact = create_codec("wan_vae", repo=str(folders / "wan")).encode(x)
    assert 0 < (z - exact).abs().max() < 0.1


def test_casting_the_module_does_not_round_its_statistics(folders):
    codec = create_codec("kl_vae", repo=str(folders / "kl"))
    x = video(1)
    before = codec.encode(x)
    torch.testing.assert_close(codec.bfloat16().float().encode(x), before, atol=5e-2, rtol=0)
    mean, std = codec._affine(torch.device("cpu"))
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(std.flatten(), torch.full((4,), 1 / 0.18215))


def test_the_config_rebuilds_the_codec(folders, kl):
    saved = json.loads(json.dumps(dataclasses.asdict(kl.config)))
    again = create_codec("kl_vae", **saved)
    assert again.config == kl.config
    assert torch.equal(again.encode(video(1)), kl.encode(video(1)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_name": "AutoencoderKLWan"}, CheckpointError, "holds 'AutoencoderKL'"),
        ({"class_name": "AutoencoderOfMine"}, InputError, "no class AutoencoderOfMine"),
        ({"subfolder": "vae"}, CheckpointError, r"config\.json is missing"),
        ({"latents_mean": (0.0,) * 4}, ConfigError, "of the codec, or neither"),
        (
            {"latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 3},
            ConfigError,
            "must have 4 values each",
        ),
        (
            {"latents_mean": (0.0,) * 4, "latents_std": (1.0, 1.0, 1.0, 0.0)},
            ConfigError,
            "above 0",
        ),
        ({"temporal_compression": 4}, ConfigError, "must be 1, got 4"),
    ],
)
def test_options_that_do_not_fit(folders, options, error, message):
    with pytest.raises(error, match=message):
        create_codec("kl_vae", **({"repo": str(folders / "kl")} | options))


def test_damaged_weights(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / "config.json").write_text((folders / "kl" / "config.json").read_text())
    state = load_file(folders / "kl" / name)
    removed = "decoder.conv_out.bias"
    save_file({k: v for k, v in state.items() if k != removed}, tmp_path / name)
    with pytest.raises(CheckpointError, match=removed):
        create_codec("kl_vae", repo=str(tmp_path))
    save_file(state | {"another.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(another\.weight\)"):
        create_codec("kl_vae", repo=str(tmp_path))
    (tmp_path / name).write_bytes((folders / "kl" / name).read_bytes()[:500])
    with pytest.raises(CheckpointError, match="is truncated"):
        create_codec("kl_vae", repo=str(tmp_path))


def test_without_diffusers_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"pip install 'diffusion-apt\[hub\]'"):
        create_codec("kl_vae", repo=str(folders / "kl"))


def test_registered_configs():
    for name in ("wan_vae", "kl_vae"):
        assert isinstance(CODECS.get(name)(), DiffusersCodecConfig)
        assert CODECS.summary(name)


def test_tiles_and_slices_are_the_whole_where_it_is_one_tile(folders, wan):
    x = video(5)
    options = {"repo": str(folders / "wan"), "slicing": True, "tiling": True}
    thrifty = create_codec("wan_vae", **options)
    assert thrifty.vae.use_tiling and thrifty.vae.use_slicing
    torch.testing.assert_close(thrifty.encode(x), wan.encode(x))
    assert not wan.vae.use_tiling and not wan.vae.use_slicing


def test_tiles_really_cut(folders, wan):
    x = video(1, height=512, width=512, batch=1)
    thrifty = create_codec("wan_vae", repo=str(folders / "wan"), tiling=True)
    whole, tiled = wan.encode(x), thrifty.encode(x)
    assert whole.shape == tiled.shape
    assert not torch.equal(whole, tiled)


@pytest.mark.parametrize(("name", "part"), [("kl", ""), ("wan", "vae")])
def test_a_folder_with_an_autoencoder_alone_is_a_codec(folders, name, part):
    folder = folders / name / part
    info = describe(folder)
    assert isinstance(info, CodecInfo) and info.sample == NO_SIZE
    assert info.codec.config["repo"] == str(folder)
    codec = load_codec(folder)
    x = video(5)
    named = create_codec(f"{name}_vae", repo=str(folders / name))
    torch.testing.assert_close(codec.encode(x), named.encode(x))
    shape = describe_codec("diffusers_vae", **dataclasses.asdict(codec.config))
    for field in ("channels", "temporal_compression", "spatial_compression"):
        assert getattr(shape, field) == getattr(codec, field)
    assert all(p.is_meta for p in shape.parameters())
    assert component_info("diffusers_vae", codec).config["class_name"] == codec.config.class_name


def test_latents_without_a_posterior(tmp_path):
    torch.manual_seed(0)
    shape = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock",) * 2,
            "block_out_channels": (8, 8),
            "layers_per_block": (1, 1),
            "qkv_multiscales": ((), ()),
        }.items()
    }
    vae = diffusers.AutoencoderDC(
        latent_channels=4, downsample_block_type="conv", scaling_factor=0.5, **shape
    )
    vae.save_pretrained(tmp_path)
    codec = load_codec(tmp_path)
    assert (codec.channels, codec.temporal_compression, codec.spatial_compression) == (4, 1, 2)
    x = video(3)
    latents = codec.encode(x)
    peer = vae.eval().encode(x[:, :, 1]).latent
    torch.testing.assert_close(latents[:, :, 1], 0.5 * peer)
    torch.testing.assert_close(codec.decode(latents)[:, :, 1], vae.decode(peer).sample.clamp(-1, 1))


def test_a_quantised_autoencoder_alone_is_a_codec(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path)
    assert isinstance(describe(tmp_path), CodecInfo)
    codec = load_codec(tmp_path)
    x = video(1)
    peer = vae.eval().encode(x[:, :, 0]).latents
    scale = vae.config.scaling_factor
    torch.testing.assert_close(codec.encode(x)[:, :, 0], scale * peer)
    made = vae.decode(peer).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(scale * peer[:, :, None])[:, :, 0], made)


def test_an_autoencoder_has_to_be_named():
    with pytest.raises(ConfigError, match=r"codec-options repo DIR"):
        create_codec("diffusers_vae")


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_a_class_that_is_called_otherwise_is_one_line(folders, monkeypatch, what):
    def otherwise(self, x, *, num_frames):
        raise AssertionError

    monkeypatch.setattr(diffusers.AutoencoderKL, what, otherwise)
    with pytest.raises(
        CheckpointError, match=r"does not work like other .* \(TypeError: .*otherwise\(\)"
    ):
        load_codec(folders / "kl")


def test_a_folder_without_weights_is_no_codec(folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"cogvideox/vae' cannot be used: .* spatial_comp"):
        load_codec(folders / "cogvideox" / "vae")
    tiny_kl().save_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        load_codec(tmp_path)
