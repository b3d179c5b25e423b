"""VBench (Huang et al., 2024): its prompts, file names and results.

VBench pins old packages and downloads a dozen models, so it runs in its own environment, with
`apt/evaluate/vbench_run.py`; docs/vbench.md has the steps. Its prompts are read from the user's
wheel or installation.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt.errors import DataError, InputError, listed
from apt.metrics.vbench import VBenchScores, vbench_scores
from apt.samples import Sample, SampleKey
from apt.untrusted import parse_json, read_json_file

VIDEOS_PER_PROMPT = 5
"""As VBench expects, and as in APT's Appendix B."""

FULL_INFO = "VBench_full_info.json"
RESULTS = "_eval_results.json"
_SUFFIX = ".mp4"
_MAX_BYTES = 1 << 24


def read_vbench_prompts(source: Path) -> dict[str, tuple[str, ...]]:
    """Return VBench's prompts, each with the dimensions that it is for.

    The file has 946 entries, but two prompts occur both for appearance style and for overall
    consistency. Both entries share their videos, so there are 944 prompts and 4,720 videos.

    Args:
        source: `vbench-*.whl` from `pip download --no-deps vbench`, the folder of an installed
            `vbench`, or its `VBench_full_info.json`.

    Raises DataError for any other file.
    """
    try:
        dimensions: dict[str, list[str]] = {}
        for entry in _full_info(source):
            for dimension in entry["dimension"]:
                dimensions.setdefault(str(entry["prompt_en"]), []).append(str(dimension))
        if not dimensions:
            raise ValueError("no prompts")
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot read VBench's prompts from {str(source)!r} ({error!r}); give vbench's wheel "
            f"(`pip download --no-deps vbench`), its installed folder, or {FULL_INFO}"
        ) from error
    odd = [prompt for prompt in dimensions if "/" in prompt or not prompt]
    if odd:
        raise DataError(f"{str(source)!r} has prompts that cannot be file names: {listed(odd)}")
    return {prompt: tuple(found) for prompt, found in dimensions.items()}


def _full_info(source: Path) -> Any:
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel, wheel.open(f"vbench/{FULL_INFO}") as stream:
            return parse_json(stream.read(_MAX_BYTES + 1), limit=_MAX_BYTES)
    return read_json_file(source / FULL_INFO if source.is_dir() else source, limit=_MAX_BYTES)


def arrange_videos(
    samples: Mapping[SampleKey, Sample], prompts: Sequence[str], folder: Path
) -> list[Path]:
    """Put samples under the names that VBench expects, `PROMPT-0.mp4` to `PROMPT-4.mp4`.

    Files are hard links if the disk allows it, else copies; existing files are replaced.

    Args:
        samples: of one model; see `apt.samples.read_samples`.
        prompts: all prompts that are needed.
        folder: where the files go.

    Returns the files.

    Raises:
        DataError: a prompt with fewer than five samples, or samples that are not MP4.
        InputError: the folder cannot be written.
    """
    by_prompt: dict[str, list[SampleKey]] = {}
    for key in sorted(samples):
        by_prompt.setdefault(key[0], []).append(key)
    lacking = [p for p in prompts if len(by_prompt.get(p, ())) < VIDEOS_PER_PROMPT]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(prompts)} prompts have fewer than {VIDEOS_PER_PROMPT} "
            f"samples: {listed(lacking)}; without them VBench's figures are not comparable"
        )
    pairs = [
        (samples[key].path, folder / f"{prompt}-{number}{_SUFFIX}")
        for prompt in prompts
        for number, key in enumerate(by_prompt[prompt][:VIDEOS_PER_PROMPT])
    ]
    others = [str(source) for source, _ in pairs if source.suffix.lower() != _SUFFIX]
    if others:
        raise DataError(f"VBench reads only MP4; generate {_SUFFIX} instead of {listed(others)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source, target in pairs:
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            # Another disk, or one without hard links.
            except OSError:
                shutil.copyfile(source, target)
    except OSError as error:
        raise InputError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}; choose another place"
        ) from error
    return [target for _, target in pairs]


def read_vbench_results(folder: Path) -> tuple[dict[str, float], VBenchScores]:
    """Read results of `vbench_run.py`: raw figures by dimension, and the three scores in percent.

    Raises:
        DataError: missing or damaged results, or a dimension that occurs twice.
        InputError: not all 16 dimensions, or figures outside [0, 1].
    """
    files = sorted(folder.glob(f"*{RESULTS}"))
    if not files:
        raise DataError(f"{str(folder)!r} has no VBench results (*{RESULTS}); run VBench first")
    values: dict[str, float] = {}
    for path in files:
        try:
            # The mean comes first, then the figures of each video.
            found = {str(k): float(v[0]) for k, v in read_json_file(path).items()}
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise DataError(
                f"{str(path)!r} cannot be read ({error!r}); delete it and run VBench again"
            ) from error
        twice = sorted(found.keys() & values.keys())
        if twice:
            raise DataError(f"{str(folder)!r} has {listed(twice)} more than once; keep one file")
        values.update(found)
    return values, vbench_scores(values)
