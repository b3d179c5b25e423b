from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from apt.checkpoints.bundle import save_bundle
from apt.checkpoints.info import SampleInfo
from apt.errors import ConfigError
from apt.methods import AdversarialConfig, DistillConfig, MethodConfig, PretrainConfig
from apt.train.config import DataConfig, OptimizerConfig, TrainConfig
from apt.train.config_file import plain
from apt.train.recipes import RECIPES, list_recipes
from apt.train.resolve import advice, prompt_check, resolve
from tests.train.tiny_methods import random_bundle

TEACHER = SampleInfo(frames=17, height=64, width=96, fps=16.0)
STAGES = (DistillConfig(teacher="t"), AdversarialConfig(generator="g", discriminator="d"))


def config(stage: MethodConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(name="x", run_dir="x", stage=stage, **changes)


@pytest.mark.parametrize("stage", STAGES)
def test_size_and_rate_are_those_of_the_model_that_a_stage_starts_from(stage: MethodConfig) -> None:
    assert resolve(config(stage), TEACHER).data.clip == TEACHER
    some = resolve(config(stage, data=DataConfig(height=32, fps=0.0)), TEACHER)
    assert some.data.clip == dataclasses.replace(TEACHER, height=32, fps=0.0)
    stills = resolve(config(stage, data=DataConfig(images="only")), TEACHER)
    assert stills.data.clip == dataclasses.replace(TEACHER, frames=1)


def test_pretraining_has_the_digits_size_unless_it_says_another() -> None:
    assert resolve(config(PretrainConfig()), None).data.clip == SampleInfo(
        frames=9, height=32, width=32, fps=8.0
    )


def test_a_stage_at_another_size_than_its_model_says_so() -> None:
    same = resolve(config(STAGES[0]), TEACHER)
    assert not [text for text in advice(same, TEACHER) if "frames of" in text]
    other = resolve(config(STAGES[0], data=DataConfig(height=32, width=32)), TEACHER)
    (said,) = [text for text in advice(other, TEACHER) if "frames of" in text]
    assert "17 frames of 64x96 at 16 fps" in said and "17 frames of 32x32 at 16 fps" in said


@pytest.mark.parametrize(
    ("stage", "decay", "updates", "warm"),
    [
        (PretrainConfig(), 0.999, 200, True),
        (PretrainConfig(), 0.999, 22_000, False),
        (PretrainConfig(), 0.5, 6, False),
        (STAGES[0], 0.999, 200, False),
    ],
)
def test_short_pretraining_warms_its_average_up(
    stage: MethodConfig, decay: float, updates: int, warm: bool
) -> None:
    settings = config(stage, ema_decay=decay, num_updates=updates)
    assert resolve(settings, TEACHER).ema_warmup is warm
    asked = dataclasses.replace(settings, ema_warmup=not warm)
    assert resolve(asked, TEACHER).ema_warmup is not warm


def test_a_resumed_run_keeps_the_average_that_it_began_with() -> None:
    short = config(PretrainConfig(), num_updates=10)
    begun = resolve(short, None)
    longer = dataclasses.replace(short, num_updates=100_000)
    assert resolve(longer, None, plain(begun)).ema_warmup is True
    old = {key: value for key, value in plain(begun).items() if key != "ema_warmup"}
    assert resolve(short, None, old).ema_warmup is False


def test_an_average_of_what_the_run_started_from_is_pointed_out() -> None:
    def said(**changes: Any) -> list[str]:
        return [text for text in advice(resolve(config(STAGES[0], **changes), None), None)]

    (text,) = said(ema_decay=0.99, num_updates=200)
    assert text.startswith("13% of the exported average") and "--ema-decay 0.985" in text
    assert said(ema_decay=0.985, num_updates=200) == []
    assert said(ema_decay=0.999, num_updates=200, ema_warmup=True) == []


@pytest.mark.parametrize(("warmup", "decay", "says"), [(30, 80, False), (30, 171, True)])
def test_a_rate_that_is_never_reached_is_pointed_out(warmup: int, decay: int, says: bool) -> None:
    optimizer = OptimizerConfig(warmup_updates=warmup, decay_updates=decay)
    settings = config(STAGES[0], num_updates=200, ema_decay=0.5, optimizer=optimizer)
    assert bool(advice(resolve(settings, None), None)) is says


def test_a_decay_longer_than_the_run_names_the_value_to_set() -> None:
    with pytest.raises(ConfigError, match=r"--optimizer\.decay-updates to at most 200 \(0 "):
        config(STAGES[0], num_updates=200, optimizer=OptimizerConfig(decay_updates=201))


def test_averages_of_shipped_pretraining_are_what_they_were() -> None:
    for name in list_recipes():
        made = RECIPES.get(name)()
        for one in [made] if isinstance(made, TrainConfig) else made:
            if isinstance(one.stage, PretrainConfig):
                assert resolve(one, None).ema_warmup is False, one.name


def test_captions_are_checked_by_the_encoder_that_will_read_them(tmp_path: Path) -> None:
    save_bundle(tmp_path / "model", random_bundle())
    for stage in (PretrainConfig(), DistillConfig(teacher=str(tmp_path / "model"))):
        check = prompt_check(config(stage))
        assert check is not None
        check(["a short one", ""])
        with pytest.raises(ValueError, match="65 words, at most 64"):
            check(["word " * 65])
