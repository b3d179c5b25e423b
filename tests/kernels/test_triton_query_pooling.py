"""Fused query pooling against fp64: on a GPU, or in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.errors import InputError
from apt.kernels import kernel_backend, query_pooling
from apt.kernels.backends import interpreted
from apt.kernels.query_pooling import pool_parts_reference, pool_reference
from apt.kernels.signatures import Pooling
from tests.memory import peak_bytes, saved_bytes

pytest.importorskip("triton")
from apt.kernels._triton import query_pooling as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Case(NamedTuple):
    """What a test draws its inputs from."""

    batch: int = 2
    length: int = 5
    heads: int = 3
    head_dim: int = 4
    width: int = 72
    value_dim: int = 2  # per head
    affine: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def draw(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        inner, outer = self.heads * self.head_dim, self.heads * self.value_dim
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.batch, self.length, self.width),
            "query": (inner,),
            "key_weight": (inner, self.width),
            "value_weight": (outer, self.width),
        }
        shapes |= {"value_bias": (outer,), "norm_weight": (self.width,)} if self.affine else {}
        inputs = {n: torch.randn(size, generator=generator) for n, size in shapes.items()}
        for name in ("key_weight", "value_weight"):
            inputs[name] *= self.width**-0.5  # scores of about 1: larger ones magnify any rounding
        return {n: v.to(DEVICE, self.dtype).requires_grad_() for n, v in inputs.items()}

    def run(self, inputs: dict[str, Tensor], backend: str | None, **options: Any) -> Tensor:
        return query_pooling(**inputs, num_heads=self.heads, backend=backend, **options)  # type: ignore[arg-type]

    def output_and_gradients(
        self, inputs: dict[str, Tensor], backend: str | None = "triton", **options: Any
    ) -> dict[str, Tensor]:
        y = self.run(inputs, backend, **options)
        generator = torch.Generator().manual_seed(self.seed + 1)
        direction = torch.randn(y.shape, generator=generator).to(y)
        gradients = torch.autograd.grad(y, list(inputs.values()), direction)
        return {"y": y} | {f"d {n}": g for n, g in zip(inputs, gradients, strict=True)}


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


def check(case: Case, *, floor: float = 0.05) -> None:
    """Output and every gradient within twice the reference's error against fp64.

    `floor`, in units of the type's epsilon, is for references that are exact by luck.
    """
    inputs = case.draw()
    expected = case.output_and_gradients(exact(inputs), "reference")
    reference = case.output_and_gradients(inputs, "reference")
    ours = case.output_and_gradients(inputs)
    # The interpreter truncates where hardware rounds to nearest: twice the error of a rounding.
    times = 4 if case.dtype == torch.bfloat16 and interpreted() else 2
    for name, want in expected.items():
        assert ours[name].shape == reference[name].shape
        assert ours[name].dtype == reference[name].dtype == case.dtype
        error, allowed = (off(values[name], want) for values in (ours, reference))
        # `not <=` also when the error is NaN
        assert error <= times * allowed + floor * torch.finfo(case.dtype).eps, name


def off(found: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(dtype, affine):
    check(Case(2, 150, 3, 8, 72, 4, affine, dtype))


WIDTHS = [64, 192, 1152, 1536, 2432, 3000, 3072, 5120, 8192]


@pytest.mark.parametrize("width", WIDTHS)
def test_accuracy_at_the_widths_of_models(width):
    check(Case(1, 40, 3, 1, width, 1, dtype=torch.bfloat16))


@pytest.mark.slow  # the interpreter adds up H D sums, 64 at a time
@pytest.mark.parametrize("width", WIDTHS)
def test_accuracy_at_the_widths_and_heads_of_models(width):
    check(Case(1, 40, width // 64, 1, width, 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_many_heads(dtype):
    check(Case(1, 40, 65, 1, 96, 1, dtype=dtype), floor=0.5)


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(2, 140),
    heads=st.integers(1, 40),
    width=st.integers(2, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_accuracy_at_ragged_shapes(batch, length, heads, width, dtype, seed):
    """Of the core alone: folding may cancel, which would magnify any rounding of its gradient.

    Errors are root mean squares over several draws: on a few numbers, the reference's error may be
    small by luck.
    """
    # The precision of an fp32 factor beside bf16 tokens
    core = 2.0**-15 if dtype == torch.bfloat16 else torch.finfo(torch.float32).eps
    limits = {"y": core, "d x": core + torch.finfo(dtype).eps, "d folded": core}
    found = [core_errors(batch, length, heads, width, dtype, 100 * seed + i) for i in range(4)]
    for name, limit in limits.items():
        ours, reference = (
            torch.tensor([draw[name][i] for draw in found]).square().mean().sqrt() for i in (0, 1)
        )
        assert ours <= 2 * reference + limit, name


def core_errors(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype, seed: int
) -> dict[str, tuple[float, float]]:
    """Of the kernel and of the reference, against fp64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=generator).to(DEVICE, dtype)
    folded = (torch.randn(heads, width, generator=generator) * width**-0.5).to(DEVICE)
    direction = torch.randn(batch, heads, width, generator=generator).to(DEVICE)

    def run(pool: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
        inputs = [value.detach().requires_grad_() for value in values]
        y = pool(Pooling(*inputs, 1e-6))
        return y, *torch.autograd.grad(y, inputs, direction.to(y.dtype))

    exact_ones = run(pool_reference, x.double(), folded.double())
    both = run(fused.pool, x, folded), run(pool_reference, x, folded)
    names = ("y", "d x", "d folded")
    return {
        name: (off(ours, want), off(reference, want))
        for name, want, ours, reference in zip(names, exact_ones, *both, strict=True)
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_tokens_merge_to_the_whole(dtype):
    """As ranks merge what each pooled of its tokens; gradients also flow through the lse."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 90, 24, generator=generator).to(DEVICE, dtype)
    folded = torch.randn(3, 24, generator=generator).to(DEVICE)  # maxima of parts differ
    direction = torch.randn(2, 3, 24, generator=generator).to(DEVICE)

    def merged(pool: Callable[..., tuple[Tensor, Tensor]], *values: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_() for value in values]
        parts = [pool(Pooling(part, leaves[1], 1e-6)) for part in leaves[0].split([70, 20], dim=1)]
        pooled, lse = (torch.stack(values) for values in zip(*parts, strict=True))
        y = (lse.softmax(0)[..., None] * pooled).sum(0)
        return y, *torch.autograd.grad(y, leaves, direction.to(y.dtype))

    wide = [value.detach().double().requires_grad_() for value in (x, folded)]
    y = pool_reference(Pooling(*wide, 1e-6))
    exact_ones = (y, *torch.autograd.grad(y, wide, direction.double()))
    both = merged(fused.pool_parts, x, folded), merged(pool_parts_reference, x, folded)
    core = 2.0**-15 if dtype == torch.bfloat16 else torch.finfo(torch.float32).eps
    for want, ours, reference, limit in zip(
        exact_ones, *both, (core, core + torch.finfo(dtype).eps, core), strict=True
    ):
        assert off(ours, want) <= 2 * off(reference, want) + limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token(dtype):
    """There is nothing to choose: the query has no gradient, except rounding."""
    case = Case(2, 1, dtype=dtype)
    inputs = case.draw()
    ours = case.output_and_gradients(inputs)
    for name, want in case.output_and_gradients(exact(inputs), "reference").items():
        error = (ours[name].double() - want).norm()
        assert error <= 4 * max(torch.finfo(dtype).eps, 2e-6) * want.norm().clamp(min=1), name
        if name in ("d query", "d key_weight"):
            assert want.norm() < 1e-12


def test_no_samples():
    found = Case(batch=0).output_and_gradients(Case(batch=0).draw())
    assert found["y"].shape == (0, 6) and found["d x"].shape == (0, 5, 72)
    for name, value in Case(batch=0).draw().items():
        assert torch.equal(found[f"d {name}"], torch.zeros_like(value)), name


def test_scores_may_be_large_and_tokens_zero():
    case = Case(length=70)
    inputs = case.draw()
    inputs["query"] = (1e4 * inputs["query"]).detach().requires_grad_()
    with torch.no_grad():
        inputs["x"][0, 1] = 0
    for name, value in case.output_and_gradients(inputs).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_and_samples_are_summed_apart(dtype, monkeypatch):
    """Many programs along the tokens, the last with fewer, in each of several samples."""
    monkeypatch.setattr(fused, "_share_out", lambda device, others, blocks: (2, -(-blocks // 2)))
    check(Case(3, 5 * fused.PAD - 10, 2, 4, 40, dtype=dtype), floor=0.5)


def test_tokens_in_bf16_and_weights_in_fp32():
    """As in a discriminator under autocast: factors that meet tokens keep 16 bits, instead of being
    rounded to bf16. The interpreter truncates the low parts, hence 2^-15."""
    case = Case(2, 130, 3, 8, 96, 4)
    inputs = case.draw()
    inputs["x"] = inputs["x"].detach().bfloat16().requires_grad_()
    found = case.output_and_gradients(inputs, out_dtype=torch.float32)
    expected = case.output_and_gradients(exact(inputs), "reference")
    assert {n: v.dtype for n, v in found.items()} == {
        n: torch.bfloat16 if n == "d x" else torch.float32 for n in expected
    }
    for name, want in expected.items():
        tolerance = 2.0**-7 if name == "d x" else 2.0**-15
        assert ((found[name] - want).norm() / want.norm()).item() < tolerance, name


def test_non_contiguous_tokens():
    case = Case(3, 6, width=40)
    inputs = case.draw()
    expected = case.output_and_gradients(inputs)
    view = inputs["x"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not view.is_contiguous()
    for name, value in case.output_and_gradients(inputs | {"x": view}).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("wanted", [["x"], ["query"], ["x", "key_weight"], ["value_weight"]])
def test_only_the_gradients_that_are_wanted(wanted):
    case = Case(2, 20)
    inputs = case.draw()
    for name, value in inputs.items():
        value.requires_grad_(name in wanted)
    found, expected = (
        torch.autograd.grad(
            case.run(inputs, backend).square().sum(), [inputs[name] for name in wanted]
        )
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_repeat_bit_for_bit():
    case = Case(3, 300, dtype=torch.float16)
    first, second = (case.output_and_gradients(case.draw()) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_autocast_does_not_reach_inside():
    case = Case(length=20)
    inputs = case.draw()
    expected = case.run(inputs, "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(case.run(inputs, "triton"), expected)


def test_double_backward_raises_and_names_the_reference():
    case = Case()
    inputs = case.draw()
    y = case.run(inputs, "triton")
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(InputError, match="backend='reference'"):
        gradient.square().sum().backward()
    with kernel_backend("reference"):
        y = case.run(inputs, None)
        (gradient,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
        gradient.square().sum().backward()
    assert inputs["x"].grad is not None and inputs["x"].grad.isfinite().all()


def test_the_ops_keep_the_rules_of_torch_library():
    x = torch.randn(2, 70, 24, device=DEVICE, requires_grad=True)
    folded = torch.randn(3, 24, device=DEVICE, requires_grad=True)
    torch.library.opcheck(fused.query_pooling_op.overload, (x, folded, 1e-6))
    values = [v.detach() for v in (x, folded, *fused.query_pooling_op(Pooling(x, folded, 1e-6)))]
    grad = torch.randn(2, 3, 24, device=DEVICE)
    for wanted in (True, False):
        for of_lse in (None, torch.randn_like(values[4])):
            torch.library.opcheck(
                fused.query_pooling_backward_op.overload, (grad, *values, of_lse, wanted)
            )


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_to_one_graph_with_its_backward(backend):
    case = Case(2, 6, width=24)
    inputs = case.draw()
    leaves = list(inputs.values())

    def run(inputs):  # type: ignore[no-untyped-def]
        return case.run(inputs, backend)

    expected = run(inputs)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(gradients, wanted)


def test_checkpointing_computes_it_again():
    case = Case(2, 6, width=24)
    inputs = case.draw()

    def run(*values: Tensor) -> Tensor:
        return case.run(dict(zip(inputs, values, strict=True)), "triton").square().sum()

    plain = torch.autograd.grad(run(*inputs.values()), list(inputs.values()))
    again = torch.utils.checkpoint.checkpoint(run, *inputs.values(), use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again, list(inputs.values())), plain))


def test_tokens_are_never_widened_in_memory():
    """The memory that a step keeps beside x, and its peak, in units of bf16 tokens."""
    batch, length, heads, width = 1, 512, 2, 512
    x = torch.randn(batch, length, width, device=DEVICE).bfloat16().requires_grad_()
    folded = torch.randn(heads, width, device=DEVICE, requires_grad=True)
    tokens = batch * length * width * 2
    per_token = 4 * batch * length
    kept = {
        name: saved_bytes(lambda f=f: f(Pooling(x, folded, 1e-6)), without=x)  # type: ignore[misc]
        for name, f in (("triton", fused.pool), ("reference", pool_reference))
    }
    assert kept["triton"] < (heads + 1) * per_token + 4 * heads * (2 * width + 8) * batch
    assert kept["reference"] > 2 * tokens
    if DEVICE == "cpu":  # by the allocator of the CPU
        assert peak_bytes(lambda: fused.pool(Pooling(x, folded, 1e-6))) < 0.2 * tokens
        y = fused.pool(Pooling(x, folded, 1e-6))
        backward = peak_bytes(lambda: torch.autograd.grad(y.sum(), x))
        assert backward < 1.2 * tokens  # the gradient itself


def test_inputs_that_the_kernel_cannot_take():
    case = Case(dtype=torch.float64)
    with pytest.raises(InputError, match="takes fp32, fp16 and bf16"):
        case.run(case.draw(), "triton")
    case = Case(1, 1, 1, 1, 8193, 1)
    with pytest.raises(InputError, match="1 to 8192 channels, got 8193"):
        case.run(case.draw(), "triton")
    case = Case(1, 1, 129, 1, 4, 1)
    with pytest.raises(InputError, match="up to 128 heads, got 129"):
        case.run(case.draw(), "triton")
    assert case.run(case.draw(), None).shape == (1, 129)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    """The second of two samples lies beyond 2^31: it must equal the same sample alone."""
    width, heads = 8192, 4
    length = 2**31 // width + 3
    x = torch.randn(2, length, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    folded = torch.randn(heads, width, device="cuda") * width**-0.5
    alone = x[1:].detach().requires_grad_()
    found, expected = (fused.pool(Pooling(values, folded, 1e-6)) for values in (x, alone))
    # not equal: another number of samples shares out tokens, and so sums, in another order
    torch.testing.assert_close(found[1:], expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found, x, found.detach())
    (wanted,) = torch.autograd.grad(expected, alone, expected.detach())
    torch.testing.assert_close(gradient[1:], wanted)
