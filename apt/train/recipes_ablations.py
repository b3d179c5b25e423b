"""Ablations of `digits_apt`: its first updates, from the same start, with one change.

`long` is `digits_apt` at constant learning rates beyond its peak, with snapshots. The other runs
are compared with its first updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from apt.losses import ApproximateR1, ApproximateR2, MismatchedCondition
from apt.methods.apt import AdversarialConfig
from apt.methods.terms import Terms
from apt.train.config import TrainConfig
from apt.train.recipe_names import RECIPES
from apt.train.recipes_digits import digits_apt

UPDATES = 100
"""Updates of each short run."""

_NO_R2 = ApproximateR2(weight=0.0)
_LONG = (50, UPDATES, 150, 200)


def _ablation(
    name: str,
    *,
    snapshot_at: tuple[int, ...] = (),
    batch_size: int | None = None,
    learning_rate: float | None = None,
    **stage: Any,
) -> TrainConfig:
    """Return `digits_apt` at constant learning rates, in its own folder, with changed fields."""
    base = digits_apt()
    assert isinstance(base.stage, AdversarialConfig)
    rate = base.optimizer.learning_rate if learning_rate is None else learning_rate
    return dataclasses.replace(
        base,
        name=f"digits_apt_{name}",
        run_dir=f"runs/digits/ablations/{name}",
        stage=dataclasses.replace(base.stage, **stage),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=rate, decay_updates=0),
        batch_size=base.batch_size if batch_size is None else batch_size,
        num_updates=max(snapshot_at, default=UPDATES),
        snapshot_at=snapshot_at,
    )


def _terms(**changes: Any) -> Terms:
    """Return the terms of `digits_apt` with changes."""
    stage = digits_apt().stage
    assert isinstance(stage, AdversarialConfig)
    return dataclasses.replace(stage.terms, **changes)


@RECIPES.register("digits_apt_long")
def digits_apt_long() -> TrainConfig:
    """`digits_apt` at constant learning rates beyond its peak, the baseline of the ablations."""
    return _ablation("long", snapshot_at=_LONG)


@RECIPES.register("digits_apt_no_r1")
def digits_apt_no_r1() -> TrainConfig:
    """Ablation: no regulariser, for as many updates as `digits_apt_long` (APT Fig. 5)."""
    no_r1 = ApproximateR1(weight=0.0)
    return _ablation("no_r1", snapshot_at=_LONG, r1=no_r1, terms=_terms(r2=_NO_R2))


@RECIPES.register("digits_apt_no_r2")
def digits_apt_no_r2() -> TrainConfig:
    """Ablation: the regulariser only on real samples, as in the paper."""
    return _ablation("no_r2", terms=_terms(r2=_NO_R2))


@RECIPES.register("digits_apt_no_mismatched")
def digits_apt_no_mismatched() -> TrainConfig:
    """Ablation: D sees no clips with other clips' captions, as in the paper (except App. J)."""
    return _ablation("no_mismatched", terms=_terms(mismatched=MismatchedCondition(weight=0.0)))


@RECIPES.register("digits_apt_shallow")
def digits_apt_shallow() -> TrainConfig:
    """Ablation: a discriminator of half the depth (APT Fig. 6)."""
    return _ablation("shallow", layers=(1, 2, 3))


@RECIPES.register("digits_apt_one_head")
def digits_apt_one_head() -> TrainConfig:
    """Ablation: one head, on the last block (APT Fig. 7)."""
    return _ablation("one_head", layers=(6,))


@RECIPES.register("digits_apt_frozen")
def digits_apt_frozen() -> TrainConfig:
    """Ablation: D's backbone is frozen, and only its heads train (APT App. F)."""
    return _ablation("frozen", freeze_discriminator_backbone=True)


@RECIPES.register("digits_apt_slow_backbone")
def digits_apt_slow_backbone() -> TrainConfig:
    """Ablation: D's backbone at a tenth of the learning rate of its heads (APT App. F)."""
    return _ablation("slow_backbone", discriminator_backbone_rate=0.1)


@RECIPES.register("digits_apt_distilled_d")
def digits_apt_distilled_d() -> TrainConfig:
    """Ablation: D initialised from the distilled weights, not the diffusion weights (Sec. 3.3)."""
    return _ablation("distilled_d", discriminator="runs/digits/distill/export")


@RECIPES.register("digits_apt_no_ensemble")
def digits_apt_no_ensemble() -> TrainConfig:
    """Ablation: D sees t = 0 instead of an ensemble of timesteps (Sec. 3.3)."""
    return _ablation("no_ensemble", timestep_ensemble=False)


@RECIPES.register("digits_apt_small_batch")
def digits_apt_small_batch() -> TrainConfig:
    """Ablation: a quarter of the batch size (APT App. E)."""
    return _ablation("small_batch", batch_size=8)


@RECIPES.register("digits_apt_low_rates")
def digits_apt_low_rates() -> TrainConfig:
    """Ablation: a third of both learning rates (APT App. F)."""
    return _ablation("low_rates", learning_rate=3e-5, discriminator_learning_rate=2e-4)


@RECIPES.register("digits_apt_high_rates")
def digits_apt_high_rates() -> TrainConfig:
    """Ablation: three times both learning rates (APT App. F)."""
    return _ablation("high_rates", learning_rate=3e-4, discriminator_learning_rate=1.8e-3)


@RECIPES.register("digits_ablations")
def digits_ablations() -> Sequence[TrainConfig]:
    """All ablations of `digits_apt`, in a row."""
    return (
        digits_apt_long(),
        digits_apt_no_r1(),
        digits_apt_no_r2(),
        digits_apt_no_mismatched(),
        digits_apt_shallow(),
        digits_apt_one_head(),
        digits_apt_frozen(),
        digits_apt_slow_backbone(),
        digits_apt_distilled_d(),
        digits_apt_no_ensemble(),
        digits_apt_small_batch(),
        digits_apt_low_rates(),
        digits_apt_high_rates(),
    )
