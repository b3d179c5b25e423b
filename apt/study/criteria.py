"""What raters judge, in the words of APT Section 4.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["left", "same", "right"]
CHOICES: tuple[Choice, ...] = ("left", "same", "right")
"""What a rater answers: the better side, or no preference."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One question of three.

    Attributes:
        name: in files.
        title: for people.
        definition: what counts.
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
