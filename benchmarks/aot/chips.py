"""The chips that kernels are compiled for, and their limits for a program (block of threads)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A compute capability.

    Attributes:
        capability: 90 for sm_90.
        shared_bytes: the most shared memory of a block (CUDA C++ Programming Guide, table of
            technical specifications per compute capability: 163 KiB and 227 KiB).
        registers: 32-bit registers of a multiprocessor; one block may use all of them.
    """

    capability: int
    shared_bytes: int
    registers: int = 65_536

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"


CHIPS = (
    Chip(capability=80, shared_bytes=163 * 1024),  # A100
    Chip(capability=90, shared_bytes=227 * 1024),  # H100, H200
    Chip(capability=100, shared_bytes=227 * 1024),  # B200
)
