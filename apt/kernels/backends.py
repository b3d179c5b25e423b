"""Choose the implementation of a fused op, and check what each one needs.

The backend is chosen by the first of these that is set: the `backend` argument, the innermost
`kernel_backend(...)`, and the environment variable APT_KERNEL_BACKEND. Otherwise the op chooses:
Triton on CUDA tensors if it can run and the input is large enough, else the torch reference. A
backend that was chosen by name runs, or raises with the reason. `kernel_backend` and the variable
are for all ops at once; an op without that backend has only the reference, and uses it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from apt.errors import InputError, MissingPackageError

ENVIRONMENT_VARIABLE = "APT_KERNEL_BACKEND"

OPS = {
    "modulated_norm": ("reference", "triton"),
    "residual_modulated_norm": ("reference", "triton"),
    "norm_rope": ("reference", "triton"),
    "qk_norm_rope": ("reference", "triton"),
    "joint_qk_norm_rope": ("reference", "triton"),
    "sample_shifted_timesteps": ("reference", "triton"),
    "perturbed_batch": ("reference", "triton"),
    "query_pooling": ("reference", "triton"),
    "fused_rmsprop": ("reference", "triton"),
}
BACKENDS = ("reference", "triton")

TRITON_VERSIONS = ((3, 6), (3, 9))  # oldest and newest supported
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOWEST_CAPABILITY = (8, 0)

# For inputs with fewer values than this, the host's time dominates with both backends, and the
# reference takes half as much of it (`python -m benchmarks.host_time`): for 2^20 values in bf16 it
# moves 24 MB in 8 microseconds on an H100, and a call of the kernel takes 50 on the host. In a CUDA
# graph the host's time does not matter, and kernels are faster at any size: choose them by name.
SMALL = 2**20
SMALL_VARIABLE = "APT_KERNEL_SMALL"
HOST_BOUND = frozenset(
    {
        "modulated_norm",
        "residual_modulated_norm",
        "norm_rope",
        "qk_norm_rope",
        "joint_qk_norm_rope",
        "query_pooling",
    }
)

# One stack for the whole process, as for attention: checkpointing recomputes on autograd's threads.
_chosen: list[str] = []
_imagined: list[bool] = []

_NO_PACKAGE = "needs `pip install 'diffusion-apt[triton]'`, or the triton of a CUDA build of torch"


class KernelUse(NamedTuple):
    """A kind of call: the op, the backend that ran, and why."""

    op: str
    backend: str
    reason: str


# Active watchers
_watchers: list[Counter[KernelUse]] = []


class BackendStatus(NamedTuple):
    """One row of a status table: `reason` says why a backend is unavailable, or describes it."""

    name: str
    available: bool
    reason: str


def kernel_status() -> list[BackendStatus]:
    """Return a row `op/backend` for each implementation of each fused op on this machine.

    Available means that it can run on at least one GPU here. Some inputs (fp64, CPU tensors, those
    on an older GPU) may still be refused.
    """
    reason = _why_no_triton()
    triton = BackendStatus("triton", reason is None, reason or _describe_triton())
    plain = BackendStatus("reference", True, "torch ops")
    small = plain._replace(reason=f"torch ops; also for GPU inputs below {small_below():,} values")
    return [
        (triton if name == "triton" else small if op in HOST_BOUND else plain)._replace(
            name=f"{op}/{name}"
        )
        for op, names in OPS.items()
        for name in names
    ]


def small_below() -> int:
    """Return the size of the first input below which ops in `HOST_BOUND` choose the reference.

    The size is in values. APT_KERNEL_SMALL sets another one; with 0, kernels are used at any size.
    Raises InputError if it is not a whole number.
    """
    text = os.environ.get(SMALL_VARIABLE)
    if text is None:
        return SMALL
    if not text.isdecimal():
        raise InputError(
            f"{SMALL_VARIABLE} must be a whole number of values, or 0 for no limit; got {text!r}"
        )
    return int(text)


@contextmanager
def watch_kernels() -> Iterator[Counter[KernelUse]]:
    """Count calls of fused ops inside the block, on any thread, by backend and reason.

    Calls in compiled code and replays of CUDA graphs are not counted.
    """
    seen: Counter[KernelUse] = Counter()
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.pop()


@contextmanager
def kernel_backend(name: str) -> Iterator[None]:
    """Make every fused op called inside the block, on any thread, use one backend.

    Raises InputError for an unknown name, or a backend that no device here can run.
    """
    if name not in BACKENDS:
        raise InputError(f"unknown kernel backend {name!r}; choose from: {', '.join(BACKENDS)}")
    reason = _why_no_triton() if name == "triton" else None
    if reason:
        raise _cannot_run("kernel", name, reason)
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


@contextmanager
def imagined_gpu() -> Iterator[None]:
    """Let fused ops called inside the block choose as on a GPU that can run every kernel.

    For tensors without data, on any device: ops of torch.library return tensors without data for
    those, and launch nothing.
    """
    _imagined.append(True)
    try:
        yield
    finally:
        _imagined.pop()


def current_kernel_backend() -> str | None:
    """Return the backend that was chosen for all ops; None if each op chooses.

    Raises InputError if APT_KERNEL_BACKEND is not a backend.
    """
    if _chosen:
        return _chosen[-1]
    name = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if name and name not in BACKENDS:
        raise InputError(
            f"{ENVIRONMENT_VARIABLE}={name!r} is not a kernel backend; "
            f"choose from: {', '.join(BACKENDS)}"
        )
    return name or None


def check_backend(op: str, backend: str | None) -> None:
    """Raise InputError for a backend that the op does not have; does not check if it can run."""
    if backend is not None and backend not in OPS[op]:
        raise InputError(
            f"{op} has no backend {backend!r}; choose from: {', '.join(OPS[op])}, or leave it out"
        )


def resolve_backend(
    op: str,
    backend: str | None,
    tensors: Sequence[Tensor | None] = (),
    limit: str | None = None,
) -> str:
    """Return the backend that `op` uses for these tensors.

    Args:
        op: a key of OPS.
        backend: the caller's choice; None for the choice made outside, or by the op.
        tensors: the inputs; the first one gives device and size.
        limit: why the op's kernel cannot take them, for reasons other than device and dtype; None
            if it can.

    Raises:
        InputError: for a backend that the op does not have, or that was chosen by name and cannot
            run.
    """
    chosen = _choose(op, backend, tensors, limit)
    if not torch.compiler.is_compiling() and _watchers:
        for seen in _watchers:
            seen[chosen] += 1
    return chosen.backend


def _choose(
    op: str, backend: str | None, tensors: Sequence[Tensor | None], limit: str | None
) -> KernelUse:
    check_backend(op, backend)
    name = backend or current_kernel_backend()
    if "triton" not in OPS[op]:
        return KernelUse(op, "reference", "it has no other")
    if name == "reference":
        return KernelUse(op, "reference", "asked for")
    given = [tensor for tensor in tensors if tensor is not None]
    if name is None and not (given[0].is_cuda or _imagined):
        # The interpreter is slow, and only for tests
        return KernelUse(op, "reference", f"inputs on {given[0].device.type}")
    if name is None and op in HOST_BOUND and given[0].numel() < (below := small_below()):
        return KernelUse(op, "reference", f"inputs below {below:,} values")
    device = given[0].device if given[0].is_cuda else None
    reason = _why_no_triton(device) or why_not_tensors(given) or limit
    if name is None:
        return KernelUse(op, "reference" if reason else "triton", reason or "it can take them")
    if reason:
        raise _cannot_run(op, name, reason)
    return KernelUse(op, "triton", "asked for")


def _why_no_triton(device: torch.device | None = None) -> str | None:
    """Return why Triton kernels cannot run on a GPU, or on any GPU here; None if they can."""
    try:
        import triton
    # A package built for another system fails when its libraries are loaded
    except (ImportError, OSError) as error:
        return f"{_NO_PACKAGE} ({type(error).__name__}: {error})"
    lowest, highest = TRITON_VERSIONS
    if not lowest <= _version(triton.__version__) <= highest:
        return (
            f"needs triton {lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}, "
            f"found {triton.__version__}"
        )
    if interpreted() or _imagined:
        return None
    if device is None and not torch.cuda.is_available():
        return "needs a CUDA GPU, or TRITON_INTERPRET=1 from the start to run slowly on the CPU"
    asked = capabilities(device)
    too_old = those_outside(asked, LOWEST_CAPABILITY)
    if len(too_old) < len(asked):
        return None
    major, minor = LOWEST_CAPABILITY
    return f"needs compute capability {major}.{minor}, found {', '.join(too_old)}"


def capabilities(device: torch.device | None = None) -> dict[str, tuple[int, int]]:
    """Return the compute capability of a GPU, or of every GPU here, by its name in torch."""
    if device is not None:
        return {str(device): torch.cuda.get_device_capability(device.index)}
    every = range(torch.cuda.device_count())
    return {f"cuda:{index}": torch.cuda.get_device_capability(index) for index in every}


def those_outside(
    asked: Mapping[str, tuple[int, int]],
    lowest: tuple[int, int],
    highest: tuple[int, int] | None = None,
) -> list[str]:
    """Return the GPUs whose compute capability is too low or too high, with the capability."""
    return [
        f"{found[0]}.{found[1]} ({gpu})"
        for gpu, found in asked.items()
        if found < lowest or found > (highest or found)
    ]


def but_not_on(gpus: Sequence[str]) -> str:
    """Return the end of a description that names the GPUs a backend does not run on."""
    return f", but not on {', '.join(gpus)}" if gpus else ""


def why_not_tensors(tensors: Sequence[Tensor]) -> str | None:
    """Return why Triton kernels cannot take these tensors; None if they can."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"takes tensors on one device, got {', '.join(sorted(map(str, devices)))}"
    if not (tensors[0].is_cuda or interpreted() or _imagined):
        return f"takes CUDA tensors, got {tensors[0].device.type}"
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in TRITON_DTYPES:
            return f"takes fp32, fp16 and bf16, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def _describe_triton() -> str:
    import triton

    if interpreted():
        return f"triton {triton.__version__}, interpreted"
    too_old = those_outside(capabilities(), LOWEST_CAPABILITY)
    return f"triton {triton.__version__}{but_not_on(too_old)}"


def _cannot_run(op: str, name: str, reason: str) -> InputError:
    missing = reason.startswith(_NO_PACKAGE)
    return (MissingPackageError if missing else InputError)(
        f"{op} backend {name!r} cannot run: {reason}. "
        "Use 'reference', or leave the choice out (`apt.kernels.kernel_status()` has the reasons)"
    )
