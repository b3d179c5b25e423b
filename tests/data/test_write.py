from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("av")

import av
import numpy as np
import torch

from apt.data.dataset import Sample
from apt.data.digits import FPS, MovingDigits
from apt.data.folder import VideoFolder
from apt.data.write import encode_video, write_video_folder
from apt.errors import ConfigError, DataError
from tests.test_files import full_disk


class Noise:
    """Colour noise on a smooth ground: as hard on a codec as clips get."""

    fingerprint = "noise"

    def __init__(self, seed: int = 0, height: int = 32, width: int = 32) -> None:
        self.seed, self.height, self.width = seed, height, width
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        random = np.random.default_rng([self.seed, index])
        ground = random.uniform(-0.8, 0.8, (3, 1, 1, 1))
        pixels = ground + random.uniform(-0.2, 0.2, (3, 9, self.height, self.width))
        return Sample(torch.from_numpy(pixels).float(), f"noise {index}, “{self.seed}”")

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        raise NotImplementedError


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(4 / float((a - b).square().mean()))


def files(root: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in root.iterdir()}


@pytest.mark.parametrize("dataset", [Noise(), MovingDigits(seed=3)], ids=["noise", "digits"])
def test_training_from_the_folder_is_training_from_the_stream(
    tmp_path: Path, dataset: Noise | MovingDigits
) -> None:
    write_video_folder(dataset, tmp_path / "out", 12, FPS)
    folder = VideoFolder(tmp_path / "out", buckets=[(9, 32, 32)], fps=FPS, strict=True)
    assert len(folder) == 12
    for index in range(12):
        stored, sample = folder[index], dataset[index]
        assert stored.caption == sample.caption
        assert stored.pixels.shape == sample.pixels.shape
        assert psnr(stored.pixels, sample.pixels) > 50
        # No colour, row or frame is off: the error has no mean and no outlier.
        assert (stored.pixels - sample.pixels).mean(dim=(1, 2, 3)).abs().max() < 0.004
        assert (stored.pixels - sample.pixels).abs().max() < 4 / 127.5


def test_files_are_h264_of_the_rate_asked_for(tmp_path: Path) -> None:
    write_video_folder(Noise(), tmp_path, 2, 29.97)
    with av.open(str(tmp_path / "000001.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv444p"
        assert stream.average_rate == Fraction(30000, 1001)
        assert stream.frames == 9
    with (tmp_path / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"file_name": f"00000{i}.mp4", "caption": f"noise {i}, “0”"} for i in (0, 1)]


def test_odd_sizes_and_out_of_range_values_survive(tmp_path: Path) -> None:
    pixels = torch.linspace(-1.5, 1.5, 3 * 5 * 21 * 33).reshape(3, 5, 21, 33)
    (tmp_path / "a.mp4").write_bytes(encode_video(pixels, Fraction(8)))
    (tmp_path / "a.txt").write_text("a ramp")
    stored = VideoFolder(tmp_path, buckets=[(5, 21, 33)])[0].pixels
    assert psnr(stored, pixels.clamp(-1, 1)) > 45


def test_an_interrupted_call_continues(tmp_path: Path) -> None:
    class Interrupted(Noise):
        def __getitem__(self, index: int) -> Sample:
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        write_video_folder(Interrupted(), tmp_path, 5, 8)
    before = files(tmp_path)
    assert sorted(before) == ["000000.mp4", "000001.mp4", "000002.mp4"]
    # The partial file that a kill leaves is not a sample, and does no harm.
    (tmp_path / f".000003.mp4.{os.getpid()}.tmp").write_bytes(b"half a file")
    calls: list[int] = []
    write_video_folder(Noise(), tmp_path, 5, 8, progress=calls.append)
    assert calls == [1, 2, 3, 4, 5]
    after = files(tmp_path)
    assert sorted(after) == [*(f"00000{i}.mp4" for i in range(5)), "metadata.csv"]
    assert {name: after[name] for name in before} == before
    write_video_folder(Noise(), tmp_path, 7, 8)
    assert len(VideoFolder(tmp_path, buckets=[(9, 32, 32)], strict=True)) == 7


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    write_video_folder(Noise(), tmp_path, 2, 8)
    (tmp_path / "000001.mp4").write_bytes(b"")
    write_video_folder(Noise(), tmp_path, 2, 8)
    assert len(VideoFolder(tmp_path, buckets=[(9, 32, 32)], strict=True)) == 2


def test_other_videos_are_not_mixed_in(tmp_path: Path) -> None:
    write_video_folder(Noise(), tmp_path, 3, 8)
    before = files(tmp_path)
    with pytest.raises(DataError, match=r"000000\.mp4 has the caption"):
        write_video_folder(Noise(seed=1), tmp_path, 3, 8)
    with pytest.raises(DataError, match=r"names 000002\.mp4"):
        write_video_folder(Noise(), tmp_path, 2, 8)
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(DataError, match=r"000000\.mp4 shows another clip"):
        write_video_folder(Noise(seed=1), tmp_path, 3, 8)
    with pytest.raises(DataError, match="shows another clip"):
        write_video_folder(Noise(height=16), tmp_path, 3, 8)
    assert files(tmp_path) == {k: v for k, v in before.items() if k != "metadata.csv"}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_video_folder(Noise(), tmp_path / "file" / "sub", 1, 8)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    write_video_folder(Noise(), tmp_path / "out", 1, 8)
    before = files(tmp_path / "out")
    with pytest.raises(DataError, match=r"out: cannot be written: .*File too large"), full_disk():
        write_video_folder(Noise(), tmp_path / "out", 3, 8)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("table", ["file_name,caption\n000000.mp4,a, b\n", "name\n", "\xff"])
def test_another_table_in_the_place_is_not_overwritten(tmp_path: Path, table: str) -> None:
    (tmp_path / "metadata.csv").write_bytes(table.encode("latin-1"))
    with pytest.raises(DataError, match=r"metadata\.csv"):
        write_video_folder(Noise(), tmp_path, 1, 8)
    assert (tmp_path / "metadata.csv").read_bytes() == table.encode("latin-1")


@pytest.mark.parametrize(("num", "fps"), [(0, 8), (1, 0), (1, -8)])
def test_bad_numbers(tmp_path: Path, num: int, fps: float) -> None:
    with pytest.raises(ConfigError, match="positive"):
        write_video_folder(Noise(), tmp_path / "out", num, fps)
    assert not (tmp_path / "out").exists()
