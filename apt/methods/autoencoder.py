"""Training of the video autoencoder whose latents all other stages use.

The objective is the sum of four terms: the error of pixels; the error of differences between
neighbouring pixels, which covers edges and motion; the error of the frequencies of small patches,
each divided by its strength in real clips, because fine detail has little energy; and the size of
the latents. Noise is added to the latents that the decoder gets, so that similar latents decode to
similar clips: a diffusion model never generates a latent exactly.
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
    """Return the mean absolute difference of clips (B, 3, T, H, W)."""
    return (output - pixels).abs().mean()


def gradient_error(pixels: Tensor, output: Tensor) -> Tensor:
    """Return the mean absolute error of differences between neighbours in time, height and width.

    This is the mean over the axes of the clips (B, 3, T, H, W) that are longer than 1, or 0 if
    there are none.
    """
    error = output - pixels
    axes = [axis for axis in (2, 3, 4) if error.shape[axis] > 1]
    if not axes:
        return error.sum() * 0
    return torch.stack([error.diff(dim=axis).abs().mean() for axis in axes]).mean()


def whitened_error(pixels: Tensor, output: Tensor, power: Tensor, floor: float = 0.05) -> Tensor:
    """Return the mean absolute error of patch frequencies, each divided by its strength.

    Clips that are smaller than a patch give 0.

    Args:
        pixels, output: clips (B, 3, T, H, W).
        power: (3 * 63,) mean squares of the frequencies in real clips; see `patch_frequencies`.
        floor: added to the strengths in quadrature, so that invisible detail does not count.
    """
    if min(pixels.shape[3:]) < PATCH:
        return output.sum() * 0
    error = patch_frequencies(output - pixels, PATCH)
    return (error.abs() / (power + floor**2).sqrt()).mean()


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(StageConfig):
    """Training of the video autoencoder that `model.codec` names.

    A weight of 0 turns a term off.

    Attributes:
        latent_noise: standard deviation of the noise added to the decoder's latents, relative to
            that of the latents.
        pixel_weight: weight of the absolute error of pixels.
        gradient_weight: weight of the error of differences between neighbouring pixels.
        frequency_weight: weight of the error of patch frequencies, each relative to its strength.
        latent_weight: weight of half the mean square of the raw latents, which would otherwise grow
            to drown out the noise.
        statistics_decay: decay of the running statistics of frequencies and latents.
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
    """Trains a codec, and exports it with the statistics of its latents.

    Raises:
        ConfigError: for a codec that cannot be trained.
    """

    def __init__(self, config: AutoencoderConfig, host: Host) -> None:
        super().__init__(host)
        self.config = config
        self.architecture, codec = host.codec()
        if not isinstance(codec, CausalCodec):
            raise ConfigError(
                f"codec {self.architecture!r} cannot be trained; set --model.codec to digits_ae "
                "or video_ae"
            )
        self.codec_config = codec.config
        self.latent_shape = codec.latent_shape
        self.trained = {
            "generator": host.train(codec, (codec.encoder, codec.decoder), averaged=True)
        }
        # Of raw latents per channel, and of patches per frequency.
        self.statistics = {
            "mean": torch.zeros(codec.channels, device=host.device),
            "square": torch.ones(codec.channels, device=host.device),
            "power": torch.ones(3 * (PATCH * PATCH - 1), device=host.device),
        }

    def parts(self) -> dict[str, Part]:
        return {"codec": self.codec_step}

    def codec_step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Minimise the reconstruction error.

        Running statistics use the whole batch, so results do not depend on the micro-batch size.
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
        """Return the terms of the loss with the current statistics, which it does not change."""
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
        """Return the weighted terms of the loss by name; the patch grid starts at `offset`."""
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
        """Return clips of the batch, each beside its reconstruction without latent noise."""
        clips, captions = batches[0].x[:_SHOWN], tuple(batches[0].captions[:_SHOWN])
        zeros = torch.zeros(1, device=clips.device)
        output, _ = self.generator.module(clips, zeros, zeros)
        return Preview(torch.cat([clips, output.float()], dim=4), captions, generated=False)

    def extra_state(self) -> dict[str, Any]:
        return {"statistics": self.statistics}

    def save(self, folder: Path, outcome: Outcome) -> None:
        """Write the codec to a folder."""
        codec = self.measured(outcome.weights)
        info = CodecInfo(
            codec=component_info(self.architecture, codec),
            sample=outcome.sample,
            training=outcome.training,
            summary=self.config.summary,
        )
        save_codec(folder, codec, info, dtype=outcome.dtype)

    def measured(self, weights: Mapping[str, Tensor]) -> CausalCodec:
        """Return a codec with these weights and the current statistics of the latents."""
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
        """Return standard normal noise in the shape of the batch's latents."""
        shape = (self.codec_config.channels, *self.latent_shape(*batch.x.shape[2:]))
        return sample_noise(len(batch), shape, self.draw(batch, update, stream))

    def noise_std(self) -> Tensor:
        """Return the standard deviation (C,) of the decoder's noise per channel."""
        deviation = _deviation(self.statistics["mean"], self.statistics["square"])
        return self.config.latent_noise * deviation

    def running(self, name: str, parts: Sequence[Tensor], update: int) -> Tensor:
        """Return a statistic (K,), moved towards the mean over all ranks' micro-batches."""
        decay = min(self.config.statistics_decay, update / (update + 1))
        found = self.host.over_ranks(torch.stack(list(parts)).mean(dim=0))
        return self.statistics[name].lerp(found, 1 - decay)


def _shifted(clips: Tensor, offset: tuple[int, int]) -> Tensor:
    """Crop the first rows and columns of clips, so that patches vary from update to update.

    At least one patch remains.
    """
    y, x = (
        min(start, max(side - PATCH, 0))
        for start, side in zip(offset, clips.shape[3:], strict=True)
    )
    return clips[..., y:, x:]


def _deviation(mean: Tensor, square: Tensor) -> Tensor:
    return (square - mean.square()).clamp(min=1e-8).sqrt()
