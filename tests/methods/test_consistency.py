from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from apt.checkpoints.load import load_bundle
from apt.errors import ConfigError
from apt.losses import Consistency
from apt.rng import Draw, sample_noise, sample_uniform
from tests.train.tiny_methods import (
    CAPTIONS,
    FROZEN,
    LATENT_SHAPE,
    assert_same_gradients,
    distill,
    floats,
    gradients,
    micro_batches,
    randomize,
    unchanged,
    weights,
)

UPDATE, FIRST, STEPS = 5, 8, 10


def test_it_minimises_the_consistency_loss(tmp_path: Path) -> None:
    stage = distill(
        tmp_path,
        train={"optimizer": FROZEN, "negative_prompt": "blurry"},
        loss=Consistency(num_timesteps=STEPS, cfg_scale=4.0, timestep_shift=2.0),
    )
    target: Any = stage.target
    # Teacher, target and student must not be mistaken for each other.
    generator = torch.Generator().manual_seed(5)
    for value in stage.target_ema.state_dict().values():
        torch.nn.init.normal_(value, std=0.2, generator=generator)
    student: Any = stage.generator.module
    randomize(student, 6)
    target = copy.deepcopy(target)  # it moves at the end of the update
    metrics = stage.update(micro_batches(first=FIRST), UPDATE)
    ours = gradients(student)

    teacher: Any = load_bundle(tmp_path / "generator").backbone
    c, negative = stage.encode(CAPTIONS), stage.encode(["blurry"] * len(CAPTIONS))
    draw = Draw(0, UPDATE, FIRST)
    x = micro_batches()[0].x
    z = sample_noise(len(CAPTIONS), LATENT_SHAPE, draw.named("noise"))
    index = (sample_uniform(len(CAPTIONS), draw.named("timestep")) * STEPS).floor()
    grid = [2 * u / (1 + u) for u in ((index + 1) / STEPS, index / STEPS)]
    t, t_next = grid
    wide, wide_next = (side.view(-1, 1, 1, 1, 1) for side in grid)
    x_t = (1 - wide) * x + wide * z
    with torch.no_grad():
        v_negative = teacher(x_t, t, negative)
        guided = v_negative + 4.0 * (teacher(x_t, t, c) - v_negative)
        x_next = x_t - (wide - wide_next) * guided
        expected = x_next - wide_next * target(x_next, t_next, c)
    loss = (x_t - wide * student(x_t, t, c) - expected).square().mean()
    student.zero_grad()
    loss.backward()
    assert metrics["generator/loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert_same_gradients(ours, gradients(student), of_largest=2e-3)


def test_teacher_stays_and_target_follows_slowly(tmp_path: Path) -> None:
    stage = distill(tmp_path, target_decay=0.75)
    student, teacher, target = stage.generator.module, stage.teacher, stage.target
    before = weights(student)
    assert unchanged(before, weights(teacher)) == before.keys()
    stage.update(micro_batches(), 0)
    after = weights(student)
    assert unchanged(before, after) == set()
    assert unchanged(before, weights(teacher)) == before.keys()
    assert all(p.grad is None for m in (teacher, target) for p in m.parameters())
    averages = stage.target_ema.state_dict()
    for name, value in averages.items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
    # The average is the target itself.
    moved = {name: value.clone() for name, value in averages.items()}
    assert unchanged(moved, weights(target)) == moved.keys()
    stage.update(micro_batches(), 1)
    again = weights(student)
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, 0.75 * moved[name] + 0.25 * again[name])


def test_a_teacher_that_is_one_expert_of_two_is_warned_of(tmp_path: Path) -> None:
    stage = distill(tmp_path)
    assert stage.warnings() == []
    info = stage.start.info
    expert = dataclasses.replace(info.model, architecture="wan2.2_t2v_a14b")
    stage.start.info = dataclasses.replace(info, model=expert)
    (text,) = stage.warnings()
    assert "not trained at" in text and "expert for t >= 0.875" in text


def test_target_is_part_of_the_state(tmp_path: Path) -> None:
    """A resumed run goes on with the same target: its state is live."""
    assert distill(tmp_path).target_ema.decay == 0.95
    stage = distill(tmp_path, target_decay=1.0)
    state = stage.extra_state()["target"]
    for value in state.values():
        value.zero_()
    stage.update(micro_batches(), 0)
    assert all(not p.any() for p in stage.target.parameters())


@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_equals_the_whole_batch(size: int, tmp_path: Path) -> None:
    results = []
    for part in (len(CAPTIONS), size):
        stage = distill(tmp_path, train={"optimizer": FROZEN})
        randomize(stage.generator.module, 7)
        metrics = stage.update(micro_batches(part), 0)
        results.append((floats(metrics), gradients(stage.generator.module)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert_same_gradients(results[0][1], results[1][1], of_largest=2e-3)


def test_checkpointing_is_for_the_student_alone(tmp_path: Path) -> None:
    stage = distill(tmp_path, train={"activation_checkpointing": True})
    nets: list[Any] = [stage.generator.module, stage.teacher, stage.target]
    assert [net.backbone.checkpointing is None for net in nets] == [False, True, True]
    stage.update(micro_batches(), 0)


def test_text_encoder_is_frozen(tmp_path: Path) -> None:
    stage = distill(tmp_path)
    text: Any = stage.start.text_encoder
    before = weights(text)
    stage.update(micro_batches(), 0)
    assert unchanged(before, weights(text)) == before.keys()
    assert not any(name.startswith("text_encoder") for name in weights(stage.generator.module))


def test_it_learns(tmp_path: Path) -> None:
    stage = distill(tmp_path, loss=Consistency(cfg_scale=1.0))
    randomize(stage.generator.module, 7)
    losses = [float(stage.update(micro_batches(), 0)["generator/loss"]) for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_teacher_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--stage\.teacher is empty; name the model"):
        distill(tmp_path, teacher="")
