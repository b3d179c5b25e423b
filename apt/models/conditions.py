"""What a backbone is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.errors import InputError


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts.

    Attributes:
        tokens: (R, S, E) embeddings, one row per prompt.
        mask: (R, S) bool, True where a token is real and not padding; None if nothing is padding,
            which lets attention take its faster path.
        pooled: (R, P) one vector per prompt, for the families that use one.
    """

    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise InputError(f"tokens must be (R, S, E), got {tuple(self.tokens.shape)}")
        if self.mask is not None and self.mask.shape != self.tokens.shape[:2]:
            raise InputError(
                f"the mask must be {tuple(self.tokens.shape[:2])}, got {tuple(self.mask.shape)}"
            )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, rows: Tensor | slice) -> TextCondition:
        """The rows at an index tensor or slice."""
        mask = None if self.mask is None else self.mask[rows]
        pooled = None if self.pooled is None else self.pooled[rows]
        return TextCondition(self.tokens[rows], mask, pooled)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TextCondition:
        """Move; dtype applies to the embeddings, never to the mask."""
        pooled = None if self.pooled is None else self.pooled.to(device=device, dtype=dtype)
        tokens = self.tokens.to(device=device, dtype=dtype)
        mask = None if self.mask is None else self.mask.to(device=device)
        return TextCondition(tokens, mask, pooled)

    def detach(self) -> TextCondition:
        """The same condition cut from the graph."""
        pooled = None if self.pooled is None else self.pooled.detach()
        return TextCondition(self.tokens.detach(), self.mask, pooled)

    @staticmethod
    def concatenate(conditions: Sequence[TextCondition]) -> TextCondition:
        """Stack rows, padding every condition to the longest one."""
        longest = max(c.tokens.shape[1] for c in conditions)
        gaps = [longest - c.tokens.shape[1] for c in conditions]
        tokens = [F.pad(c.tokens, (0, 0, 0, g)) for c, g in zip(conditions, gaps, strict=True)]
        mask = None
        if any(gaps) or any(c.mask is not None for c in conditions):
            full = [
                torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=c.tokens.device)
                if c.mask is None
                else c.mask
                for c in conditions
            ]
            mask = torch.cat([F.pad(m, (0, g)) for m, g in zip(full, gaps, strict=True)])
        pooled = [c.pooled for c in conditions if c.pooled is not None]
        if pooled and len(pooled) != len(conditions):
            raise InputError("cannot join conditions with and without a pooled vector")
        return TextCondition(torch.cat(tokens), mask, torch.cat(pooled) if pooled else None)
