"""Measures of generated videos: distances in features, sharpness, flicker, motion, diversity."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from apt.data.decode import probe, read_clip, read_image
from apt.errors import InputError
from apt.evaluate.advance import Advance, nobody
from apt.evaluate.features import Features, check_rows
from apt.evaluate.pictures import clean_resize, crop_square
from apt.metrics.detail import PatchFrechet
from apt.metrics.diversity import Diversity, pairwise_diversity
from apt.metrics.frechet import GaussianStatistics, frechet_distance, gaussian_statistics
from apt.metrics.motion import flicker, frame_change, motion, sharpness
from apt.pixels import to_frames


def read_video(path: Path) -> Tensor:
    """Return all frames of a file, at its own rate, as uint8 (T, H, W, 3); T is 1 for an image.

    Raises DataError if it cannot be decoded whole.
    """
    info = probe(path)
    if info.is_image:
        clip = read_image(path)
    else:
        clip = read_clip(
            path, start=Fraction(0), num_frames=round(info.length), fps=info.fps, info=info
        )
    return to_frames(clip[None])[0]


@dataclass(frozen=True)
class VideoFeatures:
    """A network for whole videos, such as the I3D of FVD (Unterthiner et al., 2018).

    Attributes:
        name: used in tables and records.
        network: maps clips (B, T, H, W, 3), uint8, on the CPU, to features (B, D) of any float
            dtype. It gets all frames at the size of the file, and selects and resizes them itself.
    """

    name: str
    network: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Return features (B, D) on the CPU in float64.

        Raises InputError unless the network returns one row per clip.
        """
        features = check_rows(self.name, self.network(clips), len(clips), "clips")
        return features.double().cpu()


def of_frames(features: Features) -> VideoFeatures:
    """Make features of videos from those of pictures: what frames show, and how much it changes.

    The features (B, 2D) are the mean over frames, and the mean absolute difference of neighbouring
    frames. The second half tells a frozen video from a moving one, and is 0 for a single frame.
    """

    def extract(clips: Tensor) -> Tensor:
        rows = []
        for clip in clips:
            size = (features.size, features.size)
            frames = [clean_resize(crop_square(frame), size) for frame in clip.numpy()]
            seen = features(torch.stack([torch.from_numpy(frame) for frame in frames])).double()
            change = seen.diff(dim=0).abs().sum(dim=0) / max(1, len(seen) - 1)
            rows.append(torch.cat([seen.mean(dim=0), change]))
        return torch.stack(rows)

    return VideoFeatures(f"{features.name} of frames", extract)


def video_features(
    files: Sequence[Path], features: VideoFeatures, *, advance: Advance = nobody
) -> Iterator[Tensor]:
    """Yield the features (1, D) of one file after another; sizes and lengths may differ.

    Raises DataError for a file that cannot be decoded.
    """
    for path in files:
        yield features(read_video(path)[None])
        advance(1)


class FrechetVideo:
    """Fréchet distance between videos in the features of a network; with FVD's I3D it is FVD.

    Figures of different networks, or of different numbers of videos, cannot be compared. Lower is
    better.

    Args:
        reference: files of real videos, at least two.
        features: the network.
        advance: called with progress.
    """

    def __init__(
        self, reference: Sequence[Path], features: VideoFeatures, *, advance: Advance = nobody
    ) -> None:
        self._features, self._advance = features, advance
        self._real = self._statistics(reference)

    def _statistics(self, files: Sequence[Path]) -> GaussianStatistics:
        return gaussian_statistics(video_features(files, self._features, advance=self._advance))

    def __call__(self, files: Sequence[Path]) -> float:
        """Return the squared distance, 0 for equal statistics."""
        return frechet_distance(self._statistics(files), self._real)


class PatchFrechetVideo:
    """Fréchet distance between small patches of videos (`apt.metrics.PatchFrechet`).

    It needs no network. It detects blur, ghosting and grain, but neither content nor motion. Lossy
    files add their own differences, and enlarged ones hide detail, so give lossless files of the
    real videos' size. Lower is better.

    Args:
        reference: files of real videos, at least one.

    Raises InputError for no files and for frames smaller than a patch, DataError as `read_video`.
    """

    def __init__(self, reference: Sequence[Path]) -> None:
        self._distance = PatchFrechet(_Pixels(reference))

    def __call__(self, files: Sequence[Path]) -> float:
        """Return the squared distance, 0 for equal statistics."""
        return self._distance(_Pixels(files))


@dataclass(frozen=True)
class _Pixels:
    """Videos as (1, 3, T, H, W) in [-1, 1], read from their files on each iteration."""

    files: Sequence[Path]

    def __iter__(self) -> Iterator[Tensor]:
        for path in self.files:
            yield rearrange(read_video(path), "t h w c -> 1 c t h w") / 127.5 - 1


@dataclass(frozen=True)
class Movement:
    """Figures of videos, each a mean over them; `apt.metrics.motion` defines them.

    Attributes:
        sharpness: variance of the Laplacian, in squared grey levels, mean over frames.
        flicker: amplitude of jumps in brightness, in grey levels.
        frame_change: mean change from one frame to the next, in grey levels.
        motion: speed of the moving parts, as a share of the shorter side per frame.
        frozen: share of the videos without any motion.
    """

    sharpness: float
    flicker: float
    frame_change: float
    motion: float
    frozen: float


def measure_movement(files: Sequence[Path], *, advance: Advance = nobody) -> Movement:
    """Measure the sharpness, flicker and motion of video files.

    Raises:
        DataError: a file that cannot be decoded.
        InputError: no files, or one of fewer than three frames.
    """
    if not files:
        raise InputError("there are no videos to measure; give at least one file")
    rows = []
    for path in files:
        clip = read_video(path)
        try:
            moves = motion(clip)
            rows.append(
                (
                    float(sharpness(clip).double().mean()),
                    flicker(clip),
                    frame_change(clip),
                    moves,
                    float(moves == 0),
                )
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        advance(1)
    return Movement(*torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist())


def video_diversity(
    files: Sequence[Path],
    prompts: Sequence[Hashable],
    features: VideoFeatures,
    *,
    advance: Advance = nobody,
) -> Diversity:
    """Return the mean feature distance of videos of one prompt, and of different prompts.

    Raises InputError as `apt.metrics.pairwise_diversity`, DataError for a broken file.
    """
    rows = torch.cat(list(video_features(files, features, advance=advance)))
    return pairwise_diversity(rows, prompts)
