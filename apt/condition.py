"""What a network is told of each sample: its text, and whatever else was given with it.

Text encoders make the text, and the `embed` of a model family opens it, by the functions at the
end. All between them, from data and caches through losses, guidance and the discriminator to
samplers, hands a `Condition` on whole, so that one with first frames or a camera in it goes the
same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.errors import InputError
from apt.words import described_weights


@dataclass(frozen=True)
class EncodedText:
    """Encoded prompts.

    Attributes:
        tokens: (R, S, E) embeddings, one row per prompt.
        mask: (R, S) bool, True where a token is real and not padding; None if nothing is padding,
            which lets attention take its faster path.
        pooled: (R, P) one vector per prompt, for the families that use one.

    Raises:
        InputError: tokens or a mask of another shape.
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
        """R."""
        return self.tokens.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EncodedText:
        """Move; dtype applies to the embeddings, never to the mask."""
        return self._each(lambda value: _to(value, device, dtype))

    def select(self, rows: Tensor | slice) -> EncodedText:
        """The rows at an index tensor or slice."""
        return self._each(lambda value: value[rows])

    def expand(self, num: int) -> EncodedText:
        """One row as `num` rows, which share its memory."""
        return self._each(lambda value: _expand(value, num))

    def split(self) -> list[EncodedText]:
        """The rows one by one, each without the padding that the longest among them brought."""
        return [self.select(slice(row, row + 1))._unpadded() for row in range(len(self))]

    def _unpadded(self) -> EncodedText:
        """One row up to its last real token."""
        if self.mask is None:
            return self
        length = int(self.mask[0].nonzero().max()) + 1
        mask = self.mask[:, :length]
        return EncodedText(self.tokens[:, :length], None if mask.all() else mask, self.pooled)

    def _each(self, change: Callable[[Tensor], Tensor]) -> EncodedText:
        mask = None if self.mask is None else change(self.mask)
        pooled = None if self.pooled is None else change(self.pooled)
        return EncodedText(change(self.tokens), mask, pooled)

    @staticmethod
    def concatenate(texts: Sequence[EncodedText]) -> EncodedText:
        """Stack rows, padding every text to the longest one."""
        longest = max(c.tokens.shape[1] for c in texts)
        gaps = [longest - c.tokens.shape[1] for c in texts]
        tokens = [F.pad(c.tokens, (0, 0, 0, g)) for c, g in zip(texts, gaps, strict=True)]
        mask = None
        if any(gaps) or any(c.mask is not None for c in texts):
            full = [
                torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=c.tokens.device)
                if c.mask is None
                else c.mask
                for c in texts
            ]
            mask = torch.cat([F.pad(m, (0, g)) for m, g in zip(full, gaps, strict=True)])
        pooled = [c.pooled for c in texts if c.pooled is not None]
        if pooled and len(pooled) != len(texts):
            raise InputError("cannot join conditions with and without a pooled vector")
        return EncodedText(torch.cat(tokens), mask, torch.cat(pooled) if pooled else None)


