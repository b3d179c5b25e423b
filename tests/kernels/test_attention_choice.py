"""Which attention kernel runs is known and reported, with a warning if it should be another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from apt.kernels import attention, attention_kernel, attention_status, watch_attention
from apt.kernels.attention_choice import (
    PLAIN,
    AttentionUse,
    attention_warning,
    cudnn_version,
    kernel_by_name,
    why_not_cudnn,
)

GPU = torch.device("cuda", 0)
FLASH, MATH = "torch's flash", "torch's plain softmax"
EFFICIENT = "torch's memory-efficient"


def qkv(
    dtype: torch.dtype = torch.float32, *, length: int = 12, grad: bool = False
) -> list[Tensor]:
    return [torch.randn(2, length, 3, 16, dtype=dtype, requires_grad=grad) for _ in range(3)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A GPU that need not be present, and library versions."""

    def install(
        capability: tuple[int, int] = (9, 0), cudnn: int | None = 91900, cuda: str = "13.0"
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn is not None)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return install


@pytest.mark.parametrize(
    ("number", "version"), [(91900, "9.19.0"), (91002, "9.10.2"), (91501, "9.15.1"), (None, "")]
)
def test_versions_of_cudnn(machine, number, version):
    machine(cudnn=number)
    assert cudnn_version() == version


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ({}, None),
        ({"capability": (10, 0)}, None),
        ({"cudnn": 91501, "cuda": "12.9"}, None),
        ({"cudnn": 91500}, "cuDNN is 9.15.0, but must be newer than 9.15.0"),
        ({"cudnn": 91002}, "cuDNN is 9.10.2, but must be newer"),
        ({"cuda": "12.8"}, "torch is built for CUDA 12.8, but must be for 12.9 or newer"),
        ({"cuda": "9.2"}, "CUDA 9.2, but must"),
        ({"cudnn": None}, "torch has no cuDNN here"),
        # cuDNN comes first on no other GPU, whatever its version
        ({"capability": (8, 0), "cudnn": 91002}, None),
        ({"capability": (12, 0), "cudnn": 91002}, None),
    ],
)
def test_torch_puts_cudnn_first_from_these_versions_on(machine, there, reason):
    machine(**there)
    for found in (why_not_cudnn(GPU), why_not_cudnn()):
        assert found == reason if reason is None else reason in found
    native = attention_status()[0].reason
    assert ("not cuDNN" in native) == (reason is not None)


def test_cudnn_that_is_switched_off(machine, monkeypatch):
    machine()
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert why_not_cudnn(GPU) == "cuDNN is switched off in this process"


def test_no_gpu_needs_no_cudnn():
    assert why_not_cudnn(torch.device("cpu")) is None
    assert attention_warning(torch.device("cpu"), {FLASH}) is None


def test_a_warning_names_what_ran_and_why(machine):
    machine(cudnn=91002)
    said = attention_warning(GPU, {FLASH})
    assert said is not None
    assert "'native' attention runs torch's flash on this GPU" in said
    assert "cuDNN is 9.10.2" in said
    assert attention_warning(GPU, {"cuDNN"}) is None
    assert attention_warning(GPU, set()) is None
    machine()
    refused = attention_warning(GPU, {"cuDNN", MATH})
    assert refused is not None
    assert "runs torch's plain softmax" in refused
    assert "torch refuses it for these inputs" in refused
    machine(capability=(8, 0))
    assert attention_warning(GPU, {FLASH}) is None


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i", "cuDNN"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", FLASH),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)", EFFICIENT),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<C>>", "FlashAttention-3"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "a flash kernel of a package"),
        ("void at::native::vectorized_elementwise_kernel<4>", None),
    ],
)
def test_kernels_by_their_names_in_a_profile(name, kernel):
    assert kernel_by_name(name) == kernel


@pytest.mark.parametrize(
    ("inputs", "kernel", "op"),
    [
        (qkv(), FLASH, "_scaled_dot_product_flash_attention_for_cpu"),
        (qkv(torch.bfloat16), FLASH, "_scaled_dot_product_flash_attention_for_cpu"),
        (qkv(torch.bfloat16, grad=True), PLAIN, "aten::_softmax"),
        (qkv(torch.float32, grad=True), FLASH, "_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_what_native_is_said_to_run_is_what_the_profile_shows(inputs, kernel, op):
    assert attention_kernel(*inputs, backend="native") == kernel
    with profile(activities=[ProfilerActivity.CPU]) as found:
        attention(*inputs, backend="native")
    assert any(op in event.key for event in found.key_averages())


def test_backends_by_name_are_what_they_say():
    assert attention_kernel(*qkv(), backend="_native_math") == MATH
    assert attention_kernel(*qkv(), backend="_flash_3") == "module flash_attn_interface"


def test_calls_are_counted_by_kind():
    mask = torch.ones(2, 12, dtype=torch.bool)
    with watch_attention() as outer:
        attention(*qkv())
        with watch_attention() as seen:
            attention(*qkv(), mask=mask)
            attention(*qkv())
            attention(*qkv(length=5), backend="_native_math")
    attention(*qkv())
    shape = (2, 12, 12, 3, 16)
    assert seen == {
        AttentionUse("native", FLASH, shape, "float32"): 2,
        AttentionUse("_native_math", MATH, (2, 5, 5, 3, 16), "float32"): 1,
    }
    assert sum(outer.values()) == 4


def test_a_watch_breaks_no_graph():
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend="eager")
    with watch_attention() as seen:
        found = compiled(*qkv())
    assert found.shape == (2, 12, 3, 16)
    assert not seen
