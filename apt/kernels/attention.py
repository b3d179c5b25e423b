"""Attention on (B, L, H, Dh) with a choice of backends, named as in diffusers.

    softmax(q k^T / sqrt(Dh) + mask) v

The backend is chosen by the first of these that is set: the `backend` argument, the innermost
`attention_backend(...)`, and the environment variable APT_ATTENTION_BACKEND. The default is
"native", which lets torch choose for each call, except that training on short bf16 sequences on the
CPU uses plain products. A backend that was chosen by name runs, or raises with the reason; no other
is tried.

Shapes: B samples, Lq and Lk tokens, H heads, Dh channels per head.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apt.distributed.sequence import TokenSplit, gather_heads, scatter_keys, scatter_queries
from apt.errors import InputError, MissingPackageError
from apt.kernels.attention_choice import (
    KERNELS,
    PLAIN,
    AttentionUse,
    native_kernel,
    watchers,
    why_not_cudnn,
)
from apt.kernels.backends import BackendStatus, but_not_on, capabilities, those_outside

ENVIRONMENT_VARIABLE = "APT_ATTENTION_BACKEND"

_SDPA_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
_CUDA_KERNELS = {
    "_native_cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "_native_flash": torch.backends.cuda.can_use_flash_attention,
    "_native_efficient": torch.backends.cuda.can_use_efficient_attention,
}


class _Package(NamedTuple):
    install: str
    module: str
    function: str
    lowest: tuple[int, int]  # compute capabilities
    highest: tuple[int, int] | None = None


_PACKAGES = {
    "flash": _Package("`pip install flash-attn`", "flash_attn", "flash_attn_func", (8, 0)),
    "_flash_3": _Package(
        "FlashAttention-3, built from flash-attention's folder hopper",
        "flash_attn_interface",
        "flash_attn_func",
        (9, 0),
        (9, 0),
    ),
    "flash_4": _Package("`pip install flash-attn-4`", "flash_attn.cute", "flash_attn_func", (9, 0)),
    "xformers": _Package(
        "`pip install xformers`", "xformers.ops", "memory_efficient_attention", (5, 0)
    ),
}
BACKENDS = ("native", *_SDPA_KERNELS, *_PACKAGES)

_PLAIN_SCORES = 256 * 256  # scores per head up to which plain products are faster

# Functions that were imported and called successfully, and on which GPUs. Compiled graphs only look
# them up, because they cannot import.
_functions: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {}
_probed: set[tuple[Callable[..., object], str]] = set()

# One stack for the whole process instead of a context variable: checkpointing recomputes blocks on
# autograd's threads, which must see the same backend as the forward pass.
_chosen: list[str] = []


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
    queries: TokenSplit | None = None,
    keys: TokenSplit | None = None,
) -> Tensor:
    """Compute softmax attention with scale 1 / sqrt(Dh).

    If tokens are split over ranks, q, k and v are those of this rank, and its queries attend to the
    keys of all ranks; see `apt.distributed.sequence`. If every rank has all keys, only queries are
    split: leave both splits out.

    Args:
        q: (B, Lq, H, Dh) queries, floating point.
        k, v: (B, Lk, H, Dh) keys and values of the same dtype and device.
        mask: (B, Lk) bool, True for the keys that may be attended to; at least one in each row. If
            tokens are split, the mask is for all tokens, in the order of the ranks.
        backend: a name of `attention_status()`, or None for the choice made outside.
        queries, keys: how the tokens of q, and those of k and v, are split.

    Returns:
        (B, Lq, H, Dh) in q.dtype.

    Raises:
        InputError: for shapes that do not fit, an unknown backend, and a backend that cannot run
            here or on these inputs, with the reason.
    """
    if (queries is None) != (keys is None):
        raise InputError("attention: pass the splits of both queries and keys, or neither")
    if queries is not None and keys is not None:
        return _split_attention(q, k, v, mask, backend, queries, keys)
    name = current_attention_backend() if backend is None else _known(backend)
    _check(q, k, v, mask)
    if not torch.compiler.is_compiling() and watchers:
        _tell_watchers(name, q, k, v, mask)
    if name in _PACKAGES:
        return _package_attention(name, q, k, v, mask)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    attn_mask = None if mask is None else mask[:, None, None, :]
    if name == "native" and _plain_is_faster(q, k, v):
        return _plain_attention(q, k, v, attn_mask).transpose(1, 2)
    if name == "native":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2)
    if not torch.compiler.is_compiling():
        reason = _why_not_native(name, q, k, v, attn_mask)
        if reason:
            raise _cannot_run(name, reason)
    with sdpa_kernel(_SDPA_KERNELS[name]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2)


def _split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    backend: str | None,
    queries: TokenSplit,
    keys: TokenSplit,
) -> Tensor:
    """Exchange tokens for heads, and attend over all tokens with this rank's share of the heads."""
    _check(q, k, v, None)
    if (q.shape[1], k.shape[1]) != (queries.length, keys.length):
        raise InputError(
            f"attention: the splits give this rank {queries.length} queries and {keys.length} "
            f"keys; got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    q_H, k_H, v_H = scatter_queries(q, queries), scatter_keys(k, keys), scatter_keys(v, keys)
    attended = attention(q_H, k_H, v_H, mask=mask, backend=backend)
    return gather_heads(attended, queries, q.shape[2])


def attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, backend: str | None = None
) -> str:
    """Return in words the kernel that `attention` would run on these inputs.

    For "native", torch's own selection answers, for these tensors on their device.
    """
    name = current_attention_backend() if backend is None else _known(backend)
    if name in _PACKAGES:
        return f"module {_PACKAGES[name].module}"
    if name in _SDPA_KERNELS:
        return KERNELS[_SDPA_KERNELS[name]]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if _plain_is_faster(q, k, v):
        return PLAIN
    return native_kernel(q, k, v, None if mask is None else mask[:, None, None, :])


