"""What a network is conditioned on: the text of each sample, and any other inputs.

Text encoders produce the text. The `embed` of a model family reads it, with the functions at the
end of this module. Everything in between (data, caches, losses, guidance, the discriminator,
samplers) passes the `Condition` on unchanged, including first frames or a camera in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.errors import InputError


@dataclass(frozen=True)
class EncodedText:
    """Encoded prompts.

    Attributes:
        tokens: (R, S, E) embeddings, one row per prompt.
        mask: (R, S) bool, False for padding; None if there is no padding, which lets attention
            take its faster path.
        pooled: (R, P), one vector per prompt, for families that use one.

    Raises:
        InputError: if the tokens or the mask have another shape.
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
        """Return R, the number of prompts."""
        return self.tokens.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EncodedText:
        """Move to a device and dtype; the dtype applies to the embeddings, never to the mask."""
        return self._each(lambda value: _to(value, device, dtype))

    def select(self, rows: Tensor | slice) -> EncodedText:
        """Return the rows at an index tensor or slice."""
        return self._each(lambda value: value[rows])

    def expand(self, num: int) -> EncodedText:
        """Return one row repeated `num` times, sharing its memory."""
        return self._each(lambda value: _expand(value, num))

    def split(self) -> list[EncodedText]:
        """Return the rows one by one, each without its padding."""
        return [self.select(slice(row, row + 1))._unpadded() for row in range(len(self))]

    def _unpadded(self) -> EncodedText:
        """Return one row up to its last token that is not padding."""
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
        """Stack rows, padding every text to the length of the longest one."""
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
            raise InputError(
                "cannot concatenate texts with and without a pooled vector; encode all of them "
                "with the same text encoder"
            )
        return EncodedText(torch.cat(tokens), mask, torch.cat(pooled) if pooled else None)


class TextEncoder(nn.Module):
    """A network that encodes prompts.

    Attributes:
        config: the frozen dataclass it was built from.
        embedding_dim: E.
        max_length: the longest prompt that it accepts, in its own tokens.
    """

    config: Any
    embedding_dim: int
    max_length: int

    def __repr__(self) -> str:
        """Return one line; `torch.nn.Module.__repr__(encoder)` shows the modules."""
        from apt.words import described_weights

        return (
            f"{type(self).__name__}(embedding_dim={self.embedding_dim}, "
            f"max_length={self.max_length}, {described_weights(self)})"
        )

    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts. Raises InputError for a prompt that cannot be encoded."""
        raise NotImplementedError

    def check(self, prompts: Sequence[str]) -> None:
        """Raise what encoding would raise, without encoding: InputError or PromptLengthError."""
        raise NotImplementedError


class PromptCheck(Protocol):
    """`TextEncoder.check` on its own, which needs no weights and at most a tokenizer."""

    def __call__(self, prompts: Sequence[str]) -> None:
        """Raise PromptLengthError for a prompt that is too long, InputError for other faults."""
        ...


@dataclass(frozen=True)
class Condition:
    """What R samples are conditioned on.

    Attributes:
        text: R prompts.
        extra: other inputs by name, each (R, ...), such as first frames or a camera.
            `DiffusionTransformer.extra_conditions` lists the names that a family reads.

    Raises:
        InputError: if an extra input does not have R rows.
    """

    text: EncodedText
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.extra.items():
            if value.shape[:1] != (len(self),):
                raise InputError(
                    f"the condition {name!r} must have {len(self)} rows, one per prompt, got shape "
                    f"{tuple(value.shape)}"
                )

    def __len__(self) -> int:
        """Return R, the number of prompts."""
        return len(self.text)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the text's embeddings."""
        return self.text.tokens.dtype

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Condition:
        """Move to a device and dtype; the dtype applies to floating-point values only."""
        extra = {name: _to(value, device, dtype) for name, value in self.extra.items()}
        return Condition(self.text.to(device, dtype), extra)

    def select(self, rows: Tensor | slice) -> Condition:
        """Return the rows at an index tensor or slice."""
        extra = {name: value[rows] for name, value in self.extra.items()}
        return Condition(self.text.select(rows), extra)

    def with_text(self, text: EncodedText) -> Condition:
        """Return the same with another text, of R rows or of one row for all.

        Guidance uses this for its negative prompt.
        """
        return replace(self, text=text if len(text) == len(self) else text.expand(len(self)))

    def expand(self, num: int) -> Condition:
        """Return one row repeated `num` times, sharing its memory."""
        extra = {name: _expand(value, num) for name, value in self.extra.items()}
        return Condition(self.text.expand(num), extra)

    @staticmethod
    def concatenate(conditions: Sequence[Condition]) -> Condition:
        """Stack rows, padding every text to the length of the longest one.

        Raises InputError unless all have the same extra inputs.
        """
        names = {frozenset(c.extra) for c in conditions}
        if len(names) > 1:
            given = " and ".join(sorted(", ".join(sorted(some)) or "only text" for some in names))
            raise InputError(f"cannot concatenate conditions with different inputs: {given}")
        return Condition(
            EncodedText.concatenate([c.text for c in conditions]),
            {name: torch.cat([c.extra[name] for c in conditions]) for name in conditions[0].extra},
        )


def check_extra(c: Condition, names: Collection[str]) -> None:
    """Raise InputError for an extra input that the model does not read."""
    unread = sorted(c.extra.keys() - set(names))
    if unread:
        known = ", ".join(sorted(names)) or "nothing"
        raise InputError(
            f"this model does not read {', '.join(unread)}; beside the text it reads {known}"
        )


def extra_condition(c: Condition, name: str) -> Tensor:
    """Return the extra input of that name, (R, ...). Raises InputError if it is missing."""
    if name not in c.extra:
        raise InputError(
            f"this model needs {name!r} beside the text, got {', '.join(c.extra) or 'only text'}"
        )
    return c.extra[name]


def text_tokens(c: Condition, size: int) -> Tensor:
    """Return the text's embeddings (R, S, E). Raises InputError unless E is `size`."""
    if c.text.tokens.shape[2] != size:
        raise InputError(
            f"this model needs text embeddings of {size} dimensions, got "
            f"{c.text.tokens.shape[2]}; use the text encoder that it was trained with"
        )
    return c.text.tokens


def pooled_text(c: Condition, size: int) -> Tensor:
    """Return the pooled text vectors (R, P). Raises InputError if missing or if P is not `size`."""
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
