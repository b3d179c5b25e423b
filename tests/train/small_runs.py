"""Small but real training runs, stopped and killed in all ways; test_resume.py starts this.

Every run is a process forked from this one, so torch is imported only once. This process never
computes with torch before it forks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apt.data.digits import MovingDigits
from apt.errors import InputError
from apt.train import loop
from apt.train.config import ModelConfig, TrainConfig
from apt.train.logs import LOG_NAME, RunLog
from apt.train.monitor import MonitorConfig
from apt.train.recipes import RECIPES
from apt.train.trainer import run
from tests.train.deaths import die_before, stopping

UPDATES = 6
STAGES = ("pretrain", "distill", "apt")
ACCUMULATED = ("pretrain", "apt")
LIMIT = 100_000  # bytes in a file: more than a log takes, less than a checkpoint


def config(root: Path, stage: str, name: str, **changes: Any) -> TrainConfig:
    """The digits recipe of a stage with tiny networks, writing to `root/name/stage`."""
    recipe = RECIPES.get(f"digits_pixels_{stage}")()
    assert isinstance(recipe, TrainConfig)
    sources = {
        "pretrain": {"num_steps": 2},
        "distill": {"teacher": str(root / "whole" / "pretrain" / "export")},
        "apt": {
            "generator": str(root / "whole" / "distill" / "export"),
            "discriminator": str(root / "whole" / "pretrain" / "export"),
            "layers": (1, 3),
            "generator_trains": "all",
        },
    }
    model = ModelConfig(
        options={"hidden_size": 24, "depth": 3, "num_heads": 2, "text_dim": 16, "pooled_dim": 16},
        text_encoder_options={"width": 16, "depth": 1, "num_heads": 2, "alphabet": "ascii"},
    )
    optimizer = dataclasses.replace(
        recipe.optimizer,
        name="rmsprop" if stage == "apt" else "adamw",
        learning_rate=1e-2,
        warmup_updates=3,
        decay_updates=2 if stage == "pretrain" else 0,
        # With a small eps the first updates are the gradient's sign, and rounding can flip it.
        eps=1e-5 if stage == "distill" else 1e-2,  # the student begins as the teacher
    )
    base: dict[str, Any] = {
        "run_dir": str(root / name / stage),
        "stage": dataclasses.replace(recipe.stage, **sources[stage]),
        "model": model,
        "optimizer": optimizer,
        "num_updates": UPDATES,
        "batch_size": 4,
        "ema_decay": 0.9,
        # Depends on the length of a run, which differs between the compared runs.
        "ema_warmup": False,
        "checkpoint_every": 2,
        "snapshot_at": (),
        "sample_every": 3,
        "sample_prompts": ("a red seven moving left", "a blue one moving up"),
        "precision": "fp32",
        "device": "cpu",
    }
    return dataclasses.replace(recipe, **{**base, **changes})


class Child:
    """A training run in a forked process."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        environment: dict[str, str] | None = None,
        file_limit: int | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.log = Path(config.run_dir) / LOG_NAME
        self.output = Path(config.run_dir).with_suffix(f".{time.monotonic_ns()}.txt")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._main(config, resume, environment or {}, file_limit, prepare))

    def _main(
        self,
        config: TrainConfig,
        resume: bool,
        environment: dict[str, str],
        file_limit: int | None,
        prepare: Callable[[], None],
    ) -> int:
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        try:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            prepare()
            if "whole" not in Path(config.run_dir).parts:  # nobody looks at the others' curves
                loop.plot_losses = lambda run_dir: run_dir
            run(config, resume=resume)
        except InputError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def lines(self) -> int:
        return self.log.read_bytes().count(b"\n") if self.log.is_file() else 0

    def wait(self) -> dict[str, Any]:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return {"code": code, "output": self.output.read_text(), "lines": self.lines()}


def stop_and_resume(config: TrainConfig) -> list[dict[str, Any]]:
    """SIGTERM once two updates are in the log."""

    def prepare() -> None:
        RunLog.write = stopping(2)  # type: ignore[method-assign]

    return [Child(config, prepare=prepare).wait(), Child(config, resume=True).wait()]


