"""The clips to compare: the same captions for every method, and real clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from apt.data.decode import probe, read_clip
from apt.data.digits import (
    HELDOUT_LABELS,
    TRAIN_LABELS,
    Label,
    MovingDigits,
    Setting,
    Split,
    clip_size,
)
from apt.errors import DataError
from apt.evaluate.digits.classifier import real_clips
from apt.pixels import to_uint8
from apt.rng import generator_for
from apt.samples import SampleKey


@dataclass(frozen=True)
class CaptionSet:
    """The captions of one evaluation seed, each repeated several times in a row.

    Attributes:
        seed: the evaluation seed; it also determines the noise and the real clips.
        trained: labels with captions that models were trained on.
        heldout: labels with captions that no model has seen.
        samples_per_caption: number of equal labels in a row.
        setting: of the moving digits, for real clips.
    """

    seed: int
    trained: tuple[Label, ...]
    heldout: tuple[Label, ...]
    samples_per_caption: int
    setting: Setting = "near"

    @property
    def labels(self) -> list[Label]:
        """All labels: trained captions first, then held-out ones."""
        return [*self.trained, *self.heldout]

    @property
    def keys(self) -> list[SampleKey]:
        """Caption and noise seed of each label's sample."""
        return [
            (label.caption, generator_for("evaluation noise", self.seed, position).initial_seed())
            for position, label in enumerate(self.labels)
        ]


def caption_set(
    seed: int, num_samples: int, samples_per_caption: int, setting: Setting = "near"
) -> CaptionSet:
    """Draw different trained captions for ``num_samples`` samples, and add held-out captions.

    ``num_samples`` must be a multiple of ``samples_per_caption`` and need no more captions than
    there are (``EvaluateConfig`` checks this). Held-out captions have equally many samples each;
    there are at most as many of them as trained captions.
    """
    num_captions = num_samples // samples_per_caption
    generator = generator_for("evaluation captions", seed)
    order = torch.randperm(len(TRAIN_LABELS), generator=generator)[:num_captions].tolist()
    heldout = HELDOUT_LABELS[: min(num_captions, len(HELDOUT_LABELS))]
    return CaptionSet(
        seed,
        tuple(TRAIN_LABELS[i] for i in order for _ in range(samples_per_caption)),
        tuple(label for label in heldout for _ in range(samples_per_caption)),
        samples_per_caption,
        setting,
    )


def real_for_captions(
    captions: CaptionSet, split: Split, positions: Sequence[int] | None = None
) -> Tensor:
    """Return real clips (N, 3, T, H, W) of these captions, in the handwriting of ``split``.

    Clips differ between seeds, and from those of the reference. `positions` selects labels; None
    takes all.
    """
    labels = captions.labels
    clips = []
    for position in range(len(labels)) if positions is None else positions:
        dataset = MovingDigits(
            _REAL_SEED + captions.seed,
            split,
            labels=(labels[position],),
            setting=captions.setting,
        )
        clips.append(real_clips(dataset, [position])[0])
    return torch.cat(clips)


def real_reference(num: int, setting: Setting = "near") -> Tensor:
    """Return the real clips of held-out handwriting that every method is compared with."""
    return real_clips(MovingDigits(_REFERENCE_SEED, "test", setting=setting), range(num))[0]


# Far from the small seeds that people train with.
_REFERENCE_SEED = 700_000
_REAL_SEED = 800_000


def read_digits(path: Path, setting: Setting) -> Tensor:
    """Read a sample's pixels (3, T, H, W) in [-1, 1], rounded to 8 bits.

    Raises DataError for a file that cannot be decoded, or does not have the setting's size.
    """
    size = clip_size(setting)
    info = probe(path)
    if (info.height, info.width) != (size.side, size.side):
        raise DataError(
            f"{str(path)!r} is {info.height}x{info.width}; the {setting} digits are "
            f"{size.side}x{size.side}"
        )
    clip = read_clip(path, start=Fraction(0), num_frames=size.frames, fps=info.fps, info=info)
    return to_uint8(clip).float() / 127.5 - 1
