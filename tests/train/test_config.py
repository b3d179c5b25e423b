from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from apt.errors import ConfigError
from apt.methods import AdversarialConfig, DistillConfig, PretrainConfig
from apt.train.config import DataConfig, LoRAConfig, ModelConfig, OptimizerConfig, TrainConfig
from apt.train.monitor import MonitorConfig

NAN = float("nan")
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
    assert (stage.r1.weight, stage.r1.normalize, stage.r1.fraction) == (100.0, None, 1.0)
    assert not stage.freeze_discriminator_backbone
    extras = [getattr(stage.terms, field.name) for field in dataclasses.fields(stage.terms)]
    assert len(extras) == 5 and all(extra.weight == 0 for extra in extras)
    assert (optimizer.name, optimizer.alpha) == ("rmsprop", 0.9)
    assert (optimizer.weight_decay, optimizer.max_grad_norm, optimizer.warmup_updates) == (0, 0, 0)
    assert DistillConfig().loss.cfg_scale == PretrainConfig().cfg_scale == 7.5
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
        (
            {"optimizer": OptimizerConfig(learning_rate=NAN)},
            r"optimizer\.learning_rate must be a f",
        ),
        ({"optimizer": OptimizerConfig(weight_decay=0.1)}, r"weight_decay 0\.1 is for adamw only"),
        ({"optimizer": OptimizerConfig(betas=(0.9, 1.0))}, r"betas must be at least 0 and below 1"),
        (
            {"optimizer": OptimizerConfig(betas=(-0.1, 0.9))},
            r"betas must be at least 0, got|below 1",
        ),
        ({"optimizer": OptimizerConfig(alpha=1.5)}, r"alpha must be at least 0 and below 1"),
        ({"optimizer": OptimizerConfig(eps=-1e-8)}, "eps must be at least 0"),
        ({"optimizer": OptimizerConfig(weight_decay=-1.0)}, "weight_decay must be at least 0"),
        ({"optimizer": OptimizerConfig(max_grad_norm=-1.0)}, "max_grad_norm must be at least 0"),
        ({"optimizer": OptimizerConfig(warmup_updates=-1)}, "warmup_updates must be at least 0"),
        (
            {"optimizer": OptimizerConfig(decay_updates=1001)},
            "decay_updates 1001 exceeds num_updates 1000",
        ),
        ({"ema_decay": NAN}, "ema_decay must be a finite number"),
        ({"ema_decay": 1.1}, r"ema_decay must be in \[0, 1\]"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"stage": PretrainConfig(timestep_shift=0.0)}, r"stage\.timestep_shift must be positive"),
        ({"stage": DistillConfig(target_decay=1.5)}, r"stage\.target_decay must be in \[0, 1\]"),
        (
            {"stage": AdversarialConfig(timestep_shift=math.inf)},
            r"stage\.timestep_shift must be a finite",
        ),
        ({"data": DataConfig(height=0)}, r"data\.height must be at least 1"),
        ({"data": DataConfig(fps=NAN)}, r"data\.fps must be a finite number"),
        ({"monitor": MonitorConfig(max_logit_gap=NAN)}, r"monitor\.max_logit_gap must be a finite"),
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
