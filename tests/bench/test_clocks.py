"""Clocks and power are read from nvidia-smi; if they cannot be read, a reason is given."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apt.bench.clocks import GpuState, GpuWatch, parse_nvidia_smi, read_gpu, summary
from tests.waiting import wait_until

GPU = torch.device("cuda", 0)
LINE = "1755, 2619, 693.11, 700.00, 61\n"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A fake nvidia-smi with a given output and exit code, which records its arguments."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-5678")
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def install(says: str, code: int = 0) -> Path:
        program, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
        program.write_text(f"#!/bin/sh\necho \"$@\" > '{asked}'\nprintf '{says}'\nexit {code}\n")
        program.chmod(0o755)
        return asked

    return install


def test_a_reading(nvidia_smi):
    asked = nvidia_smi("1755, 2619, 693.11, 700.00, 61\\n")
    state = read_gpu(GPU)
    assert state == parse_nvidia_smi(LINE)
    assert (state.sm_clock_mhz, state.power_w, state.power_limit_w) == (1755, 693.11, 700)
    assert (state.reason, state.readings) == ("", 1)
    assert "--id=GPU-1234-5678" in asked.read_text()


def test_a_program_that_fails_is_a_reason_and_no_error(nvidia_smi):
    nvidia_smi("Unable to determine the device handle", code=9)
    assert read_gpu(GPU) == GpuState(
        reason="nvidia-smi ended with 9: Unable to determine the device handle"
    )


def test_figures_that_a_gpu_does_not_report():
    state = parse_nvidia_smi("1755, 2619, [N/A], [N/A], 61")
    assert (state.sm_clock_mhz, state.power_w) == (1755, None)
    assert state.reason == "nvidia-smi has no power.draw, power.limit here"
    assert "nvidia-smi printed 'No devices'" in parse_nvidia_smi("No devices").reason


def test_without_nvidia_smi_nvml_is_used_and_its_absence_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    def absent(device: torch.device) -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "clock_rate", absent)
    state = read_gpu(GPU)
    assert state.sm_clock_mhz is None
    assert "NVML raised ModuleNotFoundError: pynvml" in state.reason
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: 1980)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 512_000)
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 50)
    state = read_gpu(GPU)
    assert (state.sm_clock_mhz, state.power_w, state.power_limit_w) == (1980, 512, None)
    assert state.describe().startswith("1980 MHz, 512 W, 50 °C, no nvidia-smi")


def test_readings_together():
    cool = GpuState(sm_clock_mhz=1980, power_w=400, temperature_c=40, readings=1)
    warm = GpuState(sm_clock_mhz=1600, power_w=699, temperature_c=60, readings=1)
    state = summary([cool, warm, warm])
    assert (state.sm_clock_mhz, state.power_w, state.temperature_c) == (1600, 699, 60)
    assert state.readings == 3
    assert state.metrics() == {"sm_clock_mhz": 1600, "power_w": 699}
    assert summary([GpuState(reason="gone")]).reason == "gone"
    assert "over within" in summary([]).reason


def test_a_watch_reads_while_the_work_runs(nvidia_smi, monkeypatch):
    nvidia_smi("1755, 2619, 693.11, 700.00, 61\\n")
    monkeypatch.setattr("apt.bench.clocks.SECONDS_BETWEEN", 0.01)
    with GpuWatch(GPU) as watch:
        wait_until(lambda: watch.state().readings >= 2)
    assert watch.state().sm_clock_mhz == 1755


def test_a_cpu_has_none(monkeypatch):
    monkeypatch.setattr("apt.bench.clocks.SECONDS_BETWEEN", 0.001)
    with GpuWatch(torch.device("cpu")) as watch:
        wait_until(lambda: "gpu clocks" not in {thread.name for thread in threading.enumerate()})
    assert watch.state() == GpuState(reason="clocks are read on GPUs only")
