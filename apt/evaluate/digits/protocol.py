"""Moving digits as a protocol of the harness: captions, noise and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from apt.data.digits import clip_size
from apt.evaluate.digits.clips import CaptionSet, read_digits, real_for_captions
from apt.evaluate.digits.measure import Judge, pixel_diversity
from apt.evaluate.protocol import Figure, Figures, Protocol
from apt.generate_options import GenerateOptions
from apt.metrics import Diversity
from apt.samples import Sample

NAME = "digits"
_FIGURES = {
    "frechet": Figure("Fréchet distance", "lower", "log"),
    "patch": Figure("patch distance", "lower", "log"),
    "spatial_spectrum": Figure("spatial spectrum, dB", "lower"),
    "temporal_spectrum": Figure("temporal spectrum, dB", "lower"),
    "digit": Figure("digit", "higher", "share"),
    "colour": Figure("colour", "higher", "share"),
    "direction": Figure("direction", "higher", "share"),
    "accuracy": Figure("accuracy", "higher", "share"),
    "heldout_accuracy": Figure("accuracy, held-out captions", "higher", "share"),
    "within": Figure("diversity within a caption"),
    "across": Figure("diversity across captions"),
}


def digits_protocol(
    sets: Sequence[CaptionSet],
    judge: Callable[[], Judge],
    *,
    about: str = "",
    settings: Mapping[str, object],
) -> Protocol:
    """Return the protocol that generates these captions and measures them with this judge.

    Args:
        sets: the captions of each evaluation seed, equally many, all of one setting.
        judge: returns the judge.
        about: text for a page.
        settings: what determines the judge's figures.
    """
    by_seed = {captions.seed: captions for captions in sets}
    by_noise = {captions.keys[0][1]: captions for captions in sets}
    first = sets[0]
    size = clip_size(first.setting)

    @cache
    def real_diversity(captions: CaptionSet) -> Diversity:
        return pixel_diversity(real_for_captions(captions, "test"), captions)

    def measure(samples: Sequence[Sample]) -> Figures:
        captions = by_noise[samples[0].seed]
        clips = torch.stack([read_digits(sample.path, captions.setting) for sample in samples])
        return judge().measure(clips, captions, real_diversity(captions)).flat()

    return Protocol(
        name=NAME,
        about=about,
        prompts=tuple(dict.fromkeys(label.caption for label in first.labels)),
        samples_per_prompt=first.samples_per_caption,
        seeds=tuple(by_seed),
        own_keys=lambda seed: by_seed[seed].keys,
        lossless=True,
        options=GenerateOptions(frames=size.frames, height=size.side, width=size.side),
        figures=_FIGURES,
        measures=(measure,),
        prepare=judge,
        settings=settings,
    )
