"""One step against diffusers' stock pipeline, from prompts to pixels: tiny, random parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apt.condition import Condition
from apt.methods.apt import generate
from apt.models import create_codec, create_text_encoder
from apt.models.wan import Wan
from tests.models.tiny_tokenizers import unigram_tokenizer
from tests.models.wan_nets import ours_of, relative_error, tiny_peer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a red seven moving left", "a blue four"]
WIDTH, LENGTH = 16, 30


def tiny_vae(channels: int) -> Any:
    """Wan 2.1's VAE, 4x8x8; with 48 channels Wan 2.2's, 4x16x16 by a patch of 2."""
    options: dict[str, Any] = {"latents_mean": [0.1] * channels, "latents_std": [1.5] * channels}
    if channels == 48:
        options |= {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
            "decoder_base_dim": 4,
        }
    return diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **options,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock pipelines: Wan 2.1; 2.2 TI2V with a timestep per token; 2.2 A14B with two experts."""
    root = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    tokenizer = unigram_tokenizer(PROMPTS)
    umt5 = transformers.UMT5Config(
        vocab_size=80, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    text_encoder = transformers.UMT5EncoderModel(umt5).eval()
    for name, channels, options in (
        ("wan2.1", 16, {}),
        ("ti2v", 48, {"expand_timesteps": True}),
        ("a14b", 16, {"boundary_ratio": 0.875}),
    ):
        size = {"in_channels": channels, "out_channels": channels, "text_dim": WIDTH}
        second = tiny_peer(seed=1, **size) if name == "a14b" else None
        diffusers.WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=tiny_vae(channels),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=tiny_peer(**size),
            transformer_2=second,
            **options,
        ).save_pretrained(root / name)
    return root


def stock(folder: Path, z: Tensor, size: tuple[int, int, int], output_type: str) -> Tensor:
    pipeline = diffusers.WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = size
    output = pipeline(
        prompt=PROMPTS,
        latents=z,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=LENGTH,
        output_type=output_type,
    )
    return output.frames


@pytest.mark.parametrize(
    ("name", "codec_name"), [("wan2.1", "wan_vae"), ("ti2v", "wan2.2_vae"), ("a14b", "wan_vae")]
)
def test_one_step_is_the_stock_pipelines(folders: Path, name: str, codec_name: str) -> None:
    folder = folders / name
    codec = create_codec(codec_name, repo=str(folder))
    # The high-noise expert, where there are two
    peer = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    text_encoder = create_text_encoder("umt5", repo=str(folder), dtype="float32", max_length=LENGTH)
    model = ours_of(peer, text_length=LENGTH)
    assert isinstance(model, Wan) and model.in_channels == codec.channels
    size = (5, 32, 64)
    shape = (2, codec.channels, *codec.latent_shape(*size))
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = generate(model, z, Condition(text_encoder(PROMPTS)))
        expected = stock(folder, z, size, "latent")
        assert relative_error(x - z, expected - z) < 1e-5
        pixels = codec.decode(x)
        video = stock(folder, z, size, "pt")
    assert relative_error((pixels.transpose(1, 2) + 1) / 2, video) < 1e-5
    back = codec.encode(pixels)
    assert back.shape == z.shape


def test_wan_22_vae_geometry(folders: Path) -> None:
    codec = create_codec("wan2.2_vae", repo=str(folders / "ti2v"))
    assert (codec.channels, codec.temporal_compression, codec.spatial_compression) == (48, 4, 16)
    assert codec.latent_shape(121, 704, 1280) == (31, 44, 80)


def test_wan_22_vae_equals_the_peer(folders: Path) -> None:
    codec = create_codec("wan2.2_vae", repo=str(folders / "ti2v"))
    peer = diffusers.AutoencoderKLWan.from_pretrained(folders / "ti2v", subfolder="vae").eval()
    pixels = torch.rand(2, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = peer.encode(pixels).latent_dist.mode()
        decoded = peer.decode(raw).sample
    latents = codec.encode(pixels)
    assert latents.shape == (2, 48, 2, 2, 3)
    torch.testing.assert_close(latents, (raw - 0.1) / 1.5)
    torch.testing.assert_close(codec.decode(latents), decoded, atol=1e-5, rtol=0)
