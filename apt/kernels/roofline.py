"""Rates of known GPUs, and the least time that a cost can take on them."""

from __future__ import annotations

from dataclasses import dataclass

from apt.errors import InputError
from apt.kernels.costs import OpCost


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine computes and moves data.

    Attributes:
        matmul_tflops: dense bf16 matrix products with fp32 sums, 10¹² operations per second.
        memory_gb_s: device memory, bytes read plus bytes written, 10⁹ per second.
        attention_tflops: rate of an attention kernel; None: that of matrix products.
    """

    matmul_tflops: float
    memory_gb_s: float
    attention_tflops: float | None = None

    def seconds(self, cost: OpCost) -> float:
        """Return the roofline: the longer of the times for arithmetic and for memory traffic."""
        return max(cost.flops / self.matmul_tflops / 1e12, cost.bytes / self.memory_gb_s / 1e9)

    def attention_seconds(self, cost: OpCost) -> float:
        """Return the same as `seconds`, at the rate of attention."""
        tflops = self.attention_tflops or self.matmul_tflops
        return max(cost.flops / tflops / 1e12, cost.bytes / self.memory_gb_s / 1e9)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The rates of one GPU.

    Attributes:
        name: full name.
        peak: the vendor's figures, dense, at boost clock; no kernel reaches them.
        source: where the peak is published.
        measured: what large matrix products and copies reach in practice; None if not known.
        measured_by: where the measured rates come from.
    """

    name: str
    peak: Rates
    source: str
    measured: Rates | None = None
    measured_by: str | None = None

    @property
    def rates(self) -> Rates:
        """The measured rates if known, else the peak."""
        return self.measured or self.peak


# Data sheets give bf16 with sparsity; dense is half of that.
GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        name="NVIDIA A100 SXM 80 GB",
        peak=Rates(matmul_tflops=312, memory_gb_s=2039),
        source="NVIDIA A100 Tensor Core GPU data sheet (2021)",
    ),
    "h100": Gpu(
        name="NVIDIA H100 SXM",
        peak=Rates(matmul_tflops=989.4, memory_gb_s=3350),
        source="NVIDIA H100 Tensor Core GPU data sheet (2023)",
        measured=Rates(matmul_tflops=798, memory_gb_s=3000),
        measured_by="a bf16 product of 8192x8192 matrices and a copy, torch 2.11; not by this "
        "project",
    ),
    "h100-pcie": Gpu(
        name="NVIDIA H100 PCIe",
        peak=Rates(matmul_tflops=756, memory_gb_s=2000),
        source="NVIDIA H100 Tensor Core GPU data sheet (2022)",
    ),
    "h200": Gpu(
        name="NVIDIA H200 SXM",
        peak=Rates(matmul_tflops=989.4, memory_gb_s=4800),
        source="NVIDIA H200 Tensor Core GPU data sheet (2024)",
        measured=Rates(matmul_tflops=790, memory_gb_s=4300),
        measured_by="large bf16 matrix products and copies; not by this project",
    ),
    "b200": Gpu(
        name="NVIDIA B200 SXM",
        peak=Rates(matmul_tflops=2250, memory_gb_s=8000),
        source="NVIDIA DGX B200 data sheet (2024), an eighth of the system",
    ),
    "rtx4090": Gpu(
        name="NVIDIA GeForce RTX 4090",
        peak=Rates(matmul_tflops=165.2, memory_gb_s=1008),
        source="NVIDIA Ada GPU architecture white paper (2023), fp32 sums",
    ),
}

# TFLOP/s of attention kernels on an H100 SXM, forward, 16k tokens, without a mask, by channels of a
# head: "FlashAttention-3" (Shah et al. 2024), Fig. 5. Narrow heads are slower: they need as much
# softmax for fewer products.
H100_ATTENTION_TFLOPS = {
    64: {"flash-attn 2": 324.0, "cuDNN": 413.0, "flash-attn 3": 497.0},
    128: {"flash-attn 2": 370.0, "cuDNN": 595.0, "flash-attn 3": 648.0},
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU with this key of `GPUS`. Raises InputError for others."""
    if name not in GPUS:
        raise InputError(f"unknown GPU {name!r}; choose from: {', '.join(GPUS)}")
    return GPUS[name]
