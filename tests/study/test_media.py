"""Samples as raters get them: whole, playable, and without a word of where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("av")

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from apt.errors import DataError
from apt.media import write_media, write_mp4, write_webp
from apt.study.media import clean_suffix, degrade, write_clean, write_degraded

FRAMES = np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), dtype=np.uint8)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def tagged_video(path: Path, codec: str = "libx264", pixels: str = "yuv420p") -> Path:
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = "made by model SECRET"
        stream = container.add_stream(codec, rate=8)
        stream.metadata["title"] = "SECRET"
        stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".webm", "libvpx-vp9")])
def test_a_video_keeps_its_frames_and_loses_its_words(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    sample = tagged_video(tmp_path / f"sample{suffix}", codec)
    assert b"SECRET" in sample.read_bytes()
    target = tmp_path / f"clean{suffix}"
    write_clean(target, sample)
    assert b"SECRET" not in target.read_bytes()
    assert (frames_of(target) == frames_of(sample)).all() and len(frames_of(target)) == 7
    with av.open(str(target)) as container:
        assert container.streams.video[0].average_rate == 8


def test_a_lossless_video_is_encoded_for_browsers(tmp_path: Path) -> None:
    frames = np.full((5, 32, 48, 3), 90, np.uint8)
    frames[:, 8:20, 16:30] = (200, 60, 30)
    sample = write_media(tmp_path / "a.mkv", frames, fps=8, scale=1, tags={"model": "SECRET"})
    assert b"SECRET" in sample.read_bytes() and clean_suffix(sample) == ".mp4"
    target = tmp_path / "b.mp4"
    write_clean(target, sample)
    assert b"SECRET" not in target.read_bytes()
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
    shown = frames_of(target)[:, ::8, ::8].astype(int)
    assert shown.shape == frames.shape and np.abs(shown - frames).mean() < 4
    sample.write_bytes(b"junk")
    with pytest.raises(DataError, match="is broken"):
        write_clean(target, sample)


def test_stills_become_png_of_the_same_pixels(tmp_path: Path) -> None:
    words = PngInfo()
    words.add_text("parameters", "SECRET")
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.png", pnginfo=words)
    Image.fromarray(FRAMES[0]).save(tmp_path / "b.webp", lossless=True)
    for name in ("a.png", "b.webp"):
        target = tmp_path / f"{name}.png"
        assert clean_suffix(tmp_path / name) == ".png"
        write_clean(target, tmp_path / name)
        assert b"SECRET" not in target.read_bytes()
        assert (np.asarray(Image.open(target)) == FRAMES[0]).all()


def test_what_cannot_be_shown_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    whole = write_mp4(tmp_path / "whole.mp4", FRAMES, fps=8, scale=1)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[:-400])
    unknown = tmp_path / "unknown.mp4"  # cut off in its header, before the codec
    unknown.write_bytes(whole.read_bytes().rpartition(b"stsd")[0])
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    half = tmp_path / "half.png"
    Image.fromarray(FRAMES[0]).save(tmp_path / "full.png")
    half.write_bytes((tmp_path / "full.png").read_bytes()[:1500])
    moving = write_webp(tmp_path / "moving.webp", FRAMES, fps=8)
    fine = tagged_video(tmp_path / "fine.mp4", pixels="yuv444p")
    for sample, message in (
        (cut, "broken"),
        (unknown, "broken"),
        (empty, "broken"),
        (half, "broken"),
        (moving, "is an animated image"),
        (fine, "h264 in yuv444p, which not all browsers play"),
        (tmp_path / "absent.mp4", "broken"),
    ):
        target = tmp_path / ("target" + clean_suffix(sample))
        with pytest.raises(DataError, match=message):
            write_clean(target, sample)
        assert not target.exists()
    with pytest.raises(DataError, match="cannot be shown to raters"):
        clean_suffix(tmp_path / "a.gif")


def test_a_degraded_sample_is_far_from_its_original_and_of_its_size(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 48)[:, None], (7, 32, 48, 3)).astype(np.uint8)
    worse = degrade(smooth, 1)
    assert worse.shape == smooth.shape
    assert np.abs(worse.astype(int) - smooth).mean() > 50
    assert (worse == degrade(smooth, 1)).all() and (worse != degrade(smooth, 2)).any()
    sample = write_mp4(tmp_path / "a.mp4", smooth, fps=8, scale=1)
    write_degraded(tmp_path / "b.mp4", sample, 1)
    assert frames_of(tmp_path / "b.mp4").shape == frames_of(sample).shape
