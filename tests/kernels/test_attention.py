from __future__ import annotations

import contextlib
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from apt.errors import InputError
from apt.kernels import (
    attention,
    attention_backend,
    attention_status,
    current_attention_backend,
)

NAMES = [
    "native",
    "_native_cudnn",
    "_native_flash",
    "_native_efficient",
    "_native_math",
    "flash",
    "_flash_3",
    "flash_4",
    "xformers",
]
# The package exports the function under the module's name
MODULE = sys.modules["apt.kernels.attention"]
AVAILABLE = [row.name for row in attention_status() if row.available]
UNAVAILABLE = [row.name for row in attention_status() if not row.available]


def oracle(q, k, v, mask):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def make(batch, queries, keys, heads, width, *, masked, dtype=torch.float64):
    q = torch.randn(batch, queries, heads, width, dtype=dtype)
    k, v = torch.randn(2, batch, keys, heads, width, dtype=dtype).unbind()
    mask = None
    if masked:
        mask = torch.rand(batch, keys) < 0.6
        mask[:, torch.randint(keys, ())] = True
    return q, k, v, mask


@pytest.mark.parametrize("backend", [None, "native", "_native_math", "_native_flash"])
@settings(max_examples=15, deadline=None)
@given(
    st.tuples(*[st.integers(1, top) for top in (3, 9, 9, 3, 8)]),
    st.booleans(),
)
def test_matches_the_explicit_softmax(backend, size, masked):
    q, k, v, mask = make(*size, masked=masked)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = attention(q, k, v, mask=mask, backend=backend)
    expected = oracle(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
    )


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_masked_key_has_no_influence(backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, _ = (t if t is None else t.to(device) for t in make(2, 3, 5, 2, 8, masked=False))
    mask = torch.tensor([[True, True, False, True, False], [True] * 5], device=device)
    try:
        out = attention(q, k, v, mask=mask, backend=backend)
    except InputError as refusal:
        pytest.skip(str(refusal))
    k2, v2 = k.clone(), v.clone()
    k2[0, 2], v2[0, 4] = 1e3, -1e3
    assert torch.equal(attention(q, k2, v2, mask=mask, backend=backend)[0], out[0])
    short = attention(q[:1], k[:1, mask[0]], v[:1, mask[0]], backend=backend)
    torch.testing.assert_close(out[:1], short)


def test_plain_softmax_is_twice_differentiable():
    # What exact R1 needs, and the fused kernels do not have
    q, k, v, mask = make(1, 2, 3, 1, 4, masked=True)
    inputs = [t.requires_grad_() for t in (q, k, v)]

    def run(q, k, v):
        return attention(q, k, v, mask=mask, backend="_native_math")

    assert torch.autograd.gradgradcheck(run, inputs)


def test_half_precision_keeps_its_type():
    q, k, v, mask = make(2, 4, 6, 2, 8, masked=True, dtype=torch.bfloat16)
    out = attention(q, k, v, mask=mask)
    assert out.dtype == torch.bfloat16
    expected = oracle(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(1, top) for top in (3, 9, 9, 3, 8)]), st.booleans())
def test_training_in_half_precision_has_the_gradients_of_the_explicit_softmax(size, masked):
    # On the CPU these take another path than inference does
    q, k, v, mask = make(*size, masked=masked, dtype=torch.bfloat16)
    with torch.no_grad():
        inferred = attention(q, k, v, mask=mask)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = attention(q, k, v, mask=mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, inferred, rtol=2e-2, atol=2e-2)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = oracle(*wide, mask)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    torch.testing.assert_close(
        [g.double() for g in torch.autograd.grad((out * weights).sum(), inputs)],
        list(torch.autograd.grad((expected * weights.double()).sum(), wide)),
        rtol=0,
        atol=5e-2,
    )


def test_the_table_has_every_backend_and_says_why_not():
    rows = attention_status()
    assert [row.name for row in rows] == NAMES
    assert all(row.reason for row in rows)
    status = {row.name: row.available for row in rows}
    assert status["native"] and status["_native_math"]
    if not torch.cuda.is_available():
        reasons = {row.name: row.reason for row in rows}
        assert not status["_native_cudnn"] and "CUDA" in reasons["_native_cudnn"]
        assert not status["flash"] and not status["xformers"]


