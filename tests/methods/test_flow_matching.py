from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from apt.condition import Condition
from apt.errors import ConfigError
from apt.flow import shift_timesteps
from apt.methods.base import MicroBatch
from apt.methods.flow_matching import FlowMatchingPretraining, PretrainConfig
from apt.rng import Draw, sample_noise, sample_uniform
from apt.train.config import ModelConfig, OptimizerConfig
from apt.train.initial import initial_bundle
from tests.train.tiny_methods import (
    CAPTIONS,
    FROZEN,
    LATENT_SHAPE,
    TINY_MODEL,
    assert_same_gradients,
    build,
    floats,
    gradients,
    micro_batches,
    pretrain,
    train_config,
    unchanged,
    weights,
)

UPDATE, FIRST = 5, 8


def draw(stage: FlowMatchingPretraining, num: int) -> Tensor:
    """Timesteps of one large batch."""
    batch = MicroBatch(x=torch.zeros(num, 1), captions=[""] * num, offset=0)
    return stage.timesteps(batch, 0)


def test_it_minimises_flow_matching_with_the_text_encoder() -> None:
    options = PretrainConfig(timestep_shift=3.0, caption_dropout=0.0)
    stage = pretrain(method=options, optimizer=FROZEN)
    module: Any = stage.generator.module
    metrics = stage.update(micro_batches(first=FIRST), UPDATE)
    ours = gradients(module)

    draw = Draw(0, UPDATE, FIRST)
    x = micro_batches()[0].x
    z = sample_noise(len(CAPTIONS), LATENT_SHAPE, draw.named("noise"))
    t = shift_timesteps(sample_uniform(len(CAPTIONS), draw.named("timestep")), 3.0)
    t_ = t.view(-1, 1, 1, 1, 1)
    c = Condition(module.text_encoder(CAPTIONS))
    predicted = module.backbone((1 - t_) * x + t_ * z, t, c)
    loss = (predicted - (z - x)).square().mean()
    module.zero_grad()
    loss.backward()
    assert metrics["generator/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_gradients(ours, gradients(module))
    assert any(name.startswith("text_encoder.") for name in ours)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_equals_the_whole_batch(size: int) -> None:
    results = []
    for part in (len(CAPTIONS), size):
        stage = pretrain(optimizer=FROZEN)
        metrics = stage.update(micro_batches(part), 0)
        results.append((floats(metrics), gradients(stage.generator.module)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert_same_gradients(results[0][1], results[1][1])


def test_captions_are_dropped_at_the_rate_asked_for() -> None:
    captions = [f"caption {i}" for i in range(2000)]
    batch = MicroBatch(x=torch.zeros(2000, 1), captions=captions, offset=0)
    for rate in (0.0, 0.1, 1.0):
        stage = pretrain(method=PretrainConfig(caption_dropout=rate), negative_prompt="bad")
        seen = stage.captions(batch, 0)
        dropped = [new == "bad" for new in seen]
        assert all(
            drop or new == old for drop, new, old in zip(dropped, seen, captions, strict=True)
        )
        assert sum(dropped) / 2000 == pytest.approx(rate, abs=0.02)
    # Whether a caption is dropped has nothing to do with its timestep.
    stage = pretrain(method=PretrainConfig(caption_dropout=0.5), negative_prompt="bad")
    drops = torch.tensor([text == "bad" for text in stage.captions(batch, 0)]).float()
    correlation = torch.corrcoef(torch.stack([drops, stage.timesteps(batch, 0)]))[0, 1]
    assert correlation.abs() < 0.08


def test_timesteps_are_uniform_then_shifted() -> None:
    t = draw(pretrain(), 2000)
    assert t.min() >= 0 and t.max() < 1
    assert (t.sort().values - torch.linspace(0, 1, 2000)).abs().max() < 0.04
    shifted = draw(pretrain(method=PretrainConfig(timestep_shift=12.0)), 2000)
    torch.testing.assert_close(shifted, 12 * t / (1 + 11 * t))


def test_logit_normal_timesteps_are_normal_before_the_sigmoid() -> None:
    t = draw(pretrain(method=PretrainConfig(timestep_sampling="logit_normal")), 2000)
    normal = t.double().logit()
    assert normal.isfinite().all()
    assert normal.mean().abs() < 0.08
    assert normal.std() == pytest.approx(1, abs=0.06)
    # The normal's quantiles: 16 % below -1, 84 % below 1.
    assert (normal < -1).double().mean() == pytest.approx(0.1587, abs=0.025)
    assert (normal < 1).double().mean() == pytest.approx(0.8413, abs=0.025)


def test_it_learns() -> None:
    """From the zeros of a new model, on one batch, the loss falls by far."""
    options = PretrainConfig(caption_dropout=0.0)
    config = train_config(options, optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3))
    bundle = initial_bundle(config)
    stage = build(config, bundle)
    losses = [float(stage.update(micro_batches(), 0)["generator/loss"]) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]


def test_every_weight_trains_and_the_average_follows() -> None:
    stage = pretrain()
    ema = stage.generator.ema
    assert ema is not None
    before = weights(stage.generator.module)
    stage.update(micro_batches(), 0)
    after = weights(stage.generator.module)
    # Bytes, places and positions that no caption uses have rows of their own in one tensor each.
    assert unchanged(before, after) == set()
    for name, average in ema.state_dict().items():
        torch.testing.assert_close(average, (before[name] + after[name]) / 2)


def test_a_frozen_text_encoder_is_not_trained_and_gets_no_gradient() -> None:
    config = train_config(PretrainConfig())
    bundle = initial_bundle(config)
    bundle.text_encoder.requires_grad_(False)  # type: ignore[attr-defined]
    stage = build(config, bundle)
    assert not any(name.startswith("text_encoder") for name in weights(stage.generator.module))
    stage.update(micro_batches(), 0)
    assert all(p.grad is None for p in bundle.text_encoder.parameters())  # type: ignore[attr-defined]


def test_warm_up_decay_and_clipping() -> None:
    optimizer = OptimizerConfig(
        name="adamw", learning_rate=0.4, warmup_updates=4, decay_updates=2, max_grad_norm=1e-3
    )
    stage = pretrain(optimizer=optimizer, num_updates=7)
    rates = []
    for update in range(7):
        metrics = stage.update(micro_batches(), update)
        rates.append(stage.generator.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.2])
    # The norm is that before clipping; what is left in .grad is clipped.
    assert float(metrics["generator/grad_norm"]) > 1e-3
    left = [g for g in gradients(stage.generator.module).values() if g is not None]
    assert torch.cat([g.flatten() for g in left]).norm() == pytest.approx(1e-3, rel=1e-2)


def test_optimizers_are_torchs_own_with_the_papers_values() -> None:
    rmsprop = pretrain().generator.optimizer
    assert isinstance(rmsprop, torch.optim.RMSprop)
    group = rmsprop.param_groups[0]
    assert (group["alpha"], group["momentum"], group["weight_decay"]) == (0.9, 0, 0)
    assert not group["centered"]
    config = OptimizerConfig(name="adamw", betas=(0.8, 0.9), weight_decay=0.1)
    adamw = pretrain(optimizer=config).generator.optimizer
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert adamw.param_groups[0]["weight_decay"] == 0.1


def test_the_seed_decides_the_first_weights() -> None:
    states = [
        weights(initial_bundle(train_config(PretrainConfig(), seed=seed)).backbone)  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    ]
    assert unchanged(states[0], states[1]) == states[0].keys()
    assert "patch_in.weight" not in unchanged(states[0], states[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 16}, "takes 16 channels, but codec 'patchify' has 12"),
        ({"text_dim": 8}, "takes text of 8 dimensions, but text encoder 'bytes' has 16"),
    ],
)
def test_parts_that_do_not_fit(options: dict[str, int | float | str], message: str) -> None:
    model: ModelConfig = dataclasses.replace(TINY_MODEL, options={**TINY_MODEL.options, **options})
    with pytest.raises(ConfigError, match=message):
        initial_bundle(train_config(PretrainConfig(), model=model))


def test_bf16_autocast_keeps_weights_and_loss_in_fp32() -> None:
    stage = pretrain(precision="bf16")
    module: Any = stage.generator.module
    seen: list[torch.dtype] = []
    module.backbone.patch_in.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    loss = stage.update(micro_batches(), 0)["generator/loss"]
    assert seen == [torch.bfloat16]
    assert isinstance(loss, Tensor) and loss.dtype == torch.float32 and loss.isfinite()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
