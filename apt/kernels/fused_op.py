"""Ops of torch.library, each from one description, with a shortcut for eager calls.

An op takes a NamedTuple. Its fields, in order and with their types, are the op's schema. The op's
function, its fake, its save function and its gradient read them by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Generic, NoReturn, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.nn import Parameter

from apt.errors import InputError

Function = Callable[..., Any]
Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
_PLAIN = (Tensor, Parameter)
# The length of each argument that is a list, None for others; None if no argument is a list
Sizes = tuple[int | None, ...] | None


class LibraryOp(Generic[Inputs]):
    """An op of torch.library that takes a NamedTuple.

    One field may itself be a NamedTuple; its fields then take its place in the schema.

    Args:
        name: `namespace::name`.
        function: computes the output from the inputs; its annotations give the schema.
        fake: returns outputs without data, for inputs without data.
        save: saves in `ctx` what the gradient needs from inputs and output.
        gradient: returns the gradients of the inputs, field by field, from `ctx` and the gradients
            of the outputs.
        mutates_args: names of the fields that the function writes to.

    Attributes:
        overload: the op in torch.library.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Inputs], Any],
        *,
        fake: Callable[[Inputs], Any],
        save: Callable[[Any, Inputs, Any], None] | None = None,
        gradient: Function | None = None,
        mutates_args: Iterable[str] = (),
    ) -> None:
        types = get_type_hints(function)
        returned = types.pop("return")
        returned = None if returned is type(None) else returned
        ((_, kind),) = types.items()
        self._fields = _fields_of(kind)
        build = self._fields.build

        def run(*flat: Any) -> Any:
            return function(build(flat))

        run.__signature__ = self._fields.signature(returned)  # type: ignore[attr-defined]
        op = torch.library.custom_op(name, run, mutates_args=mutates_args)
        op.register_fake(lambda *flat: fake(build(flat)))
        if gradient is not None:
            assert save is not None
            op.register_autograd(
                gradient, setup_context=lambda ctx, inputs, output: save(ctx, build(inputs), output)
            )
        namespace, _, short = name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, inputs: Inputs) -> Any:
        return self.overload(*self._fields.flatten(inputs))


class FusedOp(LibraryOp[Inputs]):
    """An op of torch.library that plain eager calls bypass.

    Compilers, tracers, profilers, modes, transforms and tensor subclasses need the library's op. In
    all other calls, it only costs host time: up to as much as launching the kernel, and several
    times that with a gradient. Such calls run the op's function directly, and an autograd function
    of ours applies the gradient that was registered with the library. The kernels are the same.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Inputs], Any],
        *,
        fake: Callable[[Inputs], Any],
        save: Callable[[Any, Inputs, Any], None] | None = None,
        gradient: Function | None = None,
    ) -> None:
        super().__init__(name, function, fake=fake, save=save, gradient=gradient)
        self._function = function
        (first, *others) = self.overload._schema.returns
        self._returns_list = not others and first.type.kind() == "ListType"
        self._gradient = None
        if save is not None and gradient is not None:
            self._gradient = _gradient(self._fields, function, save, gradient)

    def __call__(self, inputs: Inputs) -> Any:
        if torch.compiler.is_compiling() or _somebody_looks():
            return super().__call__(inputs)
        flat, sizes = _unlist(self._fields.flatten(inputs))
        differentiable = False
        for value in flat:
            if isinstance(value, Tensor):
                if type(value) not in _PLAIN or value.is_meta:
                    return super().__call__(inputs)
                differentiable = differentiable or value.requires_grad
        if not differentiable or not torch.is_grad_enabled():
            return self._function(inputs)
        assert self._gradient is not None
        output = self._gradient.apply(sizes, *flat)
        return list(output) if self._returns_list else output


def backward_op(
    name: str,
    function: Callable[[Inputs], Any],
    *,
    fake: Callable[[Inputs], Any],
    ops: str,
) -> FusedOp[Inputs]:
    """Return the op of a backward pass, whose own backward raises InputError.

    `ops` names the differentiated ops in the message.
    """

    def raise_it(ctx: Any, *grads: Tensor) -> NoReturn:
        raise InputError(
            f"{ops} in Triton cannot be differentiated twice; "
            "pass backend='reference', or compute inside apt.kernels.kernel_backend('reference')"
        )

    return FusedOp(name, function, fake=fake, save=lambda *_: None, gradient=raise_it)


def keep(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Save all inputs of an op for its gradient; lists in the inputs must be lists of tensors."""
    flat, ctx.kept_sizes = _unlist(_fields_of(type(inputs)).flatten(inputs))
    ctx.kept = [None if isinstance(value, Tensor) else value for value in flat]
    ctx.kept_type = type(inputs)
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in flat))


