"""Which kernel an attention backend really runs.

"native" lets torch pick. On an H100 that is cuDNN, or, with an older cuDNN or CUDA and without a
word, FlashAttention-2, which takes 1.7 times as long. So the choice can be asked for, watched while
a model runs, and explained.
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

# From torch's selection (sdp_utils.cpp): the GPUs on which cuDNN comes first, and the versions
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

# Parts of device kernels' names, the more special first
_NAMES = (
    ("cudnn", KERNELS[SDPBackend.CUDNN_ATTENTION]),
    ("pytorch_flash", KERNELS[SDPBackend.FLASH_ATTENTION]),
    ("fmha_cutlass", KERNELS[SDPBackend.EFFICIENT_ATTENTION]),
    ("cutlass_80_tensorop_flash", KERNELS[SDPBackend.EFFICIENT_ATTENTION]),
    ("flashattnfwdsm90", "FlashAttention-3"),
    ("flash_fwd", "a flash kernel of a package"),
)


class AttentionUse(NamedTuple):
    """A kind of call: what was asked for, what runs, and on what.

    Attributes:
        backend: a name of `apt.kernels.attention_status`.
        kernel: what it runs on these inputs.
        shape: (B, Lq, Lk, H, Dh).
        dtype: without "torch.".
    """

    backend: str
    kernel: str
    shape: tuple[int, int, int, int, int]
    dtype: str


# Watchers that are in force; one list for the process, as for the backends
watchers: list[Counter[AttentionUse]] = []


@contextmanager
def watch_attention() -> Iterator[Counter[AttentionUse]]:
    """Count the attention calls made inside, on any thread, by kind.

    Calls in compiled code and replays of CUDA graphs are not seen.
    """
    seen: Counter[AttentionUse] = Counter()
    watchers.append(seen)
    try:
        yield seen
    finally:
        watchers.pop()


def native_kernel(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> str:
    """What torch picks for these inputs (B, H, L, Dh): a value of `KERNELS`.

    It is torch's own selection that is asked, the one that `scaled_dot_product_attention` asks.
    """
    with torch.cuda.device_of(q):
        choice = torch._fused_sdp_choice(q, k, v, attn_mask)
    return KERNELS.get(SDPBackend(choice), SDPBackend(choice).name)


def kernel_by_name(name: str) -> str | None:
    """Whose attention a device kernel is, by its name in a profile; None for one not known."""
    lowered = name.lower()
    return next((kernel for part, kernel in _NAMES if part in lowered), None)


def cudnn_version() -> str:
    """Of the cuDNN that torch loads: "9.19.0"; empty without one."""
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if number is None:
        return ""
    return _dotted((number // 10000, number // 100 % 100, number % 100))


def why_not_cudnn(device: torch.device | None = None) -> str | None:
    """Why torch does not put cuDNN's attention first on a GPU where it is the fastest.

    None if it does, and for every other device. Without a device: for any GPU here.
    """
    if not _cudnn_is_fastest(device):
        return None
    version = cudnn_version()
    if not version:
        return "torch has no cuDNN here"
    if not torch.backends.cudnn.enabled or not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN is switched off in this process"
    if _numbers(version) <= CUDNN_AFTER:
        return f"cuDNN is {version}, and must be newer than {_dotted(CUDNN_AFTER)}"
    cuda = torch.version.cuda or "0"
    if _numbers(cuda) < CUDA_FROM:
        return f"torch is built for CUDA {cuda}, and must be for {_dotted(CUDA_FROM)} or newer"
    return None


def attention_warning(device: torch.device, kernels: Collection[str]) -> str | None:
    """A line for people if "native" ran something else than cuDNN where cuDNN is the fastest.

    Args:
        device: where it ran.
        kernels: what "native" ran there, in the words of `KERNELS`.
    """
    others = sorted(set(kernels) - {KERNELS[SDPBackend.CUDNN_ATTENTION]})
    if not others or not _cudnn_is_fastest(device):
        return None
    reason = why_not_cudnn(device) or "torch refuses it for these inputs, or was told another order"
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
