"""Where the time of a network goes: attention, matrix products, and everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from apt.kernels.attention_choice import kernel_by_name

ATTENTION = ("attention", "flash", "fmha", "sdpa")
LINEAR = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "mkldnn")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Milliseconds by kind of work.

    Attributes:
        attention: softmax attention, with any backend.
        linear: matrix products.
        elementwise: norms, modulation, rotation, activations, copies and sums.
        unattributed: device time of kernels that belong to no op; 0 on the CPU.
        attention_kernels: names of the device's attention kernels; empty on the CPU.
    """

    attention: float
    linear: float
    elementwise: float
    unattributed: float = 0.0
    attention_kernels: tuple[str, ...] = ()

    def milliseconds(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if isinstance(value, float)}


def profile_split(run: Callable[[], object], device: torch.device) -> Split:
    """Profile one call and add up each op's own time, without the ops that it calls.

    The call must launch its ops one by one: replays of a CUDA graph have no named ops. `run` is
    called once before, to warm up.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run()
    with profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    totals = dict.fromkeys(("attention", "linear", "elementwise"), 0.0)
    kernels = 0.0
    names = set()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            totals[kind_of(event.key)] += own / 1e3
        elif not event.is_user_annotation:
            kernels += event.self_device_time_total / 1e3
            if kind_of(event.key) == "attention" or kernel_by_name(event.key):
                names.add(event.key)
    missing = max(kernels - sum(totals.values()), 0.0) if on_gpu else 0.0
    return Split(**totals, unattributed=missing, attention_kernels=tuple(sorted(names)))


def kind_of(op: str) -> str:
    """Return the field of `Split` for an op, from its name in the profiler."""
    if any(word in op.lower() for word in ATTENTION):
        return "attention"
    return "linear" if op.startswith(LINEAR) else "elementwise"
