"""Run the package's own code on tensors that have sizes but no data."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode

__all__ = ["without_data"]


@contextmanager
def without_data() -> Iterator[None]:
    """Make tensors created inside the block take no memory, and ops on them no time.

    Modules can still be moved and cast. Tables that models cache between calls are cleared before
    and after.
    """
    original = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    _forget_tables()
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        mode.fake_tensor_converter = _NoConstants()
        with mode:
            yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
        _forget_tables()


class _NoConstants(FakeTensorConverter):
    """Makes no tensor keep its data, as torch does for `torch.tensor(0.5)`.

    torch finds such tensors again by the address of their storage. A later tensor can get the same
    address once the first is gone, and the process then crashes.
    """

    def from_real_tensor(
        self,
        fake_mode: FakeTensorMode,
        t: Tensor,
        make_constant: bool = False,
        *rest: Any,
        **options: Any,
    ) -> FakeTensor:
        return super().from_real_tensor(fake_mode, t, False, *rest, **options)


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace torch's `Module._apply`, which cannot swap the contents of tensors without data."""
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
        # isinstance() reads `__class__`, which makes some objects print warnings.
        if type(found) is functools._lru_cache_wrapper:
            owner: Any = getattr(found, "__module__", "") or ""
            if owner.startswith("apt.models."):
                found.cache_clear()
