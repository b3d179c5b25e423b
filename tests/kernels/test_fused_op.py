"""The shortcut for eager calls computes what the registered op computes, and yields to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from apt.bench.inputs import Inputs, Random
from apt.bench.ops import OPS, variants_of
from apt.bench.shapes import Shape
from apt.kernels import fused_op as module
from apt.kernels.backends import HOST_BOUND
from apt.kernels.backends import OPS as BACKENDS
from apt.kernels.fused_op import FusedOp, LibraryOp, keep, kept
from apt.kernels.signatures import ModulatedNorm

pytest.importorskip("triton")
from apt.kernels._triton.modulated_norm import modulated_norm_op

KERNELS = Path(module.__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Shape(name="small", batch=2, tokens=6, heads=2, head_dim=16, dtype=torch.float32)
NAMES = [
    "modulated_norm", "residual_modulated_norm", "norm_rope", "qk_norm_rope", "joint_qk_norm_rope",
    "query_pooling",
]  # fmt: skip


def draw(name: str) -> Inputs:
    inputs = OPS[name].draw(SMALL, Random(torch.Generator(DEVICE).manual_seed(0), torch.float32))
    for wanted in OPS[name].gradients:
        inputs[wanted].requires_grad_()
    return inputs


def outputs_and_gradients(name: str, inputs: Inputs) -> list[Tensor]:
    found = variants_of(OPS[name])["triton"](inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    wanted = [inputs[n] for n in OPS[name].gradients]
    weights = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, weights)]


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_are_the_same_function(name, monkeypatch):
    inputs = draw(name)
    short = outputs_and_gradients(name, inputs)
    with torch.no_grad():
        alone = variants_of(OPS[name])["triton"](inputs)
    monkeypatch.setattr(module, "_somebody_looks", lambda: True)
    long = outputs_and_gradients(name, inputs)
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(alone if isinstance(alone, tuple) else (alone,), long, strict=False):
        assert torch.equal(a, b)
        assert a.grad_fn is None


class Seen(TorchDispatchMode):
    """Records our ops as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "apt":
            self.ops.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["modulated_norm", "joint_qk_norm_rope"])
def test_dispatch_modes_and_the_profiler_see_the_ops(name):
    inputs = draw(name)
    with Seen() as seen:
        outputs_and_gradients(name, inputs)
    assert seen.ops == [f"{name}.default", f"{name}_backward.default"]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        outputs_and_gradients(name, inputs)
    assert {f"apt::{name}", f"apt::{name}_backward"} <= {e.key for e in profiler.key_averages()}


def modulated(x: Tensor, scale: Tensor) -> Tensor:
    return modulated_norm_op(ModulatedNorm(x, scale, scale, None, None, None, 1e-6, False))[0]


def test_tensors_without_data_take_the_op():
    for where in (FakeTensorMode(), torch.device("meta")):
        with where:
            x, scale = torch.empty(2, 3, 16), torch.empty(2, 16)
        y = modulated(x, scale)
        assert type(y) is type(x)
        assert (y.shape, y.device) == (x.shape, x.device)


def test_a_transform_takes_the_op():
    x, scale = torch.randn(2, 2, 3, 16, device=DEVICE), torch.randn(2, 2, 16, device=DEVICE)
    found = torch.func.vmap(modulated)(x, scale)
    assert torch.equal(
        found, torch.stack([modulated(*pair) for pair in zip(x, scale, strict=True)])
    )


class Options(NamedTuple):
    factor: float
    sign: int


class Lists(NamedTuple):
    """Lists in and out, an absent tensor, and fields in fields."""

    xs: list[Tensor]
    y: Tensor
    z: Tensor | None
    options: Options


@pytest.fixture(scope="module")
def asked() -> list[Any]:
    """For each call, the elements of xs whose gradients were requested."""
    return []


@pytest.fixture(scope="module")
def op(asked: list[Any]) -> FusedOp[Lists]:
    def function(inputs: Lists) -> list[Tensor]:
        factor, sign = inputs.options
        return [x * inputs.y * factor * sign for x in inputs.xs]

    def save(ctx: Any, inputs: Lists, output: Any) -> None:
        keep(ctx, inputs)

    def gradient(ctx: Any, grads: list[Tensor]) -> Any:
        inputs: Lists = kept(ctx)
        asked.append(list(ctx.needs_input_grad[0]))
        factor = inputs.options.factor * inputs.options.sign
        of_y = sum(g * x * factor for g, x in zip(grads, inputs.xs, strict=True))
        return [g * inputs.y * factor for g in grads], of_y, None, None, None

    return FusedOp(
        "apt_test::lists",
        function,
        fake=lambda inputs: [torch.empty_like(x) for x in inputs.xs],
        save=save,
        gradient=gradient,
    )


def test_the_fields_are_the_schema(op: FusedOp[Lists]):
    assert str(op.overload._schema) == (
        "apt_test::lists(Tensor[] xs, Tensor y, Tensor? z, float factor, SymInt sign) -> Tensor[]"
    )


WAYS = [lambda op, inputs: op(inputs), lambda op, inputs: LibraryOp.__call__(op, inputs)]


@pytest.mark.parametrize("way", WAYS, ids=["short", "long"])
def test_lists_and_what_is_absent(op: FusedOp[Lists], asked: list[Any], way: Callable[..., Any]):
    xs = [torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)]
    y = torch.tensor(5.0, requires_grad=True)
    found = way(op, Lists(xs, y, None, Options(10.0, -1)))
    assert isinstance(found, list)
    assert [v.item() for v in found] == [-100.0, -150.0]
    gradients = torch.autograd.grad(found, [xs[0], y], [torch.tensor(1.0), torch.tensor(2.0)])
    assert [float(g) for g in gradients] == [-50.0, -10 * (2 + 2 * 3)]
    assert asked[-1] == [True, False]


def test_the_ops_under_test_are_those_that_are_host_bound():
    assert set(NAMES) == HOST_BOUND


def test_a_kernels_file_has_its_ops_name():
    """`_triton/NAME.py` and `apt::NAME` in torch.library match one to one, and so does
    `apt/kernels/NAME.py`, except that two ops live in the file of the op whose reference they
    share."""
    public, fused = (
        {path.stem for path in folder.glob("*.py")} for folder in (KERNELS, KERNELS / "_triton")
    )
    ops = {name for name, backends in BACKENDS.items() if "triton" in backends}
    ops -= {"qk_norm_rope"}  # two tensors for the op of `norm_rope`
    together = {"residual_modulated_norm": "modulated_norm", "joint_qk_norm_rope": "norm_rope"}
    files = {together.get(name, name) for name in ops}
    assert files <= public and ops <= fused
    assert fused & public == files | {"__init__"}
    for name in ops:
        importlib.import_module(f"apt.kernels._triton.{name}")
    registered = {
        name.removeprefix("apt::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("apt::")
    }
    assert {name.removesuffix("_backward") for name in registered} == ops
