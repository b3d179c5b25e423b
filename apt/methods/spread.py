"""Contrast and diversity of samples, which show when a generator collapses."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Spread", "compared"]


class Spread:
    """Accumulates the contrast and diversity of samples over micro-batches."""

    def __init__(self) -> None:
        self._count = 0
        self._contrast: Tensor | None = None
        self._total: Tensor | None = None
        self._squares: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add samples (B, C, T, H, W); C, T, H and W must be the same in all calls."""
        x = x.detach().float()
        contrast = x.flatten(2).std(dim=2, correction=0).mean(dim=1).sum()
        total, squares = x.sum(dim=0), x.square().sum(dim=0)
        self._count += len(x)
        if self._contrast is None or self._total is None or self._squares is None:
            self._contrast, self._total, self._squares = contrast, total, squares
            return
        self._contrast += contrast
        self._total += total
        self._squares += squares

    @property
    def contrast(self) -> Tensor:
        """Standard deviation over the positions of a sample, averaged over samples and channels."""
        assert self._contrast is not None
        return self._contrast / self._count

    @property
    def diversity(self) -> Tensor | None:
        """Standard deviation between samples, as a root mean square over positions.

        None for a single sample.
        """
        if self._count < 2 or self._total is None or self._squares is None:
            return None
        mean = self._total / self._count
        return (self._squares / self._count - mean.square()).clamp_min(0).mean().sqrt()


def compared(fake: Spread, real: Spread) -> dict[str, Tensor]:
    """Return the contrast and diversity of generated samples relative to real ones.

    Both are about 1 for a healthy generator. `samples/relative_contrast` falls to 0 as samples
    become uniform, and `samples/relative_diversity` as they all become the same; the latter is
    absent for a single sample.
    """
    found = {"samples/relative_contrast": _share(fake.contrast, real.contrast)}
    ours, theirs = fake.diversity, real.diversity
    if ours is not None and theirs is not None:
        found["samples/relative_diversity"] = _share(ours, theirs)
    return found


def _share(value: Tensor, of: Tensor) -> Tensor:
    return value / of.clamp_min(torch.finfo(of.dtype).tiny)
