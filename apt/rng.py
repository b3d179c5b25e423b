"""Randomness that depends on what it is for, never on when or where it is drawn.

Every draw has a key: (seed, stream, step, global sample index). The values for a sample are thus
the same for any number of ranks, any split of the batch, and after a resume, and no generator
state has to be saved. Draws are made on the CPU, so that they do not depend on the device either.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from apt.errors import InputError


def hash_key(*key: int | str) -> int:
    """64 bits that stand for `key` (integers and strings, order matters)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose seed is a hash of `key`."""
    return torch.Generator().manual_seed(hash_key(*key) >> 1)


@dataclass(frozen=True)
class Draw:
    """The key of a random draw for consecutive samples of a global batch.

    Attributes:
        seed: of the run.
        step: update, or number of the step; never reused for other values of the same stream.
        offset: global index of the first sample.
        stream: what the values are for.
        device: where they go; None is the CPU, or where the tensors are that they are added to.
    """

    seed: int
    step: int = 0
    offset: int = 0
    stream: str = ""
    device: torch.device | str | None = None

    def named(self, stream: str) -> Draw:
        """The same samples, for another purpose."""
        return dataclasses.replace(self, stream=stream)


def sample_noise(
    num: int, shape: Sequence[int], draw: Draw, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise (num, *shape); row i has the key of sample offset + i."""
    noise = torch.empty(num, *shape, dtype=torch.float32, device="cpu")
    for row, generator in enumerate(_generators(num, draw)):
        torch.randn(tuple(shape), generator=generator, out=noise[row], device="cpu")
    return noise.to(device=draw.device, dtype=dtype)


def sample_uniform(num: int, draw: Draw) -> Tensor:
    """Uniform fp32 values (num,) in [0, 1); entry i has the key of sample offset + i."""
    values = torch.empty(num, dtype=torch.float32, device="cpu")
    for row, generator in enumerate(_generators(num, draw)):
        torch.rand((), generator=generator, out=values[row], device="cpu")
    return values.to(device=draw.device)


def _generators(num: int, draw: Draw) -> Iterator[torch.Generator]:
    for row in range(num):
        yield generator_for(draw.seed, draw.stream, draw.step, draw.offset + row)


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
