"""What the machine can do at best, measured in the run that is held to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from apt.bench.timing import Clock, Work, median, time_interleaved


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Two rates that no kernel beats by much.

    Attributes:
        copy_gb_s: device-to-device copy, bytes read plus bytes written, 10⁹ per second.
        matmul_tflops: square bf16 product on a GPU, fp32 on a CPU, through torch's library.
    """

    copy_gb_s: float
    matmul_tflops: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_ceilings(device: torch.device, clock: Clock, *, rounds: int = 20) -> Ceilings:
    """Time a large copy and a large matrix product on random data, in turns."""
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
    samples = time_interleaved(works, clock, rounds=rounds)
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(
        copy_gb_s=moved / median(samples["copy"]) / 1e6,
        matmul_tflops=2 * size**3 / median(samples["matmul"]) / 1e9,
    )
