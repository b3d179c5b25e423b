"""What must be settled before any test module is imported."""

from __future__ import annotations

import importlib.util
import os

import torch

# Triton reads this when it is imported, which any test may do. Without a GPU its interpreter runs
# the kernels, if asked by name; with one they are compiled, and the same tests run on it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The default suite draws the same examples each time and keeps none. `--hypothesis-profile=explore`
# draws new ones; a GPU machine may have no hypothesis, and then runs no test that needs it.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
    settings.load_profile("repeatable")
