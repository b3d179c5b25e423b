"""What must be settled before any test module is imported."""

from __future__ import annotations

import os

import torch

# Triton reads this when it is imported, which any test may do. Without a GPU its interpreter runs
# the kernels, if asked by name; with one they are compiled, and the same tests run on it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
