"""Errors in the middle of an update: finished work is saved, and the run continues bit for bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apt.data.digits import FPS, MovingDigits
from apt.data.folder import VideoFolder
from apt.data.write import write_video_folder
from apt.errors import DataError, InputError
from apt.methods import AdversarialConfig, PretrainConfig
from apt.methods.apt import AdversarialPostTraining
from apt.train import checkpoint, loop
from apt.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from apt.train.logs import LOG_NAME
from apt.train.networks import Trained
from apt.train.signals import StopRequest
from apt.train.trainer import run
from tests.train.tiny_methods import save_start
from tests.waiting import wait_until

UPDATES, FAILS_AT = 3, 2
PROMPTS = ("a red seven moving left", "a blue one moving up")


def config(root: Path, name: str, **changes: Any) -> TrainConfig:
    """An adversarial run with a sample sheet and a snapshot of the update that fails."""
    base = TrainConfig(
        name="tiny",
        run_dir=str(root / name),
        stage=AdversarialConfig(
            generator=str(root / "generator"), discriminator=str(root / "discriminator")
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-3),
        num_updates=UPDATES,
        batch_size=2,
        ema_decay=0.5,
        sample_every=FAILS_AT,
        sample_prompts=PROMPTS,
        snapshot_at=(FAILS_AT,),
        device="cpu",
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models lie that runs start from, and a run that nothing interrupted."""
    root = tmp_path_factory.mktemp("interrupted")
    save_start(root)
    run(config(root, "whole"))
    return root


def files(run_dir: Path) -> dict[str, bytes]:
    """All files that equal runs have in common."""
    kinds = ("samples/*.png", "export/*.safetensors", "snapshots/*/*/*.safetensors", LOG_NAME)
    return {str(p.relative_to(run_dir)): p.read_bytes() for k in kinds for p in run_dir.glob(k)}


