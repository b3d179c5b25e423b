from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt.data.digits import MovingDigits
from apt.errors import ConfigError
from apt.models.codecs import PatchifyCodec, PatchifyConfig
from apt.train.monitor import (
    NUM_CLIPS,
    CollapseMonitor,
    LatentStatistics,
    MonitorConfig,
    TrainingStopped,
    sample_statistics,
)

HEALTHY = {
    "discriminator/loss": 1.2,
    "discriminator/logit_gap": 0.4,
    "discriminator/input_gradient": 0.3,
    "samples/contrast": 0.4,
    "samples/diversity": 0.3,
    "samples/relative_contrast": 0.9,
    "samples/relative_diversity": 0.9,
}
BAD = {
    "discriminator/loss": 0.001,
    "discriminator/input_gradient": 1e-9,
    "samples/contrast": 0.0,
    "samples/diversity": 0.0,
    "samples/relative_contrast": 0.01,
    "samples/relative_diversity": 0.01,
}


def run(config: MonitorConfig, observations: list[dict[str, float]]) -> list:
    monitor = CollapseMonitor(config)
    return [w for i, seen in enumerate(observations, start=1) for w in monitor.observe(i, seen)]


def test_a_healthy_run_is_left_alone():
    assert run(MonitorConfig(patience=2), [HEALTHY] * 50) == []
    assert run(MonitorConfig(patience=2), [{}] * 50) == []


@pytest.mark.parametrize("check", BAD)
def test_each_low_value_alarms_after_patience_and_says_what_to_try(check: str):
    observations = [HEALTHY | {check: BAD[check]}] * 10
    (warning,) = run(MonitorConfig(patience=4, sample_patience=4), observations)
    assert (warning.check, warning.step) == (check, 4)
    text = str(warning)
    assert "update 4" in text and f"{BAD[check]:.3g}" in text
    assert any(word in text for word in ("R1", "learning rate"))


def test_a_recovery_starts_the_count_again():
    bad = HEALTHY | {"discriminator/loss": 0.0}
    assert run(MonitorConfig(patience=4), [bad] * 3 + [HEALTHY] + [bad] * 3) == []


def test_observations_without_the_metric_do_not_count():
    bad = {"samples/contrast": 0.0}
    warnings = run(MonitorConfig(sample_patience=2), [bad, {}, {}, bad])
    assert [w.step for w in warnings] == [4]


def test_bad_samples_alarm_at_once():
    warnings = run(MonitorConfig(), [HEALTHY, HEALTHY | {"samples/diversity": 0.0}])
    assert [(w.check, w.step) for w in warnings] == [("samples/diversity", 2)]


def test_a_lasting_condition_is_repeated_now_and_then():
    bad = HEALTHY | {"discriminator/loss": 0.0}
    warnings = run(MonitorConfig(patience=2, repeat=5), [bad] * 14)
    assert [w.step for w in warnings] == [2, 7, 12]


def test_a_growing_logit_gap_alarms_and_a_steady_or_small_one_does_not():
    config = MonitorConfig(patience=3, max_logit_gap=5.0)
    gap = "discriminator/logit_gap"
    (warning,) = run(config, [{gap: float(step)} for step in range(1, 12)])
    assert warning.check == gap and warning.step == 8 and "8" in warning.seen
    assert run(config, [{gap: 9.0}] * 30) == []
    assert run(config, [{gap: 0.1 * step} for step in range(1, 30)]) == []


def test_a_limit_of_zero_switches_a_check_off():
    config = MonitorConfig(
        patience=1,
        min_discriminator_loss=0.0,
        max_logit_gap=0.0,
        min_input_gradient=0.0,
        min_contrast=0.0,
        min_diversity=0.0,
        min_relative_contrast=0.0,
        min_relative_diversity=0.0,
    )
    assert run(config, [BAD | {"discriminator/logit_gap": 10.0**i} for i in range(9)]) == []


def test_stop_ends_the_run_with_all_reasons():
    monitor = CollapseMonitor(MonitorConfig(action="stop", patience=1))
    with pytest.raises(TrainingStopped, match=r"plain colour.*one picture"):
        monitor.observe(1, BAD)


def test_a_wrong_configuration_is_refused():
    with pytest.raises(ConfigError, match="'explode'"):
        MonitorConfig(action="explode")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        MonitorConfig(sample_patience=0)


def test_sample_statistics():
    noise = torch.randn(4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    healthy = sample_statistics(noise)
    assert 0.9 < healthy["samples/contrast"] < 1.1 and 0.6 < healthy["samples/diversity"] < 1.1
    same = sample_statistics(noise[:1].expand(4, -1, -1, -1, -1))
    assert same["samples/diversity"] == pytest.approx(0.0, abs=1e-6)
    assert same["samples/contrast"] > 0.9
    plain = sample_statistics(torch.randn(4, 3, 1, 1, 1).expand(-1, -1, 2, 8, 8))
    assert plain["samples/contrast"] == pytest.approx(0.0, abs=1e-6)
    assert plain["samples/diversity"] > 0.1
    assert sample_statistics(noise[:1]).keys() == {"samples/contrast"}


FITTED = PatchifyConfig(lapped=True, mean=-0.49, std=0.42)  # to the digits


def seen(codec: PatchifyConfig, pixels: Tensor, *, chosen: bool = True) -> list[str]:
    """The messages about clips that come four at a time."""
    statistics, built = LatentStatistics(codec, chosen=chosen), PatchifyCodec(codec)
    notes = [statistics.observe(part, built.encode(part)) for part in pixels.split(4)]
    return [note for note in notes if note is not None]


def test_a_short_run_is_judged_at_its_end() -> None:
    statistics, built = LatentStatistics(FITTED, chosen=True), PatchifyCodec(FITTED)
    assert statistics.verdict() is None
    few = clips(0.0, 0.42)[:3]
    assert statistics.observe(few, built.encode(few)) is None
    assert "the first clips (3)" in (statistics.verdict() or "")
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
    assert f"the first clips ({NUM_CLIPS}) have {mean + 0.0:.2f} and {std:.2f}" in said.replace(
        "-0.00", "0.00"
    )
    assert "--model.codec-options" in said
    (said,) = seen(codec, clips(mean, std), chosen=False)
    assert "--model.codec-options" not in said and "keeps the codec" in said


@pytest.mark.parametrize(("scale", "says"), [(1.0, False), (0.7, False), (0.3, True), (3.0, True)])
def test_for_other_codecs_the_size_of_latents_is_checked(scale: float, says: bool) -> None:
    statistics = LatentStatistics(object(), chosen=False)
    latents = scale * torch.randn(NUM_CLIPS, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (statistics.observe(None, latents) is not None) is says
