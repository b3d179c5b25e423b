from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from apt.errors import InputError
from apt.train.failures import explained


def allocate_torch() -> None:
    torch.empty(1 << 59, dtype=torch.uint8)


def allocate_numpy() -> None:
    np.empty(1 << 59, dtype=np.uint8)


def allocate_python() -> None:
    bytearray(1 << 59)


@pytest.mark.parametrize("allocate", [allocate_torch, allocate_numpy, allocate_python])
def test_memory_that_cannot_be_had(allocate) -> None:
    with pytest.raises(InputError, match=r"^out of memory: .*--micro-batch-size"), explained("r"):
        allocate()


def test_memory_of_a_gpu() -> None:
    words = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"
    with pytest.raises(InputError, match=r"Tried to allocate 20.00 GiB. Make"), explained("run"):
        raise torch.OutOfMemoryError(words)


def test_a_disk_that_refuses() -> None:
    with pytest.raises(InputError, match=r"^a/b: No space left on device"), explained("run"):
        raise OSError(errno.ENOSPC, "No space left on device", "a/b")
    with pytest.raises(InputError, match=r"^run: No space left on device"), explained("run"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), TypeError("a bug"), KeyError(1)])
def test_bugs_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), explained("run"):
        raise error