@pytest.mark.parametrize("backend", UNAVAILABLE)
def test_an_unavailable_backend_raises_with_its_reason(backend):
    q, k, v, _ = make(1, 2, 2, 1, 8, masked=False)
    reason = next(row.reason for row in attention_status() if row.name == backend)
    with pytest.raises(InputError, match=f"'{backend}' cannot run: .*needs"):
        attention(q, k, v, backend=backend)
    with pytest.raises(InputError) as error, attention_backend(backend):
        pass
    assert reason in str(error.value)
    assert current_attention_backend() == "native"


def test_a_package_that_fails_to_load_is_reported(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.99 missing')")
    monkeypatch.syspath_prepend(tmp_path)
    row = next(row for row in attention_status() if row.name == "_flash_3")
    assert not row.available
    assert "libcudart.so.99" in row.reason


def one_hopper(device: torch.device | None = None) -> dict[str, tuple[int, int]]:
    return {"cuda:0": (9, 0)}


def test_a_package_that_imports_and_cannot_be_called_is_unavailable(tmp_path, monkeypatch):
    # As xformers does without its CUDA part
    (tmp_path / "flash_attn_interface.py").write_text(
        "def flash_attn_func(q, k, v): raise NotImplementedError('No operator found\\n  q: ...')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    monkeypatch.setattr(MODULE, "capabilities", one_hopper)
    monkeypatch.setattr(MODULE, "_probe_input", lambda gpu: torch.zeros(1, 2, 1, 8))
    row = next(row for row in attention_status() if row.name == "_flash_3")
    assert not row.available
    assert row.reason == (
        "is installed, but a small call of it fails (cuda:0: NotImplementedError: No operator "
        "found)"
    )
    with pytest.raises(InputError, match="No operator found"), attention_backend("_flash_3"):
        pass


@pytest.mark.parametrize("chosen", ["by argument", "outside"])
def test_a_package_is_one_graph_with_what_is_around_it(tmp_path, monkeypatch, chosen):
    """Imports and probes stay out of the graph, even if it is the first to need them."""
    (tmp_path / "flash_attn_interface.py").write_text(
        "def flash_attn_func(q, k, v): return (q * k).softmax(-1) * v, None"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    monkeypatch.setattr(MODULE, "capabilities", one_hopper)
    monkeypatch.setattr(MODULE, "_probe_input", lambda gpu: torch.zeros(1, 2, 1, 8))
    monkeypatch.setattr(MODULE, "_functions", {})
    torch._dynamo.reset()
    name = "_flash_3" if chosen == "by argument" else None
    compiled = torch.compile(
        lambda q, k, v: 2 * attention(q, k, v, backend=name), fullgraph=True, backend="eager"
    )
    with FakeTensorMode():  # tensors that say they are on a GPU
        q = torch.empty(1, 4, 2, 8, device="cuda", dtype=torch.bfloat16)
        with contextlib.nullcontext() if name else attention_backend("_flash_3"):
            out = compiled(q, q, q)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)


TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine with these GPUs, one of them current, and flash-attn: nothing runs on them."""
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("flash_attn", "flash_attn_interface"):
        (tmp_path / f"{module}.py").write_text("def flash_attn_func(q, k, v): return q")
        monkeypatch.delitem(sys.modules, module, raising=False)

    def install(*capabilities: tuple[int, int], current: int = 0) -> None:
        def capability(index: int | None = None) -> tuple[int, int]:
            return capabilities[current if index is None else index]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(MODULE, "_probe_input", lambda gpu: torch.zeros(1, 2, 1, 8))

    return install


def on_gpu(index: int) -> Any:
    """The properties of a tensor that are read before anything runs."""
    return SimpleNamespace(
        device=torch.device("cuda", index), is_cuda=True, dtype=torch.bfloat16, ndim=4,
        shape=(1, 2, 1, 8),
    )  # fmt: skip


@pytest.mark.parametrize("current", [0, 1])
def test_the_gpu_of_the_tensors_is_asked_whichever_is_current(gpus, current):
    gpus(AMPERE, HOPPER, current=current)
    old, new = on_gpu(0), on_gpu(1)
    with attention_backend("_flash_3"):  # one of the two can run it
        with pytest.raises(InputError, match=r"compute capability 8\.0 \(cuda:0\)"):
            attention(old, old, old)
        assert attention(new, new, new) is new
    assert attention(old, old, old, backend="flash") is old


@pytest.mark.parametrize(
    ("capabilities", "available", "said"),
    [
        ([HOPPER, HOPPER], True, "module flash_attn_interface"),
        ([HOPPER, TURING], True, "module flash_attn_interface, but not on 7.5 (cuda:1)"),
        ([AMPERE, HOPPER], True, "module flash_attn_interface, but not on 8.0 (cuda:0)"),
        (
            [TURING, (10, 0)],
            False,
            "has no kernels for compute capability 7.5 (cuda:0), 10.0 (cuda:1)",
        ),
    ],
)
def test_the_table_speaks_of_all_gpus(gpus, capabilities, available, said):
    gpus(*capabilities)
    row = next(row for row in attention_status() if row.name == "_flash_3")
    assert (row.available, row.reason) == (available, said)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name.startswith("_native")])
def test_tensors_on_a_gpu_that_is_not_current(backend):
    q, k, v, _ = make(1, 3, 5, 2, 64, masked=False, dtype=torch.bfloat16)
    with torch.cuda.device(0):
        out = attention(*(t.to("cuda:1") for t in (q, k, v)), backend=backend)
    assert out.device == torch.device("cuda", 1)
    exact = oracle(q.double(), k.double(), v.double(), None)
    torch.testing.assert_close(out.double().cpu(), exact, rtol=0, atol=2e-2)


def test_who_chooses(monkeypatch):
    assert current_attention_backend() == "native"
    monkeypatch.setenv("APT_ATTENTION_BACKEND", "_native_flash")
    assert current_attention_backend() == "_native_flash"
    with attention_backend("_native_math"):
        assert current_attention_backend() == "_native_math"
        with attention_backend("native"):
            assert current_attention_backend() == "native"
        assert current_attention_backend() == "_native_math"
    assert current_attention_backend() == "_native_flash"
    with pytest.raises(RuntimeError, match="inside"), attention_backend("_native_math"):
        raise RuntimeError("inside")
    assert current_attention_backend() == "_native_flash"


@pytest.mark.skipif("_native_cudnn" in AVAILABLE, reason="cuDNN runs here")
def test_the_choice_reaches_the_call(monkeypatch):
    q, k, v, _ = make(1, 2, 2, 1, 8, masked=False)
    monkeypatch.setenv("APT_ATTENTION_BACKEND", "_native_cudnn")
    with pytest.raises(InputError, match="_native_cudnn"):
        attention(q, k, v)
    with attention_backend("_native_math"):
        attention(q, k, v)
    attention(q, k, v, backend="native")


def test_unknown_names_are_refused(monkeypatch):
    q, k, v, _ = make(1, 2, 2, 1, 8, masked=False)
    with pytest.raises(InputError, match="unknown attention backend 'fast'"):
        attention(q, k, v, backend="fast")
    with pytest.raises(InputError, match="unknown attention backend"), attention_backend("fast"):
        pass
    monkeypatch.setenv("APT_ATTENTION_BACKEND", "fast")
    with pytest.raises(InputError, match="APT_ATTENTION_BACKEND='fast'"):
        attention(q, k, v)


@pytest.mark.parametrize("backend", [None, "_native_math"])
def test_compiles_to_one_graph(backend):
    q, k, v, mask = make(2, 3, 5, 2, 8, masked=True, dtype=torch.float32)

    def run(q, k, v):
        return attention(q, k, v, mask=mask, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, "q must be"),
        ({"v": torch.zeros(2, 4, 2, 8)}, "k and v"),
        ({"q": torch.zeros(2, 3, 4, 8)}, "must agree in samples, heads"),
        ({"mask": torch.ones(2, 5)}, "mask must be .* bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask must be \(2, 5\)"),
    ],
)
def test_bad_input_is_refused(change, message):
    given_ = {
        "q": torch.zeros(2, 3, 2, 8),
        "k": torch.zeros(2, 5, 2, 8),
        "v": torch.zeros(2, 5, 2, 8),
    }
    with pytest.raises(InputError, match=message):
        attention(**(given_ | change))
