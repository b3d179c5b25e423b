"""The figures of the digits results page, for any model that generates moving digits."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

from apt.checks import check_range
from apt.data.digits import TRAIN_LABELS, clip_size
from apt.errors import ConfigError
from apt.evaluate.digits import ClassifierConfig, load_classifier
from apt.evaluate.digits.clips import caption_set, real_reference
from apt.evaluate.digits.measure import Judge
from apt.evaluate.digits.protocol import NAME, digits_protocol
from apt.evaluate.protocol import PROTOCOLS, Protocol, Request, check_seeds

_ABOUT = """\
The figures are those of the digits results page, which explains them. Samples of {captions}
captions that models were trained on and {heldout} held-out captions are compared with {reference}
real clips of handwriting that no model has seen. The judge is a classifier trained on real
clips."""


@PROTOCOLS.register(NAME)
@dataclass(frozen=True, kw_only=True)
class Digits:
    """Distances, accuracy and diversity on moving digits; without --model, the results page."""

    captions: int = len(TRAIN_LABELS)
    """Number of trained captions; up to as many held-out captions are added."""
    samples_per_caption: int = 2
    """Samples of each caption and seed."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Evaluation seeds; each has its own noise and real clips."""
    num_reference: int = 2048
    """Real clips that all samples are compared with."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The judge, trained at first use."""
    cache: Path | None = None
    """Folder of the judge; None is `judge` in --out. The page's is in `runs/digits/evaluation`."""

    def __post_init__(self) -> None:
        limits = {"captions": (2, len(TRAIN_LABELS)), "samples_per_caption": (2, 1000)}
        check_seeds(self.seeds)
        check_range(self, "", limits | {"num_reference": (2, 100_000)})

    def build(self, request: Request) -> Protocol:
        """Build the protocol. Raises ConfigError for a model whose options set another size."""
        size = clip_size(self.classifier.setting)
        wanted = {"frames": size.frames, "height": size.side, "width": size.side}
        for choice in request.models:
            for name, number in wanted.items():
                if getattr(choice.options, name) not in (None, number):
                    raise ConfigError(
                        f"{choice.name} sets {name} to {getattr(choice.options, name)}, but the "
                        f"judge reads {number}; leave it out"
                    )
        each, setting = self.samples_per_caption, self.classifier.setting
        sets = [caption_set(seed, self.captions * each, each, setting) for seed in self.seeds]
        kept = request.out / "judge" if self.cache is None else self.cache

        @functools.cache
        def judge() -> Judge:
            classifier, _ = load_classifier(self.classifier, kept)
            return Judge(classifier, real_reference(self.num_reference, setting))

        return digits_protocol(
            sets,
            judge,
            about=_ABOUT.format(
                captions=self.captions,
                heldout=len(set(sets[0].heldout)),
                reference=self.num_reference,
            ),
            settings=dataclasses.asdict(dataclasses.replace(self, cache=None)),
        )
