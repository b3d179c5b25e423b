"""Ops of torch.library that eager calls reach by a short way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Function = Callable[..., Any]
# Of arguments that are lists, None for the others; None if no argument is a list
Sizes = tuple[int | None, ...] | None


class FusedOp:
    """An op of torch.library, which is passed by where nobody looks at ops.

    Compilers, tracers, profilers, modes, transforms and subclasses of tensors need the library's
    op. For everybody else it is host time, up to as much as launching the kernel takes, and several
    times that with a gradient. Then the op's function is called as it is, and the gradient that was
    registered with the library hangs on an autograd function of ours. The kernels are the same.

    Attributes:
        overload: the library's op.
    """

    def __init__(self, name: str, function: Function) -> None:
        self._function = function
        self._op = torch.library.custom_op(name, function, mutates_args=())
        namespace, _, short = name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default
        (first, *others) = self.overload._schema.returns
        self._returns_list = not others and first.type.kind() == "ListType"
        self._gradient: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Function) -> Function:
        """As in torch.library."""
        return self._op.register_fake(fake)

    def register_autograd(self, backward: Function, *, setup_context: Function) -> None:
        """As in torch.library."""
        self._op.register_autograd(backward, setup_context=setup_context)
        self._gradient = _gradient(self._function, backward, setup_context)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _somebody_looks():
            return self.overload(*args)
        flat, sizes = _flatten(args)
        tensors = [value for value in flat if isinstance(value, Tensor)]
        if not all(type(x) in (Tensor, Parameter) and not x.is_meta for x in tensors):
            return self.overload(*args)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self._function(*args)
        assert self._gradient is not None
        output = self._gradient.apply(sizes, *flat)
        return list(output) if self._returns_list else output


def fused_op(name: str) -> Callable[[Function], FusedOp]:
    """Decorate the function of an op `namespace::name`; it writes to none of its inputs."""
    return lambda function: FusedOp(name, function)


def _somebody_looks() -> bool:
    """Whether a mode, a transform, a profiler or a tracer wants to see ops."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def _gradient(
    function: Function, backward: Function, setup_context: Function
) -> type[torch.autograd.Function]:
    """What torch.library makes of the same three, without a dispatcher in between.

    An autograd function takes no lists: they come one by one, after their lengths.
    """

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, sizes: Sizes, *flat: Any) -> Any:
            args = _nest(flat, sizes)
            output = function(*args)
            setup_context(ctx, args, output)
            ctx.fused_op = sizes, isinstance(output, list)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            sizes, listed = ctx.fused_op
            needed = ctx.needs_input_grad
            ctx.needs_input_grad = _nest(needed[1:], sizes)
            try:
                found = backward(ctx, list(grads)) if listed else backward(ctx, *grads)
            finally:
                ctx.needs_input_grad = needed
            return (None, *_flatten(found)[0])

    return Gradient


def _flatten(values: Sequence[Any]) -> tuple[Sequence[Any], Sizes]:
    if list not in map(type, values):
        return values, None
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, list) else [value]
    return flat, tuple(len(v) if isinstance(v, list) else None for v in values)


def _nest(flat: Sequence[Any], sizes: Sizes) -> Sequence[Any]:
    if sizes is None:
        return flat
    values = iter(flat)
    return tuple(
        next(values) if size is None else [next(values) for _ in range(size)] for size in sizes
    )
