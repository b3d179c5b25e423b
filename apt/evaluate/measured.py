"""Figures that were measured already, so that an interrupted evaluation goes on."""

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
    """Figures in a file, by a digest of what they are of.

    Args:
        folder: of the file; lines that cannot be read are passed over, and measured again.
        about: what else decides the figures, as JSON.
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
        """The figures of these samples, from the file or measured and noted; none are not noted.

        Args:
            number: which of the protocol's measures.
            samples: that are measured, and those that they are compared with.
            measure: does it.

        Raises InputError for a disk that refuses, and what `measure` raises.
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
                    # As text, so that infinity is one too, and no digit is lost.
                    written = {name: repr(value) for name, value in figures.items()}
                    stream.write(json.dumps({"of": key, "figures": written}) + "\n")
            except OSError as error:
                raise InputError(
                    f"cannot write {str(self._path)!r}: {error.strerror or error}; free some "
                    "space, and evaluate again: what is there is kept"
                ) from error
            self._known[key] = figures
        return self._known[key]
