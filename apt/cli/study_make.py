"""`diffusion-apt study make`: make pairs of samples for raters."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from apt.cli.app import parse
from apt.cli.output import printing
from apt.cli.progress import progress_bar
from apt.errors import InputError, counted
from apt.evaluate.choice import ModelChoice, check_model, parse_model, parse_name
from apt.prompts import read_prompts
from apt.samples import SampleFolder, SampleKey, read_samples
from apt.study.make import MakeConfig, check_beginning, make_study
from apt.study.pairs import choose_comparisons, choose_keys

# Numbers of prompts, and of samples per prompt, in the paper's studies (APT Section 4.2).
_SETS = {"images": (300, 3), "videos": (96, 1)}

Many = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class StudyMake:
    """Make a preference study of two or more models: pairs of samples with the same prompt and
    seed.

    Samples are read from folders or generated. An interrupted call can be repeated.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of the study, created if missing."""
    samples: Many = ()
    """A folder of samples with a manifest, as `generate` writes it for several prompts. A name for
    the model can precede it: --samples apt=out/apt --samples base=out/base."""
    model: Many = ()
    """A model to generate with, as in `evaluate`, including peers and diffusers pipelines. A name
    can precede it, and options can follow: --model digits --model two=digits,num_steps=2. Needs
    --prompts."""
    prompts: Path | None = None
    """Text file with one prompt per line, for --model."""
    seeds: int | None = None
    """Samples per prompt for --model, with seeds 0, 1, ... None is 1, or the number of
    --paper-set."""
    compare: Many = ()
    """Two models to compare, by name: --compare apt:base. By default every model is compared with
    every other."""
    paper_set: Literal["images", "videos"] | None = None
    """Use the paper's numbers. images: 300 prompts drawn at random, with 3 samples each; videos: 96
    prompts with one; 3 raters per pair."""
    device: str | None = None
    """cpu, cuda or cuda:N for --model; None takes a GPU if there is one."""
    config: Annotated[MakeConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=MakeConfig
    )


def main(args: Sequence[str], *, prog: str) -> None:
    """Generate the missing samples, make the pairs, and print where they are."""
    asked = parse(StudyMake, args, prog=prog)
    given = [parse_name(text) for text in asked.samples]
    models = [parse_model(text) for text in asked.model]
    names = [name for name, _ in given] + [model.name for model in models]
    if len(set(names)) < len(names):
        raise InputError(f"models need different names, got {names}; name them with NAME=...")
    if models and asked.prompts is None:
        raise InputError("--model needs --prompts FILE, a text file with one prompt per line")
    comparisons = [split_comparison(text) for text in asked.compare]
    config = asked.config
    seeds = asked.seeds
    if asked.paper_set is not None:
        num_prompts, per_prompt = _SETS[asked.paper_set]
        config = dataclasses.replace(
            config, num_prompts=num_prompts, seeds_per_prompt=per_prompt, votes=3
        )
        seeds = per_prompt if seeds is None else seeds
    seeds = 1 if seeds is None else seeds
    if seeds < 1:
        raise InputError(f"each prompt needs at least 1 sample, got {seeds}")
    # Check everything before the slow work of generating.
    choose_comparisons(names, comparisons)
    check_beginning(asked.directory, names, config)
    folders = {name: read_samples(Path(folder).expanduser()) for name, folder in given}
    if models:
        assert asked.prompts is not None
        for model in models:
            check_model(model)
        lines = list(dict.fromkeys(read_prompts(asked.prompts)))
        keys = choose_keys(
            list(itertools.product(lines, range(seeds))),
            config.num_prompts,
            config.seeds_per_prompt,
            config.seed,
        )
        prompts = list(dict.fromkeys(prompt for prompt, _ in keys))
        wanted = list(itertools.product(prompts, range(seeds)))
        for model in models:
            folders[model.name] = _generate(asked, model, wanted)
    with progress_bar("checking samples") as update:
        study = make_study(asked.directory, folders, comparisons, config, progress=update)
    with printing():
        print(
            f"{counted(len(study.pairs), 'pair')} and "
            f"{counted(len(study.checks), 'attention check')} in "
            f"{asked.directory}; next: diffusion-apt study serve {asked.directory}"
        )


def _generate(asked: StudyMake, choice: ModelChoice, keys: Sequence[SampleKey]) -> SampleFolder:
    from apt.evaluate.generate import generate_samples
    from apt.evaluate.models import load_model

    folder = asked.directory / "samples" / choice.name
    model = load_model(choice, device=asked.device)
    with progress_bar(f"generating with {choice.name}") as update:
        generate_samples(folder, model, keys, progress=update)
    return read_samples(folder)


def split_comparison(text: str) -> tuple[str, str]:
    """Split A:B into its two names. Raises InputError for other texts."""
    first, sign, second = text.partition(":")
    if not (first and sign and second) or ":" in second:
        raise InputError(f"--compare needs two names, as in --compare apt:base; got {text!r}")
    return first, second
