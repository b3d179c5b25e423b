"""How a kernel or its reference is chosen, and what is reported if one cannot run."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apt.errors import InputError
from apt.kernels import (
    current_kernel_backend,
    kernel_backend,
    kernel_status,
    modulated_norm,
    watch_kernels,
)
from apt.kernels.backends import (
    BACKENDS,
    HOST_BOUND,
    OPS,
    SMALL,
    KernelUse,
    resolve_backend,
    small_below,
)

OP = "modulated_norm"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture
def triton(monkeypatch):
    """A triton of a version that the kernels support, interpreted, whatever is installed."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return monkeypatch


def reason() -> str:
    return next(row.reason for row in kernel_status() if row.name == f"{OP}/triton")


def test_the_table_has_every_implementation_and_says_why_not(triton):
    rows = kernel_status()
    names = [f"{op}/{name}" for op, backends in OPS.items() for name in backends]
    assert [row.name for row in rows] == names
    assert all(row.available and row.reason for row in rows)
    assert reason() == "triton 3.7.1, interpreted"
    triton.setitem(sys.modules, "triton", None)  # not installed
    rows = kernel_status()
    assert {row.name.partition("/")[2] for row in rows if not row.available} == {"triton"}
    assert "diffusion-apt[triton]" in reason()


@pytest.mark.parametrize(
    ("version", "runs"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", False), ("4.0", False)],
)
def test_versions_of_triton(triton, version, runs):
    triton.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert ("needs triton 3.6 to 3.9, found" in reason()) is not runs


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_and_no_interpreter(triton):
    triton.delenv("TRITON_INTERPRET")
    assert "needs a CUDA GPU, or TRITON_INTERPRET=1" in reason()
    x = torch.zeros(1, 2, 8)
    with pytest.raises(InputError, match="'triton' cannot run: needs a CUDA GPU"):
        modulated_norm(x, x[:, 0], x[:, 0], backend="triton")
    with pytest.raises(InputError, match="needs a CUDA GPU"), kernel_backend("triton"):
        pass


TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)


@pytest.fixture
def gpus(triton):
    """A machine with GPUs of these compute capabilities, which need not be here: no kernel runs."""

    def install(*capabilities: tuple[int, int], current: int = 0) -> None:
        def capability(index: int | None = None) -> tuple[int, int]:
            return capabilities[current if index is None else index]

        triton.delenv("TRITON_INTERPRET", raising=False)
        triton.setattr(torch.cuda, "is_available", lambda: True)
        triton.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        triton.setattr(torch.cuda, "get_device_capability", capability)

    return install


def on_gpu(index: int, values: int = SMALL) -> Any:
    """What the choice reads of a tensor."""
    return SimpleNamespace(
        numel=lambda: values,
        device=torch.device("cuda", index),
        is_cuda=True,
        dtype=torch.float32,
        is_floating_point=lambda: True,
    )


@pytest.mark.parametrize("current", [0, 1])
def test_the_gpu_of_the_tensors_is_asked_whichever_is_current(gpus, current):
    gpus(TURING, HOPPER, current=current)
    old, new = on_gpu(0), on_gpu(1)
    assert resolve_backend(OP, None, [old]) == "reference"
    assert resolve_backend(OP, None, [new]) == "triton"
    assert resolve_backend(OP, "triton", [new]) == "triton"
    message = r"cannot run: needs compute capability 8\.0, found 7\.5 \(cuda:0\)"
    with pytest.raises(InputError, match=message):
        resolve_backend(OP, "triton", [old])
    with pytest.raises(InputError, match="one device, got cuda:0, cuda:1"):
        resolve_backend(OP, "triton", [new, old])
    with pytest.raises(InputError, match="takes CUDA tensors, got cpu"):
        resolve_backend(OP, "triton", [torch.zeros(1)])
    with kernel_backend("triton"):  # one of the two can run it
        assert resolve_backend(OP, None, [new]) == "triton"
        with pytest.raises(InputError, match=message):
            resolve_backend(OP, None, [old])


def test_small_inputs_take_the_reference_unless_the_kernel_is_named(gpus, monkeypatch):
    gpus(HOPPER)
    large, small = on_gpu(0), on_gpu(0, SMALL - 1)
    for op in OPS:
        assert resolve_backend(op, None, [large]) == "triton"
        assert (resolve_backend(op, None, [small]) == "reference") == (op in HOST_BOUND)
        assert resolve_backend(op, "triton", [small]) == "triton"
        with kernel_backend("triton"):
            assert resolve_backend(op, None, [small]) == "triton"
    monkeypatch.setenv("APT_KERNEL_SMALL", "0")
    assert resolve_backend(OP, None, [on_gpu(0, 1)]) == "triton"
    monkeypatch.setenv("APT_KERNEL_SMALL", str(SMALL + 1))
    assert resolve_backend(OP, None, [large]) == "reference"
    for text in ("-1", "1e6", ""):
        monkeypatch.setenv("APT_KERNEL_SMALL", text)
        with pytest.raises(InputError, match="APT_KERNEL_SMALL must be a whole number"):
            resolve_backend(OP, None, [large])


