"""The figures of the digits' results page, for any model that makes moving digits."""

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
The figures of the digits' results page, which says what each is: {captions} captions that models
were trained on, and {heldout} that they were not, against {reference} real clips of handwriting
that no model has seen. The judge is a classifier trained on real clips."""


@PROTOCOLS.register(NAME)
@dataclass(frozen=True, kw_only=True)
class Digits:
    """Distances, words and diversity on the moving digits; without --model, the results page."""

    captions: int = len(TRAIN_LABELS)
    """Captions that models were trained on; as many that were held out are added, if there are."""
    samples_per_caption: int = 2
    """Samples of each caption and seed."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Evaluation seeds; each has noise and real clips of its own."""
    num_reference: int = 2048
    """Real clips that everything is compared with."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The judge, which is trained at first use."""
    cache: Path | None = None
    """Folder of the judge; None is `judge` in --out. `runs/digits/evaluation` has the page's."""

    def __post_init__(self) -> None:
        limits = {"captions": (2, len(TRAIN_LABELS)), "samples_per_caption": (2, 1000)}
        check_seeds(self.seeds)
        check_range(self, "", limits | {"num_reference": (2, 100_000)})

    def build(self, request: Request) -> Protocol:
        """The protocol. Raises ConfigError for a model that is to make clips of another size."""
        size = clip_size(self.classifier.setting)
        wanted = {"frames": size.frames, "height": size.side, "width": size.side}
        for choice in request.models:
            for name, number in wanted.items():
                if getattr(choice.options, name) not in (None, number):
                    raise ConfigError(
                        f"{choice.name} is to make clips of {name} "
                        f"{getattr(choice.options, name)}, and the judge reads {number}; leave it "
                        "out"
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
