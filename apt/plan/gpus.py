"""GPUs for plans: their memory, and the rates from which times are computed."""

from __future__ import annotations

from dataclasses import dataclass

from apt.errors import InputError
from apt.kernels.roofline import GPUS

__all__ = ["PlannedGpu", "find_gpu"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlannedGpu:
    """The properties of a GPU that plans use.

    Attributes:
        key: its key in `apt.kernels.roofline.GPUS`.
        name: its full name.
        memory: bytes, as in `torch.cuda.get_device_properties`.
        node: the usual number of GPUs in one machine.
        node_gb_s: bandwidth to another GPU of the same machine, in 10^9 bytes per second, one way.
        network_gb_s: bandwidth to a GPU of another machine.
        reserved: bytes that tensors cannot use: the CUDA context, NCCL's buffers and cuBLAS's
            workspace. An assumption.
    """

    key: str
    name: str
    memory: int
    node: int = 8
    node_gb_s: float
    network_gb_s: float = 50.0
    reserved: int = 2 * GIB

    @property
    def peak_tflops(self) -> float:
        """The vendor's figure for dense bf16 matrix products, in TFLOP/s."""
        return GPUS[self.key].peak.matmul_tflops


# Memory: what nvidia-smi shows, less what the driver keeps. NVLink: half of the vendors' figure,
# which counts both ways. Network: one 400 Gb/s port per GPU, as in the vendors' reference systems.
_GPUS = (
    PlannedGpu(key="a100", name="A100 SXM 80 GB", memory=int(79.1 * GIB), node_gb_s=300),
    PlannedGpu(key="h100", name="H100 SXM 80 GB", memory=int(79.1 * GIB), node_gb_s=450),
    PlannedGpu(key="h100-pcie", name="H100 PCIe 80 GB", memory=int(79.1 * GIB), node_gb_s=64),
    PlannedGpu(key="h200", name="H200 SXM 141 GB", memory=int(139.8 * GIB), node_gb_s=450),
    PlannedGpu(key="b200", name="B200 SXM 180 GB", memory=int(178.3 * GIB), node_gb_s=900),
    PlannedGpu(key="rtx4090", name="RTX 4090 24 GB", memory=int(23.5 * GIB), node_gb_s=32),
)
_OTHER_NAMES = {"4090": "rtx4090", "h100-sxm": "h100", "h200-sxm": "h200"}


def find_gpu(name: str) -> PlannedGpu:
    """Return a GPU by its name. Raises InputError for unknown names, and lists the known ones."""
    key = _OTHER_NAMES.get(name.lower(), name.lower())
    for gpu in _GPUS:
        if gpu.key == key:
            return gpu
    names = ", ".join([*(gpu.key for gpu in _GPUS), *_OTHER_NAMES])
    raise InputError(f"unknown GPU {name!r}; choose from: {names}")
