"""The figures of the digits' results page, for any model that makes moving digits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from apt.checks import check_range
from apt.data.decode import probe, read_clip
from apt.data.digits import TRAIN_LABELS, clip_size
from apt.errors import DataError
from apt.evaluate.digits import ClassifierConfig, load_classifier
from apt.evaluate.digits.clips import CaptionSet, caption_set, real_for_captions, real_reference
from apt.evaluate.digits.measure import FIGURES, Judge, pixel_diversity
from apt.evaluate.protocol import PROTOCOLS, SEED_STRIDE, Figure, Figures, Protocol, Request
from apt.generate_options import GenerateOptions
from apt.pixels import to_uint8
from apt.samples import Sample

_FIGURES = {
    "frechet": Figure("Fréchet distance", "lower", "log"),
    "patch": Figure("patch distance", "lower", "log"),
    "spatial_spectrum": Figure("spatial spectrum, dB", "lower"),
    "temporal_spectrum": Figure("temporal spectrum, dB", "lower"),
    "digit": Figure("digit", "higher", "share"),
    "colour": Figure("colour", "higher", "share"),
    "direction": Figure("direction", "higher", "share"),
    "accuracy": Figure("accuracy", "higher", "share"),
    "heldout_accuracy": Figure("accuracy, held-out captions", "higher", "share"),
    "within": Figure("diversity within a caption"),
    "across": Figure("diversity across captions"),
}
_ABOUT = """\
The figures of the digits' results page, which says what each is: {captions} captions that models
were trained on, and {heldout} that they were not, against {reference} real clips of handwriting
that no model has seen. The judge is a classifier trained on real clips. Here samples are video
files, whose frames are averaged back to {height}×{width}. The page's are not compressed: compare
these figures among themselves, and not with it; the spectra differ most."""


@PROTOCOLS.register("digits")
@dataclass(frozen=True, kw_only=True)
class Digits:
    """Distances, words and diversity on the moving digits; without --model, the results page."""

    captions: int = len(TRAIN_LABELS)
    """Captions that models were trained on; as many that were held out are added, if there are."""
    samples_per_caption: int = 2
    """Samples of each caption and seed."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Evaluation seeds; each has noise and real clips of its own."""
    num_reference: int = 2048
    """Real clips that everything is compared with."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The judge, which is trained at first use."""
    cache: Path | None = None
    """Folder of the judge; None is `judge` in --out. `runs/digits/evaluation` has the page's."""

    def __post_init__(self) -> None:
        limits = {"captions": (2, len(TRAIN_LABELS)), "samples_per_caption": (2, 1000)}
        check_range(self, "", limits | {"num_reference": (2, 100_000)})

    def build(self, request: Request) -> Protocol:
        """The protocol. Raises ConfigError for numbers that do not fit."""
        each, setting = self.samples_per_caption, self.classifier.setting
        size = clip_size(setting)
        captions = caption_set(0, self.captions * each, each, setting)
        kept = request.out / "judge" if self.cache is None else self.cache

        @functools.cache
        def judge() -> Judge:
            classifier, _ = load_classifier(self.classifier, kept)
            return Judge(classifier, real_reference(self.num_reference, setting))

        return Protocol(
            name="digits",
            about=_ABOUT.format(
                captions=len(set(captions.trained)),
                heldout=len(set(captions.heldout)),
                reference=self.num_reference,
                height=size.side,
                width=size.side,
            ),
            prompts=tuple(dict.fromkeys(label.caption for label in captions.labels)),
            samples_per_prompt=each,
            seeds=self.seeds,
            options=GenerateOptions(frames=size.frames, height=size.side, width=size.side),
            figures=_FIGURES,
            measures=(lambda samples: _measure(judge(), captions, samples),),
            prepare=judge,
            settings=dataclasses.asdict(dataclasses.replace(self, cache=None)),
        )


def _measure(judge: Judge, captions: CaptionSet, samples: Sequence[Sample]) -> Figures:
    size = clip_size(captions.setting)
    clips = torch.stack([read_digits(s.path, size.frames, (size.side, size.side)) for s in samples])
    # Real clips are other ones for each seed, as the noise is.
    of_seed = dataclasses.replace(captions, seed=samples[0].seed // SEED_STRIDE)
    real = pixel_diversity(real_for_captions(of_seed, "test"), of_seed)
    found = judge.measure(clips, of_seed, real)
    return {name: found.figure(name) for name in FIGURES}


def read_digits(path: Path, frames: int, size: tuple[int, int]) -> Tensor:
    """A clip (3, T, H, W) in [-1, 1], in 8 bits, of which each pixel is a square in the file.

    Raises DataError for a file that cannot be decoded, or whose frames are no multiple of `size`.
    """
    info = probe(path)
    clip = read_clip(path, start=Fraction(0), num_frames=frames, fps=info.fps, info=info)
    if any(found % wanted for found, wanted in zip(clip.shape[2:], size, strict=True)):
        raise DataError(f"{str(path)!r} is {tuple(clip.shape[2:])}, no multiple of {size}")
    small = functional.adaptive_avg_pool2d(clip.transpose(0, 1), size).transpose(0, 1)
    return to_uint8(small).float() / 127.5 - 1
