"""A video autoencoder: the latents that all other stages work in.

The objective is the sum of four terms, of which each sees what the others overlook: the error of
pixels; that of their differences, which are edges and motion; that of small patches in frequencies,
each divided by its strength in real clips, without which fine detail hardly counts; and the size of
the latents. The decoder gets latents with noise, so that neighbours in latent space look alike: a
diffusion model never hits a latent exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.info import CODEC_STAGE, CodecInfo, SampleInfo
from apt.checkpoints.load import component_info
from apt.checkpoints.save import save_codec
from apt.checks import check_range
from apt.errors import ConfigError
from apt.methods.base import (
    Host,
    Metrics,
    MicroBatch,
    Outcome,
    Part,
    Preview,
    Stage,
    StageConfig,
    mean_logs,
)
from apt.metrics.detail import patch_frequencies
from apt.models.codec_causal import CausalCodec
from apt.rng import sample_noise

PATCH = 8
_SHOWN = 6


def pixel_error(pixels: Tensor, output: Tensor) -> Tensor:
    """Mean absolute difference of clips (B, 3, T, H, W)."""
    return (output - pixels).abs().mean()


def gradient_error(pixels: Tensor, output: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbours in time, height and width.

    The mean over the axes along which the clips (B, 3, T, H, W) have neighbours; 0 without any.
    """
    error = output - pixels
    axes = [axis for axis in (2, 3, 4) if error.shape[axis] > 1]
    if not axes:
        return error.sum() * 0
    return torch.stack([error.diff(dim=axis).abs().mean() for axis in axes]).mean()


def whitened_error(pixels: Tensor, output: Tensor, power: Tensor, floor: float = 0.05) -> Tensor:
    """Mean absolute error of the frequencies of patches, each in units of its strength.

    Args:
        pixels, output: clips (B, 3, T, H, W).
        power: (3 * 63,) mean squares of these frequencies in real clips; see `patch_frequencies`.
        floor: added to them in quadrature, so that what is too weak to be seen does not count.

    Clips that are smaller than a patch have no error.
    """
    if min(pixels.shape[3:]) < PATCH:
        return output.sum() * 0
    error = patch_frequencies(output - pixels, PATCH)
    return (error.abs() / (power + floor**2).sqrt()).mean()


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(StageConfig):
    """Training of a video autoencoder, whose latents the other stages work in.

    Which one is `model.codec`. A weight of 0 switches a term off.

    Attributes:
        latent_noise: standard deviation of the noise that the decoder gets with the latents, in
            units of theirs.
        pixel_weight: of the absolute error of pixels.
        gradient_weight: of the error of differences between neighbours.
        frequency_weight: of the error of patches in frequencies, each in units of its strength.
        latent_weight: of half the mean square of the raw latents, which noise makes grow.
        statistics_decay: of the running statistics of frequencies and latents.
    """

    exports_as: ClassVar[str] = CODEC_STAGE
    summary: ClassVar[str] = "a video autoencoder, whose latents a diffusion model works in"
    takes_latents: ClassVar[bool] = False
    reads_captions: ClassVar[bool] = False

    latent_noise: float = 0.05
    pixel_weight: float = 1.0
    gradient_weight: float = 1.0
    frequency_weight: float = 0.3
    latent_weight: float = 1e-3
    statistics_decay: float = 0.99

    def begin(self, host: Host) -> AutoencoderTraining:
        return AutoencoderTraining(self, host)

    def check(self) -> None:
        weights = ("pixel_weight", "gradient_weight", "frequency_weight", "latent_weight")
        not_negative = dict.fromkeys(("latent_noise", *weights), (0, math.inf))
        check_range(self, "stage.", not_negative)
        check_range(self, "stage.", {"statistics_decay": (0, 1)}, open_end=True)

    def check_adapters(self) -> None:
        raise ConfigError("a codec has no adapters; leave lora.rank at 0")


