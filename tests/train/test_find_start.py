from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from apt.errors import CheckpointError, ConfigError
from apt.methods import PretrainConfig
from apt.methods.apt import AdversarialConfig
from apt.methods.consistency import DistillConfig
from apt.train import checkpoint
from apt.train.config import DataConfig, LoRAConfig, TrainConfig
from apt.train.config_file import plain
from apt.train.logs import LOG_NAME
from apt.train.resume import Resume, check_resumable, find_start, model_identities
from apt.train.sequence import move_runs

pytestmark = pytest.mark.filterwarnings("ignore:skipped a damaged checkpoint")
CONFIG = TrainConfig(name="x", run_dir="x", stage=PretrainConfig(), checkpoint_every=2)
STARTED = TrainConfig(name="x", run_dir="x", stage=DistillConfig(teacher="digits-diffusion"))


def begin(run_dir: Path, *, steps: int, saved: tuple[int, ...]) -> None:
    """What a run of `CONFIG` leaves after some updates."""
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(plain(CONFIG)))
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)]
    (run_dir / LOG_NAME).write_text("".join(lines))
    for step in saved:
        checkpoint.save(run_dir / "checkpoints", step, {"step": step}, {})


def damage(run_dir: Path, step: int) -> None:
    manifest = run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_a_run_without_a_good_checkpoint_does_not_begin_again(tmp_path: Path, resume: Resume):
    run_dir = tmp_path / "run"
    begin(run_dir, steps=5, saved=(2, 4))
    for step in (2, 4):
        damage(run_dir, step)
    log = (run_dir / LOG_NAME).read_text()
    with pytest.raises(CheckpointError, match=r"checkpoints are damaged \(number: 2.*--start-over"):
        find_start(run_dir, resume)
    assert (run_dir / LOG_NAME).read_text() == log

    assert find_start(run_dir, resume, start_over=True) is None
    assert not (run_dir / LOG_NAME).exists() and not (run_dir / "checkpoints").exists()
    kept = run_dir / "before-1"
    assert (kept / LOG_NAME).read_text() == log
    assert len(list((kept / "checkpoints").iterdir())) == 2


def test_a_good_checkpoint_is_continued_whatever_is_damaged_beside_it(tmp_path: Path):
    run_dir = tmp_path / "run"
    begin(run_dir, steps=5, saved=(2, 4))
    damage(run_dir, 4)
    for resume in (True, "auto"):
        found = find_start(run_dir, resume, start_over=True)
        assert found is not None and checkpoint.step_of(found) == 2
    with pytest.raises(ConfigError, match="already holds a run"):
        find_start(run_dir, False, start_over=True)


def test_checkpoints_that_somebody_deleted_are_lost_work_too(tmp_path: Path):
    begin(tmp_path / "run", steps=5, saved=())
    with pytest.raises(CheckpointError, match=r"with 5 updates in its log, but no checkpoint"):
        find_start(tmp_path / "run", True)


@pytest.mark.parametrize("resume", [False, True, "auto"])
@pytest.mark.parametrize("steps", [2, 4])  # the first is written while updates go on, up to 4
def test_a_run_stopped_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, resume: Resume, steps: int
):
    begin(tmp_path / "run", steps=steps, saved=())
    assert find_start(tmp_path / "run", resume) is None


def test_a_run_that_waits_for_its_checkpoints_has_the_first_when_it_is_due(tmp_path: Path):
    begin(tmp_path / "run", steps=3, saved=())
    waits = dataclasses.replace(CONFIG, checkpoint_in_background=False)
    (tmp_path / "run" / "config.json").write_text(json.dumps(plain(waits)))
    with pytest.raises(CheckpointError, match=r"with 3 updates in its log, but no checkpoint"):
        find_start(tmp_path / "run", True)


def test_one_command_for_the_first_attempt_and_all_later_ones(tmp_path: Path):
    assert find_start(tmp_path / "run", "auto") is None
    with pytest.raises(CheckpointError, match=r"no run to resume.*--continue"):
        find_start(tmp_path / "run", True)
    begin(tmp_path / "run", steps=2, saved=(2,))
    found = find_start(tmp_path / "run", "auto")
    assert found is not None and checkpoint.step_of(found) == 2


def test_fewer_updates_than_are_done(tmp_path: Path):
    before = plain(CONFIG)
    shorter = dataclasses.replace(CONFIG, num_updates=8)
    check_resumable(shorter, {"config": before}, tmp_path, 8)
    with pytest.raises(ConfigError, match="--num-updates to at least 9"):
        check_resumable(shorter, {"config": before}, tmp_path, 9)


