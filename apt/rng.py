"""Random numbers that depend on their purpose, not on when or where they are drawn.

Every draw has a key: (seed, stream, step, global sample index). A sample's values are therefore the
same for any number of ranks, any split of the batch, and after a resume, and there is no generator
state to save. Draws are made on the CPU, so they do not depend on the device either.
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
    """Return a 64-bit hash of `key` (integers and strings; order matters)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*key: int | str) -> torch.Generator:
    """Return a CPU generator whose seed is a hash of `key`."""
    return torch.Generator().manual_seed(hash_key(*key) >> 1)


@dataclass(frozen=True)
class Draw:
    """The key of a random draw for consecutive samples of a global batch.

    Attributes:
        seed: of the run.
        step: number of the update or step; never reused for other values of the same stream.
        offset: global index of the first sample.
        stream: purpose of the values.
        device: of the result; None is the CPU, or the device of the tensors they are added to.
    """

    seed: int
    step: int = 0
    offset: int = 0
    stream: str = ""
    device: torch.device | str | None = None

    def named(self, stream: str) -> Draw:
        """Return the draw for the same samples and another purpose."""
        return dataclasses.replace(self, stream=stream)


def sample_noise(
    num: int, shape: Sequence[int], draw: Draw, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw standard normal noise (num, *shape); row i has the key of sample offset + i."""
    noise = torch.empty(num, *shape, dtype=torch.float32, device="cpu")
    for row, generator in enumerate(_generators(num, draw)):
        torch.randn(tuple(shape), generator=generator, out=noise[row], device="cpu")
    return noise.to(device=draw.device, dtype=dtype)


def sample_uniform(num: int, draw: Draw) -> Tensor:
    """Draw uniform fp32 values (num,) in [0, 1); entry i has the key of sample offset + i."""
    values = torch.empty(num, dtype=torch.float32, device="cpu")
    for row, generator in enumerate(_generators(num, draw)):
        torch.rand((), generator=generator, out=values[row], device="cpu")
    return values.to(device=draw.device)


def _generators(num: int, draw: Draw) -> Iterator[torch.Generator]:
    for row in range(num):
        yield generator_for(draw.seed, draw.stream, draw.step, draw.offset + row)


class PhiloxKey(NamedTuple):
    """A `Draw` without its device, as ops take it."""

    seed: int
    step: int
    offset: int
    stream: str

    @property
    def number(self) -> int:
        """The 64-bit key as a signed integer, as Triton and torch take it."""
        key = hash_key(self.seed, self.stream, self.step)
        return key - 2**64 if key >= 2**63 else key


def key_of(op: str, draw: Draw, num: int) -> PhiloxKey:
    """Return the key for `num` samples.

    Raises InputError unless seed, step and the samples' global indices are 64-bit integers.
    """
    for name, value in (("seed", draw.seed), ("step", draw.step)):
        if not -(2**63) <= value < 2**63:
            raise InputError(f"{op}: {name} must be a signed 64-bit integer, got {value}")
    if not 0 <= draw.offset <= 2**63 - 1 - num:
        raise InputError(
            f"{op}: offset must be the global index of a sample, in [0, 2^63), got {draw.offset}"
        )
    return PhiloxKey(draw.seed, draw.step, draw.offset, draw.stream)
