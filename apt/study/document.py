"""`study.json`: all pairs of a study and the models behind them. Raters never see it."""

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
        name: name of the pair; does not reveal the models.
        first, second: the models, or `INTACT` and `DEGRADED` for an attention check.
        prompt, seed: prompt and seed of both samples.
        files: names of the two files in `MEDIA`.
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
        title: title for raters; should not name a model.
        note: text for readers of the report, such as who rated and under which rules.
        seed: determines sides and order.
        votes: raters for each pair.
        check_every: one attention check per this many pairs; 0 for none.
        repeat_every: one of this many pairs is shown to its rater again; 0 for none.
        models: settings of each model's samples, by the model's name in this study.
        pairs: pairs of samples from two models.
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
                raise InputError(
                    f"{name} come once per a number of pairs, or never if it is 0; got {value}"
                )

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """The pairs of models that are compared, in order."""
        return list(dict.fromkeys((pair.first, pair.second) for pair in self.pairs))

    def find(self, name: str) -> Pair:
        """Return the pair or check of a name. Raises KeyError."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Pair]:
        return {pair.name: pair for pair in (*self.pairs, *self.checks)}

    def to_json(self) -> str:
        """Return the text of `study.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    def digest(self) -> str:
        """Return a hash that identifies this study."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]


def write_study(folder: Path, study: Study) -> None:
    """Write `study.json`. Raises OSError if that fails."""
    write_text(folder / STUDY_FILE, study.to_json())


def read_study(folder: Path) -> Study:
    """Read `study.json`. Raises DataError if it is missing or damaged."""
    path = folder / STUDY_FILE
    try:
        document = read_json_file(path)
        if document.pop("format") != FORMAT:
            raise ValueError("it was made by another version of this package")
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
        raise DataError(
            f"{str(path)!r} is not a study, or is damaged ({error}); restore it"
        ) from error


def _pair(entry: Mapping[str, Any]) -> Pair:
    first, second = entry["files"]
    return Pair(**{**entry, "files": (check_name(first), check_name(second))})
