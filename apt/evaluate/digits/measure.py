"""Compute all figures of a set of clips, and their mean and spread over trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from apt.evaluate.digits.classifier import DigitsClassifier, Judgement, judge
from apt.evaluate.digits.clips import CaptionSet
from apt.evaluate.spread import Spread, spread
from apt.metrics import (
    Diversity,
    PatchFrechet,
    frechet_distance,
    gaussian_statistics,
    pairwise_diversity,
    power_spectrum,
    spectrum_distance,
)


@dataclass(frozen=True)
class SecondOpinion:
    """An independent judge's figures for the same clips."""

    frechet: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The figures of one method in one trial.

    Attributes:
        frechet: squared Fréchet distance to real clips in the classifier's features.
        patch: the same over high-passed pixel patches (``PatchFrechet``).
        spatial_spectrum, temporal_spectrum: distances of the power spectra, dB.
        digit, colour, direction, accuracy: share of clips in which the classifier finds what the
            caption says; ``accuracy`` is all three.
        heldout_accuracy: ``accuracy`` on captions that were never trained on.
        within, across: mean pixel distance between samples of one caption, and of different ones,
            divided by that of real clips of the same captions.
        radial_power: power in dB by spatial frequency, for the plot.
        opinions: of the independent judges, by name.
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
    opinions: dict[str, SecondOpinion]

    def flat(self) -> dict[str, float]:
        """Return every number under its own name."""
        return {
            **{name: getattr(self, name) for name in FIGURES},
            **{f"{_POWER}{i}": value for i, value in enumerate(self.radial_power)},
            **{
                f"{_JUDGE}{judge}: {name}": value
                for judge, opinion in self.opinions.items()
                for name, value in dataclasses.asdict(opinion).items()
            },
        }

    @classmethod
    def of_flat(cls, figures: Mapping[str, float]) -> Measurement:
        """Rebuild a measurement from the output of `flat`."""
        opinions: dict[str, dict[str, float]] = {}
        for key, value in figures.items():
            if key.startswith(_JUDGE):
                judge, name = key.removeprefix(_JUDGE).split(": ")
                opinions.setdefault(judge, {})[name] = value
        return cls(
            **{name: figures[name] for name in FIGURES},
            radial_power=[value for key, value in figures.items() if key.startswith(_POWER)],
            opinions={judge: SecondOpinion(**values) for judge, values in opinions.items()},
        )

    def figure(self, name: str, judge: str | None = None) -> float:
        """Return one figure by name, of an independent judge if one is named."""
        return float(getattr(self if judge is None else self.opinions[judge], name))


_POWER, _JUDGE = "radial power ", "judge "

FIGURES = tuple(
    f.name for f in dataclasses.fields(Measurement) if f.name not in ("radial_power", "opinions")
)


def summarise(measurements: Sequence[Measurement]) -> dict[str, Spread]:
    """Return the mean and spread of every figure over trials."""
    return {name: spread([getattr(m, name) for m in measurements]) for name in FIGURES}


class Judge:
    """Measures clips with the classifiers and against real clips.

    Args:
        classifier: the main judge.
        reference: real clips.
        others: independent judges by name, which give fewer figures.
    """

    def __init__(
        self,
        classifier: DigitsClassifier,
        reference: Tensor,
        others: Mapping[str, DigitsClassifier] | None = None,
    ) -> None:
        self._classifier = classifier
        self._others = dict(others or {})
        self._features = gaussian_statistics(judge(classifier, reference).features)
        self._other_features = {
            name: gaussian_statistics(judge(other, reference).features)
            for name, other in self._others.items()
        }
        self._patches = PatchFrechet(reference)
        self._spectrum = power_spectrum(reference)

    def measure(self, clips: Tensor, captions: CaptionSet, real: Diversity) -> Measurement:
        """Measure clips (N, 3, T, H, W) made for ``captions``.

        Distances and diversity use only the trained captions: there are too few held-out ones, and
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
        assert gap.temporal is not None, "digits have several frames"
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
            opinions={name: self._opinion(name, trained, captions) for name in self._others},
        )

    def _opinion(self, name: str, trained: Tensor, captions: CaptionSet) -> SecondOpinion:
        judged = judge(self._others[name], trained)
        return SecondOpinion(
            frechet_distance(gaussian_statistics(judged.features), self._other_features[name]),
            judged.accuracy(list(captions.trained)).all,
        )


def pixel_diversity(clips: Tensor, captions: CaptionSet) -> Diversity:
    """Return the mean pixel distance within and across the trained captions."""
    num = len(captions.trained)
    return pairwise_diversity(clips[:num].flatten(1), captions.trained)