def kill_and_resume(config: TrainConfig) -> list[dict[str, Any]]:
    """SIGKILL four times, each time resumed: once a save is whole, and in the midst of one."""
    config = dataclasses.replace(config, checkpoint_every=1)
    saves = Path(config.run_dir) / "checkpoints"
    kills: list[dict[str, Any]] = []
    for number in range(4):
        prepare = die_after_a_save if number % 2 == 0 else die_in_a_save
        child = Child(config, resume=number > 0, prepare=prepare)
        kills.append({**child.wait(), "in_save": any(saves.glob(".tmp-*"))})
    return [*kills, Child(config, resume=True).wait()]


def die_in_a_save() -> None:
    """Everything is written but the new checkpoint's name."""
    die_before(_publishes)


def die_after_a_save() -> None:
    """Die just after a save, before anything else."""
    saved: list[str] = []

    def chosen(event: str, path: str) -> bool:
        if _publishes(event, path):
            saved.append(path)
            return False
        return bool(saved)

    die_before(chosen)


def _publishes(event: str, path: str) -> bool:
    return event == "os.rename" and Path(path).name.startswith(".tmp-step_")


def two_ranks(config: TrainConfig) -> list[dict[str, Any]]:
    """The environment that torchrun gives its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        Child(config, environment={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    return [child.wait() for child in children]


def misfits(root: Path) -> dict[str, dict[str, Any]]:
    fits = config(root, "pretrain", "whole")
    narrow = dataclasses.replace(fits.model, options={**fits.model.options, "depth": 2})
    changed = {
        "batch size": (dataclasses.replace(fits, batch_size=8), True),
        "model": (dataclasses.replace(fits, model=narrow), True),
        "stage": (dataclasses.replace(config(root, "apt", "whole"), run_dir=fits.run_dir), True),
        "without resume": (fits, False),
        "nothing there": (dataclasses.replace(fits, run_dir=str(root / "nowhere")), True),
    }
    return {name: Child(c, resume=resume).wait() for name, (c, resume) in changed.items()}


def main(root: Path) -> None:
    # Here, once, instead of in every run
    import matplotlib.figure
    import torch.utils.tensorboard  # noqa: F401

    MovingDigits(0)[0]  # reads scikit-learn's files, once
    matplotlib.figure.Figure().savefig(os.devnull, format="png")  # finds the fonts, once
    report: dict[str, Any] = {}
    for stage in STAGES:
        report[f"whole/{stage}"] = [Child(config(root, stage, "whole")).wait()]
        report[f"stopped/{stage}"] = stop_and_resume(config(root, stage, "stopped"))
        report[f"ranks/{stage}"] = two_ranks(config(root, stage, "ranks"))
        if stage in ACCUMULATED:
            accumulated = config(root, stage, "accumulated", micro_batch_size=2)
            report[f"accumulated/{stage}"] = [Child(accumulated).wait()]
    report["killed/apt"] = kill_and_resume(config(root, "apt", "killed"))

    full = config(root, "apt", "full")
    report["full/apt"] = [
        Child(dataclasses.replace(full, num_updates=2)).wait(),
        Child(full, resume=True, file_limit=LIMIT).wait(),
    ]
    # Kept as they are now, for the test to compare.
    shutil.copytree(Path(full.run_dir) / "checkpoints", root / "full" / "after_failure")
    report["full/apt"].append(Child(full, resume=True).wait())

    fast = dataclasses.replace(full.optimizer, learning_rate=1e30, warmup_updates=0)
    nan = config(root, "pretrain", "nan", optimizer=fast, checkpoint_every=1, sample_every=0)
    report["nan"] = Child(nan).wait()
    stop = MonitorConfig(action="stop", patience=3, min_discriminator_loss=1e6)
    report["collapse"] = Child(config(root, "apt", "collapse", monitor=stop)).wait()
    report["misfits"] = misfits(root)
    (root / "report.json").write_text(json.dumps(report))
