"""A protocol: the prompts, the number of samples of each, and the measures.

Protocols are classes in `PROTOCOLS`, whose fields are the command's options. A measure is a
function of the samples of one model and one evaluation seed. It holds its networks and reference
data itself, so these are prepared once for all models.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from apt.errors import ConfigError
from apt.evaluate.choice import ModelChoice
from apt.generate_options import GenerateOptions
from apt.registry import Registry
from apt.samples import Sample, SampleKey

Figures = Mapping[str, float]
"""Figures by name; `Protocol.figures` describes those that are shown."""

Measure = Callable[[Sequence[Sample]], Figures]
"""Maps files with their prompts and seeds, in the protocol's order, to figures."""

PairMeasure = Callable[[Sequence[Sample], Sequence[Sample]], Figures]
"""Maps samples, and the first model's samples of the same prompts and seeds, to figures."""

SEED_STRIDE = 1_000_000
"""From the noise seeds of one evaluation seed to those of the next."""


@dataclass(frozen=True)
class Figure:
    """A figure's title in tables and plots, which direction is better ("" is neither), and the
    scale of its axis; "share" goes from 0 to 1."""

    title: str
    better: Literal["lower", "higher", ""] = ""
    scale: Literal["linear", "log", "share"] = "linear"

    @property
    def heading(self) -> str:
        """The title, with an arrow in the better direction."""
        arrow = {"lower": " ↓", "higher": " ↑", "": ""}[self.better]
        return self.title + arrow


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One evaluation, the same for every model.

    Attributes:
        name: of the protocol.
        about: what it measures, as Markdown for the page.
        prompts: their order determines the noise seeds; prompts may repeat.
        samples_per_prompt: for each evaluation seed.
        seeds: evaluation seeds. Each is a set of samples with its own noise; figures are given with
            their spread over the seeds.
        own_keys: returns the prompts and noise seeds of the samples of an evaluation seed, with all
            prompts equally often; None uses the default.
        lossless: store videos without loss.
        options: frames, height and width; unset ones are each model's own.
        figures: shown in tables and plots, in this order; any others are only in the JSON file.
        measures: of each model's samples.
        pair_measures: of each further model's samples against the first model's.
        prepare: loads what the measures hold, such as networks and real data; called once, before
            anything is generated.
        baselines: rows above the models', by name: figures of what no model made, such as real
            videos.
        references: real files by prompt, shown beside the samples.
        settings: what else determines the figures, for the record: folders, networks.
    """

    name: str
    about: str
    prompts: tuple[str, ...]
    samples_per_prompt: int = 1
    seeds: tuple[int, ...] = (0,)
    own_keys: Callable[[int], list[SampleKey]] | None = None
    lossless: bool = False
    options: GenerateOptions = GenerateOptions()
    figures: Mapping[str, Figure]
    measures: tuple[Measure, ...] = ()
    pair_measures: tuple[PairMeasure, ...] = ()
    prepare: Callable[[], object] = lambda: None
    baselines: Mapping[str, Callable[[], Figures]] = field(default_factory=dict)
    references: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError(f"the protocol {self.name!r} has no prompts; give at least one")
        check_seeds(self.seeds)
        if self.samples_per_prompt < 1:
            raise ConfigError(f"samples_per_prompt must be positive, got {self.samples_per_prompt}")
        if len(self.prompts) * self.samples_per_prompt > SEED_STRIDE:
            raise ConfigError(f"a protocol makes at most {SEED_STRIDE} samples per seed")

    def keys(self, seed: int) -> list[SampleKey]:
        """Return the prompts and noise seeds of the samples of one evaluation seed.

        Each sample has its own noise seed, the same for every model.
        """
        if self.own_keys is not None:
            return self.own_keys(seed)
        first = seed * SEED_STRIDE
        each = self.samples_per_prompt
        return [
            (prompt, first + number * each + index)
            for number, prompt in enumerate(self.prompts)
            for index in range(each)
        ]


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ConfigError unless these can be evaluation seeds."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(
            f"seeds must be different non-negative integers, at least one; got {seeds}"
        )


@dataclass(frozen=True)
class Request:
    """The evaluation that a protocol is built for.

    Attributes:
        out: folder of the evaluation; a protocol may put the files that it prepares there.
        models: the models to evaluate.
    """

    out: Path
    models: tuple[ModelChoice, ...]


class ProtocolConfig(typing.Protocol):
    """The options of a protocol: a frozen dataclass whose docstrings are the command's help."""

    def build(self, request: Request) -> Protocol:
        """Build the protocol. Raises InputError for options or files that do not fit."""
        ...


PROTOCOLS: Registry[ProtocolConfig] = Registry("protocol")
"""Protocols by the names that `diffusion-apt evaluate` takes."""
