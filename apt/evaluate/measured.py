"""A cache of measured figures, so that an interrupted evaluation can continue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apt.errors import InputError
from apt.evaluate.protocol import Figures
from apt.samples import Sample
from apt.untrusted import parse_json

MEASURED = "measured.jsonl"


class Measured:
    """Figures in a file, keyed by a digest of the samples and of everything else behind them.

    Args:
        folder: contains the file; unreadable lines are skipped, and their figures measured again.
        about: everything but the samples that determines the figures, as JSON.
    """

    def __init__(self, folder: Path, about: Any) -> None:
        self._path = folder / MEASURED
        self._about = about
        self._known: dict[str, dict[str, float]] = {}
        if not self._path.is_file():
            return
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = parse_json(line)
                figures = {str(name): float(value) for name, value in entry["figures"].items()}
                self._known[str(entry["of"])] = figures
            except (ValueError, TypeError, KeyError, AttributeError):
                continue

    def get(
        self, number: int, samples: Sequence[Sequence[Sample]], measure: Callable[[], Figures]
    ) -> dict[str, float]:
        """Return the figures of these samples from the file, or measure and record them.

        If there are no figures, nothing is recorded.

        Args:
            number: index of the measure in the protocol.
            samples: the measured samples, and those that they are compared with.
            measure: computes the figures.

        Raises InputError if the file cannot be written, and what `measure` raises.
        """
        digests = [[sample.sha256 for sample in part] for part in samples]
        text = json.dumps([self._about, number, digests], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self._known:
            figures = {name: float(value) for name, value in measure().items()}
            if not figures:
                return {}
            try:
                with self._path.open("a", encoding="utf-8") as stream:
                    # As text, which also holds infinity and keeps every digit.
                    written = {name: repr(value) for name, value in figures.items()}
                    stream.write(json.dumps({"of": key, "figures": written}) + "\n")
            except OSError as error:
                raise InputError(
                    f"cannot write {str(self._path)!r}: {error.strerror or error}; free some "
                    "space, and evaluate again: finished work is kept"
                ) from error
            self._known[key] = figures
        return self._known[key]
