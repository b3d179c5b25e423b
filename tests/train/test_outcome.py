from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apt.checkpoints.info import SamplingInfo
from apt.checkpoints.load import load_bundle
from apt.condition import Condition
from apt.losses import Consistency
from apt.methods.apt import AdversarialConfig, generate
from apt.methods.base import Method
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from tests.train.tiny_methods import (
    CAPTIONS,
    adversarial,
    build,
    distill,
    export_method,
    micro_batches,
    pretrain,
    train_config,
    unchanged,
    weights,
)

KINDS = ("diffusion", "consistency", "apt")


def trained(kind: str, folder: Path) -> Method:
    """A stage after one update, so that its weights and their average differ."""
    stage: Method
    if kind == "diffusion":
        options = PretrainConfig(cfg_scale=3.0, num_steps=7, sampling_shift=5.0)
        stage = pretrain(method=options, negative_prompt="bad")
    elif kind == "consistency":
        stage = distill(folder)
    else:
        stage = adversarial(folder)
    stage.update(micro_batches(), 0)
    return stage


def expected_weights(stage: Method, which: str) -> dict[str, torch.Tensor]:
    ema = stage.generator.ema
    assert ema is not None
    state = ema.state_dict() if which == "ema" else stage.generator.module.state_dict()
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("which", ["ema", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_trained(kind: str, which: str, tmp_path: Path) -> None:
    stage = trained(kind, tmp_path)
    export_method(stage, tmp_path / "out", updates=1, weights=which)
    bundle: Any = load_bundle(tmp_path / "out")
    expected = expected_weights(stage, which)
    assert unchanged(weights(bundle.backbone), expected) == expected.keys()
    other = expected_weights(stage, "raw" if which == "ema" else "ema")
    assert unchanged(expected, other) != expected.keys()
    assert bundle.info.stage == kind
    assert bundle.info.training["weights"] == which

    ema = stage.generator.ema
    assert ema is not None
    z, module = micro_batches()[0].x, stage.generator.module
    with torch.no_grad():
        ours = generate(bundle.backbone, z, Condition(bundle.text_encoder(CAPTIONS)))
        if which == "ema":
            with ema.applied(module):
                theirs = generate(module, z, stage.encode(CAPTIONS))
        else:
            theirs = generate(module, z, stage.encode(CAPTIONS))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_how_to_sample(kind: str, tmp_path: Path) -> None:
    stage = trained(kind, tmp_path)
    export_method(stage, tmp_path / "out", updates=1)
    info = load_bundle(tmp_path / "out").info
    if kind == "diffusion":
        assert info.sampling == SamplingInfo(
            num_steps=7,
            cfg_scale=3.0,
            negative_prompt="bad",
            timestep_shift=5.0,
            sampler="euler",
        )
    else:
        # Guidance is distilled: one step without it.
        assert (info.sampling.num_steps, info.sampling.cfg_scale) == (1, 1.0)
    assert (info.sample.frames, info.sample.height, info.sample.width) == (9, 32, 32)


def test_further_steps_of_a_one_step_model_are_on_the_grid_that_it_was_distilled_on() -> None:
    teacher = SamplingInfo(num_steps=25, cfg_scale=3.0, timestep_shift=2.0, sampler="euler")
    for shift, expected in ((4.0, 4.0), (None, 2.0)):
        loss = Consistency(num_timesteps=25, timestep_shift=shift)
        distilled = DistillConfig(teacher="teacher", loss=loss).sampling(teacher)
        assert distilled.timestep_shift == expected
        # D's shift is another thing.
        stage = AdversarialConfig(generator="g", discriminator="d", timestep_shift=12.0)
        assert stage.sampling(distilled) == distilled


def test_provenance_tells_the_stages_before(tmp_path: Path) -> None:
    first = trained("diffusion", tmp_path)
    export_method(first, tmp_path / "generator", updates=11)
    second = distill_from(tmp_path)
    export_method(second, tmp_path / "out", updates=5)
    training = load_bundle(tmp_path / "out").info.training
    assert training["updates"] == 5
    assert training["config"]["stage"]["teacher"] == str(tmp_path / "generator")
    before = training["started_from"]
    assert before["updates"] == 11 and before["config"]["stage"]["num_steps"] == 7
    assert "started_from" not in before
    json.dumps(training)


def distill_from(folder: Path) -> Method:
    """A distillation whose teacher is the model in folder/generator, not a new one."""
    config = train_config(DistillConfig(teacher=str(folder / "generator")))
    return build(config)


def test_half_precision_on_request(tmp_path: Path) -> None:
    stage = trained("apt", tmp_path)
    export_method(stage, tmp_path / "whole", updates=1)
    export_method(stage, tmp_path / "half", updates=1, dtype=torch.bfloat16)
    sizes = [(tmp_path / d / "transformer.safetensors").stat().st_size for d in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    half: Any = load_bundle(tmp_path / "half").backbone
    for name, value in expected_weights(stage, "ema").items():
        torch.testing.assert_close(weights(half)[name], value.bfloat16().float())


def test_exporting_changes_nothing(tmp_path: Path) -> None:
    stage = trained("diffusion", tmp_path)
    ema = stage.generator.ema
    assert ema is not None
    before = weights(stage.generator.module), {k: v.clone() for k, v in ema.state_dict().items()}
    text: Any = stage.start.text_encoder
    export_method(stage, tmp_path / "out", updates=1)
    assert unchanged(before[0], weights(stage.generator.module)) == before[0].keys()
    assert unchanged(before[1], ema.state_dict()) == before[1].keys()
    assert all(p.requires_grad for p in text.parameters())
