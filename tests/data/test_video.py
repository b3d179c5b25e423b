"""Videos as recorders, phones and editors write them, read from any moment on."""

from __future__ import annotations

import io
import os
import struct
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("av")

import av
import numpy as np
from PIL import Image

from apt.data.decode import probe, read_clip, verify
from apt.data.reading import MediaInfo
from apt.data.video import frames_from, look, open_video
from apt.errors import DataError
from tests.data.media import (
    corner_colours,
    hold,
    noise,
    numbered,
    numbers,
    quadrants,
    write_image,
    write_video,
    write_yuv,
)

MPEG = {"codec": "mpeg2video", "options": {"qmin": "1", "qmax": "1", "bf": "2"}, "gop": 12}
ZERO = Fraction(0)


def levels(pixels: np.ndarray) -> list[int]:
    """The mean grey of each frame of (3, T, H, W)."""
    return np.round((np.asarray(pixels).mean(axis=(0, 2, 3)) + 1) * 127.5).astype(int).tolist()


CONTAINERS = {
    "a.ts": {"gop": 12},
    "b.ts": MPEG,
    "a.mpg": MPEG,
    "a.vob": MPEG,
    "a.m2ts": {"gop": 12, "options": {"x264-params": "open-gop=1"}},
    "a.mts": {"gop": 12},
    "a.avi": {"codec": "mpeg4", "options": {"qmin": "1", "qmax": "1", "bf": "2"}, "gop": 12},
    "a.flv": {"gop": 12, "options": {"pix_fmt": "yuv420p"}},
    "a.wmv": {"codec": "wmv2", "options": {"qmin": "1", "qmax": "1"}, "gop": 12},
    "a.3gp": {"gop": 12},
    "a.mxf": MPEG,
    "a.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12"}},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_counts_its_frames_and_starts_anywhere(tmp_path: Path, name: str) -> None:
    video = write_video(tmp_path / name, numbered(49, 64, 64), 25, **CONTAINERS[name])
    info = probe(video)
    assert (info.frames, info.fps, info.span) == (49, 25, None)
    verify(video)
    whole = read_clip(video, start=ZERO, num_frames=49, fps=Fraction(25))
    assert numbers(whole) == list(range(49))
    for first in (1, 13, 30, 44):
        clip = read_clip(video, start=first / info.fps, num_frames=5, fps=info.fps, info=info)
        assert (clip == whole[:, first : first + 5]).all(), first


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.ts", {"gop": 12, "options": {"bf": "2"}}),
        ("b.ts", MPEG),
        ("a.mpg", MPEG),
        ("c.ts", {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12"}}),
    ],
)
def test_a_recording_that_begins_in_the_middle_of_a_group(
    tmp_path: Path, name: str, options: dict
) -> None:
    whole = write_video(tmp_path / name, noise(60, 64, 64), 25, **options)
    frames = read_clip(whole, start=ZERO, num_frames=60, fps=Fraction(25))
    content = whole.read_bytes()
    begun = set()
    for share in (10, 30, 45):
        cut = tmp_path / f"{share}{name}"
        cut.write_bytes(content[len(content) * share // 100 // 188 * 188 :])
        info = probe(cut)
        assert info.span is None
        verify(cut)
        found = read_clip(cut, start=ZERO, num_frames=info.frames, fps=info.fps, info=info)
        assert (found == frames[:, 60 - info.frames :]).all(), "from the first whole frame on"
        later = read_clip(cut, start=7 / info.fps, num_frames=9, fps=info.fps)
        assert (later == found[:, 7:16]).all()
        begun.add(info.frames)
    assert len(begun) > 1 and max(begun) < 60


def test_a_recording_whose_first_parameters_come_late(tmp_path: Path) -> None:
    """The decoder itself reports that nothing before the second group can be decoded."""
    options = {"bf": "0", "preset": "ultrafast", "x264-params": "scenecut=0"}
    whole = write_video(tmp_path / "a.ts", noise(210, 32, 32), 25, gop=200, options=options)
    content = whole.read_bytes()
    (tmp_path / "cut.ts").write_bytes(content[len(content) // 10 // 188 * 188 :])
    info = verify(tmp_path / "cut.ts")
    assert (info.frames, info.first - probe(whole).first) == (10, 8)
    clip = read_clip(tmp_path / "cut.ts", start=ZERO, num_frames=10, fps=info.fps)
    assert (clip == read_clip(whole, start=Fraction(8), num_frames=10, fps=info.fps)).all()


def test_a_clock_that_was_set_anew_is_refused(tmp_path: Path) -> None:
    one = write_video(tmp_path / "one.ts", numbered(30), 25)
    (tmp_path / "two.ts").write_bytes(one.read_bytes() * 2)
    with pytest.raises(DataError, match=r"two\.ts: its timestamps jump from 1\.16 to 0\.00 s; rew"):
        probe(tmp_path / "two.ts")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2"}])
def test_a_last_frame_that_is_held_is_one_frame(
    tmp_path: Path, suffix: str, options: dict[str, str]
) -> None:
    plain = write_video(tmp_path / "plain.mp4", numbered(49), 16, options=options)
    held = hold(plain, tmp_path / f"held{suffix}", last=32)
    info = probe(held)
    assert (info.frames, info.fps, info.span) == (49, 16, None)
    assert info.clip_starts(9, Fraction(8)) == 33
    verify(held)
    clip = read_clip(held, start=Fraction(40, 16), num_frames=9, fps=Fraction(16))
    assert numbers(clip) == list(range(40, 49))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2"}])
def test_frames_that_are_held_stay_on_the_screen(
    tmp_path: Path, suffix: str, options: dict[str, str]
) -> None:
    # At 10 per second; frame 9 is held for 2 s, the last but one for 1 s.
    pts = [*range(10), *range(29, 38), 47]
    video = write_video(tmp_path / f"a{suffix}", numbered(20), 10, pts=pts, options=options)
    info = probe(video)
    assert (info.frames, info.fps, info.length) == (20, 10, 48)
    verify(video)
    shown = [max(n for n, at in enumerate(pts) if at <= moment) for moment in range(48)]
    clip = read_clip(video, start=ZERO, num_frames=48, fps=Fraction(10))
    assert numbers(clip) == shown
    last = info.clip_starts(9, Fraction(10)) - 1
    assert last == 39
    for start in (5, 20, last):
        clip = read_clip(video, start=start / info.fps, num_frames=9, fps=info.fps, info=info)
        assert numbers(clip) == shown[start : start + 9]


def test_unsteady_phones_have_their_mean_rate(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pts = np.cumsum([0, *random.integers(28, 39, 59)]).tolist()
    video = write_video(tmp_path / "a.mp4", numbered(60), 1000, pts=pts, options={"bf": "0"})
    info = probe(video)
    assert float(info.fps) == pytest.approx(59000 / pts[-1], rel=2e-3)
    assert info.frames == 60
    clip = read_clip(video, start=ZERO, num_frames=60, fps=info.fps)
    found = numbers(clip)
    for number, frame in enumerate(found):
        assert abs(pts[frame] / 1000 - number / info.fps) <= Fraction(38 - 16, 1000)


def test_theora_repeats_frames_without_storing_them() -> None:
    # Six greys of five frames and a seventh, which FFmpeg writes as packets of no bytes.
    video = Path(__file__).with_name("repeats.ogv")
    info = probe(video)
    assert (info.frames, info.fps, info.codec) == (31, 16, "theora")
    verify(video)
    found = levels(read_clip(video, start=ZERO, num_frames=31, fps=info.fps))
    greys = sorted(set(found))
    assert len(greys) == 7
    assert found == [greys[number // 5] for number in range(31)]
    for first in (1, 12, 23):
        clip = read_clip(video, start=first / info.fps, num_frames=7, fps=info.fps, info=info)
        assert levels(clip) == found[first : first + 7]


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    cover = write_image(tmp_path / "cover.png", noise(1)[0])
    video = write_video(tmp_path / "plain.mp4", numbered(9))
    with av.open(str(tmp_path / "a.mp4"), "w") as out, av.open(str(cover)) as picture:
        image = out.add_stream_from_template(picture.streams.video[0])
        image.disposition = av.stream.Disposition.attached_pic
        with av.open(str(video)) as film:
            stream = out.add_stream_from_template(film.streams.video[0])
            for packet in picture.demux(video=0):
                if packet.size:
                    packet.stream = image
                    out.mux(packet)
            for packet in film.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    assert probe(tmp_path / "a.mp4").frames == 9
    found = read_clip(tmp_path / "a.mp4", start=ZERO, num_frames=9, fps=Fraction(8))
    assert numbers(found) == list(range(9))


def test_a_size_that_changes_within_a_video_becomes_that_of_the_first_frame(
    tmp_path: Path,
) -> None:
    first = write_video(tmp_path / "first.ts", numbered(5, 32, 48), 25)
    second = write_video(tmp_path / "second.ts", numbered(5, 64, 96), 25)
    with av.open(str(tmp_path / "a.ts"), "w") as out:
        stream = None
        for number, path in enumerate((first, second)):
            with av.open(str(path)) as part:
                stream = stream or out.add_stream_from_template(part.streams.video[0])
                for packet in part.demux(video=0):
                    if packet.size:
                        packet.pts += number * 5 * 3600
                        packet.dts += number * 5 * 3600
                        packet.stream = stream
                        out.mux(packet)
    clip = read_clip(tmp_path / "a.ts", start=ZERO, num_frames=10, fps=Fraction(25))
    assert clip.shape == (3, 10, 32, 48)
    assert numbers(clip) == [*range(5), *range(5)]


def test_a_playlist_under_a_videos_name_opens_no_other_file(tmp_path: Path) -> None:
    write_video(tmp_path / "secret.ts", numbered(30), 25)
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:2", "#EXTINF:1.2,", "secret.ts", "#EXT-X-ENDLIST"]
    (tmp_path / "a.mp4").write_text("\n".join(lines))
    (tmp_path / "b.mp4").write_text("ffconcat version 1.0\nfile secret.ts\n")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(DataError, match=f"{name}: (is not in a supported|cannot be decoded)"):
            probe(tmp_path / name)


def test_names_are_no_protocols_and_need_not_be_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    video = write_video(tmp_path / "plain.mp4", numbered(9))
    for name in (b"concat:plain.mp4|plain.mp4", b"caf\xe9 100%03d.mp4"):
        path = Path(name.decode("utf-8", "surrogateescape"))
        path.write_bytes(video.read_bytes())
        assert probe(path).frames == 9


def codes(*rgb: int, matrix: str = "bt601", full: bool = False, bits: int = 8) -> tuple[int, ...]:
    """Y, Cb and Cr as stored, by the formulas of ITU-R BT.601, BT.709 and BT.2020."""
    kr, kb = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}[
        matrix
    ]
    r, g, b = (value / 255 for value in rgb)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    scale = 2 ** (bits - 8)
    if full:
        top = 2**bits - 1
        return round(top * y), round(128 * scale + top * u), round(128 * scale + top * v)
    return tuple(round(scale * value) for value in (16 + 219 * y, 128 + 224 * u, 128 + 224 * v))


def flat(code: tuple[int, ...], size: tuple[int, int], chroma: int, bits: int) -> list[np.ndarray]:
    kind = np.uint8 if bits == 8 else np.uint16
    small = (size[0] // chroma, size[1] // chroma)
    return [np.full(s, c, kind) for s, c in zip((size, small, small), code, strict=True)]


SD, HD = (32, 64), (64, 1280)


@pytest.mark.parametrize(
    ("matrix", "tag", "full", "bits", "size"),
    [
        ("bt601", 6, False, 8, SD),
        ("bt601", 5, True, 8, SD),
        ("bt709", 1, False, 8, SD),
        ("bt709", 1, True, 8, HD),
        ("bt709", 1, False, 10, SD),
        ("bt709", 1, True, 10, SD),
        ("bt2020", 9, False, 10, SD),
        ("bt601", 2, False, 8, SD),  # untagged: by size, as players do
        ("bt709", 2, False, 8, HD),
        ("bt709", 2, False, 10, HD),
    ],
)
def test_matrices_ranges_and_depths(
    tmp_path: Path, matrix: str, tag: int, full: bool, bits: int, size: tuple[int, int]
) -> None:
    colour = (200, 60, 30)
    video = write_yuv(
        tmp_path / "a.mkv",
        flat(codes(*colour, matrix=matrix, full=full, bits=bits), size, 2, bits),
        pix_fmt="yuv420p" if bits == 8 else "yuv420p10le",
        colorspace=tag,
        color_range=2 if full else 1,
    )
    found = read_clip(video, start=ZERO, num_frames=1, fps=Fraction(8))[:, 0, 9, 9]
    assert np.abs((np.asarray(found) + 1) * 127.5 - colour).max() <= 3


@pytest.mark.parametrize("codec", ["ffv1", "libx265"])
@pytest.mark.parametrize(("trc", "white"), [(16, 0.58069), (18, 0.75)])
def test_hdr_is_shown_as_sdr(tmp_path: Path, codec: str, trc: int, white: float) -> None:
    grey = {16: 0.4111, 18: 0.3784}[trc]
    luma = np.repeat(np.array([0, grey, white, 0.95]), 32)[None].repeat(64, axis=0)
    planes = [np.round(64 + 876 * luma).astype(np.uint16), *[np.full((32, 64), 512, np.uint16)] * 2]
    params = f"log-level=none:lossless=1:colorprim=bt2020:colormatrix=bt2020nc:transfer={trc}"
    video = write_yuv(
        tmp_path / "a.mkv",
        planes,
        pix_fmt="yuv420p10le",
        codec=codec,
        options={"x265-params": params} if codec == "libx265" else {},
        colorspace=9,
        color_range=1,
        trc=trc,
        primaries=9,
    )
    clip = read_clip(video, start=ZERO, num_frames=2, fps=Fraction(8))
    found = (np.asarray(clip[:, 0, 20, 16::32]) + 1) * 127.5
    assert np.abs(found - [0, 118, 255, 255]).max() <= 1.5


def test_large_rgb_frames_have_no_matrix(tmp_path: Path) -> None:
    colour = np.full((8, 1280, 3), (200, 60, 30), np.uint8)
    frames = [Image.fromarray(colour), Image.fromarray(colour[::-1] // 2)]
    for name in ("a.png", "a.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
        clip = read_clip(tmp_path / name, start=ZERO, num_frames=1, fps=Fraction(10))
        assert ((clip[:, 0, 4, 4] + 1) * 127.5).round().tolist() == [200, 60, 30]


def test_colours_that_nobody_here_knows_are_refused(tmp_path: Path) -> None:
    planes = flat(codes(200, 60, 30), SD, 2, 8)
    for matrix in (8, 14):  # YCgCo, ICtCp
        video = write_yuv(
            tmp_path / "a.mkv", planes, pix_fmt="yuv420p", colorspace=matrix, color_range=1
        )
        with pytest.raises(DataError, match=rf"a\.mkv: .*matrix {matrix}"):
            read_clip(video, start=ZERO, num_frames=1, fps=Fraction(8))
        with pytest.raises(DataError, match="matrix"):
            probe(video)


def test_dolby_vision_without_a_base_picture_is_refused(tmp_path: Path) -> None:
    video = write_video(
        tmp_path / "a.mp4",
        numbered(9, 64, 64),
        codec="libx265",
        options={"x265-params": "log-level=none:bframes=0"},
    )
    verify(video)
    content = video.read_bytes()
    assert content.count(b"hev1") >= 1
    video.write_bytes(content.replace(b"hev1", b"dvhe"))
    with pytest.raises(DataError, match="Dolby Vision"):
        probe(video)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    opaque, clear = np.full((32, 32), 255, np.uint8), np.zeros((32, 32), np.uint8)
    half = np.full((32, 32), 128, np.uint8)
    planes = flat(codes(200, 60, 30), (32, 96), 1, 8)
    planes.append(np.concatenate([opaque, half, clear], axis=1))
    video = write_yuv(tmp_path / "a.mkv", planes, pix_fmt="yuva444p", colorspace=6, color_range=1)
    clip = read_clip(video, start=ZERO, num_frames=1, fps=Fraction(8))
    found = (np.asarray(clip[:, 0, 9, 16::32]) + 1) * 127.5
    assert np.abs(found.T - [[200, 60, 30], [227, 157, 142], [255, 255, 255]]).max() <= 4


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparent_webm_is_white(tmp_path: Path, codec: str) -> None:
    """FFmpeg's own decoders give what lies under the transparent pixels, mostly black."""
    planes = flat(codes(200, 60, 30), (32, 96), 2, 8)
    planes.append(np.full((32, 96), 255, np.uint8))
    planes[0][:, 48:], planes[3][:, 48:] = 16, 0
    video = write_yuv(
        tmp_path / "a.webm",
        planes,
        pix_fmt="yuva420p",
        num=12,
        codec=codec,
        options={"auto-alt-ref": "0", "g": "4", "b": "1M"},
        color_range=1,
    )
    assert probe(video).frames == 12
    for start in (ZERO, Fraction(9, 8)):
        clip = read_clip(video, start=start, num_frames=3, fps=Fraction(8))
        found = (np.asarray(clip[:, 2, 9, (20, 76)]) + 1) * 127.5
        assert np.abs(found.T - [[200, 60, 30], [255, 255, 255]]).max() <= 6


def test_interlaced_frames_lose_their_combs_and_only_them(tmp_path: Path) -> None:
    frames = np.full((9, 64, 96, 3), 60, np.uint8)
    frames[:, 20:40, 70:90] = 160  # stands still
    for number, frame in enumerate(frames):
        frame[0::2, 4 * number : 4 * number + 16] = 220
        frame[1::2, 4 * number + 2 : 4 * number + 18] = 220  # 1/50 s later
    video = write_video(tmp_path / "a.mp4", frames, 25, options={"x264-params": "tff=1", "bf": "0"})
    clip = read_clip(video, start=ZERO, num_frames=9, fps=Fraction(25))
    shown = ((np.asarray(clip) + 1) * 127.5).round().transpose(1, 2, 3, 0)
    assert np.abs(shown[:, 1:-1:2] - shown[:, 0:-2:2])[:, :, :60].max() <= 2, "no combs"
    assert np.abs(shown[:, ::2] - frames[:, ::2]).max() <= 2, "the first field is as it was"
    assert np.abs(shown[:, 21:39, 64:] - frames[:, 21:39, 64:]).max() <= 2
    progressive = write_video(tmp_path / "b.mp4", frames, 25)
    clip = read_clip(progressive, start=ZERO, num_frames=9, fps=Fraction(25))
    shown = ((np.asarray(clip) + 1) * 127.5).round().transpose(1, 2, 3, 0)
    assert np.abs(shown - frames).max() <= 2, "what is not flagged keeps its lines"


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("libx264", "yuv422p10le", ".mp4"),
        ("prores_ks", "yuv422p10le", ".mov"),
        ("mjpeg", "yuvj422p", ".avi"),
        ("libx265", "yuv444p12le", ".mp4"),
        ("libsvtav1", "yuv420p10le", ".mp4"),
        ("libvpx-vp9", "yuv420p", ".webm"),
    ],
)
def test_what_cameras_and_editors_write(
    tmp_path: Path, codec: str, pix_fmt: str, suffix: str
) -> None:
    if codec not in av.codec.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(tmp_path / f"a{suffix}"), "w") as container:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=Fraction(30000, 1001), options=options)
        stream.height, stream.width, stream.pix_fmt = 66, 98, pix_fmt
        stream.bit_rate = 20_000_000
        for frame in quadrants(6, 66, 98):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    info = probe(tmp_path / f"a{suffix}")
    assert (info.width, info.height, info.frames) == (98, 66, 6)
    assert info.fps == Fraction(30000, 1001)
    verify(tmp_path / f"a{suffix}")
    clip = read_clip(tmp_path / f"a{suffix}", start=ZERO, num_frames=6, fps=info.fps)
    assert corner_colours(clip[:, 5]) == "rgbw"


class CountingFile(io.BytesIO):
    name = "counting.mp4"
    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.taken += len(content)
        return content


@pytest.mark.parametrize("held", [False, True])
def test_looking_at_an_mp4_does_not_read_its_frames(tmp_path: Path, held: bool) -> None:
    pts = [*range(100), *range(120, 220)] if held else None
    video = write_video(
        tmp_path / "a.mp4", noise(200, 64, 64), 10, gop=10, options={"bf": "2"}, pts=pts
    )
    file = CountingFile(video.read_bytes())
    with open_video(file) as opened:
        info = look(opened)
    assert (info.frames, info.length) == (200, 220 if held else 200)
    assert file.taken < len(file.getvalue()) / 4


def test_a_long_matroska_file_is_not_read_through(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mkv", numbered(1500 % 80, 16, 16), 25)
    frames = np.zeros((1500, 16, 16, 3), np.uint8)
    frames[:] = np.random.default_rng(0).integers(0, 256, (1500, 16, 16, 3), np.uint8)
    video = write_video(tmp_path / "a.mkv", frames, 25, gop=25, options={"preset": "ultrafast"})
    file = CountingFile(video.read_bytes())
    with open_video(file) as opened:
        assert look(opened) == MediaInfo(False, 16, 16, 1500, Fraction(25), "h264")
    assert file.taken < len(file.getvalue()) * 0.9


def test_a_truncated_index_still_promises_what_is_lost(tmp_path: Path) -> None:
    pts = [*range(20), *range(30, 50)]
    video = write_video(tmp_path / "a.mp4", noise(40), 10, gop=40, faststart=True, pts=pts)
    content = video.read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: int(len(content) * 0.9)])
    assert probe(video).frames == 40
    with pytest.raises(DataError):
        verify(video)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2"}])
def test_an_edit_list_that_begins_within_a_group_is_obeyed(
    tmp_path: Path, options: dict[str, str], held: bool
) -> None:
    """What `ffmpeg -ss 0.4 -c copy` leaves: an edit list that hides the first frames."""
    pts = [*range(20), *range(25, 35)] if held else list(range(30))
    video = write_video(tmp_path / "a.mp4", numbered(30), 10, gop=12, options=options, pts=pts)
    content = bytearray(video.read_bytes())
    at = content.index(b"elst") + 12
    duration, media_time = struct.unpack(">Ii", content[at : at + 8])
    scale = struct.unpack(">I", content[content.index(b"mdhd") + 16 :][:4])[0] // 10
    tick = duration // (pts[-1] + 1)
    content[at : at + 8] = struct.pack(">Ii", duration - 4 * tick, media_time + 4 * scale)
    video.write_bytes(content)
    info = verify(video)
    assert (info.frames, info.fps, info.length) == (26, 10, pts[-1] - 3)
    shown = [max(n for n, at in enumerate(pts) if at <= moment) for moment in range(4, pts[-1] + 1)]
    clip = read_clip(video, start=ZERO, num_frames=len(shown), fps=info.fps)
    assert numbers(clip) == shown
    part = read_clip(video, start=Fraction(9, 10), num_frames=9, fps=info.fps)
    assert numbers(part) == shown[9:18]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_decoding_starts_no_threads(tmp_path: Path) -> None:
    """A thread pool that an error's traceback keeps alive would hang a loader's forked worker."""
    for codec in ("libx264", "libsvtav1", "libvpx-vp9"):
        video = write_video(tmp_path / f"{codec}.mkv", numbered(9, 128, 128), codec=codec)
        info = probe(video)
        with open_video(video) as opened:
            before = len(os.listdir("/proc/self/task"))
            for picture, _ in frames_from(opened, info, ZERO):
                picture.pixels()
                assert len(os.listdir("/proc/self/task")) == before
