from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apt.errors import InputError
from apt.kernels import query_pooling
from tests.memory import peak_bytes, saved_bytes

NAMES = ("x", "query", "key_weight", "value_weight", "value_bias", "norm_weight")


class Case(NamedTuple):
    batch: int = 2
    length: int = 7
    heads: int = 2
    head_dim: int = 4
    width: int = 12
    value_dim: int = 3  # per head
    dtype: torch.dtype = torch.float64

    def draw(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        inner, outer = self.heads * self.head_dim, self.heads * self.value_dim
        shapes = (
            (self.batch, self.length, self.width),
            (inner,),
            (inner, self.width),
            (outer, self.width),
            (outer,),
            (self.width,),
        )
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        for matrix in (values[2], values[3]):
            matrix *= self.width**-0.5  # scores of about 1: larger ones magnify any rounding
        return {
            name: value.to(self.dtype).requires_grad_()
            for name, value in zip(NAMES, values, strict=True)
        }

    def run(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        return query_pooling(**inputs, num_heads=self.heads, **options)  # type: ignore[arg-type]

    def plain(self, inputs: dict[str, Tensor], key_bias: Tensor | None = None) -> Tensor:
        """Norm, keys and values of all tokens, and attention, each by torch itself."""
        x, query, key_weight, value_weight, value_bias, norm_weight = inputs.values()
        normed = F.rms_norm(x, x.shape[-1:], norm_weight, 1e-6)
        keys = F.linear(normed, key_weight, key_bias).unflatten(-1, (self.heads, -1))
        values = F.linear(normed, value_weight, value_bias).unflatten(-1, (self.heads, -1))
        q = query.expand(x.shape[0], 1, -1).unflatten(-1, (self.heads, -1))
        q, keys, values = (part.transpose(1, 2) for part in (q, keys, values))
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, keys, values).flatten(1)


def with_gradients(function: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    y = function(inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum(), list(inputs.values()))
    return {"y": y} | dict(zip(inputs, gradients, strict=True))


SIZES = (st.integers(1, most) for most in (3, 40, 3, 5, 20, 4))


@settings(max_examples=25, deadline=None)
@given(st.builds(Case, *SIZES, dtype=st.just(torch.float64)))
def test_it_is_plain_cross_attention(case):
    inputs = case.draw()
    found, expected = with_gradients(case.run, inputs), with_gradients(case.plain, inputs)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accuracy(dtype):
    """Within twice the error of plain attention in the same type, or one rounding of the result."""
    case = Case(3, 200, 3, 16, 48, 16, dtype=dtype)
    inputs = case.draw()
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    exact = with_gradients(case.plain, wide)
    found, plain = with_gradients(case.run, inputs), with_gradients(case.plain, inputs)
    for name, want in exact.items():
        assert found[name].dtype == dtype
        error, allowed = (
            ((values[name].double() - want).norm() / want.norm()).item()
            for values in (found, plain)
        )
        assert error <= 2 * allowed + torch.finfo(dtype).eps, name


def test_without_the_optional_parts():
    case = Case()
    inputs = case.draw()
    del inputs["value_bias"], inputs["norm_weight"]
    ones = torch.ones(case.width, dtype=case.dtype)
    zeros = torch.zeros(case.heads * case.value_dim, dtype=case.dtype)
    full = inputs | {"value_bias": zeros, "norm_weight": ones}
    torch.testing.assert_close(case.run(inputs), case.plain(full))


def test_a_bias_of_the_keys_would_change_nothing():
    """Why the op has none."""
    case = Case()
    inputs = case.draw()
    bias = torch.randn(case.heads * case.head_dim, dtype=case.dtype, requires_grad=True)
    biased = case.plain(inputs, bias)
    torch.testing.assert_close(biased, case.plain(inputs))
    (gradient,) = torch.autograd.grad(biased.square().sum(), bias)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_scores_may_be_large_and_tokens_zero():
    case = Case()
    inputs = case.draw()
    inputs["query"] = (1e4 * inputs["query"]).detach().requires_grad_()
    with torch.no_grad():
        inputs["x"][0, 1] = 0
    for name, value in with_gradients(case.run, inputs).items():
        assert value.isfinite().all(), name


def test_first_and_second_derivatives():
    case = Case(1, 3, 2, 2, 4, 1)
    inputs = case.draw()

    def run(*values):
        return case.run(dict(zip(NAMES, values, strict=True)))

    assert torch.autograd.gradcheck(run, list(inputs.values()))
    assert torch.autograd.gradgradcheck(run, list(inputs.values()))


def test_the_result_may_be_wider_than_the_tokens():
    case = Case(dtype=torch.bfloat16)
    inputs = case.draw()
    wide = {name: value.detach().float() for name, value in inputs.items()}
    found = case.run(wide | {"x": inputs["x"]}, out_dtype=torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, case.run(wide))
    assert torch.equal(case.run(inputs), found.bfloat16())


def test_autocast_does_not_reach_inside():
    case = Case(dtype=torch.float32)
    inputs = case.draw()
    expected = case.run(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run(inputs), expected)


def test_compiles_to_one_graph():
    case = Case(dtype=torch.float32)
    inputs = case.draw()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), case.run(inputs))


def test_memory():
    """L D numbers a sample, and little else: keys, values and the norm's output are not there."""
    batch, length, heads, width = 2, 4096, 4, 256
    case = Case(batch, length, heads, width // heads, width, width // heads, torch.float32)
    inputs = case.draw()
    tokens = batch * length * width * 4
    scores = batch * length * heads * 4
    weights = 2 * width * width * 4
    folded, plain = (
        saved_bytes(lambda f=f: f(inputs), without=inputs["x"])  # type: ignore[misc]
        for f in (case.run, case.plain)
    )
    assert folded < 4 * scores + weights
    assert plain > 3 * tokens
    folded, plain = (peak_bytes(lambda f=f: f(inputs)) for f in (case.run, case.plain))  # type: ignore[misc]
    assert folded < 5 * scores + 2 * weights
    assert plain > 3 * tokens
    folded, plain = (
        peak_bytes(lambda f=f: with_gradients(f, inputs))  # type: ignore[misc]
        for f in (case.run, case.plain)
    )
    assert folded < 3.5 * tokens and plain > 5 * tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12)}, r"x must be \(B, L, D\)"),
        ({"x": torch.zeros(2, 0, 12)}, "L at least 1"),
        ({"x": torch.zeros(2, 3, 12).long()}, "floating point"),
        ({"query": torch.zeros(2, 8)}, "query must be"),
        ({"key_weight": torch.zeros(8, 11)}, r"key_weight must be \(8, 12\)"),
        ({"value_weight": torch.zeros(6, 11)}, r"value_weight must be \(6, 12\)"),
        ({"value_bias": torch.zeros(8)}, r"value_bias must be \(6,\)"),
        ({"norm_weight": torch.zeros(8)}, r"norm_weight must be \(12,\)"),
        ({"num_heads": 4}, "6 rows of value_weight must split into 4"),
        ({"num_heads": 0}, "must split into 0"),
        ({"backend": "flash"}, "no backend 'flash'"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        query_pooling(**(Case().draw() | {"num_heads": 2} | change))
