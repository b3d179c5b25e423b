from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apt.checkpoints.export import export_model
from apt.checkpoints.info import CODEC_FILE, CodecInfo, SampleInfo, read_info
from apt.checkpoints.load import component_info, describe, load_bundle, load_codec
from apt.checkpoints.save import save_bundle, save_codec
from apt.errors import CheckpointError, ConfigError, InputError
from apt.models import create_codec
from apt.models.codec_causal import CausalCodec, CausalCodecConfig, Memory
from apt.pixels import LatentCodec
from tests.memory import peak_bytes
from tests.tiny import tiny_bundle

SMALL: dict[str, Any] = {"channels": 3, "widths": (6, 8), "decoder_blocks": 1}
STATISTICS: dict[str, Any] = {
    "latents_mean": (0.5, -1.0, 2.0),
    "latents_std": (0.5, 2.0, 1.5),
}


def small(**changes: Any) -> CausalCodec:
    """A codec whose every weight matters."""
    codec = CausalCodecConfig(**{**SMALL, **changes}).build()
    generator = torch.Generator().manual_seed(0)
    for parameter in codec.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return codec.requires_grad_(False)


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@settings(max_examples=25, deadline=None)
@given(
    blocks=st.integers(0, 4),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    temporal=st.integers(1, 5),
    levels=st.integers(1, 3),
    chunk=st.integers(1, 3),
)
def test_any_size_that_its_factors_divide(
    blocks: int, height: int, width: int, temporal: int, levels: int, chunk: int
) -> None:
    codec = small(temporal=temporal, widths=(4,) * levels, chunk=chunk)
    p = 2**levels
    assert codec.spatial_compression == p
    clip = pixels(2, 3, blocks * temporal + 1, height * p, width * p)
    latents = codec.encode(clip)
    assert latents.shape == (2, 3, *codec.latent_shape(*clip.shape[2:]))
    assert latents.shape[2:] == (blocks + 1, height, width)
    assert codec.decode(latents).shape == clip.shape


def test_the_presets() -> None:
    digits, video = create_codec("digits_ae"), create_codec("video_ae")
    for codec, spatial, millions in ((digits, 4, 1.3), (video, 8, 5.7)):
        assert isinstance(codec, LatentCodec)
        assert (codec.channels, codec.temporal_compression) == (16, 4)
        assert codec.spatial_compression == spatial
        count = sum(parameter.numel() for parameter in codec.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_latents_know_nothing_of_later_frames() -> None:
    codec = small()
    clip = pixels(1, 3, 13, 8, 8)
    base = codec.encode(clip)
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (12, 3)):
        changed = clip.clone()
        changed[:, :, frame] += 1
        found = codec.encode(changed)
        assert torch.equal(found[:, :, :latent], base[:, :, :latent])
        assert not torch.equal(found[:, :, latent], base[:, :, latent])


def test_pixels_know_nothing_of_later_latents() -> None:
    codec = small()
    latents = torch.randn(1, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    base = codec.decode(latents)
    for latent, frame in ((0, 0), (1, 1), (2, 5), (3, 9)):
        changed = latents.clone()
        changed[:, :, latent] += 1
        found = codec.decode(changed)
        assert torch.equal(found[:, :, :frame], base[:, :, :frame])
        assert not torch.equal(found[:, :, frame], base[:, :, frame])


def test_an_image_is_a_video_of_one_frame() -> None:
    codec = small()
    clip = pixels(2, 3, 9, 8, 12)
    torch.testing.assert_close(codec.encode(clip[:, :, :1]), codec.encode(clip)[:, :, :1])
    latents = codec.encode(clip)
    torch.testing.assert_close(codec.decode(latents[:, :, :1]), codec.decode(latents)[:, :, :1])


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 7), chunk=st.integers(1, 4))
def test_in_chunks_or_whole_is_the_same(length: int, chunk: int) -> None:
    """In fp64, where an error at a border of chunks cannot hide in rounding."""
    codec = small(chunk=chunk).double()
    clip = pixels(1, 3, 4 * length - 3, 8, 8).double()
    latents = codec.encoder(clip)
    memory = Memory()
    frames = [clip[:, :, : 4 * chunk - 3], *clip[:, :, 4 * chunk - 3 :].split(4 * chunk, dim=2)]
    pieces = [codec.encoder(piece, memory) for piece in frames if piece.shape[2]]
    torch.testing.assert_close(torch.cat(pieces, dim=2), latents, rtol=0, atol=1e-12)

    memory = Memory()
    pieces = [codec.decoder(z, memory) for z in latents.split(chunk, dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), codec.decoder(latents), rtol=0, atol=1e-12)


