"""Triton kernels of the fused ops. Imported only where one of them runs: Triton is optional."""

from __future__ import annotations
