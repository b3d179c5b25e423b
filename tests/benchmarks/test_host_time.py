"""`python -m benchmarks.host_time` without a GPU."""

from __future__ import annotations

import pytest
import torch

from apt.kernels.backends import HOST_BOUND
from benchmarks.host_time import FUSED, main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: PyTorch sees no CUDA GPU here")


def test_whatever_chooses_by_size_is_measured() -> None:
    assert {op.name for op in FUSED} >= HOST_BOUND