def kept(ctx: Any) -> Any:
    """Return what `keep` saved."""
    flat = [
        value if tensor is None else tensor
        for value, tensor in zip(ctx.kept, ctx.saved_tensors, strict=True)
    ]
    return _fields_of(ctx.kept_type).build(_list_again(flat, ctx.kept_sizes))


def _somebody_looks() -> bool:
    """Return whether a mode, a transform, a profiler or a tracer needs to see ops."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def _gradient(
    fields: _Fields, function: Function, save: Function, gradient: Function
) -> type[torch.autograd.Function]:
    """Return an autograd function that does what torch.library does, without the dispatcher.

    An autograd function takes no lists, so their lengths come first, and then all elements.
    """

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, sizes: Sizes, *flat: Any) -> Any:
            inputs = fields.build(_list_again(flat, sizes))
            output = function(inputs)
            save(ctx, inputs, output)
            ctx.fused_op = sizes, isinstance(output, list)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            sizes, listed = ctx.fused_op
            needed = ctx.needs_input_grad
            ctx.needs_input_grad = _list_again(needed[1:], sizes)
            try:
                found = gradient(ctx, list(grads)) if listed else gradient(ctx, *grads)
            finally:
                ctx.needs_input_grad = needed
            return (None, *_unlist(found)[0])

    return Gradient


class _Fields:
    """The fields of a NamedTuple; a nested NamedTuple is replaced by its fields.

    Flattening and building are part of the host time of each call.
    """

    def __init__(self, kind: Any) -> None:
        self._make = kind._make
        self.types = types = get_type_hints(kind)
        nested = [name for name, type_ in types.items() if hasattr(type_, "_fields")]
        self._inner: _Fields | None = None
        if nested:
            (name,) = nested
            self._inner = _fields_of(types[name])
            self._at = kind._fields.index(name)
            self._end = self._at + len(self._inner.types)
            items = list(types.items())
            items[self._at : self._at + 1] = self._inner.types.items()
            self.types = dict(items)

    def flatten(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if self._inner is None:
            return inputs
        at = self._at
        return (*inputs[:at], *self._inner.flatten(inputs[at]), *inputs[at + 1 :])

    def build(self, flat: Sequence[Any]) -> Any:
        if self._inner is None:
            return self._make(flat)
        at, end = self._at, self._end
        return self._make((*flat[:at], self._inner.build(flat[at:end]), *flat[end:]))

    def signature(self, returned: Any) -> inspect.Signature:
        """Return the signature of a function that takes the fields one by one."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(n, kind, annotation=t) for n, t in self.types.items()]
        return inspect.Signature(parameters, return_annotation=returned)


@cache
def _fields_of(kind: Any) -> _Fields:
    return _Fields(kind)


def _unlist(values: Sequence[Any]) -> tuple[Sequence[Any], Sizes]:
    """Return all values with lists flattened, and the length of each list."""
    if list not in map(type, values):
        return values, None
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, list) else [value]
    return flat, tuple(len(v) if isinstance(v, list) else None for v in values)


def _list_again(flat: Sequence[Any], sizes: Sizes) -> Sequence[Any]:
    if sizes is None:
        return flat
    values = iter(flat)
    return tuple(
        next(values) if size is None else [next(values) for _ in range(size)] for size in sizes
    )