def test_what_was_chosen_and_why_is_told(gpus):
    gpus(HOPPER)
    with watch_kernels() as outer, watch_kernels() as seen:
        for values in (SMALL, SMALL, 3):
            resolve_backend(OP, None, [on_gpu(0, values)])
        resolve_backend(OP, None, [on_gpu(0)], "takes 1 to 8192 channels, got 9000")
        resolve_backend(OP, None, [torch.zeros(1)])
        resolve_backend(OP, "reference", [on_gpu(0)])
        resolve_backend(OP, "triton", [on_gpu(0)])
    resolve_backend(OP, None, [on_gpu(0)])
    reasons = {(use.backend, use.reason): number for use, number in seen.items()}
    assert reasons == {
        ("triton", "it can take them"): 2,
        ("reference", f"inputs below {SMALL:,} values"): 1,
        ("reference", "takes 1 to 8192 channels, got 9000"): 1,
        ("reference", "inputs on cpu"): 1,
        ("reference", "asked for"): 1,
        ("triton", "asked for"): 1,
    }
    assert outer == seen
    assert seen[KernelUse(OP, "triton", "asked for")] == 1


def test_the_table_tells_the_size(triton):
    rows = {row.name: row.reason for row in kernel_status()}
    assert small_below() == SMALL
    assert f"below {SMALL:,} values" in rows["modulated_norm/reference"]
    assert rows["perturbed_batch/reference"] == "torch ops"


@pytest.mark.parametrize(
    ("capabilities", "available", "said"),
    [
        ([HOPPER, AMPERE], True, "triton 3.7.1"),
        ([HOPPER, TURING], True, "triton 3.7.1, but not on 7.5 (cuda:1)"),
        ([TURING, HOPPER], True, "triton 3.7.1, but not on 7.5 (cuda:0)"),
        (
            [TURING, (7, 0)],
            False,
            "needs compute capability 8.0, found 7.5 (cuda:0), 7.0 (cuda:1)",
        ),
    ],
)
def test_the_table_speaks_of_all_gpus(gpus, capabilities, available, said):
    gpus(*capabilities)
    rows = [row for row in kernel_status() if row.name.endswith("/triton")]
    assert {(row.available, row.reason) for row in rows} == {(available, said)}


def test_no_gpu_is_new_enough(gpus):
    gpus(TURING)
    with pytest.raises(InputError, match=r"found 7\.5"), kernel_backend("triton"):
        pass


def test_by_default_cpu_tensors_take_the_reference_even_with_the_interpreter(triton):
    x = torch.zeros(1, 2, 8)
    assert resolve_backend(OP, None, [x]) == "reference"
    assert resolve_backend(OP, "triton", [x]) == "triton"
    with kernel_backend("triton"):
        assert resolve_backend(OP, None, [x]) == "triton"
        assert resolve_backend(OP, "reference", [x]) == "reference"
        triton.setitem(OPS, "plain", ("reference",))  # an op that has nothing but its reference
        assert resolve_backend("plain", None) == "reference"


def test_inputs_that_the_kernel_cannot_take_are_refused_by_name_only(triton):
    for x, message in (
        (torch.zeros(1, 2, 8, dtype=torch.float64), "takes fp32, fp16 and bf16, got float64"),
        (torch.zeros(1, 2, 8193), "takes 1 to 8192 channels, got 8193"),
    ):
        with pytest.raises(InputError, match=message):
            modulated_norm(x, x[:, 0], x[:, 0], backend="triton")
        with pytest.raises(InputError, match=message), kernel_backend("triton"):
            modulated_norm(x, x[:, 0], x[:, 0])
        modulated_norm(x, x[:, 0], x[:, 0])
    tensors = [torch.zeros(1), torch.zeros(1, device="meta")]
    with pytest.raises(InputError, match="one device, got cpu, meta"):
        resolve_backend(OP, "triton", tensors)


def test_who_chooses(triton):
    assert current_kernel_backend() is None
    triton.setenv("APT_KERNEL_BACKEND", "triton")
    assert current_kernel_backend() == "triton"
    with kernel_backend("reference"):
        assert current_kernel_backend() == "reference"
        with kernel_backend("triton"):
            assert current_kernel_backend() == "triton"
        assert current_kernel_backend() == "reference"
    with pytest.raises(RuntimeError, match="inside"), kernel_backend("reference"):
        raise RuntimeError("inside")
    assert current_kernel_backend() == "triton"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(InputError, match="unknown kernel backend 'fast'"), kernel_backend("fast"):
        pass
    monkeypatch.setitem(OPS, "plain", ("reference",))
    with pytest.raises(InputError, match="no backend 'triton'; choose from: reference, or leave"):
        resolve_backend("plain", "triton")
    monkeypatch.delitem(OPS, "plain")
    monkeypatch.setenv("APT_KERNEL_BACKEND", "fast")
    with pytest.raises(InputError, match="APT_KERNEL_BACKEND='fast'"):
        resolve_backend(OP, None, [torch.zeros(1)])
    assert set(BACKENDS) == {name for names in OPS.values() for name in names}


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_installed_triton_is_one_of_those_supported():
    assert "needs triton" not in reason()


@pytest.mark.gpu
def test_by_default_cuda_tensors_take_the_kernel():
    x = torch.zeros(1, SMALL // 8, 8, device="cuda")
    assert resolve_backend(OP, None, [x]) == "triton"
    assert resolve_backend(OP, None, [x[:, 1:]]) == "reference"
    assert resolve_backend(OP, None, [x.double()]) == "reference"