def _tell_watchers(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    use = AttentionUse(
        backend=name,
        kernel=attention_kernel(q, k, v, mask=mask, backend=name),
        shape=(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3]),
        dtype=str(q.dtype).removeprefix("torch."),
    )
    for seen in watchers:
        seen[use] += 1


def _plain_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether these are short bf16 sequences on the CPU that need gradients.

    For those, torch's kernel takes twice as long as two products and a softmax, whose scores stay
    in the cache.
    """
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape[2] * k.shape[2] <= _PLAIN_SCORES
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
    )


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Compute attention by its definition on (B, H, L, Dh); scores have the inputs' dtype."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Make every `attention` call inside the block, on any thread, use one backend.

    Raises InputError for an unknown name, or a backend that no device here can run.
    """
    status = {row.name: row for row in attention_status()}[_known(name)]
    if not status.available:
        raise _cannot_run(name, status.reason)
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def current_attention_backend() -> str:
    """Return the backend that `attention` uses when none is passed.

    Raises InputError if APT_ATTENTION_BACKEND is not a backend.
    """
    if _chosen:
        return _chosen[-1]
    name = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if name and name not in BACKENDS:
        raise InputError(
            f"{ENVIRONMENT_VARIABLE}={name!r} is not an attention backend; "
            f"choose from: {', '.join(BACKENDS)}"
        )
    return name or "native"


def attention_status() -> list[BackendStatus]:
    """Return a row for each backend: whether this machine can run it, and why not or what it is.

    Available means that at least one GPU is of the right kind and, for a package, that it can be
    imported and a small call works there. A backend may still refuse some inputs (on another GPU, a
    mask, fp32, a large Dh), with the reason.
    """
    rows = [BackendStatus("native", True, _describe_native())]
    for name in BACKENDS[1:]:
        reason = _why_unavailable(name)
        rows.append(BackendStatus(name, reason is None, reason or _describe(name)))
    return rows


def _describe_native() -> str:
    text = "torch chooses a kernel for each call; on CPUs also plain products"
    reason = why_not_cudnn()
    return f"{text}; not cuDNN, which is the fastest here: {reason}" if reason else text


def _describe(name: str) -> str:
    if name in _PACKAGES:
        package = _PACKAGES[name]
        unfit = those_outside(capabilities(), package.lowest, package.highest)
        return f"module {package.module}{but_not_on(unfit)}"
    return "torch's plain softmax" if name == "_native_math" else "a kernel of torch"


def _why_unavailable(name: str, device: torch.device | None = None) -> str | None:
    """Return why a backend cannot run on a GPU, or on any device here; None if it can."""
    if name in _PACKAGES:
        return _why_no_package(name, device)
    if name in ("_native_cudnn", "_native_efficient") and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if name == "_native_cudnn" and not torch.backends.cudnn.is_available():
        return "this torch was built without cuDNN"
    return None


def _no_package(name: str) -> str:
    return f"needs {_PACKAGES[name].install}"


