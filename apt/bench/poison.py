"""Fill new memory with NaN, so that outputs that a kernel does not write are noticed.

Memory of a freed tensor is reused, with its old values in it. A kernel that leaves its output
unwritten can seem correct if the reference has just written the same result there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that torch allocates: floats with NaN, integers with their largest value.

    This is a feature of torch's deterministic mode, which is on inside the block, in the form that
    rejects no kernel (`warn_only`). Memory that libraries or compiled code allocate without torch's
    functions is not filled.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module with a property, which has no types
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # It does not matter here that some kernels are not deterministic
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled
