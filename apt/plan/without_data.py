"""Running the package's own code on tensors that have sizes, and no data."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["without_data"]


@contextmanager
def without_data() -> Iterator[None]:
    """What is made inside takes no memory, and ops on it no time; modules can be moved and cast.

    Tables that models keep from one call to the next are forgotten before and after.
    """
    original = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    _forget_tables()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
        _forget_tables()


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's, which swaps the contents of tensors; those without data it then cannot swap."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            changed = fn(parameter.detach())
            if (changed.dtype, changed.device) != (parameter.dtype, parameter.device):
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _forget_tables() -> None:
    for found in gc.get_objects():
        # Not isinstance(), which asks objects for their class: some answer with a warning.
        if type(found) is functools._lru_cache_wrapper:
            owner: Any = getattr(found, "__module__", "") or ""
            if owner.startswith("apt.models."):
                found.cache_clear()
