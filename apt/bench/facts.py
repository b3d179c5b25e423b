"""Facts about a measurement in words, for its record."""

from __future__ import annotations

from collections.abc import Collection

import torch

from apt.bench.split import Split
from apt.kernels.attention_choice import attention_warning, kernel_by_name


def attention_facts(
    device: torch.device, backend: str, chosen: Collection[str], parts: Split | None
) -> dict[str, str]:
    """Return which attention kernel ran, how that is known, and a warning if it is a poor one.

    Args:
        device: the device that it ran on.
        backend: the backend that was asked for.
        chosen: kernels that the selection reported.
        parts: a profile, which is more reliable on a GPU; None if there is none.
    """
    kernels, source = set(chosen), "by selection"
    if parts is not None and parts.attention_kernels:
        names = parts.attention_kernels
        kernels, source = {kernel_by_name(name) or name for name in names}, "by profile"
    if not kernels:
        return {}
    facts = {"attention_kernel": f"{', '.join(sorted(kernels))} ({source})"}
    if parts is not None and parts.attention_kernels:
        facts["device_kernels"] = ", ".join(parts.attention_kernels)
    warning = attention_warning(device, kernels) if backend == "native" else None
    return facts | ({"warning": warning} if warning else {})
