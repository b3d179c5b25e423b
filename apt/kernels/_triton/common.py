"""What the Triton ops share around their kernels."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from apt.errors import InputError


class Backward(Protocol):
    """A backward pass, as `register_autograd` takes it."""

    def __call__(self, ctx: Any, *grads: Tensor) -> NoReturn: ...


@cache
def num_processors(device: torch.device) -> int:
    """Programs that a device runs side by side; the interpreter shares out as if it had 4."""
    if device.type != "cuda":
        return 4
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return processors


def no_double_backward(ops: str) -> Backward:
    """The backward pass of a backward op, which raises InputError; `ops` names them in words."""

    def raise_it(ctx: Any, *grads: Tensor) -> NoReturn:
        raise InputError(
            f"{ops} in Triton cannot be differentiated twice; "
            "pass backend='reference', or compute inside apt.kernels.kernel_backend('reference')"
        )

    return raise_it


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The context of a backward pass that raises."""
