"""Fixtures of the kernels' tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from apt.bench.poison import poisoned_memory as poisoned


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """torch fills new memory with NaN, so that an element which no kernel writes is seen."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with poisoned():
        assert torch.empty(3, device=device).isnan().all()
        yield


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Tests compile the same code, of which Dynamo keeps a limited number of versions."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
