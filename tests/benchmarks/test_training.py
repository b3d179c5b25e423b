"""The training check: how it judges losses, and that this code gives the recorded curve."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.training import (
    ALLOWED,
    CURVE,
    CURVE_UPDATES,
    STAGES,
    Update,
    alone,
    case_of,
    check_large_step,
    judge_curve,
    stage_config,
    train,
    worst_deviation,
)

CPU = torch.device("cpu")
CASE = case_of("first losses", "pretrain", "auto", "fp32")


def updates(*losses: float) -> list[Update]:
    return [Update({"loss": loss}, 10.0 + i, 1.0) for i, loss in enumerate(losses)]


def test_a_deviation_is_a_share_of_the_recorded_value():
    found = [{"a": 1.0, "b": 8.0}, {"a": 2.0, "b": 3.9}]
    worst, where = worst_deviation(found, {"a": [1.0, 2.0, 3.0], "b": [8.0, 4.0, 5.0]})
    assert worst == pytest.approx(0.025)
    assert where == "b of update 2"


@pytest.mark.parametrize("loss", [1.0 + 2 * ALLOWED["pretrain"], math.nan, math.inf])
def test_a_loss_that_is_off_is_wrong_and_has_no_time(loss):
    found = judge_curve(CASE, updates(1.0, loss, 1.0, 1.0, 1.0), {"loss": [1.0] * 5}, "")
    assert found.status == "wrong"
    assert "loss of update 2" in found.reason
    assert found.samples_ms == ()


def test_a_curve_that_is_met_has_the_times_behind_the_first_updates():
    found = judge_curve(CASE, updates(1.0, 1.0, 1.0, 1.0, 1.0), {"loss": [1.0] * 5}, "")
    assert (found.status, found.samples_ms) == ("measured", (13.0, 14.0))
    assert found.metrics == {"deviation": 0.0, "updates": 5}


def test_where_nothing_is_computed_nothing_is_judged():
    found = judge_curve(CASE, updates(0.0), {"loss": [1.0]}, "not judged: 1 + 1 gave 0")
    assert (found.status, found.reason) == ("skipped", "not judged: 1 + 1 gave 0")


def test_the_curve_is_recorded_for_every_stage():
    recorded = json.loads(CURVE.read_text())["losses"]
    assert tuple(recorded) == STAGES
    assert set(recorded["apt"]) == {"generator/loss", "discriminator/loss"}
    assert {len(curve) for losses in recorded.values() for curve in losses.values()} == {
        CURVE_UPDATES
    }


def test_pretraining_follows_the_recorded_curve():
    """After a deliberate change of a recipe, model or loss, run python -m benchmarks.training."""
    recorded = json.loads(CURVE.read_text())["losses"]["pretrain"]
    done = [u.metrics for u in train(stage_config("pretrain", precision="fp32"), alone(CPU), 2)]
    deviation, where = worst_deviation(done, recorded)
    assert deviation < 1e-5, where


def test_the_larger_step_runs_on_the_fused_optimiser():
    (found,) = check_large_step(CPU, small=True)
    assert found.status == "measured", found.reason
    assert len(found.samples_ms) == 3
    assert found.metrics["tokens"] == 8