def state(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "state.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    """Plots take half the time of so short a run, and are not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_losses", lambda run_dir: None)
        yield


def full_disk(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "some/file")


def once(part: Callable[..., Any], fault: Callable[..., Any]) -> Callable[..., Any]:
    """`part`, which fails in one update."""

    def faulty(stage: Any, batches: Any, update: int) -> Any:
        return fault() if update + 1 == FAILS_AT else part(stage, batches, update)

    return faulty


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        pytest.param("discriminator_step", None, marks=pytest.mark.slow),
        ("generator_step", ["discriminator"]),
        ("write_sheet", ["discriminator", "generator"]),
        pytest.param("save_outcome", ["discriminator", "generator"], marks=pytest.mark.slow),
    ],
)
def test_an_error_saves_what_is_done_and_the_rest_is_done_later(
    root: Path, where: str, parts: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = root / where
    if where.endswith("_step"):
        part = getattr(AdversarialPostTraining, where)
        monkeypatch.setattr(AdversarialPostTraining, where, once(part, full_disk))
    else:
        monkeypatch.setattr(loop, where, full_disk)
    with pytest.raises(InputError, match="some/file: No space left on device"):
        run(config(root, where))
    monkeypatch.undo()

    assert state(run_dir)["state"] == "failed" and "No space" in state(run_dir)["reason"]
    found = checkpoint.latest(run_dir / "checkpoints")
    assert found is not None and checkpoint.step_of(found) == state(run_dir)["update"] == 1
    under_way = checkpoint.read_meta(found).get("under_way")
    assert (under_way and under_way["parts"]) == parts

    run(config(root, where), resume=True)
    assert files(run_dir) == files(root / "whole")
    assert state(run_dir) == {
        "state": "finished", "update": UPDATES, "num_updates": UPDATES, "reason": "",
    }  # fmt: skip


def test_weights_that_moved_in_part_are_not_saved(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trained.step

    def torn(trained: Trained, update: int) -> float:
        step(trained, update)
        if update + 1 == FAILS_AT:
            raise RuntimeError("a launch failed")
        return 0.0

    monkeypatch.setattr(Trained, "step", torn)
    with pytest.raises(RuntimeError, match="a launch failed"):
        run(config(root, "torn", checkpoint_every=1))
    monkeypatch.undo()
    run_dir = root / "torn"
    found = checkpoint.latest(run_dir / "checkpoints")
    assert found is not None and checkpoint.step_of(found) == 1
    assert "under_way" not in checkpoint.read_meta(found)
    run(config(root, "torn", checkpoint_every=1), resume=True)
    # The metrics of the torn step's stand-in differ in its norm alone; all weights are the same.
    ours, theirs = (
        load_file(folder / "export" / "transformer.safetensors")
        for folder in (run_dir, root / "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_stop_between_micro_batches_gives_up_no_more_than_a_part(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, stop = AdversarialPostTraining.draw_fake, StopRequest()
    drawn: list[tuple[int, str, int]] = []

    def stopping(stage: Any, batch: Any, c: Any, update: int, stream: str) -> Any:
        drawn.append((update + 1, stream, batch.offset))
        if drawn[-1] == (FAILS_AT, "generator/noise", 0):
            stop.request("a test")
        return draw(stage, batch, c, update, stream)

    run(config(root, "micro", micro_batch_size=1))
    settings = config(root, "between", micro_batch_size=1)
    monkeypatch.setattr(AdversarialPostTraining, "draw_fake", stopping)
    run(settings, stop=stop)
    monkeypatch.undo()
    assert drawn[-1] == (FAILS_AT, "generator/noise", 0)  # not the second of its two
    run_dir = root / "between"
    assert (state(run_dir)["state"], state(run_dir)["reason"]) == ("unfinished", "a test")
    found = checkpoint.latest(run_dir / "checkpoints")
    assert found is not None and checkpoint.step_of(found) == 1
    assert checkpoint.read_meta(found)["under_way"]["parts"] == ["discriminator"]
    run(settings, resume=True)
    assert files(run_dir) == files(root / "micro")


def test_training_goes_on_while_a_checkpoint_of_the_clock_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, log = checkpoint.write, root / "beside" / LOG_NAME

    def late(folder: Path, step: int, *rest: Any) -> Path:
        # Only training can write these lines.
        wait_until(lambda: log.read_bytes().count(b"\n") >= min(step + 1, UPDATES))
        return write(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "write", late)
    run(config(root, "beside", checkpoint_every_minutes=1e-9, keep_checkpoints=UPDATES))
    assert files(root / "beside") == files(root / "whole")
    names = sorted(path.name for path in (root / "beside" / "checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in range(1, UPDATES + 1)]


def pretraining(root: Path, name: str, **changes: Any) -> TrainConfig:
    data = {"source": "folder", "path": str(root / "clips"), **changes}
    return TrainConfig(
        name="folder",
        run_dir=str(root / name),
        stage=PretrainConfig(),
        model=ModelConfig(options={"hidden_size": 24, "depth": 1, "num_heads": 2}),
        data=DataConfig(**data),
        num_updates=3,
        batch_size=2,
        device="cpu",
    )


class Deadly(VideoFolder):
    """A folder with a file that kills whoever decodes it, once an update is logged."""

    victim = ""
    log: Path

    def __getitem__(self, index: int) -> Any:
        if self.file_name(index) == self.victim:
            # The trainer hears of a death at once, which must not be in the update before.
            wait_until(lambda: self.log.is_file() and self.log.read_text())
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_file_that_kills_its_reader_is_named_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video_folder(MovingDigits(0), tmp_path / "clips", 4, FPS)
    settings = pretraining(tmp_path, "run", num_workers=1)
    monkeypatch.setattr("apt.data.builtin_sources.VideoFolder", Deadly)
    folder = Deadly(tmp_path / "clips", buckets=[(9, 32, 32)], fps=FPS, seed=0)
    second = next(folder.batches(2, seed=0, start=1))
    monkeypatch.setattr(Deadly, "victim", folder.file_name(second[1]))
    monkeypatch.setattr(Deadly, "log", tmp_path / "run" / LOG_NAME, raising=False)
    with pytest.raises(DataError) as error:
        run(settings)
    assert Deadly.victim in str(error.value) and "data check" in str(error.value)
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and checkpoint.step_of(found) == 1
    monkeypatch.undo()
    run(dataclasses.replace(settings, data=pretraining(tmp_path, "run").data), resume=True)
    run(pretraining(tmp_path, "whole"))
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_disk_that_fills_up(tmp_path: Path, root: Path) -> None:
    """A small disk, full once the run has started; the saved run continues when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or os.system(f"{' '.join(mount)} 2>/dev/null"):
        pytest.skip("cannot mount a small file system here (not root)")
    try:
        settings = config(
            root, "disk", run_dir=str(disk / "run"), checkpoint_every=1, sample_every=0,
            snapshot_at=(),
        )  # fmt: skip
        run(dataclasses.replace(settings, num_updates=1))
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as stream, pytest.raises(OSError):
            while True:
                stream.write(b"0" * 4096)
        with pytest.raises(InputError, match="No space left on device"):
            run(settings, resume=True)
        filler.unlink()
        found = checkpoint.latest(disk / "run" / "checkpoints")
        assert found is not None and checkpoint.step_of(found) == 1
        run(settings, resume=True)
        log = (root / "whole" / LOG_NAME).read_text().splitlines()
        ours = (disk / "run" / LOG_NAME).read_text().splitlines()
        assert ours[0] == log[0] and ours[2] == log[2] and len(ours) == len(log)
    finally:
        assert os.system(f"umount {disk}") == 0
