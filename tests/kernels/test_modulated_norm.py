from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import InputError
from apt.kernels import modulated_norm, residual_modulated_norm

SHAPES = st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(1, 33))


def oracle(x, scale, shift, weight, bias, norm, eps, rows):
    """Written out, one sample at a time."""
    out = []
    for sample in range(x.shape[0]):
        row = sample if rows is None else int(rows[sample])
        y = x[sample]
        if norm == "layer":
            y = y - y.mean(-1, keepdim=True)
        y = y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        y = y * (1 if weight is None else weight) + (0 if bias is None else bias)
        out.append(y * (1 + scale[row]) + shift[row])
    return torch.stack(out)


def make(shape, num_rows, *, dtype=torch.float32, per_token=False, affine=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, _, width = shape

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    modulation = shape if per_token else (num_rows, width)
    x, update = draw(*shape), draw(*shape)
    gate, scale, shift = draw(*modulation), draw(*modulation), draw(*modulation)
    weight, bias = (draw(width), draw(width)) if affine else (None, None)
    rows = torch.randint(num_rows, (batch,), generator=generator) if num_rows != batch else None
    return x, update, gate, scale, shift, weight, bias, rows


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from(["rms", "layer"]), st.booleans(), st.booleans(), st.integers(1, 3))
def test_matches_the_formula(shape, norm, per_token, affine, num_rows):
    num_rows = shape[0] if per_token else num_rows
    x, update, gate, scale, shift, weight, bias, rows = make(
        shape, num_rows, dtype=torch.float64, per_token=per_token, affine=affine
    )
    bias = bias if norm == "layer" else None
    options = {"weight": weight, "bias": bias, "norm": norm, "eps": 1e-5, "rows": rows}
    expected = oracle(x, scale, shift, weight, bias, norm, 1e-5, rows)
    torch.testing.assert_close(modulated_norm(x, scale, shift, **options), expected)
    x_new, y = residual_modulated_norm(x, update, gate, scale, shift, **options)
    index = torch.arange(shape[0]) if rows is None else rows
    expected_sum = x + update * (gate if per_token else gate[index][:, None])
    torch.testing.assert_close(x_new, expected_sum)
    torch.testing.assert_close(
        y, oracle(expected_sum, scale, shift, weight, bias, norm, 1e-5, rows)
    )


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_values_and_gradients_against_fp64(norm, dtype, tolerance):
    x, update, gate, scale, shift, weight, bias, rows = make((4, 7, 24), 2, dtype=dtype)
    bias = bias if norm == "layer" else None
    inputs = [t for t in (x, update, gate, scale, shift, weight, bias) if t is not None]

    generator = torch.Generator().manual_seed(1)
    loss_weights = torch.randn(4, 7, 24, generator=generator).to(dtype)

    def run(values, function):
        values = [value.clone().requires_grad_() for value in values]
        bias_ = values[6] if norm == "layer" else None
        x_new, y = function(*values[:6], bias_)
        loss = (y * loss_weights.to(y.dtype)).sum()
        return y, torch.autograd.grad(loss + x_new.pow(2).sum(), values)

    def ours(x, update, gate, scale, shift, weight, bias):
        return residual_modulated_norm(
            x, update, gate, scale, shift, weight=weight, bias=bias, norm=norm, rows=rows
        )

    def written_out(x, update, gate, scale, shift, weight, bias):
        x_new = x + gate[rows][:, None] * update
        return x_new, oracle(x_new, scale, shift, weight, bias, norm, 1e-6, rows)

    y, gradients = run(inputs, ours)
    y64, gradients64 = run([value.double() for value in inputs], written_out)
    assert y.dtype == dtype
    for got, want in zip((y, *gradients), (y64, *gradients64), strict=True):
        assert got.dtype == dtype
        scale_of = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale_of)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_first_and_second_derivatives(norm):
    x, update, gate, scale, shift, weight, bias, rows = make((3, 2, 5), 2, dtype=torch.float64)
    bias = bias if norm == "layer" else None

    def run(x, update, gate, scale, shift, weight):
        return residual_modulated_norm(
            x, update, gate, scale, shift, weight=weight, bias=bias, norm=norm, rows=rows
        )

    inputs = [t.requires_grad_() for t in (x, update, gate, scale, shift, weight)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_half_precision_is_rounded_once(norm):
    x, update, gate, scale, shift, weight, _, rows = make((4, 7, 64), 2, dtype=torch.bfloat16)
    x = 16 * x + 100  # a mean square that bf16 itself would lose digits of
    x_new, y = residual_modulated_norm(
        x, update, gate, scale, shift, weight=weight, norm=norm, rows=rows
    )
    wide = [value.double() for value in (x, update, gate, scale, shift, weight)]
    exact_sum = wide[0] + wide[1] * wide[2][rows][:, None]
    exact = oracle(x_new.double(), wide[3], wide[4], wide[5], None, norm, 1e-6, rows)
    for got, want in ((x_new, exact_sum), (y, exact)):
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


def test_shared_rows_equal_copies_and_their_gradients_add():
    x, _, _, scale, shift, _, _, _ = make((4, 3, 8), 2)
    rows = torch.tensor([0, 1, 0, 0])
    shared = scale.clone().requires_grad_()
    copied = scale[rows].clone().requires_grad_()
    y = modulated_norm(x, shared, shift, rows=rows)
    z = modulated_norm(x, copied, shift[rows])
    assert torch.equal(y, z)
    y.pow(2).sum().backward()
    z.pow(2).sum().backward()
    expected = torch.stack([copied.grad[[0, 2, 3]].sum(0), copied.grad[1]])
    torch.testing.assert_close(shared.grad, expected)


def test_non_contiguous_input():
    x, _, _, scale, shift, _, _, _ = make((3, 8, 6), 3)
    view = x.transpose(1, 2)
    scale, shift = scale[:, :1].expand(-1, 8), shift[:, :1].expand(-1, 8)
    expected = modulated_norm(view.contiguous(), scale.contiguous(), shift.contiguous())
    torch.testing.assert_close(modulated_norm(view, scale, shift), expected)


def test_compiles_to_one_graph():
    x, update, gate, scale, shift, weight, _, rows = make((4, 3, 8), 2)

    def run(x):
        return residual_modulated_norm(x, update, gate, scale, shift, weight=weight, rows=rows)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_reference_compiles_to_one_graph_with_its_backward(norm):
    x, _, _, scale, shift, weight, _, rows = make((4, 3, 8), 2)
    leaves = [value.requires_grad_() for value in (x, scale, shift, weight)]

    def run(x, scale, shift, weight):
        return modulated_norm(
            x, scale, shift, weight=weight, norm=norm, rows=rows, backend="reference"
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for function in (compiled, run)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fused"}, "no backend 'fused'"),
        ({"norm": "batch"}, "norm must be"),
        ({"norm": "rms", "bias": torch.zeros(8)}, "has no bias"),
        ({"weight": torch.zeros(7)}, r"weight must be \(8,\)"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows must be \(4,\) int64"),
        ({"rows": torch.zeros(4, dtype=torch.int32)}, r"rows must be \(4,\) int64"),
        ({"scale": torch.zeros(2, 8)}, "pass rows"),
        ({"scale": torch.zeros(4, 1, 8)}, r"scale must be \(R, 8\)"),
        ({"shift": torch.zeros(8)}, r"shift must be \(R, 8\)"),
        ({"x": torch.zeros(4, 8)}, r"x must be \(B, L, D\)"),
    ],
)
def test_bad_input_is_refused(change, message):
    given_ = {"x": torch.zeros(4, 3, 8), "scale": torch.zeros(4, 8), "shift": torch.zeros(4, 8)}
    with pytest.raises(InputError, match=message):
        modulated_norm(**(given_ | change))


def test_update_of_another_shape_is_refused():
    x, m = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    with pytest.raises(InputError, match="update must have the shape"):
        residual_modulated_norm(x, x[:, :1], m, m, m)
    with pytest.raises(InputError, match="gate must be"):
        residual_modulated_norm(x, x, m[:, :4], m, m)
