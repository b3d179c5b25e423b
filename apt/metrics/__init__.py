"""Metrics: Fréchet distances, detail, diversity, preference and VBench scores."""

from __future__ import annotations

from apt.metrics.detail import (
    PatchFrechet,
    PowerSpectrum,
    SpectrumDistance,
    power_spectrum,
    spectrum_distance,
)
from apt.metrics.diversity import Diversity, pairwise_diversity
from apt.metrics.frechet import GaussianStatistics, frechet_distance, gaussian_statistics
from apt.metrics.preference import preference_score, relative_preference_score
from apt.metrics.vbench import VBenchScores, total_score, vbench_scores

__all__ = [
    "Diversity",
    "GaussianStatistics",
    "PatchFrechet",
    "PowerSpectrum",
    "SpectrumDistance",
    "VBenchScores",
    "frechet_distance",
    "gaussian_statistics",
    "pairwise_diversity",
    "power_spectrum",
    "preference_score",
    "relative_preference_score",
    "spectrum_distance",
    "total_score",
    "vbench_scores",
]
