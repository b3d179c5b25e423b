"""Monitor a run for the failures of adversarial training, and for latents of wrong variance.

The failures are those of APT Secs. 3.2-3.4, Sec. 5.1 and App. E.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from apt.errors import ConfigError, InputError
from apt.models.codecs import PatchifyConfig

__all__ = [
    "CollapseMonitor",
    "CollapseWarning",
    "LatentStatistics",
    "MonitorConfig",
    "TrainingStopped",
    "sample_statistics",
]

# Names of the trainer's metrics that are monitored here.
DISCRIMINATOR_LOSS = "discriminator/loss"
LOGIT_GAP = "discriminator/logit_gap"
INPUT_GRADIENT = "discriminator/input_gradient"
SAMPLE_CONTRAST = "samples/contrast"
SAMPLE_DIVERSITY = "samples/diversity"
RELATIVE_CONTRAST = "samples/relative_contrast"
RELATIVE_DIVERSITY = "samples/relative_diversity"


class TrainingStopped(InputError, RuntimeError):
    """The run stopped itself, to save time and keep the last good state."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What counts as a collapse, and what to do then.

    A check raises an alarm after several observations in a row beyond its limit, and another after
    every `repeat` further ones. A limit of 0 turns its check off.

    Attributes:
        action: `"warn"`, or `"stop"` to end the run with `TrainingStopped`.
        patience: number of updates in a row beyond a limit that raise an alarm.
        sample_patience: the same for samples, which are drawn far less often.
        repeat: observations after which a lasting condition is reported again.
        min_discriminator_loss: lower limit of the adversarial part of D's loss, without penalties.
            The non-saturating loss starts at 1.386.
        max_logit_gap: upper limit of the mean logit of real minus generated samples, while this gap
            is still growing.
        growth: factor by which the gap must exceed the one `patience` observations ago.
        min_input_gradient: lower limit of the norm of D's gradient at its input.
        min_contrast: lower limit of the standard deviation inside a sample, pixels in [-1, 1].
        min_diversity: lower limit of the standard deviation between samples at the same pixel, in
            [-1, 1].
        min_relative_contrast, min_relative_diversity: the same for the samples that D sees in every
            update, relative to those of real samples.
    """

    action: Literal["warn", "stop"] = "warn"
    patience: int = 20
    sample_patience: int = 1
    repeat: int = 200
    min_discriminator_loss: float = 0.05
    max_logit_gap: float = 8.0
    growth: float = 1.05
    min_input_gradient: float = 1e-6
    min_contrast: float = 0.02
    min_diversity: float = 0.02
    min_relative_contrast: float = 0.1
    min_relative_diversity: float = 0.1

    def __post_init__(self) -> None:
        if self.action not in ("warn", "stop"):
            raise ConfigError(f"monitor action {self.action!r} must be 'warn' or 'stop'.")
        for name in ("patience", "sample_patience", "repeat"):
            if getattr(self, name) < 1:
                raise ConfigError(f"monitor {name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class CollapseWarning:
    """An alarm: the check, the update, the observation, and advice."""

    check: str
    step: int
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"update {self.step}: {self.seen}. {self.advice}"


_ADVICE = {
    DISCRIMINATOR_LOSS: "The discriminator has won: raise the R1 weight or sigma, lower its "
    "learning rate, or use a larger batch.",
    LOGIT_GAP: "The discriminator is running away: raise the R1 weight or sigma, or lower its "
    "learning rate.",
    INPUT_GRADIENT: "The generator learns nothing from this discriminator: lower the R1 weight or "
    "sigma if D's loss is still high, raise them if it is near zero.",
    SAMPLE_CONTRAST: "The generator has collapsed to plain colour: go back to an earlier "
    "checkpoint, and raise the R1 weight or lower the learning rate.",
    SAMPLE_DIVERSITY: "The generator has collapsed to one picture: go back to an earlier "
    "checkpoint, and use a larger batch or raise the R1 weight.",
}
_ADVICE[RELATIVE_CONTRAST] = _ADVICE[SAMPLE_CONTRAST]
_ADVICE[RELATIVE_DIVERSITY] = _ADVICE[SAMPLE_DIVERSITY]


class CollapseMonitor:
    """Watches metrics, and raises alarms if a run is collapsing.

    Metrics may be missing in an observation, because samples, for example, are only drawn now and
    then. The state is not saved: after a resume, each check starts counting again.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self._gaps: deque[float] = deque(maxlen=config.patience + 1)
        self._streaks: dict[str, int] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[CollapseWarning]:
        """Check the metrics of an update, and return the alarms, usually none.

        Args:
            step: number of updates done.
            metrics: may hold `discriminator/loss`, `discriminator/logit_gap`,
                `discriminator/input_gradient`, `samples/contrast`, `samples/diversity`,
                `samples/relative_contrast`, `samples/relative_diversity`.

        Raises:
            TrainingStopped: there is an alarm and the action is `"stop"`.
        """
        alarms = [
            CollapseWarning(check, step, seen, _ADVICE[check])
            for check, seen in self._symptoms(metrics)
            if seen is not None and self._alarming(check)
        ]
        if alarms and self.config.action == "stop":
            raise TrainingStopped("training stopped: " + " ".join(map(str, alarms)))
        return alarms

    def _symptoms(self, metrics: Mapping[str, float]) -> list[tuple[str, str | None]]:
        """Return name and symptom of every check that has a metric; None if all is well."""
        c = self.config
        lower_limits = {
            DISCRIMINATOR_LOSS: (c.min_discriminator_loss, "the discriminator's loss is"),
            INPUT_GRADIENT: (c.min_input_gradient, "the gradient at the discriminator's input is"),
            SAMPLE_CONTRAST: (c.min_contrast, "the contrast inside the samples is"),
            SAMPLE_DIVERSITY: (c.min_diversity, "the difference between the samples is"),
            RELATIVE_CONTRAST: (
                c.min_relative_contrast,
                "the contrast inside the samples, relative to real ones, is",
            ),
            RELATIVE_DIVERSITY: (
                c.min_relative_diversity,
                "the difference between the samples, relative to real ones, is",
            ),
        }
        found: list[tuple[str, str | None]] = []
        for check, (limit, text) in lower_limits.items():
            if check in metrics and limit > 0:
                low = metrics[check] < limit
                seen = f"{text} {metrics[check]:.3g}, below {limit:g}"
                found.append((check, seen if low else None))
        if LOGIT_GAP in metrics and c.max_logit_gap > 0:
            gap = metrics[LOGIT_GAP]
            self._gaps.append(gap)
            grows = len(self._gaps) > c.patience and gap > c.growth * self._gaps[0]
            text = f"the logit gap between real and generated samples has grown to {gap:.3g}"
            found.append((LOGIT_GAP, text if gap > c.max_logit_gap and grows else None))
        for check, symptom in found:
            self._streaks[check] = self._streaks.get(check, 0) + 1 if symptom is not None else 0
        return found

    def _alarming(self, check: str) -> bool:
        of_samples = check in (SAMPLE_CONTRAST, SAMPLE_DIVERSITY)
        patience = self.config.sample_patience if of_samples else self.config.patience
        beyond = self._streaks[check] - patience
        return beyond >= 0 and beyond % self.config.repeat == 0


