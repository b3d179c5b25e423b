"""Make a study from folders of samples: `study.json`, and files whose names reveal nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apt.errors import DataError, InputError
from apt.outputs import check_folder, file_content
from apt.rng import hash_key
from apt.samples import Sample, SampleFolder
from apt.study.document import (
    DEGRADED,
    INTACT,
    MEDIA,
    STUDY_FILE,
    Pair,
    Study,
    read_study,
    write_study,
)
from apt.study.media import clean_suffix, write_clean, write_degraded
from apt.study.pairs import check_models, choose_comparisons, choose_keys, pair_up

_MOST_CHECKS = 12
"""The most different attention checks; a rater who gets more sees some again."""


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """Settings of a new study."""

    title: str = "Which one is better?"
    """Shown to raters; it should not name a model."""
    note: str = ""
    """Printed in the report, such as who rates and how."""
    votes: int = 3
    """Raters for each pair; 3 in the paper."""
    num_prompts: int | None = None
    """Number of prompts, drawn at random from those of the samples; None takes all."""
    seeds_per_prompt: int | None = None
    """Number of samples of each prompt; None takes all."""
    check_every: int = 20
    """One attention check per this many pairs: a sample next to a ruined copy of it. 0 for none."""
    repeat_every: int = 10
    """One of this many pairs is shown again later with its sides swapped, which measures how well
    raters agree with themselves. 0 for none."""
    seed: int = 0
    """Determines which prompts are drawn, the sides and the order."""


def check_beginning(folder: Path, names: Collection[str], config: MakeConfig) -> None:
    """Raise InputError if the folder contains a study of other models or with other settings.

    `make_study` checks the rest, which depends on the samples.
    """
    if not (folder / STUDY_FILE).exists():
        return
    study = read_study(folder)
    kept = ("title", "note", "votes", "check_every", "repeat_every", "seed")
    changed = [name for name in kept if getattr(study, name) != getattr(config, name)]
    if set(study.models) != set(names):
        changed.insert(0, "models")
    if changed:
        raise _another_study(folder, f" (different: {', '.join(changed)})")


def make_study(
    folder: Path,
    folders: Mapping[str, SampleFolder],
    comparisons: Sequence[tuple[str, str]] = (),
    config: MakeConfig = MakeConfig(),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Study:
    """Write a study. An interrupted call can be repeated: files that exist are kept.

    Args:
        folder: folder of the study; created if needed.
        folders: folder of samples of each model, by the model's name in this study.
        comparisons: pairs of models to compare; empty for all pairs.
        config: how many pairs there are, and how they are shown.
        progress: called with the number of files written so far and the number of all files.

    Raises:
        InputError: for models, prompts or numbers that do not fit, and for a folder that cannot be
            written or that contains another study.
        DataError: for a sample that is missing, broken, changed since it was made, or of a type
            that cannot be shown to raters.
    """
    check_models(folders)
    met = choose_comparisons(list(folders), comparisons)
    shared = list(next(iter(folders.values())).samples)
    keys = choose_keys(shared, config.num_prompts, config.seeds_per_prompt, config.seed)
    found = pair_up(folders, met, keys)
    checked = _samples_to_check(folders, [pair.samples[0] for pair in found], config)

    def name(sample: Sample, kind: str = INTACT) -> str:
        suffix = clean_suffix(sample.path)
        if kind == DEGRADED and suffix == ".webm":
            suffix = ".mp4"
        return _file_name(config.seed, sample.sha256, kind) + suffix

    study = Study(
        title=config.title,
        note=config.note,
        seed=config.seed,
        votes=config.votes,
        check_every=config.check_every,
        repeat_every=config.repeat_every,
        models={model: dict(samples.settings) for model, samples in folders.items()},
        pairs=tuple(
            Pair(
                name=f"p{number}",
                first=pair.first,
                second=pair.second,
                prompt=pair.samples[0].prompt,
                seed=pair.samples[0].seed,
                files=(name(pair.samples[0]), name(pair.samples[1])),
            )
            for number, pair in enumerate(found)
        ),
        checks=tuple(
            Pair(
                name=f"c{number}",
                first=INTACT,
                second=DEGRADED,
                prompt=sample.prompt,
                seed=sample.seed,
                files=(name(sample), name(sample, DEGRADED)),
            )
            for number, sample in enumerate(checked)
        ),
    )
    check_folder(folder)
    if (folder / STUDY_FILE).exists() and read_study(folder).digest() != study.digest():
        raise _another_study(folder)
    jobs = {name(sample): (sample, INTACT) for pair in found for sample in pair.samples}
    jobs |= {name(sample): (sample, INTACT) for sample in checked}
    jobs |= {name(sample, DEGRADED): (sample, DEGRADED) for sample in checked}
    media = folder / MEDIA
    try:
        media.mkdir(parents=True, exist_ok=True)
        for done, (file, (sample, kind)) in enumerate(jobs.items()):
            progress(done, len(jobs))
            if not (media / file).exists():
                _write(media / file, sample, kind)
        progress(len(jobs), len(jobs))
        write_study(folder, study)
    except OSError as error:
        raise InputError(
            f"cannot write the study to {str(folder)!r}: {error.strerror or error}; free some "
            "space and run this again: finished files are kept"
        ) from error
    return study


def _samples_to_check(
    folders: Mapping[str, SampleFolder], samples: Sequence[Sample], config: MakeConfig
) -> list[Sample]:
    """Draw different samples for attention checks, as many as a rater sees, up to a dozen."""
    if config.check_every < 1:
        return []
    drawn = sorted(
        {sample.sha256: sample for sample in samples}.values(),
        key=lambda sample: hash_key(config.seed, "check", sample.sha256),
    )
    return drawn[: min(_MOST_CHECKS, math.ceil(len(samples) / config.check_every))]


def _file_name(seed: int, sha256: str, kind: str) -> str:
    """Return a file name that depends on the content only, so that it does not reveal the model."""
    return hashlib.blake2b(f"{seed}\x1f{sha256}\x1f{kind}".encode(), digest_size=16).hexdigest()


def _write(target: Path, sample: Sample, kind: str) -> None:
    try:
        content = file_content(sample.path)[1]
    except OSError as error:
        raise DataError(
            f"cannot read the sample {str(sample.path)!r}: {error.strerror or error}; generate its "
            "folder again"
        ) from error
    if content != sample.sha256:
        raise DataError(
            f"{str(sample.path)!r} differs from its manifest: it was cut off or changed after it "
            "was made; generate its folder again"
        )
    if kind == INTACT:
        write_clean(target, sample.path)
    else:
        write_degraded(target, sample.path, hash_key(target.stem))


def _another_study(folder: Path, difference: str = "") -> InputError:
    return InputError(
        f"{str(folder)!r} contains another study{difference}, whose answers belong to its own "
        "pairs; choose another folder"
    )
