"""Configuration of the digits evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from apt.data.digits import TRAIN_LABELS
from apt.errors import ConfigError
from apt.evaluate.digits.classifier import ClassifierConfig
from apt.evaluate.protocol import check_seeds

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, and how thoroughly.

    Attributes:
        runs: roots of training runs of one recipe with different seeds; the first also has what was
            trained only once.
        out: folder of the report, its plots and its raw figures.
        seeds: evaluation seeds; each draws its own captions, noise and real clips.
        num_samples: samples per method and seed; only Fréchet distances of equal numbers can be
            compared. The default is every trained caption twice: having fewer captions than the
            reference would count as a difference from it.
        samples_per_caption: how many of them share a caption, for the diversity.
        num_reference: real clips that all samples are compared with.
        snapshot_samples: samples per snapshot and seed, for the curves.
        methods: names of the methods to measure; empty measures all, and the curves.
        batch_size: samples per network call.
        precision: of the networks. They are trained in bf16 autocast and saved in bf16.
        cache: folder of the classifiers, the samples and their figures; None is ``evaluation`` in
            the first root.
        independent_judges: also use two other classifiers.
        render: only write the page again, from the figures and sheets in ``out``.
        classifier: the main judge; all real clips have its setting of the digits.
    """

    runs: tuple[Path, ...] = (Path("runs/digits"),)
    out: Path = Path("docs/results")
    seeds: tuple[int, ...] = (1, 2, 3)
    num_samples: int = 432
    samples_per_caption: int = 2
    num_reference: int = 2048
    snapshot_samples: int = 216
    methods: tuple[str, ...] = ()
    batch_size: int = 32
    precision: Precision = "bf16"
    cache: Path | None = None
    independent_judges: bool = True
    render: bool = False
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        if not self.runs or len({run.resolve() for run in self.runs}) < len(self.runs):
            named = " ".join(map(str, self.runs))
            raise ConfigError(f"runs must be different folders, at least one; got {named!r}.")
        check_seeds(self.seeds)
        if self.samples_per_caption < 2:
            raise ConfigError(
                f"samples_per_caption is {self.samples_per_caption}; diversity within a caption "
                "needs at least 2."
            )
        most = self.samples_per_caption * len(TRAIN_LABELS)
        least = self.samples_per_caption * 2
        for name in ("num_samples", "snapshot_samples"):
            number = getattr(self, name)
            if number % self.samples_per_caption or not least <= number <= most:
                raise ConfigError(
                    f"{name} is {number}; with {self.samples_per_caption} samples per caption it "
                    f"must be a multiple of that from {least} to {most}."
                )
        for name, least in (("num_reference", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def kept(self) -> Path:
        """Folder of the classifiers, the samples and their figures."""
        return self.runs[0] / "evaluation" if self.cache is None else self.cache
