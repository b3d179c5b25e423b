"""Measures of generated images against real ones: FID, PFID, FDr, CLIP score.

They read files batch by batch and accumulate means and covariances in fp64, so memory does not grow
with the number of files. Real images are processed once, when a measure is created, and serve for
all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from apt.data.decode import probe
from apt.errors import DataError, InputError
from apt.evaluate.advance import Advance, nobody
from apt.evaluate.clip_score import Similarity
from apt.evaluate.features import Features
from apt.evaluate.pictures import (
    Picture,
    clean_resize,
    crop_middle,
    crop_square,
    read_picture,
    upsample,
)
from apt.metrics.frechet import GaussianStatistics, frechet_distance, gaussian_statistics

T = TypeVar("T")

SMALL, LARGE = 512, 1024
"""Pictures whose shorter side is at most `SMALL` are enlarged to `LARGE` for PFID (Lin et al.,
2024)."""

_DECODERS = 4


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def whole(path: Path, size: int) -> Picture:
    """Read a file, crop its largest centred square, and resize that as clean-fid does."""
    return clean_resize(crop_square(read_picture(path)), (size, size))


def patch(path: Path, size: int) -> Picture:
    """Return the middle of a real picture, not resized."""
    return crop_middle(read_picture(path), size)


def patch_of_generated(path: Path, size: int) -> Picture:
    """Return the middle of a generated picture; one of up to 512 pixels is enlarged first."""
    picture = read_picture(path)
    small = min(picture.shape[:2]) <= SMALL
    return crop_middle(upsample(picture, LARGE) if small else picture, size)


def prepared(
    files: Sequence[Path], prepare: Callable[[Path], Picture], batch_size: int
) -> Iterator[Tensor]:
    """Yield batches of prepared pictures of one size: (B, H, W, 3), uint8 or float32."""
    with ThreadPoolExecutor(_DECODERS) as pool:
        for chunk in batches(files, batch_size):
            yield torch.from_numpy(np.stack(list(pool.map(prepare, chunk))))


def feature_statistics(
    files: Sequence[Path],
    features: Features,
    prepare: Callable[[Path, int], Picture] = whole,
    *,
    batch_size: int = 32,
    advance: Advance = nobody,
) -> GaussianStatistics:
    """Return the mean and covariance of the features of image files.

    Args:
        files: images.
        features: the network.
        prepare: maps a file and the network's size to a picture of that size.
        batch_size: pictures per network call; the figures do not depend on it.
        advance: called with progress.

    Raises:
        DataError: a file that cannot be decoded.
        InputError: fewer than two files, or features that are not finite.
    """

    def rows() -> Iterator[Tensor]:
        size = features.size
        for pictures in prepared(files, lambda path: prepare(path, size), batch_size):
            yield features(pictures)
            advance(len(pictures))

    return gaussian_statistics(rows())


class _FrechetOfFiles:
    """Fréchet distance between the features of generated and real files; see `Fid`."""

    _prepare_real = staticmethod(whole)
    _prepare_generated = staticmethod(whole)

    def __init__(
        self,
        reference: Sequence[Path],
        features: Features,
        *,
        batch_size: int = 32,
        advance: Advance = nobody,
    ) -> None:
        self._features, self._batch_size, self._advance = features, batch_size, advance
        self._real = self._measure(self._usable(reference), self._prepare_real)

    def _usable(self, reference: Sequence[Path]) -> Sequence[Path]:
        return reference

    def _measure(
        self, files: Sequence[Path], prepare: Callable[[Path, int], Picture]
    ) -> GaussianStatistics:
        return feature_statistics(
            files, self._features, prepare, batch_size=self._batch_size, advance=self._advance
        )

    def statistics(self, files: Sequence[Path]) -> GaussianStatistics:
        """Return the feature statistics of generated files; see `feature_statistics`."""
        return self._measure(files, self._prepare_generated)

    def distance(self, statistics: GaussianStatistics) -> float:
        """Return the squared distance of these statistics to the real ones; 0 if equal."""
        return frechet_distance(statistics, self._real)

    def __call__(self, files: Sequence[Path]) -> float:
        """Return the squared distance of generated files to the real ones."""
        return self.distance(self.statistics(files))


class Fid(_FrechetOfFiles):
    """Fréchet Inception distance (Heusel et al., 2017), as in APT's Appendix A.

    Pictures are cropped to their middle square and resized to 299 pixels as clean-fid does (Parmar
    et al., 2022). Lower is better. Few samples bias it upwards, so compare equal numbers; below
    2048 samples the covariance is singular.

    Args:
        reference: files of real images, at least two.
        features: Inception; another network gives another Fréchet distance.
        batch_size: pictures per network call.
        advance: called with progress.
    """


class PatchFid(_FrechetOfFiles):
    """Patch FID (Lin et al., 2024; APT, Appendix A): detail at the generated resolution.

    It compares patches of 299 pixels from the middle, not resized. Generated pictures whose shorter
    side is at most 512 pixels are first enlarged to 1024, bilinearly. Real ones are never enlarged;
    those with a side below 299 are left out. Arguments are those of `Fid`.

    Attributes:
        left_out: number of real files that were too small.

    Raises:
        DataError: all real files are too small.
        InputError: a generated picture is too small, which it never is for patches of up to 513
            pixels.
    """

    _prepare_real = staticmethod(patch)
    _prepare_generated = staticmethod(patch_of_generated)

    def _usable(self, reference: Sequence[Path]) -> Sequence[Path]:
        side = self._features.size
        large = [path for path in reference if _shorter_side(path) >= side]
        self.left_out = len(reference) - len(large)
        if not large:
            raise DataError(
                f"none of the {len(reference)} real images has at least {side} pixels on its "
                "shorter side, so there are no patches; give a folder of larger images"
            )
        return large


def _shorter_side(path: Path) -> int:
    info = probe(path)
    return min(info.height, info.width)


@dataclass(frozen=True)
class FrechetRatios:
    """The result of `FrechetRatio`.

    Attributes:
        mean: over the networks; 1 means as far from the reference as real images are.
        ratios: by network.
        distances: Fréchet distances of the generated images, by network.
    """

    mean: float
    ratios: Mapping[str, float]
    distances: Mapping[str, float]


class FrechetRatio:
    """FDr^k: Fréchet distances in k representations, each divided by that of held-out real images.

    The result is the mean over networks of FD(generated, reference) / FD(held out, reference); real
    images reach 1. The distance in one network can be optimised and then misranks models; several
    are harder to fool.

    Source: Yang et al., "Representation Fréchet Loss for Visual Generation" (arXiv 2604.28190) and
    its evaluation code, with Inception, ConvNeXt-V2-B, DINOv2-L, MAE-L, SigLIP 2 So400m and CLIP-L
    (`apt.evaluate.features.FDR_FEATURES`) on ImageNet, whose validation set is held out.

    Differences from that code: the real images are the user's own, and pictures are resized as
    clean-fid does to the size that each network was trained at (theirs have 256 pixels). Figures
    can therefore be compared with each other, but not with that paper's tables. Distances fall as
    the number of images on either side grows, so hold out as many as are generated.

    Args:
        reference: files of real images.
        features: networks with different names.
        heldout: other real images; None holds out every second file of `reference`.
        batch_size: pictures per network call.
        advance: called with progress.

    Raises:
        InputError: no networks, two with the same name, too few images, or held-out images that are
            those of the reference.
    """

    def __init__(
        self,
        reference: Sequence[Path],
        features: Sequence[Features],
        *,
        heldout: Sequence[Path] | None = None,
        batch_size: int = 32,
        advance: Advance = nobody,
    ) -> None:
        names = [network.name for network in features]
        if not names or len(set(names)) < len(names):
            raise InputError(f"FDr needs one or more networks with different names, got {names}")
        if heldout is None:
            reference, heldout = reference[::2], reference[1::2]
        self._distances = {
            network.name: Fid(reference, network, batch_size=batch_size, advance=advance)
            for network in features
        }
        self.heldout = {name: distance(heldout) for name, distance in self._distances.items()}
        equal = [name for name, distance in self.heldout.items() if distance <= 0]
        if equal:
            raise InputError(
                f"the held-out images equal the reference in {', '.join(equal)}, so nothing can be "
                "measured against them; hold out other real images"
            )

    def __call__(
        self, files: Sequence[Path], known: Mapping[str, GaussianStatistics] | None = None
    ) -> FrechetRatios:
        """Return the ratios of generated images.

        Args:
            files: images.
            known: their `Fid.statistics` by network, if known; the others are computed.
        """
        known = known or {}
        distances = {
            name: distance.distance(known[name]) if name in known else distance(files)
            for name, distance in self._distances.items()
        }
        ratios = {name: distances[name] / self.heldout[name] for name in distances}
        return FrechetRatios(sum(ratios.values()) / len(ratios), ratios, distances)


def clip_score(
    files: Sequence[Path],
    prompts: Sequence[str],
    similarity: Similarity,
    *,
    batch_size: int = 32,
    advance: Advance = nobody,
) -> float:
    """Return the mean of 100 times the cosine of image and prompt, as in APT's Tables 5 and 6.

    Args:
        files: images.
        prompts: the prompt of each image.
        similarity: CLIP, or another network.
        batch_size: pictures per network call.
        advance: called with progress.

    Raises:
        InputError: no files, or not one prompt for each.
        DataError: a file that cannot be decoded.
    """
    if not files or len(files) != len(prompts):
        raise InputError(
            f"a CLIP score needs a prompt for each image; got {len(files)} images and "
            f"{len(prompts)} prompts"
        )
    pictures = prepared(files, lambda path: whole(path, similarity.size), batch_size)
    total = 0.0
    for batch, texts in zip(pictures, batches(prompts, batch_size), strict=True):
        total += float(similarity(batch, texts).sum())
        advance(len(texts))
    return 100 * total / len(files)
