"""The same functions from liger-kernel, which a user might use instead.

Liger has the modulated RMSNorm (scale and shift per sample or per token, no shared rows), but no
gated residual. That sum is added before it, as a user would write it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from apt.errors import InputError, MissingPackageError

Function = Any  # a function of liger_kernel.transformers.functional, which has no types


def liger_modulated_norm(inputs: dict[str, Tensor]) -> Tensor:
    """Call Liger's modulated RMSNorm. Raises InputError, with the reason, if it cannot run."""
    # in_place would write dL/dx over dL/dy, which the next sample needs; it moves the same bytes.
    # "gemma" computes in fp32 as we do; the default rounds intermediate values.
    run = _function("liger_modulated_rms_norm", inputs["x"])
    return run(
        inputs["x"],
        inputs.get("weight"),
        inputs["scale"],
        inputs["shift"],
        casting_mode="gemma",
        in_place=False,
    )


def liger_residual_modulated_norm(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute `residual_modulated_norm` with torch's addcmul and Liger's modulated RMSNorm."""
    x = torch.addcmul(inputs["x"], inputs["update"], inputs["gate"].unsqueeze(1))
    return x, liger_modulated_norm(inputs | {"x": x})


def _function(name: str, x: Tensor) -> Function:
    if not x.is_cuda:
        raise InputError("liger-kernel needs a CUDA GPU")
    try:
        module = importlib.import_module("liger_kernel.transformers.functional")
    # The import fails with a Triton or torch that it does not know
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError(
            f"needs `pip install liger-kernel` ({type(error).__name__}: {error})"
        ) from error
    if not hasattr(module, name):
        raise InputError(f"this liger-kernel has no {name}: `pip install -U liger-kernel`")
    return getattr(module, name)
