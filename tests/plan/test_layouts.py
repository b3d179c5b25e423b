"""The choice of a layout, from given instead of measured figures."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.checkpoints.info import SampleInfo
from apt.distributed.mesh import Layout, ParallelConfig
from apt.errors import ConfigError, InputError
from apt.losses import R1
from apt.methods.terms import Terms
from apt.plan.estimate import Estimate, Job
from apt.plan.gpus import GIB, find_gpu
from apt.plan.layouts import Choice, choose, ways
from apt.plan.measure import Peak, Usage
from apt.plan.models import find_model
from apt.plan.plan import job_of
from apt.plan.report import report
from apt.plan.tracking import Collective, Work
from apt.train.config import LoRAConfig, TrainConfig
from apt.train.recipes import RECIPES
from tests.data.media import numbered, write_video

H100 = find_gpu("h100")


def paper() -> TrainConfig:
    made = RECIPES.get("apt_video_720p")()
    assert isinstance(made, TrainConfig)
    return made


def job(config: TrainConfig) -> Job:
    start = find_model(config, "generator")
    others = {"discriminator": find_model(config, "discriminator")}
    return Job(config, start, others, SampleInfo(frames=49, height=720, width=1280, fps=24))


def needing(config: TrainConfig, states: float, activations: float, ranks: int = 16) -> Estimate:
    """An estimate for these GiB of states, which are sharded, and of activations, which are split
    over the sequence. D's groups hold two thirds of them. If attention is recomputed too, the work
    is a tenth more."""
    layout = config.parallel.layout(ranks)
    held = activations / layout.sequence
    if getattr(config.stage, "discriminator_forwards", 1) == 2:
        held *= 2 / 3
    if config.checkpointing.offloads:
        held /= 4
    if config.checkpointing.saves_attention:
        held *= 1.5
    parts = Counter({"weights": states / layout.states * GIB, "activations": held * GIB})
    usage = Usage(
        {"discriminator": (Peak(sum(parts.values()), parts),)},
        Work(),
        Work(linear=1e15 * (1.0 if config.checkpointing.saves_attention else 1.1)),
        config.batch_size // layout.data,
    )
    return Estimate(config, layout, usage, H100, 400.0)


def chosen(config: TrainConfig, states: float, activations: float) -> Choice:
    return choose(job(config), 16, H100, lambda way: needing(way, states, activations))


def test_two_forwards_are_a_way_only_where_blocks_are_computed_again() -> None:
    def forwards(config: TrainConfig) -> list[tuple[int, bool]]:
        stages: list[Any] = [way.stage for way in ways(config, last=True)]
        offloads = [way.checkpointing.offloads for way in ways(config, last=True)]
        return [(s.discriminator_forwards, o) for s, o in zip(stages, offloads, strict=True)]

    assert paper().activation_checkpointing
    assert forwards(paper()) == [(1, False), (2, False), (2, True)]
    kept = dataclasses.replace(paper(), activation_checkpointing=False)
    assert forwards(kept) == [(1, False), (2, True)]


def test_what_fits_without_sharing_samples_is_taken_in_copies_of_a_machine() -> None:
    taken = chosen(paper(), states=100, activations=20).taken
    assert taken.layout == Layout(2, 8, 1)
    assert taken.config.checkpointing.saves_attention  # there is room for it, and it is faster


def test_what_is_too_large_for_one_is_shared_by_as_few_as_hold_it() -> None:
    choice = chosen(paper(), states=100, activations=150)
    assert choice.taken.layout == Layout(2, 4, 2) and choice.taken.fits
    assert getattr(choice.taken.config.stage, "discriminator_forwards", 0) == 2
    assert not any(found.fits for found in choice.tried if found.layout.sequence == 1)


def test_a_copy_grows_beyond_a_machine_only_where_it_must() -> None:
    assert chosen(paper(), states=800, activations=20).taken.layout.replicate == 1


@pytest.mark.parametrize("ranks", [9, 12, 20])
def test_any_number_of_gpus_has_a_layout(ranks: int) -> None:
    config = dataclasses.replace(paper(), batch_size=180)
    choice = choose(job(config), ranks, H100, lambda way: needing(way, 800, 20, ranks))
    assert all(found.layout.world_size == ranks for found in choice.tried)


def test_a_layout_that_is_named_is_tried_alone() -> None:
    named = dataclasses.replace(paper(), parallel=ParallelConfig(sequence=4))
    layouts = {found.layout for found in chosen(named, states=100, activations=20).tried}
    assert layouts == {Layout(1, 4, 4)}


def test_what_cannot_fit_by_what_others_take_is_not_measured() -> None:
    choice = chosen(paper(), states=100, activations=150)
    assert {
        (way.parallel.sequence, way.stage.discriminator_forwards) for way, _ in choice.skipped
    } == {  # type: ignore[attr-defined]
        (1, 2),
        (2, 1),
    }
    for way, least in choice.skipped:
        there = needing(way, 100, 150)
        assert not there.fits and least <= there.needed
    assert "not measured" in report(job(paper()), choice, 16)


@given(st.floats(1, 2000), st.floats(1, 2000), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_skipping_changes_nothing_of_the_choice(
    states: float, activations: float, ranks: int
) -> None:
    config = dataclasses.replace(paper(), batch_size=9216)

    def assess(way: TrainConfig) -> Estimate:
        return needing(way, states, activations, ranks)

    choice = choose(job(config), ranks, H100, assess)
    assert all(not assess(way).fits for way, _ in choice.skipped)
    if not choice.taken.fits:
        assert not any(found.fits for found in choice.tried)


def test_attention_is_kept_only_where_there_may_be_room() -> None:
    measured: list[TrainConfig] = []

    def assess(way: TrainConfig) -> Estimate:
        measured.append(way)
        found = needing(way, 100, 20)
        usage = dataclasses.replace(found.usage, with_attention=78 * GIB)
        return dataclasses.replace(found, usage=usage)

    taken = choose(job(paper()), 16, H100, assess).taken
    assert taken.fits and not taken.config.checkpointing.saves_attention
    assert not any(way.checkpointing.saves_attention for way in measured)


def test_where_nothing_fits_it_says_what_would_help() -> None:
    config = paper()
    choice = chosen(config, states=4000, activations=10)
    text = report(job(config), choice, 16)
    assert "It does not fit" in text and "--gpus 32" in text and "--lora.rank" in text


def test_what_the_trainer_refuses_is_not_promised() -> None:
    config = paper()
    exact = dataclasses.replace(config.stage, terms=Terms(exact_r1=R1(weight=1.0)))  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="exact"):
        chosen(dataclasses.replace(config, stage=exact), states=1, activations=1)


def test_times_and_bytes() -> None:
    """By hand: 1e15 operations at 400 TFLOP/s, 7/8 of what is gathered, twice that to sum."""
    sent = Counter(
        {Collective("all-gather", 8): 8 * 10**9, Collective("all-reduce", 2, stride=8): 10**9}
    )
    sent[Collective("all-to-all", 4)] = 4 * 10**9
    usage = Usage({"generator": (Peak(0, Counter()),)}, Work(sent=sent), Work(linear=1e15), 1)
    found = Estimate(paper(), Layout(2, 2, 4), usage, H100, 400.0)
    assert found.compute_seconds == 2.5
    assert found.sent() == {
        Collective("all-gather", 8): 7e9,
        Collective("all-reduce", 2, stride=8): 1e9,
        Collective("all-to-all", 4): 3e9,
    }
    assert found.waiting_seconds == pytest.approx(3 / 450)  # inside a machine
    assert found.hidden_seconds == pytest.approx(7 / 450 + 1 / 50)  # copies are in two machines
    assert found.seconds == pytest.approx(2.5 + 3 / 450)


def test_recipes_are_followed_to_the_model_that_they_begin_with() -> None:
    video = RECIPES.get("apt_video_wan")()
    found = find_model(video, "generator")
    assert found.name == "wan2.1_t2v_1.3b" and "apt_image_wan" in found.found
    assert find_model(paper(), "generator").name == "apt_8b"
    digits = RECIPES.get("digits_apt")()
    made = find_model(digits, "generator")
    assert made.name == "mmdit_digits_latent"
    assert made.config.in_channels == made.bundle(loads=False).codec.channels


def test_stages_are_planned_as_they_begin_with_nothing_left_open() -> None:
    digits = RECIPES.get("digits_pretrain")()
    begun = job_of(digits)
    assert begun.start is not None and begun.start.name == "mmdit_digits_latent"
    assert not begun.others
    distill = RECIPES.get("digits_distill")()
    still_open = dataclasses.replace(distill.stage.loss, cfg_scale=None)
    stage = dataclasses.replace(distill.stage, loss=still_open)
    filled = job_of(dataclasses.replace(distill, stage=stage, precision="auto")).config
    assert filled.stage.loss.cfg_scale == digits.stage.cfg_scale
    assert filled.precision == "bf16"


def test_adapters_beside_a_base_share_it_with_whoever_starts_from_it() -> None:
    video = RECIPES.get("apt_video_wan")()
    apart = dataclasses.replace(video, lora=LoRAConfig(rank=4))
    beside = dataclasses.replace(video, lora=LoRAConfig(rank=4, base="wan2.1_t2v_1.3b"))
    for model in ("", "wan2.1_t2v_14b"):
        alone, shared = job_of(apart, model), job_of(beside, model)
        assert alone.start.file != alone.others["discriminator"].file
        assert shared.start.file == shared.others["discriminator"].file
        assert not shared.config.lora.base and shared.config.lora.rank == 4


def test_a_row_is_planned_with_what_its_own_stages_make(tmp_path: Path) -> None:
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", numbered(12, 96, 128), 8)
        (tmp_path / f"{number}.txt").write_text("a clip")

    def planned(path: str, size: str) -> Job:
        row = [
            dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=path))
            for stage in RECIPES.create("own", size=size)  # type: ignore[arg-type, union-attr]
        ]
        return job_of(row[-1], row=row)

    mini, tiny = planned(str(tmp_path), "mini"), planned("", "tiny")
    assert [job.start.name for job in (mini, tiny)] == ["mmdit_mini", "mmdit_tiny"]
    assert mini.others["discriminator"].name == "mmdit_mini"
    # Of the folder, or else the largest clips that the recipe takes.
    assert mini.sample == SampleInfo(frames=9, height=96, width=128, fps=8.0)
    assert (tiny.sample.frames, tiny.sample.height, tiny.sample.width) == (17, 64, 64)


def test_unknown_models_and_gpus() -> None:
    stage = dataclasses.replace(paper().stage, generator="nobody/has-it")  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="--model"):
        find_model(dataclasses.replace(paper(), stage=stage), "generator")
    with pytest.raises(InputError, match="choose from: a100"):
        find_gpu("h300")
