from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apt.data.digits import MovingDigits
from apt.methods import DistillConfig, MethodConfig, PretrainConfig
from apt.models.codecs import PatchifyCodec, PatchifyConfig
from apt.train.config import TrainConfig
from apt.train.latent_statistics import NUM_CLIPS, LatentStatistics

FITTED = PatchifyConfig(lapped=True, mean=-0.49, std=0.42)  # to the digits


def seen(codec: PatchifyConfig, pixels: Tensor, *, stage: MethodConfig | None = None) -> list[str]:
    """What is said of clips that come four at a time."""
    config = TrainConfig(name="x", run_dir="x", stage=stage or PretrainConfig())
    statistics, built = LatentStatistics(codec, config), PatchifyCodec(codec)
    notes = [statistics.observe(part, built.encode(part)) for part in pixels.split(4)]
    return [note for note in notes if note is not None]


def test_a_short_run_is_judged_at_its_end() -> None:
    config = TrainConfig(name="x", run_dir="x", stage=PretrainConfig())
    statistics, built = LatentStatistics(FITTED, config), PatchifyCodec(FITTED)
    assert statistics.verdict() is None
    few = clips(0.0, 0.42)[:3]
    assert statistics.observe(few, built.encode(few)) is None
    assert "the first 3 clips" in (statistics.verdict() or "")
    assert statistics.verdict() is None


def clips(mean: float, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return mean + std * torch.randn(2 * NUM_CLIPS, 3, 5, 16, 16, generator=generator)


def test_the_digits_fit_the_codec_that_is_fitted_to_them() -> None:
    digits = MovingDigits(0)
    assert seen(FITTED, torch.stack([digits[i].pixels for i in range(NUM_CLIPS)])) == []


@pytest.mark.parametrize("lapped", [True, False])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.42), (-0.49, 0.2), (-0.49, 0.9)])
def test_other_data_are_told_once_with_the_values_to_set(
    lapped: bool, mean: float, std: float
) -> None:
    codec = PatchifyConfig(lapped=lapped, mean=-0.49, std=0.42)
    (said,) = seen(codec, clips(mean, std))
    assert f"the first {NUM_CLIPS} clips have {mean + 0.0:.2f} and {std:.2f}" in said.replace(
        "-0.00", "0.00"
    )
    assert "--model.codec-options" in said
    (said,) = seen(codec, clips(mean, std), stage=DistillConfig(teacher="t"))
    assert "--model.codec-options" not in said and "keeps the codec" in said


@pytest.mark.parametrize(("scale", "says"), [(1.0, False), (0.7, False), (0.3, True), (3.0, True)])
def test_of_other_codecs_the_size_of_latents_is_looked_at(scale: float, says: bool) -> None:
    config: Any = TrainConfig(name="x", run_dir="x", stage=DistillConfig(teacher="t"))
    statistics = LatentStatistics(object(), config)
    latents = scale * torch.randn(NUM_CLIPS, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (statistics.observe(None, latents) is not None) is says
