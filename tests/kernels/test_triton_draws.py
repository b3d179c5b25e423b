"""The kernels that draw random numbers: on a GPU, or in Triton's interpreter (tests/conftest.py).

They must equal the torch reference bit for bit, not only nearly.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from apt import philox
from apt.errors import InputError
from apt.kernels import kernel_backend, perturbed_batch, sample_shifted_timesteps
from apt.kernels.backends import interpreted
from apt.kernels.perturbed_batch import perturbed_batch_op
from apt.kernels.sample_shifted_timesteps import timesteps_op
from apt.rng import Draw, PhiloxKey

pytest.importorskip("triton")
import triton
import triton.language as tl

from apt.kernels._triton.philox import to_normal, to_uniform, words4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEY = Draw(seed=3, step=5, stream="noise")
HERE = dataclasses.replace(KEY, device=DEVICE)
OFFSETS = st.sampled_from([0, 1, 77, 2**31 - 1, 2**32 - 1, 2**45])


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to `dtype` as kernels round here: the interpreter truncates to bf16."""
    if dtype == torch.bfloat16 and interpreted():
        return (values.view(torch.int32) & -(2**16)).view(torch.float32).to(dtype)
    return values.to(dtype)


@triton.jit
def draw_kernel(normal_ptr, uniform_ptr, words_ptr, key, sample, group, N: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, N).to(tl.int64)
    w0, w1, w2, w3 = words4(key, sample, group + index)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    at = tl.arange(0, 4 * N)
    tl.store(words_ptr + at, words.to(tl.int64))
    tl.store(normal_ptr + at, to_normal(words))
    tl.store(uniform_ptr + at, to_uniform(words))


@settings(max_examples=20, deadline=None)
@given(
    st.one_of(st.sampled_from([0, 1, -1, -(2**63), 2**63 - 1]), st.integers(-(2**63), 2**63 - 1)),
    OFFSETS,
    st.sampled_from([0, 5, 2**31 - 100, 2**32 - 100, 2**40]),
)
def test_words_and_what_is_made_of_them(key, sample, group):
    """Also for elements of samples that would not fit into any memory."""
    num = 256
    normal, uniform = torch.empty(2, 4 * num, device=DEVICE).unbind()
    words = torch.empty(4 * num, dtype=torch.int64, device=DEVICE)
    draw_kernel[(1,)](normal, uniform, words, key, sample, group, N=num, enable_fp_fusion=False)
    groups = group + torch.arange(num)
    low = 2**32 - 1
    counter = (groups & low, groups >> 32, torch.tensor(sample & low), torch.tensor(sample >> 32))
    expected = torch.stack(philox.philox(counter, key), dim=1).flatten()
    assert torch.equal(words.cpu(), expected)
    assert torch.equal(normal.cpu(), philox.to_normal(expected))
    assert torch.equal(uniform.cpu(), philox.to_uniform(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.floats(1e-3, 1e3), OFFSETS, st.integers(0, 2**40))
def test_timesteps_are_bit_equal(num, shift, offset, step):
    draw = Draw(3, step, offset, "timesteps", DEVICE)
    ours = sample_shifted_timesteps(num, draw, shift=shift, backend="triton")
    assert ours.device.type == DEVICE and ours.dtype == torch.float32
    assert torch.equal(ours, sample_shifted_timesteps(num, draw, shift=shift, backend="reference"))
    assert ((ours >= 0) & (ours <= 1)).all()


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(0, 3),
    st.lists(st.integers(0, 13), max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.01, 0.1, 3.0]),
    OFFSETS,
)
def test_batches_are_bit_equal(nums, num_perturbed, shape, dtype, sigma, offset):
    num_real, num_fake = nums
    num_perturbed = min(num_perturbed, num_real)
    real = torch.randn(num_real, *shape).to(DEVICE, dtype)
    fake = torch.randn(num_fake, *shape).to(DEVICE, dtype)
    draw = dataclasses.replace(KEY, offset=offset)
    moved = partial(perturbed_batch, sigma=sigma, draw=draw, num_perturbed=num_perturbed)
    ours = moved(real, fake, backend="triton")
    exact = moved(real.float(), fake.float(), backend="reference")
    assert ours.dtype == dtype
    assert torch.equal(ours, rounded(exact, dtype))
    reference = moved(real, fake, backend="reference")
    assert torch.equal(reference, exact.to(dtype))


