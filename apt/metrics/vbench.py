"""Aggregation of VBench's 16 dimensions into its three scores (Huang et al., 2024).

VBench pins old packages and downloads weights, so it runs in its own environment. This file turns
the figures that it prints into the scores of APT Table 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from apt.errors import InputError


@dataclass(frozen=True)
class Dimension:
    """The range that VBench maps to [0, 1], and the weight in the quality or semantic score."""

    low: float
    high: float
    weight: float = 1.0

    def normalise(self, value: float) -> float:
        """Return VBench's normalised figure for a raw figure in [0, 1]."""
        return (value - self.low) / (self.high - self.low)


QUALITY_DIMENSIONS: Mapping[str, Dimension] = {
    "subject consistency": Dimension(0.1462, 1.0),
    "background consistency": Dimension(0.2615, 1.0),
    "temporal flickering": Dimension(0.6293, 1.0),
    "motion smoothness": Dimension(0.706, 0.9975),
    "aesthetic quality": Dimension(0.0, 1.0),
    "imaging quality": Dimension(0.0, 1.0),
    "dynamic degree": Dimension(0.0, 1.0, weight=0.5),
}
SEMANTIC_DIMENSIONS: Mapping[str, Dimension] = {
    "object class": Dimension(0.0, 1.0),
    "multiple objects": Dimension(0.0, 1.0),
    "human action": Dimension(0.0, 1.0),
    "color": Dimension(0.0, 1.0),
    "spatial relationship": Dimension(0.0, 1.0),
    "scene": Dimension(0.0, 0.8222),
    "appearance style": Dimension(0.0009, 0.2855),
    "temporal style": Dimension(0.0, 0.364),
    "overall consistency": Dimension(0.0, 0.364),
}
QUALITY_WEIGHT = 4.0
SEMANTIC_WEIGHT = 1.0


@dataclass(frozen=True)
class VBenchScores:
    """The three scores of APT Table 7, in percent."""

    quality: float
    semantic: float
    total: float


def total_score(quality: float, semantic: float) -> float:
    """Return (4 · quality + semantic) / 5, in the unit of the inputs."""
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (
        QUALITY_WEIGHT + SEMANTIC_WEIGHT
    )


def vbench_scores(values: Mapping[str, float]) -> VBenchScores:
    """Return the quality, semantic and total scores in percent from the 16 raw figures in [0, 1].

    Keys are VBench's dimension names, with spaces or underscores. Raises ``InputError`` if a
    dimension is missing or unknown, or its figure is not in [0, 1].
    """
    named = {name.replace("_", " "): value for name, value in values.items()}
    expected = set(QUALITY_DIMENSIONS) | set(SEMANTIC_DIMENSIONS)
    if set(named) != expected or len(named) != len(values):
        missing, unknown = sorted(expected - set(named)), sorted(set(named) - expected)
        raise InputError(
            f"VBench scores need each of the 16 dimensions once; {missing=}, {unknown=}."
        )
    for name, value in named.items():
        if not 0.0 <= value <= 1.0:
            raise InputError(
                f"VBench figure {name!r} is {value}; expected a raw figure in [0, 1], not percent."
            )
    quality = 100 * _weighted_mean(named, QUALITY_DIMENSIONS)
    semantic = 100 * _weighted_mean(named, SEMANTIC_DIMENSIONS)
    return VBenchScores(quality, semantic, total_score(quality, semantic))


def _weighted_mean(values: Mapping[str, float], dimensions: Mapping[str, Dimension]) -> float:
    weighted = sum(d.weight * d.normalise(values[name]) for name, d in dimensions.items())
    return weighted / sum(d.weight for d in dimensions.values())
