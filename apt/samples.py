"""Folders of generated samples of one model, and the manifest that says what each file is.

The manifest is the record that generating leaves behind, `apt.outputs.OutputRecord`: JSON lines,
the settings first, then a line for each file that is whole. `diffusion-apt generate` writes one for
a list of prompts, so what it made can be compared as it is; work that was shared among processes
may leave several in one folder.

    {"settings": {"model": "digits", "num_steps": 1, ...}}
    {"file": "prompt0-seed0.mp4", "prompt": "a red seven", "seed": 0, "bytes": 4711, "sha256": ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt.errors import DataError, InputError
from apt.outputs import RECORD_BEGINNING, RECORD_SUFFIX, Output, parse_line, whole_lines
from apt.untrusted import check_name

MANIFEST = "samples" + RECORD_SUFFIX
"""Of folders that are made for comparing. Readers take any name with this ending."""

SampleKey = tuple[str, int]
"""Prompt and seed."""


@dataclass(frozen=True, kw_only=True)
class Sample(Output):
    """A file that was made.

    Attributes:
        sha256: of its content when it was made.
    """

    sha256: str


@dataclass(frozen=True, kw_only=True)
class SampleFolder:
    """What one model made.

    Attributes:
        folder: with the files.
        settings: what else decides their content: model, steps, guidance, ...
        samples: by prompt and seed, in the order of making.
    """

    folder: Path
    settings: Mapping[str, Any]
    samples: Mapping[SampleKey, Sample]


def read_samples(folder: Path) -> SampleFolder:
    """Read the manifests of a folder. The files themselves are not looked at.

    Raises:
        DataError: no folder, no manifest in it, a damaged one, one that names files elsewhere,
            several that differ in their settings, or a prompt and seed that are there twice.
    """
    settings: Mapping[str, Any] | None = None
    samples: dict[SampleKey, Sample] = {}
    for path in _manifests(folder):
        first, *lines = _lines(path)
        if settings is not None and first["settings"] != settings:
            raise DataError(
                f"{str(path)!r} has other settings than another manifest beside it; keep the "
                "samples of one model and one setting in a folder"
            )
        settings = first["settings"]
        for line in lines:
            sample = _sample(path, line)
            key = (sample.prompt, sample.seed)
            if samples.setdefault(key, sample).path != sample.path:
                raise DataError(
                    f"{str(folder)!r} has two samples of {sample.prompt!r} with seed "
                    f"{sample.seed}; keep one"
                )
            samples[key] = sample
    if settings is None or not samples:
        raise DataError(
            f"{str(folder)!r} has no manifest of samples (*{RECORD_SUFFIX}); make samples with "
            "`diffusion-apt generate` and several prompts, or with `study make --model`"
        )
    return SampleFolder(folder=folder, settings=settings, samples=samples)


def _manifests(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.name.endswith(RECORD_SUFFIX))
        return [path for path in found if path.read_bytes().startswith(RECORD_BEGINNING.encode())]
    except OSError as error:
        raise DataError(
            f"cannot read samples from {str(folder)!r}: {error.strerror or error}"
        ) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        whole = whole_lines(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error}); make its samples again") from error
    try:
        lines = [parse_line(path, line) for line in whole]
    except InputError as error:
        raise DataError(f"{str(path)!r} is damaged; make its samples again") from error
    if not lines or not isinstance(lines[0].get("settings"), dict):
        raise DataError(f"{str(path)!r} does not begin with settings; make its samples again")
    return lines


def _sample(path: Path, line: Mapping[str, Any]) -> Sample:
    try:
        return Sample(
            path=path.parent / check_name(line["file"]),
            prompt=str(line["prompt"]),
            seed=int(line["seed"]),
            sha256=str(line["sha256"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{str(path)!r} has a line that is no sample: {error}") from error