@pytest.mark.parametrize("size", [1023, 1024, 1025, 5000])
def test_samples_of_several_programs(size):
    real, fake = torch.randn(2, 2, size, device=DEVICE).unbind()
    ours = perturbed_batch(real, fake, 0.1, KEY, backend="triton")
    assert torch.equal(ours, perturbed_batch(real, fake, 0.1, KEY, backend="reference"))


def test_a_reference_on_another_device_makes_the_same():
    real, fake = torch.randn(2, 3, 500).unbind()
    ours = perturbed_batch(real.to(DEVICE), fake.to(DEVICE), 0.1, KEY, backend="triton")
    assert torch.equal(ours.cpu(), perturbed_batch(real, fake, 0.1, KEY, backend="reference"))
    t = sample_shifted_timesteps(9, HERE, shift=12, backend="triton")
    assert torch.equal(t.cpu(), sample_shifted_timesteps(9, KEY, shift=12))


def test_non_contiguous_inputs():
    real = torch.randn(5, 4, 3, device=DEVICE).transpose(0, 2)
    fake = torch.randn(3, 4, 10, device=DEVICE)[..., ::2]
    for backend in ("triton", "reference"):
        ours = perturbed_batch(real, fake, 0.1, KEY, backend=backend)
        same = perturbed_batch(real.contiguous(), fake.contiguous(), 0.1, KEY, backend=backend)
        assert torch.equal(ours, same) and ours.is_contiguous()


def test_the_reference_takes_what_the_kernel_does_not():
    x = torch.zeros(1, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(InputError, match="perturbed_batch backend 'triton' cannot run: takes fp32"):
        perturbed_batch(x, x, 0.1, KEY, backend="triton")
    wide = perturbed_batch(x, x, 0.1, KEY, backend="reference")
    noise = perturbed_batch(x.float(), x.float(), 1.0, KEY)[1].double()
    assert torch.equal(wide[1], 0.1 * noise)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("num_perturbed", [0, 2, 3])
@pytest.mark.parametrize("wanted", ["both", "real", "fake"])
def test_gradients(backend, num_perturbed, wanted):
    real, fake = torch.randn(2, 3, 40, device=DEVICE).unbind()
    real.requires_grad_(wanted != "fake")
    fake.requires_grad_(wanted != "real")
    batch = perturbed_batch(real, fake, 0.1, KEY, num_perturbed=num_perturbed, backend=backend)
    weights = torch.randn_like(batch)
    (batch * weights).sum().backward()
    if wanted != "fake":
        both = weights[:3].clone()
        both[:num_perturbed] += weights[3 : 3 + num_perturbed]
        assert real.grad is not None and torch.equal(real.grad, both)
    if wanted != "real":
        assert fake.grad is not None and torch.equal(fake.grad, weights[3 + num_perturbed :])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_it_is_linear_and_may_be_differentiated_twice(backend):
    """As exact R1 does, with the gradient of logits in x_real."""
    real = torch.randn(2, 6, device=DEVICE, requires_grad=True)
    fake = torch.randn(1, 6, device=DEVICE)
    batch = perturbed_batch(real, fake, 0.1, KEY, backend=backend)
    (gradient,) = torch.autograd.grad(batch.pow(3).sum(), real, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), real)
    torch.testing.assert_close(second, 6 * (batch[:2] + batch[2:4]))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_checkpointing_makes_the_same_noise_again(backend):
    real, fake = torch.randn(2, 2, 30, device=DEVICE).unbind()
    real.requires_grad_()
    seen = []

    def run(x):
        t = sample_shifted_timesteps(2, HERE, shift=3, backend=backend)
        batch = perturbed_batch(x, fake, 0.1, KEY, backend=backend)
        seen.append((t, batch.detach()))
        return (t.repeat(3)[:, None] * batch.pow(3)).sum()

    (plain,) = torch.autograd.grad(run(real), real)
    (again,) = torch.autograd.grad(checkpoint(run, real, use_reentrant=False), real)
    assert len(seen) == 3 and torch.equal(again, plain)
    for t, batch in seen[1:]:
        assert torch.equal(t, seen[0][0]) and torch.equal(batch, seen[0][1])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_ops_keep_the_rules_of_torch_library(backend):
    key = (3, 5, 7, "noise", backend)
    torch.library.opcheck(timesteps_op.overload, (5, 12.0, *key, torch.device(DEVICE)))
    real, fake = torch.randn(2, 3, 2, 5, device=DEVICE).unbind()
    torch.library.opcheck(perturbed_batch_op.overload, (real, fake, 0.1, 2, *key))
    wanted = (real.clone().requires_grad_(), fake.requires_grad_())
    for num_perturbed in (0, 2, 3):
        torch.library.opcheck(perturbed_batch_op.overload, (*wanted, 0.1, num_perturbed, *key))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_to_one_graph_for_all_steps(backend):
    real, fake = torch.randn(2, 2, 30, device=DEVICE).unbind()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(x, step, offset):
        draw = Draw(3, step, offset, "noise", DEVICE)
        t = sample_shifted_timesteps(6, draw, shift=12, backend=backend)
        return t[:, None] * perturbed_batch(x, fake, 0.1, draw, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend=count)
    for step in range(10, 20):
        assert torch.equal(compiled(real, step, 4 * step), run(real, step, 4 * step))
    assert len(graphs) <= 2  # integers become symbols when they first change
    real.requires_grad_()
    aot = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(real, 7, 8).square().sum(), real)[0] for f in (aot, run)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_default_dtype_has_no_influence(backend):
    real = torch.randn(2, 5, device=DEVICE)

    def draw():
        t = sample_shifted_timesteps(4, HERE, shift=12, backend=backend)
        return t, perturbed_batch(real, real, 0.1, KEY, backend=backend)

    expected = draw()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_one_choice_for_all_ops_reaches_them():
    with kernel_backend("triton"):
        t = sample_shifted_timesteps(4, HERE, shift=12)
    assert torch.equal(t, sample_shifted_timesteps(4, HERE, shift=12))


