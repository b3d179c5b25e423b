"""Randomness that depends on what it is for, never on when or where it is drawn.

Every draw has a key: (seed, stream, step, global sample index). The values for a sample are thus
the same for any number of ranks, any split of the batch, and after a resume, and no generator
state has to be saved. Draws are made on the CPU, so that they do not depend on the device either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def hash_key(*key: int | str) -> int:
    """64 bits that stand for `key` (integers and strings, order matters)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator whose seed is a hash of `key`."""
    return torch.Generator().manual_seed(hash_key(*key) >> 1)


def sample_noise(
    num: int,
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    offset: int,
    stream: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise (num, *shape); row i has the key (seed, stream, step, offset + i)."""
    noise = torch.empty(num, *shape)
    for row in range(num):
        generator = generator_for(seed, stream, step, offset + row)
        torch.randn(tuple(shape), generator=generator, out=noise[row])
    return noise.to(device=device, dtype=dtype)


def sample_uniform(
    num: int,
    *,
    seed: int,
    step: int,
    offset: int,
    stream: str,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform fp32 values (num,) in [0, 1); entry i has the key (seed, stream, step, offset+i)."""
    values = [
        torch.rand((), generator=generator_for(seed, stream, step, offset + row)).item()
        for row in range(num)
    ]
    return torch.tensor(values, dtype=torch.float32, device=device)