@torch.compiler.assume_constant_result  # a graph cannot contain its imports and calls
def _why_no_package(name: str, device: torch.device | None) -> str | None:
    """Do `_why_unavailable` for a package; if it is available, put its function in `_functions`."""
    package = _PACKAGES[name]
    try:
        function = getattr(importlib.import_module(package.module), package.function)
    # A package built for another torch or CUDA fails when its libraries are loaded
    except (ImportError, OSError, AttributeError) as error:
        return f"{_no_package(name)} ({type(error).__name__}: {error})"
    asked = capabilities(device)
    if not asked:
        return "needs a CUDA GPU"
    unfit = those_outside(asked, package.lowest, package.highest)
    if len(unfit) == len(asked):
        return f"has no kernels for compute capability {', '.join(unfit)}"
    failures = []
    for gpu, found in asked.items():
        if those_outside({gpu: found}, package.lowest, package.highest):
            continue
        failure = _why_not_called(function, gpu)
        if failure is None:
            _functions[name] = function
            return None
        failures.append(f"{gpu}: {failure}")
    return f"is installed, but a small call of it fails ({'; '.join(failures)})"


def _why_not_called(function: Callable[..., object], gpu: str) -> str | None:
    """Return what a call raises; None if it works. Packages without their CUDA part import, too."""
    if (function, gpu) in _probed:
        return None
    try:
        probe = _probe_input(gpu)
        with torch.no_grad():
            function(probe, probe, probe)
    # Any error of the package is the reason to show to the user
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    _probed.add((function, gpu))
    return None


def _probe_input(gpu: str) -> Tensor:
    """Return a small input, with a dtype and a width that every package takes."""
    return torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16, device=gpu)


def _why_not_native(
    name: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None
) -> str | None:
    """Return why torch's kernel cannot take these inputs (B, H, L, Dh); None if it can."""
    if name == "_native_math":
        return None
    if not q.is_cuda:
        if name != "_native_flash":
            return f"needs CUDA tensors, got {q.device.type}"
        if q.device.type != "cpu":
            return f"needs CUDA or CPU tensors, got {q.device.type}"
        return None
    usable = _CUDA_KERNELS[name]
    params = torch.backends.cuda.SDPAParams(q, k, v, attn_mask, 0.0, False, False)
    # torch checks the current GPU, but runs on the tensors' GPU
    with torch.cuda.device_of(q):
        if usable(params):
            return None
        # It reports its reasons only as warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            usable(params, debug=True)
    reasons = [str(warning.message).partition(" (Triggered")[0] for warning in caught]
    return "; ".join(reasons) or "torch refuses these inputs"


def _package_attention(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    reason = _why_unavailable(name, q.device if q.is_cuda else None)
    if reason is None and not q.is_cuda:
        reason = f"needs CUDA tensors, got {q.device.type}"
    if reason is None and mask is not None and name != "xformers":
        reason = "takes no key mask"
    if reason is None and q.dtype not in (torch.float16, torch.bfloat16) and name != "xformers":
        reason = f"takes fp16 or bf16, not {q.dtype}"
    if reason is not None:
        raise _cannot_run(name, reason)
    options = {} if mask is None else {"attn_bias": _additive_bias(q, mask)}
    out = _functions[name](q, k, v, **options)
    return out[0] if isinstance(out, tuple) else out


def _additive_bias(q: Tensor, mask: Tensor) -> Tensor:
    """Return the key mask for xformers: 0 and -inf, (B, H, Lq, Lk), rows aligned to 8 keys."""
    batch, keys = mask.shape
    padded = q.new_full((batch, 1, 1, -(-keys // 8) * 8), float("-inf"))
    padded[..., :keys].masked_fill_(mask[:, None, None, :], 0.0)
    return padded.expand(batch, q.shape[2], q.shape[1], -1)[..., :keys]


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise InputError(f"unknown attention backend {name!r}; choose from: {', '.join(BACKENDS)}")
    return name


def _cannot_run(name: str, reason: str) -> InputError:
    missing = name in _PACKAGES and reason.startswith(_no_package(name))
    return (MissingPackageError if missing else InputError)(
        f"attention backend {name!r} cannot run: {reason}. "
        "Use another (`apt.kernels.attention_status()` lists them) or 'native'"
    )


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise InputError(
            "attention: q must be (B, Lq, H, Dh), k and v (B, Lk, H, Dh); got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise InputError(
            "attention: q and k must agree in samples, heads and channels; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise InputError(
            f"attention: mask must be {tuple(k.shape[:2])} bool (B, Lk), got "
            f"{tuple(mask.shape)} {mask.dtype}"
        )
