"""Captions that a text encoder rejects: found early, then skipped, cut, or raised as errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from apt.errors import DataError, InputError, PromptLengthError

LongCaptions = Literal["skip", "cut", "error"]

# Tokenizers are several times faster on many texts at once.
_AT_ONCE = 256


@dataclass(frozen=True)
class Refused:
    """A caption that cannot be used.

    Attributes:
        kind: "long caption", or "bad caption" if the encoder cannot read it at all.
        reason: the encoder's message.
    """

    kind: Literal["long caption", "bad caption"]
    reason: str


@dataclass(frozen=True)
class CaptionRule:
    """How to treat captions that a text encoder rejects.

    Attributes:
        check: the encoder's check. It raises PromptLengthError for a prompt that is too long, and
            InputError for one that it cannot read.
        long: for captions that are too long. "skip" leaves the sample out, like one whose file is
            broken; "cut" keeps the part that fits, in whole words if there are any; "error" raises.
    """

    check: Callable[[Sequence[str]], None]
    long: LongCaptions = "skip"

    def apply(self, captions: Sequence[str], names: Sequence[str]) -> list[str | Refused]:
        """Return the captions to use, in their order.

        Args:
            captions: as found.
            names: of their files, for errors.

        Raises:
            DataError: for the first rejected caption, if `long` is "error".
        """
        results: list[str | Refused] = []
        for start in range(0, len(captions), _AT_ONCE):
            some = captions[start : start + _AT_ONCE]
            try:
                self.check(some)
                results += some
            except InputError:
                results += map(self._one, some)
        for name, result in zip(names, results, strict=True):
            if self.long == "error" and isinstance(result, Refused):
                raise DataError(
                    f"{name}: {result.kind} ({result.reason}); fix it, or have such captions "
                    "skipped or cut with --long-captions (in training --data.long-captions)"
                )
        return results

    def _one(self, caption: str) -> str | Refused:
        try:
            self.check([caption])
        except PromptLengthError as error:
            short = self._cut(caption) if self.long == "cut" else ""
            return short or Refused("long caption", str(error))
        except InputError as error:
            return Refused("bad caption", str(error))
        return caption

    def _cut(self, caption: str) -> str:
        """Return the longest beginning that fits; empty if not even one character does."""
        fits, above = 0, len(caption)
        while above - fits > 1:
            middle = (fits + above) // 2
            if self._takes(caption[:middle]):
                fits = middle
            else:
                above = middle
        short = caption[:fits]
        if not caption[fits].isspace() and " " in short.strip():
            short = short[: short.rindex(" ")]
        # Part of a word can have more tokens than the whole word.
        return short.rstrip() if self._takes(short.rstrip()) else ""

    def _takes(self, caption: str) -> bool:
        try:
            self.check([caption])
        except InputError:
            return False
        return True
