"""The study's document, `study.json`: which pairs there are. It is the key; no rater sees it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt.errors import DataError, InputError
from apt.files import write_text
from apt.untrusted import check_name, read_json_file

STUDY_FILE = "study.json"
MEDIA = "media"
FORMAT = 1

INTACT, DEGRADED = "intact", "degraded"
"""The sides of an attention check."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two samples of one prompt and seed.

    Attributes:
        name: in files; says nothing of the models.
        first, second: the models, or `INTACT` and `DEGRADED` for an attention check.
        prompt, seed: of both samples.
        files: their names in `MEDIA`.
    """

    name: str
    first: str
    second: str
    prompt: str
    seed: int
    files: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything about a study that does not change while people rate.

    Attributes:
        title: for raters; names no model.
        note: for readers of the report, such as who rated, and by which rule.
        seed: sides and order follow from it.
        votes: raters for each pair.
        check_every: an attention check in so many pairs; 0 for none.
        repeat_every: a pair in so many is shown to its rater again; 0 for none.
        models: settings of the samples by the model's name in this study.
        pairs: of models.
        checks: attention checks.
    """

    title: str
    note: str
    seed: int
    votes: int
    check_every: int
    repeat_every: int
    models: Mapping[str, Mapping[str, Any]]
    pairs: tuple[Pair, ...]
    checks: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if self.votes < 1:
            raise InputError(f"each pair needs at least 1 rater, got {self.votes}")
        for name, value in (("checks", self.check_every), ("repeats", self.repeat_every)):
            if value < 0:
                raise InputError(f"{name} come once in so many pairs, or never with 0; got {value}")

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """The models that met, in order."""
        return list(dict.fromkeys((pair.first, pair.second) for pair in self.pairs))

    def find(self, name: str) -> Pair:
        """The pair of a name. Raises KeyError."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Pair]:
        return {pair.name: pair for pair in (*self.pairs, *self.checks)}

    def to_json(self) -> str:
        """The document's text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    def digest(self) -> str:
        """What tells this study from every other one."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]


def write_study(folder: Path, study: Study) -> None:
    """Write the document. Raises OSError if the disk refuses."""
    write_text(folder / STUDY_FILE, study.to_json())


def read_study(folder: Path) -> Study:
    """Read the document. Raises DataError if there is none, or it is damaged."""
    path = folder / STUDY_FILE
    try:
        document = read_json_file(path)
        if document.pop("format") != FORMAT:
            raise ValueError("it is of another version of this package")
        pairs, checks = (
            tuple(_pair(entry) for entry in document.pop(name)) for name in ("pairs", "checks")
        )
        return Study(**document, pairs=pairs, checks=checks)
    except FileNotFoundError as error:
        raise DataError(
            f"{str(folder)!r} holds no study; make one with `diffusion-apt study make`"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{str(path)!r} is no study, or damaged ({error}); restore it") from error


def _pair(entry: Mapping[str, Any]) -> Pair:
    first, second = entry["files"]
    return Pair(**{**entry, "files": (check_name(first), check_name(second))})