class AutoencoderTraining(Stage):
    """Trains a codec; its folder holds the codec alone, with the statistics of its latents.

    Raises:
        ConfigError: a codec that has nothing to train.
    """

    def __init__(self, config: AutoencoderConfig, host: Host) -> None:
        super().__init__(host)
        self.config = config
        self.architecture, codec = host.codec()
        if not isinstance(codec, CausalCodec):
            raise ConfigError(
                f"codec {self.architecture!r} is not one that is trained here; set --model.codec "
                "to digits_ae or video_ae"
            )
        self.codec_config = codec.config
        self.latent_shape = codec.latent_shape
        self.trained = {
            "generator": host.train(codec, (codec.encoder, codec.decoder), averaged=True)
        }
        # Of the raw latents by channel, and of patches by frequency.
        self.statistics = {
            "mean": torch.zeros(codec.channels, device=host.device),
            "square": torch.ones(codec.channels, device=host.device),
            "power": torch.ones(3 * (PATCH * PATCH - 1), device=host.device),
        }

    def parts(self) -> dict[str, Part]:
        return {"codec": self.codec_step}

    def codec_step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Minimise the error of reconstruction.

        Running statistics are those of whole batches, so nothing depends on how one is cut.
        """
        offset = (update % PATCH, update // PATCH % PATCH)
        moved = {}
        squares = [
            patch_frequencies(clips, PATCH).square().mean(dim=0)
            for clips in (_shifted(batch.x, offset) for batch in batches)
            if min(clips.shape[3:]) >= PATCH
        ]
        if squares:
            moved["power"] = self.running("power", squares, update)
        power = moved.get("power", self.statistics["power"])
        self.generator.zero_grad()
        terms: list[dict[str, Tensor]] = []
        means: list[Tensor] = []
        mean_squares: list[Tensor] = []
        for batch in self.generator.accumulated(batches):
            with self.host.autocast():
                output, raw = self.generator.module(
                    batch.x, self.noise(batch, update), self.noise_std()
                )
            found = self.terms(batch.x, output.float(), raw, power, offset)
            (torch.stack([*found.values()]).sum() / len(batches)).backward()
            terms.append(found)
            rows = raw.detach().transpose(0, 1).flatten(1).T
            means.append(rows.mean(dim=0))
            mean_squares.append(rows.square().mean(dim=0))
        moved["mean"] = self.running("mean", means, update)
        moved["square"] = self.running("square", mean_squares, update)
        norm = self.generator.step(update)
        for name, values in moved.items():
            self.statistics[name].copy_(values)
        logs = {f"codec/{name}": value for name, value in mean_logs(terms).items()}
        return {**logs, "generator/grad_norm": norm}

    def heldout(self, batch: MicroBatch) -> Metrics:
        """The terms of the loss, with the statistics so far, which stay as they are."""
        noise = self.noise(batch, 0, "heldout noise")
        with self.host.autocast():
            output, raw = self.generator.module(batch.x, noise, self.noise_std())
        found = self.terms(batch.x, output.float(), raw, self.statistics["power"])
        return {f"codec/{name}": value for name, value in found.items()}

    def terms(
        self,
        pixels: Tensor,
        output: Tensor,
        raw: Tensor,
        power: Tensor,
        offset: tuple[int, int] = (0, 0),
    ) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; patches are cut from `offset` on."""
        config = self.config
        frequencies = whitened_error(_shifted(pixels, offset), _shifted(output, offset), power)
        return {
            "pixels": config.pixel_weight * pixel_error(pixels, output),
            "gradients": config.gradient_weight * gradient_error(pixels, output),
            "frequencies": config.frequency_weight * frequencies,
            "latents": config.latent_weight * raw.square().mean() / 2,
        }

    def samples(
        self, prompts: tuple[str, ...], clip: SampleInfo, batches: Sequence[MicroBatch]
    ) -> Preview:
        """Clips of the batch, each beside its reconstruction from latents without noise."""
        clips, captions = batches[0].x[:_SHOWN], tuple(batches[0].captions[:_SHOWN])
        zeros = torch.zeros(1, device=clips.device)
        output, _ = self.generator.module(clips, zeros, zeros)
        pairs = torch.cat([clips, output.float()], dim=4)
        return Preview(pairs, captions, generated=False, shows="clip | reconstruction, frames")

    def extra_state(self) -> dict[str, Any]:
        return {"statistics": self.statistics}

    def save(self, folder: Path, outcome: Outcome) -> None:
        """Write the codec by itself."""
        codec = self.measured(outcome.weights)
        info = CodecInfo(
            codec=component_info(self.architecture, codec),
            sample=outcome.sample,
            training=outcome.training,
            summary=self.config.summary,
        )
        save_codec(folder, codec, info, dtype=outcome.dtype)

    def measured(self, weights: Mapping[str, Tensor]) -> CausalCodec:
        """A codec of these weights, with the statistics of latents so far."""
        mean, square = self.statistics["mean"].cpu(), self.statistics["square"].cpu()
        config = dataclasses.replace(
            self.codec_config,
            latents_mean=tuple(mean.tolist()),
            latents_std=tuple(_deviation(mean, square).tolist()),
        )
        codec = config.build()
        codec.load_state_dict(weights)
        return codec

    def noise(self, batch: MicroBatch, update: int, stream: str = "latent noise") -> Tensor:
        """Standard normal, in the shape of the batch's latents."""
        shape = (self.codec_config.channels, *self.latent_shape(*batch.x.shape[2:]))
        return sample_noise(len(batch), shape, self.draw(batch, update, stream))

    def noise_std(self) -> Tensor:
        """(C,) how much of it the decoder gets."""
        deviation = _deviation(self.statistics["mean"], self.statistics["square"])
        return self.config.latent_noise * deviation

    def running(self, name: str, parts: Sequence[Tensor], update: int) -> Tensor:
        """A statistic moved towards the mean of what all ranks measured, (K,) of a micro-batch."""
        decay = min(self.config.statistics_decay, update / (update + 1))
        found = self.host.over_ranks(torch.stack(list(parts)).mean(dim=0))
        return self.statistics[name].lerp(found, 1 - decay)


def _shifted(clips: Tensor, offset: tuple[int, int]) -> Tensor:
    """Clips without their first rows and columns, so that patches are not always the same.

    Clips that are hardly larger than a patch lose fewer.
    """
    y, x = (
        min(start, max(side - PATCH, 0))
        for start, side in zip(offset, clips.shape[3:], strict=True)
    )
    return clips[..., y:, x:]


def _deviation(mean: Tensor, square: Tensor) -> Tensor:
    return (square - mean.square()).clamp(min=1e-8).sqrt()
