"""New memory full of NaN, so that an output which nobody writes is seen.

A freed tensor's memory is the next one's, with its values: a kernel that leaves an output unwritten
can pass for right where the reference has just computed the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch allocates inside: floating point with NaN, integers with their largest value.

    Torch does that for its deterministic mode, which is on inside, in the form that changes no
    kernel and refuses none (`warn_only`). Memory of a library's own, or that compiled code takes
    past torch's functions, stays as it was.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module with a property, which has no types
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # That some kernels repeat only nearly is nothing new here
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled
