"""The machine's best rates, measured in the same run as everything that is compared with them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apt.bench.clocks import GpuState, GpuWatch
from apt.bench.timing import Clock, Work, median, time_interleaved

# Within a second of full load a GPU reaches its power limit, and its clocks drop
SUSTAINED_SECONDS = {"cuda": 3.0, "cpu": 0.2}
_AHEAD = 32  # products in the queue: enough to keep the device from waiting for the host


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates that no kernel exceeds by much.

    Attributes:
        copy_gb_s: device-to-device copy, bytes read plus bytes written, 10⁹ per second.
        matmul_tflops: square matrix product through torch's library, bf16 on a GPU and fp32 on a
            CPU. Single products, during which a GPU's clocks are high.
        sustained_tflops: the same product without pauses, measured in the second half of
            `SUSTAINED_SECONDS`: the limit for work that takes seconds. None if not measured.
        under_load: the GPU's clocks and power during that time.
    """

    copy_gb_s: float
    matmul_tflops: float
    sustained_tflops: float | None = None
    under_load: GpuState | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the rates as records hold them."""
        return {
            "copy_gb_s": self.copy_gb_s,
            "matmul_tflops": self.matmul_tflops,
            "sustained_tflops": self.sustained_tflops,
            "under_load": None if self.under_load is None else self.under_load.as_dict(),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Ceilings:
        """Undo `as_dict`."""
        state = found["under_load"]
        return cls(**found | {"under_load": None if state is None else GpuState(**state)})

    def describe(self) -> str:
        """Return the rates in one line."""
        text = f"copy {self.copy_gb_s:.4g} GB/s, matmul {self.matmul_tflops:.4g} TFLOP/s"
        if self.sustained_tflops is not None:
            text += f", sustained {self.sustained_tflops:.4g} TFLOP/s"
        return text + (f" ({self.under_load.describe()})" if self.under_load else "")


def measure_ceilings(
    device: torch.device, clock: Clock, *, rounds: int = 20, seconds: float | None = None
) -> Ceilings:
    """Time a large copy and a large matrix product on random data, in turns; then products only.

    Args:
        device, clock: the device and its clock.
        rounds: samples of each.
        seconds: how long to run products without pauses; None takes `SUSTAINED_SECONDS`.
    """
    on_gpu = device.type == "cuda"
    size, values = (8192, 2**29) if on_gpu else (1024, 2**24)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    source = torch.randint(-(2**30), 2**30, (values,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    works = {
        "copy": Work(lambda _: target.copy_(source)),
        "matmul": Work(lambda _: a @ b),
    }
    timings = time_interleaved(works, clock, rounds=rounds)
    moved = 2 * source.numel() * source.element_size()
    operations = 2 * size**3
    with GpuWatch(device) as watch:
        per_second = _products_per_second(a, b, seconds or SUSTAINED_SECONDS[device.type])
    return Ceilings(
        copy_gb_s=moved / median(timings["copy"].samples_ms) / 1e6,
        matmul_tflops=operations / median(timings["matmul"].samples_ms) / 1e9,
        sustained_tflops=operations * per_second / 1e12,
        under_load=watch.state(),
    )


def _products_per_second(a: Tensor, b: Tensor, seconds: float) -> float:
    """Run products for a time, and return the rate in its second half."""
    out = torch.empty_like(a)
    # The host waits for each event `_AHEAD` products later, so it keeps pace with the device
    events = [torch.cuda.Event() for _ in range(_AHEAD)] if a.is_cuda else []
    begun = half = time.monotonic()
    count = counted_from = 0
    while (now := time.monotonic()) - begun < seconds:
        if half == begun and now - begun >= seconds / 2:
            half, counted_from = now, count
        torch.mm(a, b, out=out)
        if events:
            event = events[count % _AHEAD]
            if count >= _AHEAD:
                event.synchronize()
            event.record()
        count += 1
    return (count - counted_from) / (time.monotonic() - half)
