from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from apt.errors import DataError, InputError
from apt.evaluate.features import Features
from apt.evaluate.video_measures import (
    FrechetVideo,
    PatchFrechetVideo,
    VideoFeatures,
    measure_movement,
    of_frames,
    read_video,
    video_diversity,
)
from apt.media import write_media
from apt.metrics import PatchFrechet, frechet_distance, pairwise_diversity

SIDE, FRAMES = 48, 6


def texture(seed: int) -> np.ndarray:
    """Patches of 4x4 pixels, which survive the encoding."""
    cells = np.random.default_rng(seed).integers(40, 216, (40, 40, 1), dtype=np.uint8)
    return cells.repeat(4, axis=0).repeat(4, axis=1).repeat(3, axis=2)


def clip(kind: str, seed: int) -> np.ndarray:
    step = {"moving": 3, "fast": 6}.get(kind, 0)
    frames = np.stack(
        [texture(seed)[40 : 40 + SIDE, 60 - step * t : 60 - step * t + SIDE] for t in range(FRAMES)]
    )
    if kind == "flickering":
        frames[1::2] += 40
    if kind == "blurred":
        frames = np.full_like(frames, frames.mean())
    return frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Path]]:
    root = tmp_path_factory.mktemp("videos")
    made = {}
    for kind in ("moving", "fast", "frozen", "flickering", "blurred"):
        made[kind] = [root / f"{kind}{seed}.mp4" for seed in range(2)]
        for seed, path in enumerate(made[kind]):
            write_media(path, clip(kind, seed), fps=8, scale=1)
    return made


def brightness(clips: Tensor) -> Tensor:
    values = clips.double()
    return torch.stack([values.mean(dim=(1, 2, 3, 4)), values.std(dim=(1, 2, 3, 4))], dim=1)


def test_all_frames_of_a_file_come_back(videos: Mapping[str, list[Path]]) -> None:
    read = read_video(videos["fast"][1])
    assert read.shape == (FRAMES, SIDE, SIDE, 3) and read.dtype == torch.uint8
    assert (read.numpy().astype(float) - clip("fast", 1)).std() < 20


def test_known_figures(videos: Mapping[str, list[Path]]) -> None:
    found = {kind: measure_movement(files) for kind, files in videos.items()}
    assert found["moving"].motion == pytest.approx(3 / SIDE)
    assert found["fast"].motion == pytest.approx(6 / SIDE)
    for kind in ("frozen", "flickering", "blurred"):
        assert found[kind].motion == 0 and found[kind].frozen == 1
    assert found["moving"].frozen == 0
    assert found["flickering"].flicker == pytest.approx(20, abs=2)
    assert found["flickering"].frame_change == pytest.approx(40, abs=4)
    assert found["frozen"].flicker < 1
    assert found["blurred"].sharpness < 0.01 * found["frozen"].sharpness


def test_distance_of_videos(videos: Mapping[str, list[Path]]) -> None:
    done: list[int] = []
    features = VideoFeatures("brightness", brightness)
    measure = FrechetVideo(videos["moving"], features, advance=done.append)
    rows = {
        kind: torch.cat([brightness(read_video(path)[None]) for path in videos[kind]])
        for kind in ("moving", "blurred")
    }
    expected = frechet_distance(rows["blurred"], rows["moving"])
    assert measure(videos["blurred"]) == pytest.approx(expected)
    assert measure(videos["moving"]) == pytest.approx(0, abs=1e-6)
    assert sum(done) == 6


def test_patches_of_videos_see_blur(videos: Mapping[str, list[Path]]) -> None:
    measure = PatchFrechetVideo(videos["moving"])
    pixels = {
        kind: torch.stack([read_video(path) for path in videos[kind]]).permute(0, 4, 1, 2, 3)
        for kind in ("moving", "blurred")
    }
    expected = PatchFrechet(pixels["moving"] / 127.5 - 1)(pixels["blurred"] / 127.5 - 1)
    assert measure(videos["blurred"]) == pytest.approx(expected, rel=1e-4)
    assert measure(videos["moving"]) == pytest.approx(0, abs=1e-6)


def test_features_of_frames_see_a_frozen_video(videos: Mapping[str, list[Path]]) -> None:
    def corners(pictures: Tensor) -> Tensor:
        return pictures[:, ::2, ::2].double().flatten(1)

    features = of_frames(Features("corners", corners, 8))
    moving, frozen = (features(read_video(videos[k][0])[None])[0] for k in ("moving", "frozen"))
    half = len(moving) // 2
    assert moving[half:].mean() > 5
    assert frozen[half:].abs().max() < 2
    single = features(read_video(videos["moving"][0])[None, :1])[0]
    assert (single[half:] == 0).all()


def test_diversity_is_that_of_the_features(videos: Mapping[str, list[Path]]) -> None:
    files, prompts = [*videos["moving"], *videos["blurred"]], [*"aabb"]
    rows = torch.cat([brightness(read_video(path)[None]) for path in files])
    found = video_diversity(files, prompts, VideoFeatures("brightness", brightness))
    assert found == pairwise_diversity(rows, prompts)


def test_bad_input(videos: Mapping[str, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no videos"):
        measure_movement([])
    write_media(tmp_path / "one.mp4", clip("moving", 0)[:1], fps=8, scale=1)
    with pytest.raises(InputError, match=r"one\.mp4: motion needs at least 2 frames"):
        measure_movement([tmp_path / "one.mp4"])
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"broken\.mp4"):
        FrechetVideo([tmp_path / "broken.mp4"], VideoFeatures("brightness", brightness))
    with pytest.raises(InputError, match="the features 'flat' returned"):
        FrechetVideo(videos["moving"], VideoFeatures("flat", lambda clips: clips.float()))
