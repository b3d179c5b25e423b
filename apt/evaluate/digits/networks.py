"""The two networks of the digits judges, which are built differently."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.data.digits import FRAMES, SIZE

_FRAME_STRIDE = 4
_GLIMPSE = 20
_COARSE = 4


class GlimpseNetwork(nn.Module):
    """A CNN on close-ups of what moves, and a small network on the whole clip in low resolution.

    The digit is what moves, so the CNN reads the 20x20 square with the most motion, cut out of some
    of the frames. The low-resolution network sees where the squares lie and how the rest moves.
    This learns from a tenth of the clips that a network on whole frames needs.

    Maps clips (N, 3, 9, 32, 32) to features (N, features).
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        w = width
        self.look = nn.Sequential(
            _convolution(6, w),
            _convolution(w, 2 * w, stride=2),
            _convolution(2 * w, 3 * w),
            _convolution(3 * w, 4 * w, stride=2),
            nn.Flatten(),
            nn.Linear(4 * w * (_GLIMPSE // 4) ** 2, 4 * w, bias=False),
            nn.BatchNorm1d(4 * w),
            nn.ReLU(),
        )
        self.place = nn.Linear(6 * (SIZE // _COARSE) ** 2, w)
        self.join = nn.Sequential(
            nn.Linear(4 * w + FRAMES * w, 2 * features),
            nn.ReLU(),
            nn.Linear(2 * features, features),
            nn.ReLU(),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        both = torch.cat([pixels, _motion(pixels)], dim=1).transpose(1, 2)
        squares = _glimpses(both[:, ::_FRAME_STRIDE])
        what = self.look(squares.flatten(0, 1)).unflatten(0, squares.shape[:2]).mean(dim=1)
        coarse = F.avg_pool2d(both.flatten(0, 1), _COARSE).unflatten(0, both.shape[:2])
        where = self.place(coarse.flatten(2)).flatten(1)
        features: Tensor = self.join(torch.cat([what, where], dim=1))
        return features


class FramesNetwork(nn.Module):
    """A residual network on whole frames, with the frames as channels.

    Maps clips (N, 3, 9, 32, 32) to features (N, features).
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        channels = 6 * len(range(0, FRAMES, 2))
        self.layers = nn.Sequential(
            _convolution(channels, width),
            _Residual(width, 2 * width),
            _Residual(2 * width, 4 * width),
            _Residual(4 * width, 6 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6 * width, features),
            nn.ReLU(),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        both = torch.cat([pixels, _motion(pixels)], dim=1)[:, :, ::2]
        features: Tensor = self.layers(both.flatten(1, 2))
        return features


NETWORKS = {"glimpse": GlimpseNetwork, "frames": FramesNetwork}


def seen(pixels: Tensor, blur: float) -> Tensor:
    """Return clips as a judge sees them: large ones reduced to half size and rate, then blurred.

    Args:
        pixels: (N, 3, T, H, W).
        blur: standard deviation of the Gaussian, in pixels at 32x32; 0 is none.
    """
    factor = pixels.shape[-1] // SIZE
    if factor > 1:
        pixels = F.avg_pool3d(pixels[:, :, ::factor], (1, factor, factor))
    if not blur:
        return pixels
    reach = math.ceil(3 * blur)
    line = torch.arange(-reach, reach + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = (-0.5 * (line / blur) ** 2).exp()
    kernel = kernel / kernel.sum()
    planes = pixels.flatten(0, 2)[:, None]
    planes = F.pad(planes, (reach,) * 4, mode="replicate")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        planes = F.conv2d(planes, kernel.view(shape))
    return planes[:, 0].unflatten(0, pixels.shape[:3])


class _Residual(nn.Module):
    """Two convolutions that halve height and width, and a strided 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.way = nn.Sequential(
            _convolution(inputs, outputs, stride=2),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.past = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.way(x) + self.past(x))


def _motion(pixels: Tensor) -> Tensor:
    """Subtract the median over time: the background is still, so this leaves what moves."""
    return pixels - pixels.median(dim=2, keepdim=True).values


def _glimpses(frames: Tensor) -> Tensor:
    """Cut the square with the most motion out of each frame: (N, F, 6, H, W) to (N, F, 6, 20, 20).

    Channels 3 to 5 are the motion.
    """
    energy = frames[:, :, 3:].square().mean(dim=2)
    sums = F.avg_pool2d(energy, _GLIMPSE, stride=1)
    best = sums.flatten(2).argmax(dim=2)
    top, left = best // sums.shape[-1], best % sums.shape[-1]
    side = torch.arange(_GLIMPSE)
    n = torch.arange(frames.shape[0])[:, None, None, None]
    f = torch.arange(frames.shape[1])[None, :, None, None]
    y = (top[..., None] + side)[..., :, None]
    x = (left[..., None] + side)[..., None, :]
    # Indexing puts the channels last.
    return frames[n, f, :, y, x].movedim(-1, 2)


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
