"""Triton kernels of the fused ops, imported only when one of them runs: Triton is optional."""

from __future__ import annotations
