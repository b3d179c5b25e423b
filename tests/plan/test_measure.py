"""Plans made without data, compared with the same updates on real tensors."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from apt.checkpoints.info import SampleInfo
from apt.distributed.imagined import imagined_ranks
from apt.distributed.mesh import Layout, ParallelConfig
from apt.errors import ConfigError
from apt.methods.base import Stage
from apt.models.mmdit import MMDiTConfig
from apt.pixels import LatentCodec
from apt.plan import measure
from apt.plan.compare import real_peaks
from apt.plan.estimate import Job, estimate
from apt.plan.measure import (
    STATES,
    Peak,
    Usage,
    begin_stage,
    follow_update,
    make_batches,
    name_states,
)
from apt.plan.tracking import Tracker
from apt.train.host import encoded
from tests.plan.jobs import JOBS, ON_RANKS, RANKS, SHAPE, described, in_layout
from tests.processes import run_main


def planned(job: Job, world: int = 1) -> Usage:
    return estimate(job, job.config.parallel.layout(world), gpu=False)


def peaks(usage: Usage) -> dict[str, float]:
    return {name: peak.total for name, peak in usage.peaks.items()}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plan")
    run_main("tests.plan.jobs", folder, folder=folder)
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in RANKS}


@pytest.mark.parametrize(
    "name", [name if name == "apt" else pytest.param(name, marks=pytest.mark.slow) for name in JOBS]
)
def test_memory_of_one_process_is_that_of_live_tensors(name: str) -> None:
    with imagined_ranks(Layout()) as alone:
        real = real_peaks(JOBS[name], alone)
    assert peaks(planned(JOBS[name])) == pytest.approx(real, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_RANKS)
@pytest.mark.parametrize(
    ("world", "kind"), [(world, kind) for world, layouts in RANKS.items() for kind in layouts]
)
def test_memory_and_collectives_on_ranks_are_those_of_live_tensors(
    on_ranks: dict[int, dict[str, Any]], world: int, kind: str, name: str
) -> None:
    found = described(planned(in_layout(name, RANKS[world][kind]), world))
    counted = on_ranks[world][f"{name}/{kind}"]
    assert found["peaks"] == pytest.approx(counted["peaks"], rel=0.05)
    assert found["calls"] == counted["calls"]
    assert found["sent"] == pytest.approx(counted["sent"], rel=1e-3)


def test_parts_add_up_and_states_are_told_apart() -> None:
    found = planned(JOBS["distill"])
    count = sum(p.numel() for p in JOBS["distill"].start.config.build().parameters())  # type: ignore[union-attr]
    parts = found.peak.parts
    assert sum(parts.values()) == pytest.approx(found.peak.total)
    assert parts["weights"] == 4 * count
    assert parts["optimiser states"] == pytest.approx(4 * count, rel=0.01)
    assert parts["averages"] == 2 * 4 * count  # the EMA, and the target


@pytest.mark.slow
def test_a_deep_network_is_extrapolated_from_shallow_ones() -> None:
    """Peaks and work of 12 blocks, extrapolated from 6 and 8, against all 12."""
    job = JOBS["deep"]
    few, whole = estimate(job, Layout(1, 4, 1)), estimate(job, Layout(1, 4, 1), whole=True)
    assert peaks(few) == pytest.approx(peaks(whole), rel=1e-3)
    assert few.work.flops == pytest.approx(whole.work.flops, rel=1e-3)
    assert few.work.sent == pytest.approx(whole.work.sent, rel=1e-3)


@pytest.mark.slow
def test_nothing_of_a_plan_is_left_behind() -> None:
    planned(JOBS["apt"])
    assert not torch.distributed.is_initialized()
    linear = torch.nn.Linear(2, 2).to(torch.float64)
    assert type(linear.weight.data) is torch.Tensor and linear.weight.dtype == torch.float64


def test_clips_are_encoded_once_unless_each_part_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = JOBS["pretrain"]
    config = dataclasses.replace(job.config, micro_batch_size=2)
    with imagined_ranks(Layout()) as alone:
        stage = begin_stage(config, alone, job.start, job.others)
    made: list[int] = []

    def counting(stage: Stage, codec: LatentCodec, pixels: Tensor) -> Tensor:
        made.append(len(pixels))
        return encoded(stage, codec, pixels)

    monkeypatch.setattr(measure, "encoded", counting)
    batches = make_batches(config, stage, job.sample, Layout(), Tracker())
    first = [batch.texts for batch in batches]
    assert [batch.texts is kept for batch, kept in zip(batches, first, strict=True)] == [True] * 2
    assert made == [2, 2]
    batches.forget()
    assert all(batch.texts is not kept for batch, kept in zip(batches, first, strict=True))
    assert made == [2, 2, 2, 2]


def test_a_batch_that_does_not_divide_is_refused_as_by_the_run() -> None:
    with pytest.raises(ConfigError, match=r"batch_size 8 is not divisible by the 3 .* 6 or 9"):
        planned(in_layout("apt", ParallelConfig()), 3)


def updated_on_four(job: Job) -> Usage:
    """The first of four ranks that are not there, in real tensors: cheaper than without data."""
    tracker = Tracker(scalar=0.5)
    with imagined_ranks(Layout(1, 4, 1)) as ranks, tracker.watching():
        stage = begin_stage(job.config, ranks, job.start, job.others)
        tracker.name_parts = name_states(stage)
        batches = make_batches(job.config, stage, job.sample, ranks.layout, tracker)
        return follow_update(stage, batches, tracker)


def test_one_more_block_adds_neither_gathered_weights_nor_whole_gradients() -> None:
    """Beside states a rank holds its input alone, also with two forwards of D."""
    made = JOBS["attention"]
    given: Any = made.config.stage
    stage = dataclasses.replace(given, discriminator_forwards=2)
    others = {name: dataclasses.replace(m, text_tokens=8) for name, m in made.others.items()}
    small = dataclasses.replace(
        made,
        config=dataclasses.replace(made.config, batch_size=4, stage=stage),
        start=dataclasses.replace(made.start, text_tokens=8),
        others=others,
        sample=SampleInfo(frames=1, height=32, width=32, fps=8),
    )
    # From four on, each block more is one in the middle of both networks.
    shallow, deep = (updated_on_four(small.of_depth(depth)).peaks for depth in (4, 5))
    block = MMDiTConfig(**SHAPE).build().block_list()[0]
    gathered = 2 * sum(weight.numel() for weight in block.parameters())  # in bf16

    def beside_states(peak: Peak) -> float:
        return peak.total - sum(peak.parts[part] for part in STATES)

    for name, peak in deep.items():
        assert beside_states(peak) - beside_states(shallow[name]) < gathered / 8, name