class TextEncoder(nn.Module):
    """Prompts to the text of conditions.

    Attributes:
        config: the frozen dataclass it was built from.
        embedding_dim: E.
        max_length: the longest prompt it takes, in its own tokens.
    """

    config: Any
    embedding_dim: int
    max_length: int

    def __repr__(self) -> str:
        """In a line; `torch.nn.Module.__repr__(encoder)` shows what is inside."""
        return (
            f"{type(self).__name__}(embedding_dim={self.embedding_dim}, "
            f"max_length={self.max_length}, {described_weights(self)})"
        )

    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts; raises InputError for a prompt that it cannot take."""
        raise NotImplementedError

    def check(self, prompts: Sequence[str]) -> None:
        """Raise InputError as encoding would, PromptLengthError for length, and compute nothing."""
        raise NotImplementedError


class PromptCheck(Protocol):
    """`TextEncoder.check` by itself: it needs a tokenizer at most, and no weights."""

    def __call__(self, prompts: Sequence[str]) -> None:
        """Raise PromptLengthError for a prompt that is too long, InputError for other faults."""
        ...


@dataclass(frozen=True)
class Condition:
    """What R samples are conditioned on.

    Attributes:
        text: R prompts.
        extra: what is given beside them, by name, each (R, ...): first frames, a camera. A family
            says which names it reads, `DiffusionTransformer.extra_conditions`.

    Raises:
        InputError: something given that has not R rows.
    """

    text: EncodedText
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.extra.items():
            if value.shape[:1] != (len(self),):
                raise InputError(
                    f"{name!r} of a condition must have {len(self)} rows, one for each prompt, got "
                    f"{tuple(value.shape)}"
                )

    def __len__(self) -> int:
        """R."""
        return len(self.text)

    @property
    def dtype(self) -> torch.dtype:
        """The type that it was encoded in, or cast to."""
        return self.text.tokens.dtype

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Condition:
        """Move; dtype applies to floating-point values alone."""
        extra = {name: _to(value, device, dtype) for name, value in self.extra.items()}
        return Condition(self.text.to(device, dtype), extra)

    def select(self, rows: Tensor | slice) -> Condition:
        """The rows at an index tensor or slice."""
        extra = {name: value[rows] for name, value in self.extra.items()}
        return Condition(self.text.select(rows), extra)

    def with_text(self, text: EncodedText) -> Condition:
        """The same with other text, of R rows or one for all: what guidance leads away from."""
        return replace(self, text=text if len(text) == len(self) else text.expand(len(self)))

    def expand(self, num: int) -> Condition:
        """One row as `num` rows, which share its memory."""
        extra = {name: _expand(value, num) for name, value in self.extra.items()}
        return Condition(self.text.expand(num), extra)

    @staticmethod
    def concatenate(conditions: Sequence[Condition]) -> Condition:
        """Stack rows, padding text to the longest.

        Raises InputError unless the same is given in all.
        """
        names = {frozenset(c.extra) for c in conditions}
        if len(names) > 1:
            given = " and ".join(sorted(", ".join(sorted(some)) or "text alone" for some in names))
            raise InputError(f"cannot join conditions in which different things are given: {given}")
        return Condition(
            EncodedText.concatenate([c.text for c in conditions]),
            {name: torch.cat([c.extra[name] for c in conditions]) for name in conditions[0].extra},
        )


def check_extra(c: Condition, names: Collection[str]) -> None:
    """Raise InputError for something given beside the text that a model does not read."""
    unread = sorted(c.extra.keys() - set(names))
    if unread:
        known = ", ".join(sorted(names)) or "text alone"
        raise InputError(
            f"this model does not read {', '.join(unread)} of a condition; it reads {known}"
        )


def extra_condition(c: Condition, name: str) -> Tensor:
    """What is given under a name, (R, ...); raises InputError if it is not."""
    if name not in c.extra:
        raise InputError(
            f"this model needs {name!r} beside the text, got {', '.join(c.extra) or 'text alone'}"
        )
    return c.extra[name]


def text_tokens(c: Condition, size: int) -> Tensor:
    """The embeddings (R, S, E) of text; raises InputError unless E is `size`."""
    if c.text.tokens.shape[2] != size:
        raise InputError(
            f"this model needs text tokens of {size} dimensions, got {c.text.tokens.shape[2]}; use "
            "the text encoder that it was trained with"
        )
    return c.text.tokens


def pooled_text(c: Condition, size: int) -> Tensor:
    """The pooled vectors (R, P) of text; raises InputError unless it has them and P is `size`."""
    pooled = c.text.pooled
    if pooled is None or pooled.shape[1] != size:
        given = "none" if pooled is None else tuple(pooled.shape)
        raise InputError(
            f"this model needs text with a pooled vector of {size} dimensions, got {given}; use "
            "the text encoder that it was trained with"
        )
    return pooled


def _to(value: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def _expand(value: Tensor, num: int) -> Tensor:
    return value.expand(num, *value.shape[1:])
