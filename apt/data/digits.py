"""Moving digits: real handwriting in colour, moving over real photographs, with captions.

The digits are scikit-learn's 8x8 scans (UCI Optical Recognition of Handwritten Digits), and the
backgrounds are crops of the two photographs that scikit-learn ships. Both come with scikit-learn,
so nothing is downloaded. A clip is a pure function of (setting, seed, split, index).

In "centred" clips, the caption determines where the digit is, within a pixel, in front of one of 20
backgrounds, so the mean of all clips with a caption is legible. In "free" clips, places and
backgrounds vary so much that the mean is a smear. "near" clips have the backgrounds of free clips,
with the digit nearer to the centre; a small model learns them in less than an hour. "large" clips
are free clips with twice the pixels per side and twice the frame rate.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image

from apt.data.dataset import Sample
from apt.errors import InputError

FRAMES, SIZE, FPS = 9, 32, 8
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (255, 40, 40),
    "green": (40, 230, 60),
    "blue": (70, 110, 255),
    "yellow": (255, 230, 40),
    "magenta": (255, 60, 230),
    "white": (255, 255, 255),
}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
Split = Literal["train", "test", "heldout"]
Setting = Literal["centred", "near", "free", "large"]

_DIGIT_SIDE = 20
_PHOTO_SCALE = 10  # 64x42 pixels, so a clip of 32x32 shows a good part of the scene


class ClipSize(NamedTuple):
    """Frames of a clip, its height (equal to its width), and frames per second."""

    frames: int
    side: int
    fps: int


@dataclass(frozen=True, kw_only=True)
class _Freedom:
    """How much clips with the same caption differ.

    Attributes:
        along, across: maximum offset of the digit's path from the centre, in pixels.
        crop_step: pixels between the places of crops.
        gain: lowest and highest brightness of the background, kept low so that the bright digit
            stands out. If they differ, each colour channel has its own.
        mirrored: whether half of the backgrounds are mirrored.
        scale: factor of the pixels per side and of the frame rate.
    """

    along: int = 1
    across: int = 1
    crop_step: int = 8
    gain: tuple[float, float] = (0.45, 0.45)
    mirrored: bool = False
    scale: int = 1

    @property
    def clip(self) -> ClipSize:
        """The size of the clips."""
        return ClipSize((FRAMES - 1) * self.scale + 1, SIZE * self.scale, FPS * self.scale)


_FREEDOM: dict[Setting, _Freedom] = {
    "centred": _Freedom(),  # 20 backgrounds in total
    "near": _Freedom(along=1, across=2, crop_step=1, gain=(0.3, 0.5), mirrored=True),
    "free": _Freedom(along=2, across=3, crop_step=1, gain=(0.3, 0.5), mirrored=True),
    "large": _Freedom(along=4, across=6, crop_step=1, gain=(0.3, 0.5), mirrored=True, scale=2),
}


def clip_size(setting: Setting) -> ClipSize:
    """Return the size of a setting's clips."""
    return _FREEDOM[setting].clip


@dataclass(frozen=True)
class Label:
    """The content of a clip, in words."""

    digit: str
    colour: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.digit} moving {self.direction}"