def test_what_helps_after_an_error_may_change(tmp_path: Path):
    data = DataConfig(long_captions="cut", num_workers=3, strict=True)
    helped = dataclasses.replace(
        CONFIG, data=data, micro_batch_size=1, activation_checkpointing=True
    )
    before = {**plain(CONFIG), "ema_warmup": False}
    helped = dataclasses.replace(helped, ema_warmup=False)
    taken = check_resumable(helped, {"config": before}, tmp_path, 1)
    assert "micro_batch_size (was 0, is 1)" in taken and len(taken) == 5
    del before["ema_warmup"]  # a run of an earlier version
    check_resumable(helped, {"config": before}, tmp_path, 1)
    other = dataclasses.replace(CONFIG, data=dataclasses.replace(data, size_multiple=16))
    with pytest.raises(ConfigError, match=r"data\.size_multiple \(was None, is 16\)"):
        check_resumable(other, {"config": plain(CONFIG)}, tmp_path, 1)


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(tmp_path: Path):
    before = plain(CONFIG)
    before["stage"] = {"generator": "g", "r1_weight": 100.0, "r1_sigma": 0.1}
    with pytest.raises(ConfigError, match=r"started by an earlier version.*\(stage\.r1_weight"):
        check_resumable(CONFIG, {"config": before}, tmp_path, 1)


NEWER = ("discriminator_forwards", "discriminator_precision", "rounding_every")


def test_a_run_from_before_some_options_goes_on_as_it_was(tmp_path: Path):
    stage = AdversarialConfig(generator="g", discriminator="d")
    config = dataclasses.replace(CONFIG, stage=stage, ema_warmup=False)
    before = plain(config)
    for name in NEWER:
        del before["stage"][name]
    meta = {"config": before}
    assert check_resumable(config, meta, tmp_path, 1) == []
    told = dataclasses.replace(config, stage=dataclasses.replace(stage, rounding_every=5))
    assert check_resumable(told, meta, tmp_path, 1) == ["stage.rounding_every (was 0, is 5)"]
    exact = dataclasses.replace(stage, discriminator_precision="fp32")
    with pytest.raises(ConfigError, match=r"discriminator_precision \(was 'run', is 'fp32'\)"):
        check_resumable(dataclasses.replace(config, stage=exact), meta, tmp_path, 1)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Two folders of the same model, "here" and "there"."""
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "apt.json").write_text("{}")
        (tmp_path / place / "transformer.safetensors").write_bytes(b"1234")
    return tmp_path


def test_the_base_of_adapters_may_move_and_not_become_another(places: Path):
    here, there = (
        dataclasses.replace(STARTED, lora=LoRAConfig(rank=2, base=str(places / place)))
        for place in ("here", "there")
    )
    meta = {"config": plain(here), "models": model_identities(here)}
    (taken,) = check_resumable(there, meta, places, 1)
    assert taken.startswith("lora.base (was ")
    for place, words in (("there", "was"), ("here", "the model at .* has changed")):
        (places / place / "transformer.safetensors").write_bytes(b"12345")
        with pytest.raises(ConfigError, match=rf"lora\.base \({words}"):
            check_resumable(there if place == "there" else here, meta, places, 1)


def test_stages_in_a_row_find_the_base_of_adapters_in_its_new_place():
    first = dataclasses.replace(STARTED, run_dir="runs/first")
    base = LoRAConfig(rank=2, base="runs/first/export")
    second = dataclasses.replace(STARTED, run_dir="runs/second", lora=base)
    wanted = [dataclasses.replace(config, run_dir="here") for config in (first, second)]
    moved = move_runs(wanted, before=[first, second])
    assert moved[1].lora.base == str(Path("here/first/export"))


def test_a_model_may_move_and_not_become_another(places: Path):
    tmp_path = places
    here, there = (
        dataclasses.replace(CONFIG, stage=DistillConfig(teacher=str(tmp_path / place)))
        for place in ("here", "there")
    )
    meta = {"config": plain(here), "models": model_identities(here)}
    (taken,) = check_resumable(there, meta, tmp_path, 1)
    assert taken.startswith("stage.teacher (was ")
    (tmp_path / "there" / "apt.json").write_text('{"seed": 1}')
    assert check_resumable(there, meta, tmp_path, 1) == [taken]
    (tmp_path / "there" / "transformer.safetensors").write_bytes(b"1235")
    with pytest.raises(ConfigError, match=r"does not fit.*stage\.teacher \(was"):
        check_resumable(there, meta, tmp_path, 1)
    (tmp_path / "here" / "transformer.safetensors").write_bytes(b"12345")
    with pytest.raises(ConfigError, match=r"stage\.teacher \(the model at .* has changed"):
        check_resumable(here, meta, tmp_path, 1)
