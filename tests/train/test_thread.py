"""Training inside another program: in a thread, and without a terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from apt.methods.flow_matching import PretrainConfig
from apt.train.config import DataConfig, TrainConfig
from apt.train.logs import LOG_NAME
from apt.train.signals import StopRequest
from apt.train.trainer import run
from tests.train.tiny_methods import train_config

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)


def config(folder: Path, *, num_workers: int = 0) -> TrainConfig:
    data = DataConfig(num_workers=num_workers)
    return train_config(
        PretrainConfig(), run_dir=str(folder), data=data, num_updates=3, sample_every=0
    )


def state(folder: Path) -> dict[str, object]:
    return json.loads((folder / "state.json").read_text())


def in_thread(config: TrainConfig, **options: object) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, config, **options).result()  # type: ignore[arg-type]


def test_a_thread_trains_as_the_main_thread_does(tmp_path: Path) -> None:
    run(config(tmp_path / "main"))
    before = [signal.getsignal(number) for number in HANDLED]
    in_thread(config(tmp_path / "thread", num_workers=1))
    assert [signal.getsignal(number) for number in HANDLED] == before
    main, thread = (tmp_path / name for name in ("main", "thread"))
    assert (thread / LOG_NAME).read_bytes() == (main / LOG_NAME).read_bytes()
    assert state(thread)["state"] == "finished"


class Cell(io.StringIO):
    """The output of a notebook's cell, with a user who stops the run at its first line."""

    def __init__(self, stop: StopRequest) -> None:
        super().__init__()
        self.stop = stop

    def write(self, text: str) -> int:
        if " left  " in text:
            self.stop.request("the notebook")
        return super().write(text)


def test_a_run_in_a_thread_is_stopped_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    monkeypatch.setattr(sys, "stderr", Cell(stop))
    whole = config(tmp_path)
    in_thread(dataclasses.replace(whole, num_updates=1000), stop=stop)
    assert state(tmp_path)["reason"] == "the notebook"
    assert "the notebook: saved after update 1; continue with --resume" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    in_thread(whole, resume=True)
    assert state(tmp_path)["state"] == "finished"
    assert len((tmp_path / LOG_NAME).read_text().splitlines()) == whole.num_updates
