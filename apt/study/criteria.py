"""The criteria that raters judge by, in the words of APT Section 4.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["left", "same", "right"]
CHOICES: tuple[Choice, ...] = ("left", "same", "right")
"""The possible answers: the better side, or no preference."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One of the three criteria.

    Attributes:
        name: name in files.
        title: name for people.
        definition: what raters should judge.
    """

    name: str
    title: str
    definition: str


CRITERIA = (
    Criterion(
        name="visual_fidelity",
        title="Visual fidelity",
        definition="Texture, details, color, exposure, and realism.",
    ),
    Criterion(
        name="structural_integrity",
        title="Structural integrity",
        definition="Structural correctness of the objects and body parts.",
    ),
    Criterion(
        name="text_alignment",
        title="Text alignment",
        definition="Closeness to the prompt.",
    ),
)
