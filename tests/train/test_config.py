from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from apt.errors import ConfigError
from apt.train.config import (
    AdversarialConfig,
    DataConfig,
    DistillConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)

CONFIGS = (
    AdversarialConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"name": "run", "run_dir": "runs/run", "stage": PretrainConfig(), **changes}
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_are_frozen_and_keyword_only(kind: Any) -> None:
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_is_explained(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        assert field.name in (kind.__doc__ or ""), f"{kind.__name__}.{field.name}"


def test_defaults_are_the_papers_where_it_says_them() -> None:
    stage, optimizer = AdversarialConfig(), OptimizerConfig()
    assert (stage.objective, stage.head, stage.layers) == ("non_saturating", "attention", ())
    assert (stage.r1_weight, stage.r1_normalize, stage.r1_fraction) == (100.0, None, 1.0)
    assert not stage.freeze_discriminator_backbone
    extras = ("r2", "exact_r1", "logit_centring", "feature_matching", "mismatched")
    assert all(getattr(stage, f"{name}_weight") == 0 for name in extras)
    assert (optimizer.name, optimizer.alpha) == ("rmsprop", 0.9)
    assert (optimizer.weight_decay, optimizer.max_grad_norm, optimizer.warmup_updates) == (0, 0, 0)
    assert DistillConfig().cfg_scale == PretrainConfig().cfg_scale == 7.5
    assert config().ema_decay == 0.995


def test_configs_do_not_share_what_can_be_changed() -> None:
    one, other = config(), config()
    one.model.options["depth"] = 3
    assert other.model.options == {}


def test_a_config_is_json() -> None:
    tree = dataclasses.asdict(config(stage=AdversarialConfig(layers=(1, 2))))
    assert json.loads(json.dumps(tree))["stage"]["layers"] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_updates": 0}, "num_updates must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"micro_batch_size": -1}, "micro_batch_size must not be negative"),
        ({"sample_every": -1}, "sample_every must not be negative"),
        ({"optimizer": OptimizerConfig(learning_rate=0.0)}, "learning_rate must be positive"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\], got 1.5"),
        ({"caption_dropout": -0.1}, r"caption_dropout must be in \[0, 1\]"),
    ],
)
def test_pretraining_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(**changes)


def test_blocks_or_adapters() -> None:
    stage = AdversarialConfig(generator_trains="blocks")
    with pytest.raises(ConfigError, match=r"set stage\.generator_trains to all"):
        TrainConfig(name="x", run_dir="x", stage=stage, lora=LoRAConfig(rank=4))
