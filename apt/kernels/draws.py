"""The key of a draw, as the ops that make random numbers take it."""

from __future__ import annotations

from typing import NamedTuple

from apt.errors import InputError
from apt.rng import Draw, hash_key


class PhiloxKey(NamedTuple):
    """A `Draw` as an op takes it, without the device."""

    seed: int
    step: int
    offset: int
    stream: str

    @property
    def number(self) -> int:
        """64 bits, as a signed integer, which is how Triton and torch take them."""
        key = hash_key(self.seed, self.stream, self.step)
        return key - 2**64 if key >= 2**63 else key


def key_of(op: str, draw: Draw, num: int) -> PhiloxKey:
    """The key of so many samples.

    Raises InputError unless seed, step and the samples' global indices are 64-bit integers.
    """
    for name, value in (("seed", draw.seed), ("step", draw.step)):
        if not -(2**63) <= value < 2**63:
            raise InputError(f"{op}: {name} must fit into 64 bits with its sign, got {value}")
    if not 0 <= draw.offset <= 2**63 - 1 - num:
        raise InputError(
            f"{op}: offset must be the global index of a sample, in [0, 2^63), got {draw.offset}"
        )
    return PhiloxKey(draw.seed, draw.step, draw.offset, draw.stream)