COMPILE = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from apt.kernels._triton.perturbed_batch import GROUPS, perturb_kernel
from apt.kernels._triton.sample_shifted_timesteps import TIMESTEPS, timesteps_kernel

kernels = {
    timesteps_kernel: ["*fp32", "i64", "i64", "i32", "fp32", "fp32", TIMESTEPS],
    perturb_kernel: ["*bf16"] * 3 + ["i64", "i64", "fp32"] + ["i32"] * 4 + [GROUPS],
}
for kernel, kinds in kernels.items():
    names = kernel.arg_names
    signature = {n: k if isinstance(k, str) else "constexpr" for n, k in zip(names, kinds)}
    constants = {(i,): k for i, k in enumerate(kinds) if not isinstance(k, str)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(*sorted(set(re.findall(r"\\b(?:fma|div|sqrt|mul|add|sub|lg2|ex2)\\.[.\\w]*f32", ptx))))
"""


def test_every_rounding_is_in_the_compiled_code():
    """Bit equality on a GPU rests on it: no fused steps, no approximations, no flushed zeros."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    timesteps, perturb = (set(line.split()) for line in result.stdout.splitlines())
    allowed = {"div.rn.f32", "mul.f32", "mul.rn.f32", "add.f32", "add.rn.f32", "sub.f32"}
    assert "div.rn.f32" in timesteps & perturb
    assert (timesteps | perturb) <= allowed | {"sub.rn.f32"}


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    size = 2**31 + 1030
    real = torch.zeros(1, size, device="cuda", dtype=torch.float16)
    batch = perturbed_batch(real, real[:0], 1.0, KEY, backend="triton")
    assert batch[0].count_nonzero() == 0
    groups = torch.arange(size // 4 - 256, size // 4)
    zero = torch.zeros((), dtype=torch.int64)
    words = philox.philox((groups, zero, zero, zero), PhiloxKey(3, 5, 0, "noise").number)
    expected = philox.to_normal(torch.stack(words, dim=1).flatten()).half()
    last = batch[1, 4 * (size // 4 - 256) : 4 * (size // 4)].cpu()
    assert torch.equal(last, expected)
