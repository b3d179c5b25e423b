"""A protocol: which prompts, how many samples of each, and what is measured of them.

Protocols are classes in `PROTOCOLS`, whose fields are the command's options. A measure is a
function of the samples of one model and one evaluation seed; what it compares them with, and the
networks that it needs, it holds itself, so that they are prepared once for all models.
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
"""Figures by name; `Protocol.figures` says what those are that are shown."""

Measure = Callable[[Sequence[Sample]], Figures]
"""Files with their prompts and seeds, in the protocol's order, to figures."""

PairMeasure = Callable[[Sequence[Sample], Sequence[Sample]], Figures]
"""Samples, and the first model's samples of the same prompts and seeds, to figures."""

SEED_STRIDE = 1_000_000
"""Between evaluation seeds, more than the samples of one."""


@dataclass(frozen=True)
class Figure:
    """What a figure is called in tables and plots, which way is better ("" is neither), and on
    which axis it is drawn; "share" is one from 0 to 1."""

    title: str
    better: Literal["lower", "higher", ""] = ""
    scale: Literal["linear", "log", "share"] = "linear"

    @property
    def heading(self) -> str:
        """The title with an arrow."""
        arrow = {"lower": " ↓", "higher": " ↑", "": ""}[self.better]
        return self.title + arrow


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One evaluation, the same for every model.

    Attributes:
        name: of the protocol.
        about: what it measures, in sentences for the page (Markdown).
        prompts: in an order that the seeds of their noise depend on; some may be the same.
        samples_per_prompt: of each evaluation seed.
        seeds: evaluation seeds; each is a set of samples with noise of its own, and figures are
            given with their spread over these.
        own_keys: gives prompts and noise seeds of the samples of an evaluation seed, each prompt as
            often as the others; None is the usual ones.
        lossless: keep every pixel of videos.
        options: frames, height and width; what they leave open is each model's own.
        figures: that tables and plots show, in this order; what else the measures give is in the
            JSON file alone.
        measures: of each model's samples.
        pair_measures: of each further model's samples against the first model's.
        prepare: makes ready what the measures hold, such as networks and what is real; called once,
            before anything is generated.
        baselines: rows above the models', by name: measure what no model made, such as real videos.
        references: real files by prompt, to be shown beside samples.
        settings: what else decides the figures, for the record: folders, networks.
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
            raise ConfigError(f"a protocol makes at most {SEED_STRIDE} samples of a seed")

    def keys(self, seed: int) -> list[SampleKey]:
        """Prompts and noise seeds of the samples of one evaluation seed.

        All noise is different, and the same for every model.
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
    """Raise ConfigError for what cannot be the evaluation seeds."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds must be different numbers from 0, at least one; got {seeds}")


@dataclass(frozen=True)
class Request:
    """What a protocol is made for.

    Attributes:
        out: folder of the evaluation, where a protocol may put files that it prepares.
        models: that are evaluated.
    """

    out: Path
    models: tuple[ModelChoice, ...]


class ProtocolConfig(typing.Protocol):
    """The options of a protocol: a frozen dataclass, whose docstrings are the command's help."""

    def build(self, request: Request) -> Protocol:
        """The protocol. Raises InputError for options or files that do not fit."""
        ...


PROTOCOLS: Registry[ProtocolConfig] = Registry("protocol")
"""By the names that `diffusion-apt evaluate` takes."""