def sample_statistics(pixels: Tensor) -> dict[str, float]:
    """Measure contrast and diversity of samples, which are low after a collapse.

    Args:
        pixels: (B, 3, T, H, W) in [-1, 1].

    Returns:
        `samples/contrast`: standard deviation over the positions of a sample, averaged over samples
        and colours; 0 for plain colour. `samples/diversity`: standard deviation over the batch at a
        position, averaged over positions; 0 for identical samples, absent for a single one.
    """
    pixels = pixels.detach().to(torch.float32)
    statistics = {SAMPLE_CONTRAST: pixels.flatten(2).std(dim=2, correction=0).mean().item()}
    if len(pixels) > 1:
        statistics[SAMPLE_DIVERSITY] = pixels.std(dim=0, correction=0).mean().item()
    return statistics


NUM_CLIPS = 16
# Beyond these limits, timesteps correspond to other amounts of noise than recipes were made for.
_PIXEL_SHIFT, _PIXEL_SCALE, _LATENT_SCALE = 0.5, 1.5, 2.0


class LatentStatistics:
    """Checks on the first clips of a run whether a codec's statistics fit the data.

    The config of the lossless codec has the mean and standard deviation of the pixels that it was
    fitted to, and these are compared. For other codecs, the root mean square of the latents is
    checked.

    Args:
        codec_config: config of the codec, or of the one that made a cache.
        chosen: whether the run chose the codec, rather than the model that it starts from.
    """

    def __init__(self, codec_config: Any, *, chosen: bool) -> None:
        self._codec = codec_config
        self._chosen = chosen
        self._clips = 0
        self._judged = False
        self._values = 0
        self._sum = 0.0
        self._squares = 0.0
        self._of_pixels: bool | None = None

    def observe(self, pixels: Tensor | None, latents: Tensor) -> str | None:
        """Add some clips; once there are enough, return what is wrong with them, if anything.

        Args:
            pixels: (b, 3, T, H, W), None in a run on a latent cache.
            latents: (b, C, T', H', W').
        """
        if self._judged:
            return None
        self._of_pixels = pixels is not None and isinstance(self._codec, PatchifyConfig)
        values = (pixels if self._of_pixels and pixels is not None else latents).double()
        self._clips += len(latents)
        self._values += values.numel()
        self._sum += values.sum().item()
        self._squares += values.square().sum().item()
        return self.verdict() if self._clips >= NUM_CLIPS else None

    def verdict(self) -> str | None:
        """Return what is wrong with the clips so far, once; for the end of a short run."""
        if self._judged or not self._clips:
            return None
        self._judged = True
        mean, square = self._sum / self._values, self._squares / self._values
        if not self._of_pixels:
            return self._of_latents(math.sqrt(square))
        codec, std = self._codec, math.sqrt(max(square - mean**2, 0.0))
        fits = abs(mean - codec.mean) <= _PIXEL_SHIFT * codec.std
        if fits and codec.std / _PIXEL_SCALE <= std <= codec.std * _PIXEL_SCALE:
            return None
        return (
            f"the codec's statistics do not fit the data: it expects pixels with mean "
            f"{codec.mean:g} and standard deviation {codec.std:g}, but the first clips "
            f"({self._clips}) have {mean:.2f} and {std:.2f}. {self._remedy(mean, std)}"
        )

    def _of_latents(self, size: float) -> str | None:
        if 1 / _LATENT_SCALE <= size <= _LATENT_SCALE:
            return None
        return (
            f"the codec's statistics do not fit the data: latents of the first clips "
            f"({self._clips}) have a root mean square of {size:.2f} instead of 1, so timesteps "
            "correspond to other amounts of noise than the recipe was made for"
        )

    def _remedy(self, mean: float, std: float) -> str:
        if not self._chosen:
            return (
                "This stage keeps the codec of the model that it starts from: expect lower "
                "quality, or pre-train on this data"
            )
        return f"Start again with mean {mean:.2f} and std {std:.2f} in --model.codec-options"
