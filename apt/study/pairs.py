"""Choose the pairs of a study: models, prompts and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apt.errors import InputError, listed
from apt.rng import hash_key
from apt.samples import Sample, SampleFolder, SampleKey
from apt.study.document import DEGRADED, INTACT
from apt.study.media import clean_suffix


@dataclass(frozen=True, kw_only=True)
class SamplePair:
    """Two samples that will be shown side by side.

    Attributes:
        first, second: names of the models.
        samples: one sample of each.
    """

    first: str
    second: str
    samples: tuple[Sample, Sample]


def check_models(folders: Mapping[str, SampleFolder]) -> None:
    """Raise InputError unless there are two models or more, all with the same prompts and seeds."""
    if len(folders) < 2:
        raise InputError(f"a study needs at least two models, got {listed(folders) or 'none'}")
    for name in folders:
        if name in (INTACT, DEGRADED):
            raise InputError(f"a model cannot be called {name!r} here; choose another name")
    (first, ours), *others = folders.items()
    for other, theirs in others:
        for left, right, keys in (
            (first, other, ours.samples.keys() - theirs.samples.keys()),
            (other, first, theirs.samples.keys() - ours.samples.keys()),
        ):
            if keys:
                prompt, seed = min(keys)
                raise InputError(
                    f"{right!r} lacks {len(keys)} of the samples of {left!r}, such as {prompt!r} "
                    f"with seed {seed}; generate all prompts and seeds with every model"
                )


def choose_comparisons(
    names: Sequence[str], asked: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return the pairs of models to compare: those asked for, or all.

    Raises InputError for an unknown model, a model against itself, or a comparison given twice.
    """
    for first, second in asked:
        for name in (first, second):
            if name not in names:
                raise InputError(f"there is no model {name!r} to compare; choose from {names}")
        if first == second:
            raise InputError(f"{first!r} cannot be compared with itself")
    if len({frozenset(pair) for pair in asked}) < len(asked):
        raise InputError("a comparison was given twice; give each pair of models once")
    return list(asked) or list(itertools.combinations(names, 2))


def choose_keys(
    keys: Sequence[SampleKey], num_prompts: int | None, seeds_per_prompt: int | None, seed: int
) -> list[SampleKey]:
    """Draw prompts at random, and take the first seeds of each; None takes all.

    Raises InputError if there are fewer than asked for.
    """
    seeds: dict[str, list[int]] = {}
    for prompt, number in keys:
        seeds.setdefault(prompt, []).append(number)
    if num_prompts is not None and not 1 <= num_prompts <= len(seeds):
        raise InputError(
            f"{num_prompts} prompts were asked for, but the samples have {len(seeds)}; generate "
            "more, or ask for another number"
        )
    drawn = set(sorted(seeds, key=lambda prompt: hash_key(seed, "prompt", prompt))[:num_prompts])
    chosen = []
    for prompt in seeds:
        if prompt in drawn:
            numbers = sorted(seeds[prompt])
            if seeds_per_prompt is not None and not 1 <= seeds_per_prompt <= len(numbers):
                raise InputError(
                    f"{seeds_per_prompt} samples of each prompt were asked for, but {prompt!r} "
                    f"has {len(numbers)}; generate more, or ask for another number"
                )
            chosen += [(prompt, number) for number in numbers[:seeds_per_prompt]]
    return chosen


def pair_up(
    folders: Mapping[str, SampleFolder],
    comparisons: Sequence[tuple[str, str]],
    keys: Sequence[SampleKey],
) -> list[SamplePair]:
    """Return a pair of samples for every comparison, prompt and seed.

    Raises DataError for files that cannot be shown, and InputError for a video next to an image or
    two video files of different types.
    """
    pairs = []
    for (first, second), key in itertools.product(comparisons, keys):
        samples = folders[first].samples[key], folders[second].samples[key]
        kinds = [clean_suffix(sample.path) for sample in samples]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{str(samples[0].path)!r} and {str(samples[1].path)!r} are a pair but of "
                "different types; generate both with the same suffix"
            )
        pairs.append(SamplePair(first=first, second=second, samples=samples))
    return pairs
