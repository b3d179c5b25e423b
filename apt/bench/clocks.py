"""Clocks, power and temperature of a GPU at work, without which its rates mean little."""

from __future__ import annotations

import shutil
import subprocess
import threading
from dataclasses import asdict, dataclass

import torch

from apt.bench.timing import median

SECONDS_BETWEEN = 0.25

_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """State of a GPU. None where a value could not be read; `reason` then says why.

    Attributes:
        sm_clock_mhz, memory_clock_mhz: medians over the readings.
        power_w, temperature_c: largest readings.
        power_limit_w: the power limit, which the GPU keeps by lowering its clocks.
        readings: number of readings.
        reason: why values are missing; empty if none are.
    """

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    readings: int = 0
    reason: str = ""

    def as_dict(self) -> dict[str, float | int | str | None]:
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Return clock and power, if they were read."""
        pairs = {"sm_clock_mhz": self.sm_clock_mhz, "power_w": self.power_w}
        return {name: value for name, value in pairs.items() if value is not None}

    def describe(self) -> str:
        """Return the state in one line."""
        figures = [
            f"{value:.0f}{unit}"
            for value, unit in (
                (self.sm_clock_mhz, " MHz"),
                (self.power_w, " W"),
                (self.power_limit_w, " W at most"),
                (self.temperature_c, " °C"),
            )
            if value is not None
        ]
        return ", ".join([*figures, *([self.reason] if self.reason else [])])


def read_gpu(device: torch.device) -> GpuState:
    """Read the state once, with nvidia-smi or, if that is missing, with NVML through torch."""
    if device.type != "cuda":
        return GpuState(reason="clocks are read on GPUs only")
    if shutil.which("nvidia-smi") is not None:
        return _by_nvidia_smi(device)
    try:
        return GpuState(
            sm_clock_mhz=float(torch.cuda.clock_rate(device)),
            power_w=torch.cuda.power_draw(device) / 1e3,
            temperature_c=float(torch.cuda.temperature(device)),
            readings=1,
            reason="no nvidia-smi: memory clock and power limit were not read",
        )
    # NVML can fail in many ways, and no failure is worth losing a measurement
    except Exception as error:
        return GpuState(reason=f"no nvidia-smi, and NVML raised {type(error).__name__}: {error}")


def _by_nvidia_smi(device: torch.device) -> GpuState:
    # Its device numbers differ from torch's if CUDA_VISIBLE_DEVICES is set
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_FIELDS)}"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return GpuState(reason=f"nvidia-smi raised {type(error).__name__}: {error}")
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        return GpuState(reason=f"nvidia-smi ended with {done.returncode}: {said}")
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> GpuState:
    """Parse nvidia-smi's line of values in the order of `_FIELDS`; "[N/A]" becomes None."""
    values: list[float | None] = []
    for word in text.strip().split(","):
        try:
            values.append(float(word))
        except ValueError:
            values.append(None)
    if len(values) != len(_FIELDS):
        return GpuState(reason=f"nvidia-smi printed {text.strip()!r}")
    missing = [field for field, value in zip(_FIELDS, values, strict=True) if value is None]
    sm, memory, power, limit, temperature = values
    return GpuState(
        sm_clock_mhz=sm,
        memory_clock_mhz=memory,
        power_w=power,
        power_limit_w=limit,
        temperature_c=temperature,
        readings=1,
        reason=f"nvidia-smi has no {', '.join(missing)} here" if missing else "",
    )


class GpuWatch:
    """Reads a GPU's state in a thread while the `with` block runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True, name="gpu clocks")
        self._states: list[GpuState] = []

    def __enter__(self) -> GpuWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN):
            self._states.append(read_gpu(self._device))
            if not self._states[-1].readings:
                return  # the next reading would fail for the same reason

    def state(self) -> GpuState:
        """Return a summary of all readings; call it after the block."""
        if self._device.type != "cuda":  # even if there was no time for a reading
            return read_gpu(self._device)
        return summary(self._states)


def summary(states: list[GpuState]) -> GpuState:
    """Return medians of the clocks, and maxima of power and temperature."""
    taken = [state for state in states if state.readings]
    if not taken:
        short = f"the work was over within {SECONDS_BETWEEN} s"
        return states[-1] if states else GpuState(reason=short)

    def column(name: str) -> list[float]:
        return [value for state in taken if (value := getattr(state, name)) is not None]

    def middle(name: str) -> float | None:
        return median(values) if (values := column(name)) else None

    def most(name: str) -> float | None:
        return max(column(name), default=None)

    return GpuState(
        sm_clock_mhz=middle("sm_clock_mhz"),
        memory_clock_mhz=middle("memory_clock_mhz"),
        power_w=most("power_w"),
        power_limit_w=most("power_limit_w"),
        temperature_c=most("temperature_c"),
        readings=len(taken),
        reason=states[-1].reason,
    )
