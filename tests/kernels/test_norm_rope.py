from __future__ import annotations

import math

import pytest

pytest.importorskip("diffusers")

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import InputError
from apt.kernels import norm_rope, qk_norm_rope


def table(length: int, pairs: int, dtype=torch.float64):
    angles = torch.arange(length, dtype=dtype)[:, None] * torch.logspace(0, -2, pairs, dtype=dtype)
    return angles.cos(), angles.sin()


def oracle(x, weight, cos, sin, eps):
    """Each pair turned by a 2x2 matrix."""
    y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    if cos is None:
        return y
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    pairs = y.unflatten(-1, (-1, 2))
    return torch.einsum("lprs,blhps->blhpr", rotation, pairs).flatten(-2)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(0, 7), st.integers(1, 3), st.integers(1, 9)),
    st.booleans(),
    st.booleans(),
)
def test_matches_the_formula(size, rotate, affine):
    batch, length, heads, pairs = size
    q, k = torch.randn(2, batch, length, heads, 2 * pairs, dtype=torch.float64)
    weights = torch.randn(2, 2 * pairs, dtype=torch.float64) if affine else (None, None)
    cos, sin = table(length, pairs) if rotate else (None, None)
    got = qk_norm_rope(q, k, *weights, cos, sin, eps=1e-5)
    for value, x, weight in zip(got, (q, k), weights, strict=True):
        torch.testing.assert_close(value, oracle(x, weight, cos, sin, 1e-5))


def test_scores_depend_on_distance_only():
    vector = torch.randn(8, dtype=torch.float64)
    same = vector.expand(1, 12, 1, 8)
    q, k = qk_norm_rope(same, same, None, None, *table(12, 4))
    scores = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(scores[3, 1], scores[10, 8])
    assert not math.isclose(scores[3, 1].item(), scores[3, 2].item(), rel_tol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_against_fp64(dtype, tolerance):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 3, 8).to(dtype) for _ in range(2)]
    inputs += [torch.randn(8).to(dtype) for _ in range(2)]
    cos, sin = table(5, 4, torch.float32)

    def run(values, function):
        values = [value.clone().requires_grad_() for value in values]
        q, k = function(*values)
        return q, torch.autograd.grad((q * k.roll(1, 1)).sum(), values)

    def written_out(q, k, a, b):
        c, s = cos.double(), sin.double()
        return oracle(q, a, c, s, 1e-6), oracle(k, b, c, s, 1e-6)

    got, gradients = run(inputs, lambda *v: qk_norm_rope(*v, cos, sin))
    want, gradients64 = run([value.double() for value in inputs], written_out)
    for ours, exact in zip((got, *gradients), (want, *gradients64), strict=True):
        assert ours.dtype == dtype
        atol = tolerance * exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)


def test_first_and_second_derivatives():
    q, k = torch.randn(2, 1, 2, 2, 4, dtype=torch.float64).unbind()
    weights = torch.randn(2, 4, dtype=torch.float64).unbind()
    cos, sin = table(2, 2)
    inputs = [t.clone().requires_grad_() for t in (q, k, *weights)]

    def run(*values):
        return qk_norm_rope(*values, cos, sin)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_compiled_equals_eager():
    q, k = torch.randn(2, 2, 5, 3, 8).unbind()
    weight = torch.randn(8)
    cos, sin = table(5, 4, torch.float32)

    def run(q, k):
        return qk_norm_rope(q, k, weight, weight, cos, sin)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), run(q, k))


def test_slices_of_a_joint_projection():
    qkv = torch.randn(2, 5, 3, 3, 8)
    q, k, _ = qkv.unbind(2)
    cos, sin = table(5, 4, torch.float32)
    expected = qk_norm_rope(q.contiguous(), k.contiguous(), None, None, cos, sin)
    torch.testing.assert_close(qk_norm_rope(q, k, None, None, cos, sin), expected)


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_both_layouts_and_norms_are_diffusers(layout, across_heads):
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    weight = torch.randn(24 if across_heads else 8, dtype=torch.float64)
    cos, sin = table(5, 4)
    normed = (
        F.rms_norm(x.flatten(2), (24,), weight, 1e-6).view_as(x)
        if across_heads
        else F.rms_norm(x, (8,), weight, 1e-6)
    )
    if layout == "interleaved":
        angles, unbind = (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)), -1
    else:
        angles, unbind = (cos.repeat(1, 2), sin.repeat(1, 2)), -2
    expected = apply_rotary_emb(
        normed.transpose(1, 2), angles, use_real=True, use_real_unbind_dim=unbind
    ).transpose(1, 2)
    found = norm_rope(x, weight, cos, sin, across_heads=across_heads, layout=layout)
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=1e-6)


def test_cross_attention_queries_and_keys_of_different_lengths():
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8)
    weight = torch.randn(24)
    found = qk_norm_rope(q, k, weight, None, across_heads=True)
    assert torch.equal(found[0], norm_rope(q, weight, across_heads=True))
    assert torch.equal(found[1], norm_rope(k, None, across_heads=True))
    cos, sin = table(5, 4, torch.float32)
    with pytest.raises(InputError, match="one table rotates both"):
        qk_norm_rope(q, k, None, None, cos, sin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fused"}, "no backend 'fused'"),
        ({"q": torch.zeros(1, 4, 6)}, "q must be"),
        ({"q": torch.zeros(1, 4, 2, 5)}, "even Dh"),
        ({"k": torch.zeros(1, 3, 2, 6)}, "k must have the shape"),
        ({"k": torch.zeros(1, 4, 1, 6)}, "k must have the samples, heads and channels"),
        ({"layout": "split"}, "layout must be 'interleaved' or 'half', got 'split'"),
        ({"across_heads": True, "k_weight": torch.zeros(6)}, r"k_weight must be \(12,\)"),
        ({"cos": torch.zeros(4, 3, requires_grad=True)}, "no gradient reaches cos"),
        ({"q_weight": torch.zeros(5)}, r"q_weight must be \(6,\)"),
        ({"sin": None}, "both cos and sin"),
        ({"cos": torch.zeros(4, 6)}, r"cos must be \(4, 3\)"),
    ],
)
def test_bad_input_is_refused(change, message):
    x, angles = torch.zeros(1, 4, 2, 6), torch.zeros(4, 3)
    given_ = {"q": x, "k": x, "q_weight": None, "k_weight": None, "cos": angles, "sin": angles}
    with pytest.raises(InputError, match=message):
        qk_norm_rope(**(given_ | change))