ALL_LABELS = tuple(
    Label(digit, colour, direction)
    for digit, colour, direction in itertools.product(DIGITS, COLOURS, DIRECTIONS)
)
# One caption in ten, chosen so that every digit, colour and direction still occurs in training.
HELDOUT_LABELS = tuple(label for i, label in enumerate(ALL_LABELS) if i % 10 == (i // 24) % 10)
TRAIN_LABELS = tuple(label for label in ALL_LABELS if label not in HELDOUT_LABELS)


class MovingDigits:
    """A stream of clips: index i is always the same clip, and any index is valid.

    Args:
        seed: another seed gives another stream.
        split: "train" has the training handwriting and the training captions; "test" has held-out
            handwriting (one scan in five) and the training captions; "heldout" has held-out
            handwriting and held-out captions.
        labels: draw from these labels instead of the split's, with the split's handwriting.
        setting: "centred", "near", "free" or "large".

    Raises:
        InputError: for an unknown split or setting.
    """

    def __init__(
        self,
        seed: int = 0,
        split: Split = "train",
        *,
        labels: Sequence[Label] | None = None,
        setting: Setting = "centred",
    ) -> None:
        for name, value, known in (
            ("split", split, get_args(Split)),
            ("setting", setting, get_args(Setting)),
        ):
            if value not in known:
                raise InputError(f"unknown {name} {value!r}; choose from {', '.join(known)}")
        self.seed = seed
        self.split = split
        self.setting = setting
        of_split = HELDOUT_LABELS if split == "heldout" else TRAIN_LABELS
        self._labels = of_split if labels is None else tuple(labels)
        self._scans = _scans(heldout=split != "train", scale=_FREEDOM[setting].scale)

    @property
    def fingerprint(self) -> str:
        """A hash of the first clips, which changes if the clips of a seed change."""
        digest = hashlib.sha256(repr((self.seed, self.split, self._labels)).encode())
        for index in range(8):
            digest.update(self[index].pixels.numpy().tobytes())
        return digest.hexdigest()

    def labels(self, index: int) -> Label:
        """Return the label of clip `index`."""
        return self._labels[int(self._random(index).integers(len(self._labels)))]

    def caption(self, index: int) -> str:
        """Return the caption of clip `index`, for example "a red seven moving left"."""
        return self.labels(index).caption

    def __getitem__(self, index: int) -> Sample:
        """Return clip `index`: pixels (3, T, H, W) fp32 in [-1, 1], and its caption."""
        random = self._random(index)
        label = self._labels[int(random.integers(len(self._labels)))]
        scans = self._scans[DIGITS.index(label.digit)]
        frames = _compose(random, label, scans, _FREEDOM[self.setting])
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()
        return Sample(pixels=pixels * 2 - 1, caption=label.caption)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Yield consecutive indices without end, from batch `start`.

        `seed` is ignored, because a stream needs no shuffling.
        """
        for batch in itertools.count(start):
            yield list(range(batch * batch_size, (batch + 1) * batch_size))

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, get_args(Split).index(self.split), index])


def _compose(
    random: np.random.Generator, label: Label, scans: np.ndarray, freedom: _Freedom
) -> np.ndarray:
    """Return frames (T, H, W, 3) in [0, 1]."""
    clip = freedom.clip
    alpha = scans[int(random.integers(len(scans)))][..., None]
    frames = np.repeat(_background(random, freedom)[None], clip.frames, axis=0)
    # One pixel per frame, passing the centre (plus a random offset) at half time.
    step = np.array(DIRECTIONS[label.direction])
    reach = np.where(step, freedom.along, freedom.across)
    digit = len(alpha)
    centre = (clip.side - digit) // 2 + random.integers(-reach, reach + 1)
    start = centre - step * (clip.frames // 2)
    colour = np.array(COLOURS[label.colour], np.float32) / 255
    for i in range(clip.frames):
        y, x = start + step * i
        patch = frames[i, y : y + digit, x : x + digit]
        patch *= 1 - alpha
        patch += alpha * colour
    return frames


def _background(random: np.random.Generator, freedom: _Freedom) -> np.ndarray:
    """Return a darkened crop (H, W, 3) of a photograph."""
    photos, size = _photos(freedom.scale), freedom.clip.side
    photo = photos[int(random.integers(len(photos)))]
    y, x = (
        freedom.crop_step * int(random.integers((side - size) // freedom.crop_step + 1))
        for side in photo.shape[:2]
    )
    crop = photo[y : y + size, x : x + size]
    if freedom.mirrored and random.integers(2):
        crop = crop[:, ::-1]
    low, high = freedom.gain
    gain = low if low == high else random.uniform(low, high, size=3)
    return crop * np.asarray(gain, np.float32)


@lru_cache
def _photos(scale: int) -> tuple[np.ndarray, ...]:
    """Return the two photographs in [0, 1], reduced."""
    from sklearn.datasets import load_sample_images

    factor = _PHOTO_SCALE // scale
    reduced = (Image.fromarray(photo).reduce(factor) for photo in load_sample_images().images)
    return tuple(np.asarray(photo, np.float32) / 255 for photo in reduced)


@lru_cache
def _scans(*, heldout: bool, scale: int) -> tuple[np.ndarray, ...]:
    """Return opacity masks (N, side, side) in [0, 1] of each digit's training or held-out scans."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 0) == heldout
    groups: list[list[np.ndarray]] = [[] for _ in DIGITS]
    side = _DIGIT_SIDE * scale
    for scan, target in zip(data.images[chosen], data.target[chosen], strict=True):
        image = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
        large = image.resize((side, side), Image.Resampling.BICUBIC)
        groups[target].append(np.asarray(large, np.float32) / 255)
    return tuple(np.stack(group) for group in groups)
