"""Distances that detect blur, ghosting and washed-out pixels, which classifier features overlook.

Both use pixels at full resolution and never resize, as the paper's PFID does (Appendix A):
``PatchFrechet`` compares the distribution of small patches, ``spectrum_distance`` the power at
each spatial and temporal frequency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.errors import InputError
from apt.metrics.frechet import GaussianStatistics, frechet_distance, gaussian_statistics

# One clip of 9x32x32 has 5 x 16 patches; 64 clips keep a chunk of features near 8 MB.
_CHUNK = 64
# Power of the error of rounding to 8 bits in [-1, 1]; a spectrum below it is only that error.
_POWER_FLOOR = (2 / 255) ** 2 / 12


class PatchFrechet:
    """Fréchet distance between the patches of clips and those of real clips.

    A patch is ``patch_size``² pixels of one frame, from a grid without overlap or resizing. It is
    transformed by an orthonormal DCT over its pixels and over its three colour channels (which
    gives brightness and two colour differences); the constant coefficients are dropped (high pass).
    Each coefficient is divided by its root mean square in the real clips, so that fine detail,
    which has little energy, counts as much as coarse shape. ``noise_floor`` is added to that
    divisor in quadrature, so that invisible noise does not count as detail. Features are the scaled
    coefficients and the square roots of their magnitudes. The square roots show what a covariance
    alone cannot, such as the share of patches without any detail.

    ``real`` is (N, 3, T, H, W) in [-1, 1], with H and W at least ``patch_size``; every
    ``frame_stride``-th frame is used. Clips of several sizes, or more than fit into memory, can be
    given as an iterable of such batches; ``real`` is iterated twice. Raises ``InputError`` for
    other shapes, and for no clips.
    """

    def __init__(
        self,
        real: Tensor | Iterable[Tensor],
        *,
        patch_size: int = 8,
        frame_stride: int = 2,
        noise_floor: float = 0.05,
    ) -> None:
        self.patch_size = patch_size
        self.frame_stride = frame_stride
        squares = torch.zeros(3 * (patch_size**2 - 1), dtype=torch.float64)
        count = 0
        for coefficients in self._coefficients(real):
            squares += coefficients.double().square().sum(dim=0)
            count += len(coefficients)
        if not count:
            raise InputError("there are no real clips to compare with; give at least one")
        self._scale = (squares / count + noise_floor**2).sqrt().float()
        self._real = gaussian_statistics(self._features(real))

    def __call__(self, clips: Tensor | Iterable[Tensor]) -> float:
        """Return the distance of ``clips`` (N, 3, T, H, W) in [-1, 1] from the real clips."""
        return frechet_distance(self.statistics(clips), self._real)

    def statistics(self, clips: Tensor | Iterable[Tensor]) -> GaussianStatistics:
        """Return mean and covariance of the patch features of ``clips``."""
        return gaussian_statistics(self._features(clips))

    def _features(self, clips: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        for coefficients in self._coefficients(clips):
            scaled = coefficients / self._scale
            yield torch.cat([scaled, scaled.abs().sqrt()], dim=1)

    def _coefficients(self, clips: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in [clips] if isinstance(clips, Tensor) else clips:
            _check_clips(batch, min_size=self.patch_size)
            for chunk in batch.split(_CHUNK):
                frames = chunk[:, :, :: self.frame_stride].float().cpu()
                yield patch_frequencies(frames, self.patch_size)


def patch_frequencies(clips: Tensor, patch_size: int = 8) -> Tensor:
    """Return DCT coefficients of patches without the constant ones: (patches, 3 * (p² - 1)).

    The DCT is orthonormal, over pixels and colour channels. Clips (B, 3, T, H, W) are cut into
    patches of p = ``patch_size`` pixels from the top left without overlap; what remains at the
    right and bottom is left out.
    """
    p = patch_size
    colour, pixel = (_dct_matrix(size).to(clips.device) for size in (3, p))
    patches = clips.unfold(3, p, p).unfold(4, p, p)
    coefficients = torch.einsum("kc,ui,vj,bcthwij->bthwkuv", colour, pixel, pixel, patches)
    return coefficients.reshape(-1, 3, p * p)[:, :, 1:].flatten(1)


@dataclass(frozen=True)
class PowerSpectrum:
    """Mean log power of clips, in dB.

    ``spatial`` (K,) is for radial frequencies of 1..K cycles per shorter side of the frame,
    ``temporal`` (M,) for 1..M cycles per clip (empty for images).
    """

    spatial: Tensor
    temporal: Tensor


@dataclass(frozen=True)
class SpectrumDistance:
    """Root mean square difference of two spectra in dB; ``temporal`` is None for images."""

    spatial: float
    temporal: float | None


def power_spectrum(clips: Tensor) -> PowerSpectrum:
    """Return spatial and temporal power spectra of clips (N, 3, T, H, W) in [-1, 1].

    Spatial power is averaged over directions, temporal power over pixels. Frames and pixel tracks
    have their mean removed and a Hann window applied. The logarithm is taken for each clip before
    averaging, so that a few over-sharp clips cannot hide many blurred ones.
    """
    _check_clips(clips, min_size=4)
    num_frames, height, width = clips.shape[2:]
    window = torch.outer(_hann(height), _hann(width))
    radius = torch.hypot(
        torch.fft.fftfreq(height)[:, None] * min(height, width),
        torch.fft.fftfreq(width)[None, :] * min(height, width),
    )
    bins = radius.round().long()
    num_bins = min(height, width) // 2
    kept = (bins >= 1) & (bins <= num_bins)
    members = torch.bincount(bins[kept] - 1, minlength=num_bins)

    spatial, temporal = [], []
    for chunk in clips.split(_CHUNK):
        x = chunk.float().cpu()
        centred = (x - x.mean(dim=(3, 4), keepdim=True)) * window
        power = torch.fft.fft2(centred, norm="ortho").abs().square().mean(dim=(1, 2))
        radial = torch.zeros(len(x), num_bins).index_add_(1, bins[kept] - 1, power[:, kept])
        spatial.append(_decibel(radial / members))

        tracks = (x - x.mean(dim=2, keepdim=True)) * _hann(num_frames)[:, None, None]
        power = torch.fft.rfft(tracks, dim=2, norm="ortho").abs().square().mean(dim=(1, 3, 4))
        temporal.append(_decibel(power[:, 1:]))
    return PowerSpectrum(torch.cat(spatial).mean(0), torch.cat(temporal).mean(0))


def spectrum_distance(a: PowerSpectrum, b: PowerSpectrum) -> SpectrumDistance:
    """Return the distance of two spectra in dB. Raises ``InputError`` if clip sizes differ."""
    if a.spatial.shape != b.spatial.shape or a.temporal.shape != b.temporal.shape:
        raise InputError(
            "spectra of clips of different sizes cannot be compared: "
            f"{len(a.spatial)} and {len(b.spatial)} spatial, "
            f"{len(a.temporal)} and {len(b.temporal)} temporal frequencies. Use equal sizes."
        )
    spatial = (a.spatial - b.spatial).square().mean().sqrt().item()
    if not len(a.temporal):
        return SpectrumDistance(spatial, None)
    return SpectrumDistance(spatial, (a.temporal - b.temporal).square().mean().sqrt().item())


def _check_clips(clips: Tensor, *, min_size: int) -> None:
    if clips.ndim != 5 or clips.shape[1] != 3 or not len(clips) or min(clips.shape[3:]) < min_size:
        raise InputError(
            f"clips have shape {tuple(clips.shape)}; expected (N, 3, T, H, W) with N >= 1 and "
            f"frames of at least {min_size}x{min_size} pixels."
        )


def _dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II: row k holds the k-th cosine."""
    k, n = torch.arange(size)[:, None], torch.arange(size)[None, :]
    matrix = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _hann(size: int) -> Tensor:
    # The zeros at both ends are cut off, so that short clips keep all their frames.
    return torch.hann_window(size + 2, periodic=False)[1:-1]


def _decibel(power: Tensor) -> Tensor:
    return 10 * torch.log10(power + _POWER_FLOOR)
