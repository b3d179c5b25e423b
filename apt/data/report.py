"""Reports of the files that cannot be used, with counts and reasons."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from apt.errors import counted

_LOG = logging.getLogger(__name__)

ProblemKind = Literal[
    "unreadable",
    "missing caption",
    "missing file",
    "unknown suffix",
    "bad metadata",
    "too short",
    "too small",
    "no bucket",
    "long caption",
    "bad caption",
]

_NAMED_PER_KIND = 20


@dataclass(frozen=True)
class Problem:
    """One file that cannot be used.

    Attributes:
        kind: the class of problem, for counting.
        file: the file's name relative to its folder.
        detail: what was found and what was expected.
    """

    kind: ProblemKind
    file: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}: {self.kind} ({self.detail})"


@dataclass
class DataReport:
    """How much of a folder is used, and why the rest is not.

    Attributes:
        num_videos: usable videos (one per file and caption).
        num_images: usable images.
        problems: one entry per file and kind, in the order found.
        cut: names of files whose caption was cut to fit the text encoder.
    """

    num_videos: int = 0
    num_images: int = 0
    problems: list[Problem] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    _seen: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def add(self, problem: Problem) -> bool:
        """Record and log a problem; returns False if the file already has one of that kind."""
        key = (problem.kind, problem.file)
        if key in self._seen:
            return False
        self._seen.add(key)
        self.problems.append(problem)
        _LOG.warning("skipped %s", problem)
        return True

    def add_cut(self, file: str) -> None:
        """Record and log that a file's caption was cut."""
        self.cut.append(file)
        _LOG.warning("cut the caption of %s to fit the text encoder", file)

    def counts(self) -> dict[str, int]:
        """Return the number of files per kind of problem, most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def text(self) -> str:
        """Return the report as plain text: a line of counts, then the files by kind of problem."""
        used = f"{counted(self.num_videos, 'video')} and {counted(self.num_images, 'image')} in use"
        if self.cut:
            used += f"; {counted(len(self.cut), 'caption')} cut"
        if not self.problems:
            return f"{used}; no problems"
        return "\n".join([f"{used}; {len(self.problems)} skipped", *problem_lines(self.problems)])


def problem_lines(problems: list[Problem]) -> list[str]:
    """Format problems as indented lines, grouped by kind; long groups end with a count."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.kind, []).append(problem)
    lines = []
    for kind, group in groups.items():
        lines.append(f"  {kind}: {len(group)}")
        lines += [f"    {problem.file}: {problem.detail}" for problem in group[:_NAMED_PER_KIND]]
        if len(group) > _NAMED_PER_KIND:
            lines.append(f"    and {len(group) - _NAMED_PER_KIND} more")
    return lines
