"""Too little memory, found out and said."""

from __future__ import annotations

import pytest
import torch

from apt.errors import CheckpointError, InputError
from apt.memory import explained_memory, require_memory, total_memory

CPU = torch.device("cpu")


def fill(error: Exception | None = None, *shape: int) -> None:
    with explained_memory("filling a shelf", "buy another"):
        if error is not None:
            raise error
        torch.empty(*shape)


def test_what_torch_raises_becomes_one_line() -> None:
    with pytest.raises(InputError, match=r"out of memory while filling a shelf .*; buy another"):
        fill(None, 2**60)
    with pytest.raises(InputError, match="out of memory"):
        fill(None, 2**62, 2**62)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")):
        with pytest.raises(InputError, match="out of memory"):
            fill(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), CheckpointError("x"), ValueError("x")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        fill(error)


def test_more_than_there_is_in_all() -> None:
    there = total_memory(CPU)
    assert there is None or there > 2**28
    require_memory(1, CPU, "a byte", "")
    if there is not None:
        with pytest.raises(InputError, match=r"a year of film needs more than .* cpu has .*; less"):
            require_memory(there + 1, CPU, "a year of film", "less")
