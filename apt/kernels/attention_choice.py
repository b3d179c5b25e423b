"""Find out which kernel an attention backend really runs.

"native" lets torch choose. On an H100 it chooses cuDNN or, with an older cuDNN or CUDA and without
any notice, FlashAttention-2, which takes 1.7 times as long. The functions here return the choice,
watch it while a model runs, and explain it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from apt.kernels.backends import capabilities

# From torch's selection (sdp_utils.cpp): GPUs on which cuDNN comes first, and the versions needed
CUDNN_FIRST = ((9, 0), (10, 0))
CUDNN_AFTER = (9, 15, 0)
CUDA_FROM = (12, 9)

KERNELS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "torch's flash",
    SDPBackend.EFFICIENT_ATTENTION: "torch's memory-efficient",
    SDPBackend.MATH: "torch's plain softmax",
}
PLAIN = "plain products"

# Parts of device kernels' names, the more specific ones first
_NAMES = (
    ("cudnn", KERNELS[SDPBackend.CUDNN_ATTENTION]),
    ("pytorch_flash", KERNELS[SDPBackend.FLASH_ATTENTION]),
    ("fmha_cutlass", KERNELS[SDPBackend.EFFICIENT_ATTENTION]),
    ("cutlass_80_tensorop_flash", KERNELS[SDPBackend.EFFICIENT_ATTENTION]),
    ("flashattnfwdsm90", "FlashAttention-3"),
    ("flash_fwd", "a flash kernel of a package"),
)


class AttentionUse(NamedTuple):
    """A kind of call: the backend that was asked for, the kernel that runs, and the inputs.

    Attributes:
        backend: a name of `apt.kernels.attention_status`.
        kernel: the kernel that it runs on these inputs.
        shape: (B, Lq, Lk, H, Dh).
        dtype: name of the dtype, without "torch.".
    """

    backend: str
    kernel: str
    shape: tuple[int, int, int, int, int]
    dtype: str


# Active watchers; one list for the whole process, as for the backends
watchers: list[Counter[AttentionUse]] = []


@contextmanager
def watch_attention() -> Iterator[Counter[AttentionUse]]:
    """Count attention calls inside the block, on any thread, by kind.

    Calls in compiled code and replays of CUDA graphs are not counted.
    """
    seen: Counter[AttentionUse] = Counter()
    watchers.append(seen)
    try:
        yield seen
    finally:
        watchers.pop()


def native_kernel(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> str:
    """Return the kernel that torch chooses for these inputs (B, H, L, Dh), a value of `KERNELS`.

    This calls torch's own selection, the one that `scaled_dot_product_attention` calls.
    """
    with torch.cuda.device_of(q):
        choice = torch._fused_sdp_choice(q, k, v, attn_mask)
    return KERNELS.get(SDPBackend(choice), SDPBackend(choice).name)


def kernel_by_name(name: str) -> str | None:
    """Return the attention that a device kernel belongs to, by its name in a profile, or None."""
    lowered = name.lower()
    return next((kernel for part, kernel in _NAMES if part in lowered), None)


def cudnn_version() -> str:
    """Return the version of the cuDNN that torch loads, such as "9.19.0"; empty without one."""
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if number is None:
        return ""
    return _dotted((number // 10000, number // 100 % 100, number % 100))


def why_not_cudnn(device: torch.device | None = None) -> str | None:
    """Return why torch does not prefer cuDNN's attention on a GPU where it is the fastest.

    None if it does, and for all other devices. Without a device: for any GPU here.
    """
    if not _cudnn_is_fastest(device):
        return None
    version = cudnn_version()
    if not version:
        return "torch has no cuDNN here"
    if not torch.backends.cudnn.enabled or not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN is switched off in this process"
    if _numbers(version) <= CUDNN_AFTER:
        return f"cuDNN is {version}, but must be newer than {_dotted(CUDNN_AFTER)}"
    cuda = torch.version.cuda or "0"
    if _numbers(cuda) < CUDA_FROM:
        return f"torch is built for CUDA {cuda}, but must be for {_dotted(CUDA_FROM)} or newer"
    return None


def attention_warning(device: torch.device, kernels: Collection[str]) -> str | None:
    """Return a warning if "native" did not run cuDNN although that is the fastest; else None.

    Args:
        device: the device that it ran on.
        kernels: what "native" ran there, in the words of `KERNELS`.
    """
    others = sorted(set(kernels) - {KERNELS[SDPBackend.CUDNN_ATTENTION]})
    if not others or not _cudnn_is_fastest(device):
        return None
    reason = why_not_cudnn(device) or "torch refuses it for these inputs, or was set to another"
    return (
        f"'native' attention runs {', '.join(others)} on this GPU, where cuDNN takes about half "
        f"the time on long sequences: {reason}"
    )


def _cudnn_is_fastest(device: torch.device | None) -> bool:
    if (device is not None and device.type != "cuda") or not torch.cuda.is_available():
        return False
    return any(capability in CUDNN_FIRST for capability in capabilities(device).values())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
