"""Folders of generated samples of one model, with a manifest that describes each file.

The manifest is the record that `apt.outputs.OutputRecord` writes while generating: JSON lines, the
settings first, then one line per finished file. `diffusion-apt generate` writes one for a list of
prompts, so its output folders can be compared directly. If several processes shared the work, a
folder may hold several manifests.

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
"""Name of the manifest in folders made for comparison. Readers accept any name with this ending."""

SampleKey = tuple[str, int]
"""Prompt and seed."""


@dataclass(frozen=True, kw_only=True)
class Sample(Output):
    """A generated file.

    Attributes:
        sha256: of the content as it was generated.
    """

    sha256: str


@dataclass(frozen=True, kw_only=True)
class SampleFolder:
    """The samples of one model.

    Attributes:
        folder: that holds the files.
        settings: everything else that determines their content: model, steps, guidance, ...
        samples: by prompt and seed, in the order in which they were generated.
    """

    folder: Path
    settings: Mapping[str, Any]
    samples: Mapping[SampleKey, Sample]


def read_samples(folder: Path) -> SampleFolder:
    """Read the manifests of a folder, but not the samples.

    Raises:
        DataError: if there is no folder or no manifest in it, a manifest is damaged or names files
            elsewhere, manifests differ in their settings, or a prompt and seed occur twice.
    """
    settings: Mapping[str, Any] | None = None
    samples: dict[SampleKey, Sample] = {}
    for path in _manifests(folder):
        first, *lines = _lines(path)
        if settings is not None and first["settings"] != settings:
            raise DataError(
                f"{str(path)!r} has other settings than another manifest in its folder; use one "
                "folder for each model and its settings"
            )
        settings = first["settings"]
        for line in lines:
            sample = _sample(path, line)
            key = (sample.prompt, sample.seed)
            if samples.setdefault(key, sample).path != sample.path:
                raise DataError(
                    f"{str(folder)!r} has two samples of {sample.prompt!r} with seed "
                    f"{sample.seed}; keep one of them"
                )
            samples[key] = sample
    if settings is None or not samples:
        raise DataError(
            f"{str(folder)!r} has no manifest of samples (*{RECORD_SUFFIX}); generate samples with "
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
        raise DataError(
            f"cannot read {str(path)!r} ({error}); generate its samples again"
        ) from error
    try:
        lines = [parse_line(path, line) for line in whole]
    except InputError as error:
        raise DataError(f"{str(path)!r} is damaged; generate its samples again") from error
    if not lines or not isinstance(lines[0].get("settings"), dict):
        raise DataError(f"{str(path)!r} does not begin with settings; generate its samples again")
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
        raise DataError(
            f"{str(path)!r} has an invalid line ({error}); generate its samples again"
        ) from error
