"""All figures of a set of clips, and their mean and spread over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from apt.evaluate.clips import CaptionSet
from apt.evaluate.digits_classifier import DigitsClassifier, Judgement, judge
from apt.metrics import (
    Diversity,
    PatchFrechet,
    frechet_distance,
    gaussian_statistics,
    pairwise_diversity,
    power_spectrum,
    spectrum_distance,
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The figures of one method at one seed.

    Attributes:
        frechet: squared Fréchet distance to real clips in the classifier's features.
        patch: the same over high-passed pixel patches (``PatchFrechet``).
        spatial_spectrum, temporal_spectrum: distances of the power spectra, dB.
        digit, colour, direction, accuracy: shares that the classifier reads as the caption says;
            ``accuracy`` is all three.
        heldout_accuracy: all three right, on captions that were never trained on.
        within, across: mean distance between samples of one caption and of two captions, in
            pixels, divided by that of real clips of the same captions.
        radial_power: power in dB at 1..16 cycles per frame, for the plot.
    """

    frechet: float
    patch: float
    spatial_spectrum: float
    temporal_spectrum: float
    digit: float
    colour: float
    direction: float
    accuracy: float
    heldout_accuracy: float
    within: float
    across: float
    radial_power: list[float]


FIGURES = tuple(f.name for f in dataclasses.fields(Measurement) if f.name != "radial_power")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (nan for a single value) over seeds."""

    mean: float
    std: float


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation with n - 1."""
    array = np.asarray(values, dtype=np.float64)
    # An infinite ratio has no spread either.
    known = len(array) > 1 and bool(np.isfinite(array).all())
    return Spread(float(array.mean()), float(array.std(ddof=1)) if known else math.nan)


def summarise(measurements: Sequence[Measurement]) -> dict[str, Spread]:
    """Every figure over seeds."""
    return {name: spread([getattr(m, name) for m in measurements]) for name in FIGURES}


class Judge:
    """Holds the classifier and the real clips; measures clips against them."""

    def __init__(self, classifier: DigitsClassifier, reference: Tensor) -> None:
        self._classifier = classifier
        self._features = gaussian_statistics(judge(classifier, reference).features)
        self._patches = PatchFrechet(reference)
        self._spectrum = power_spectrum(reference)

    def measure(self, clips: Tensor, captions: CaptionSet, real: Diversity) -> Measurement:
        """Measure clips (N, 3, 9, 32, 32) made for ``captions``.

        Distances and diversity use the trained captions alone: those held out are too few, and
        the reference has none of them.
        """
        num = len(captions.trained)
        trained = clips[:num]
        judged = judge(self._classifier, clips)
        of_trained = Judgement(judged.features[:num], judged.words[:num])
        of_heldout = Judgement(judged.features[num:], judged.words[num:])
        right = of_trained.accuracy(list(captions.trained))
        spectrum = power_spectrum(trained)
        gap = spectrum_distance(spectrum, self._spectrum)
        assert gap.temporal is not None, "digits have nine frames"
        diversity = pixel_diversity(clips, captions).relative_to(real)
        return Measurement(
            frechet=frechet_distance(gaussian_statistics(of_trained.features), self._features),
            patch=self._patches(trained),
            spatial_spectrum=gap.spatial,
            temporal_spectrum=gap.temporal,
            digit=right.digit,
            colour=right.colour,
            direction=right.direction,
            accuracy=right.all,
            heldout_accuracy=of_heldout.accuracy(list(captions.heldout)).all,
            within=diversity.within,
            across=diversity.across,
            radial_power=spectrum.spatial.tolist(),
        )


def pixel_diversity(clips: Tensor, captions: CaptionSet) -> Diversity:
    """Mean pixel distance within and across the trained captions."""
    num = len(captions.trained)
    return pairwise_diversity(clips[:num].flatten(1), captions.trained)
