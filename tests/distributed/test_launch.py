from __future__ import annotations

import subprocess
import sys

import pytest

from apt.distributed import launch
from apt.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def facts() -> tuple[object, ...]:
    return (
        launch.launch_rank(),
        launch.launch_world_size(),
        launch.local_rank(),
        launch.restarts(),
        launch.is_one_of_many(),
        launch.under_torchrun(),
    )


def test_without_a_launcher() -> None:
    assert facts() == (0, 1, 0, 0, False, False)


def test_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("5", "8", "1", "run", "2"), strict=True):
        monkeypatch.setenv(name, value)
    assert facts() == (5, 8, 1, 2, True, True)


def test_torchrun_of_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("0", "1", "0", "run", "0"), strict=True):
        monkeypatch.setenv(name, value)
    assert not launch.is_one_of_many()
    assert launch.under_torchrun()


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_what_is_no_number_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE='{value}'"):
        launch.launch_world_size()
    assert not launch.is_one_of_many()


def test_it_is_known_without_torch() -> None:
    code = "import sys, apt.distributed.launch; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