def test_chunks_of_fp32_are_equal_to_rounding() -> None:
    whole, chunked = small(chunk=100, **STATISTICS), small(chunk=2, **STATISTICS)
    clip = pixels(2, 3, 29, 16, 16)
    latents = whole.encode(clip)
    torch.testing.assert_close(chunked.encode(clip), latents, rtol=1e-6, atol=1e-6)
    expected = whole.decode(latents)
    scale = float(expected.abs().max())
    for found in (
        chunked.decode(latents),
        # Pieces need not be chunks.
        torch.cat(
            [*whole.decode_chunks([latents[:, :, :1], latents[:, :, 1:6], latents[:, :, 6:]])], 2
        ),
    ):
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-6)


def test_memory_does_not_grow_with_the_length() -> None:
    codec = small(chunk=2, widths=(16, 16))

    def latents(count: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            yield torch.randn(1, 3, 2, 8, 8)

    def frames(count: int) -> int:
        return sum(piece.shape[2] for piece in codec.decode_chunks(latents(count)))

    def peak(count: int) -> int:
        return peak_bytes(lambda: frames(count))

    assert frames(12) == 4 * 24 - 3
    assert peak(12) == peak(4)


def test_statistics_are_part_of_the_codec() -> None:
    plain, normal = small(), small(**STATISTICS)
    clip = pixels(2, 3, 5, 8, 8)
    mean, std = (
        torch.tensor(STATISTICS[f"latents_{k}"]).view(1, 3, 1, 1, 1) for k in ("mean", "std")
    )
    raw = plain.encode(clip)
    torch.testing.assert_close(normal.encode(clip), (raw - mean) / std)
    torch.testing.assert_close(
        normal.decode((raw - mean) / std), plain.decode(raw), rtol=1e-4, atol=1e-4
    )


def test_types_of_the_outside_are_fp32() -> None:
    codec = small()
    with torch.autocast("cpu", torch.bfloat16):
        latents = codec.encode(pixels(1, 3, 5, 8, 8))
        assert latents.dtype == codec.decode(latents.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 8, 8), "8 frames do not fit; use 5 or 9"),
        ((0, 8, 8), "use 1 or 5"),
        ((5, 10, 8), "height 10 does not fit; use a multiple of 4, such as 8 or 12"),
        ((5, 8, 2), "width 2 does not fit; use a multiple of 4, such as 4"),
    ],
)
def test_sizes_that_do_not_fit(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small().encode(torch.zeros(1, 3, *size))


def test_other_tensors_are_refused() -> None:
    codec = small()
    with pytest.raises(InputError, match=r"pixels must be \(B, 3, T, H, W\)"):
        codec.encode(torch.zeros(1, 4, 5, 8, 8))
    with pytest.raises(InputError, match=r"latents must be \(B, 3, T, H, W\)"):
        codec.decode(torch.zeros(1, 16, 2, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be at least 1"),
        ({"widths": ()}, "one for each halving"),
        ({"latents_mean": (0.0,) * 16}, "16 values each.*got 16 and 0"),
        ({"latents_mean": (0.0,) * 16, "latents_std": (0.0,) * 16}, "above 0"),
        ({"width": (8, 8)}, "did you mean 'widths'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_codec("digits_ae", **options)


def codec_info(codec: CausalCodec) -> CodecInfo:
    return CodecInfo(
        codec=component_info("digits_ae", codec),
        sample=SampleInfo(frames=5, height=8, width=8, fps=8.0),
        training={"recipe": "tiny", "config": {"run_dir": "/home/somebody/runs"}},
    )


def test_a_codec_to_its_folder_and_back(tmp_path: Path) -> None:
    codec = small(**STATISTICS)
    save_codec(tmp_path, codec, codec_info(codec))
    loaded, info = load_codec(tmp_path), describe(tmp_path)
    assert isinstance(loaded, CausalCodec) and loaded.config == codec.config
    assert info.codec.weights == CODEC_FILE and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    clip = pixels(1, 3, 5, 8, 8)
    assert torch.equal(loaded.encode(clip), codec.encode(clip))
    with pytest.raises(
        CheckpointError, match=r"is a latent codec, not a whole model.*stage\.codec"
    ):
        read_info(tmp_path)
    with pytest.raises(CheckpointError, match="is a latent codec, not a whole model"):
        load_bundle(tmp_path)
    with pytest.raises(CheckpointError, match=r"info\.codec\.config differs"):
        save_codec(tmp_path, small(), codec_info(codec))


def test_a_model_has_its_codec_with_it(tmp_path: Path) -> None:
    codec = small(channels=768, widths=(6,))
    bundle = tiny_bundle()
    described = dataclasses.replace(component_info("digits_ae", codec), weights=CODEC_FILE)
    bundle.codec, bundle.info = codec, dataclasses.replace(bundle.info, codec=described)
    save_bundle(tmp_path / "model", bundle)
    again = export_model(tmp_path / "model", tmp_path / "again")
    for folder in (tmp_path / "model", again):
        loaded = load_bundle(folder).codec
        clip = pixels(1, 3, 5, 8, 8)
        assert torch.equal(loaded.encode(clip), codec.encode(clip))
    (again / CODEC_FILE).unlink()
    with pytest.raises(CheckpointError, match=CODEC_FILE):
        load_codec(again)


def test_built_in_models_of_a_family_share_one_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "assets"
    monkeypatch.setattr("apt.checkpoints.source.ASSETS", assets)
    codec = small(channels=768, widths=(6,))
    save_codec(assets / "tiny-codec", codec, codec_info(codec))
    bundle = tiny_bundle()
    described = dataclasses.replace(component_info("digits_ae", codec), weights=CODEC_FILE)
    bundle.codec, bundle.info = codec, dataclasses.replace(bundle.info, codec=described)
    for folder in (assets / "tiny", assets / "tiny-diffusion", assets / "other", tmp_path / "tiny"):
        (save_bundle(folder, bundle) / CODEC_FILE).unlink()
    for name in ("tiny", "tiny-diffusion"):
        loaded = load_bundle(name)
        clip = pixels(1, 3, 5, 8, 8)
        assert torch.equal(loaded.codec.encode(clip), codec.encode(clip))
        assert (export_model(name, tmp_path / "out" / name) / CODEC_FILE).is_file()
    for lacking in ("other", tmp_path / "tiny"):
        with pytest.raises(CheckpointError, match=CODEC_FILE):
            load_bundle(lacking)


def test_a_codec_is_exported_without_folders_of_this_machine(tmp_path: Path) -> None:
    codec = small(**STATISTICS)
    save_codec(tmp_path / "run", codec, codec_info(codec))
    out = export_model(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16)
    assert "somebody" not in (out / "apt.json").read_text()
    assert (out / CODEC_FILE).stat().st_size < (tmp_path / "run" / CODEC_FILE).stat().st_size
    loaded = load_codec(out)
    assert isinstance(loaded, CausalCodec) and loaded.config == codec.config
    with pytest.raises(CheckpointError, match="is a latent codec"):
        export_model(tmp_path / "run", tmp_path / "x", format="diffusers")
