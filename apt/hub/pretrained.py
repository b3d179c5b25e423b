"""Where the weights of a registered model come from."""

from __future__ import annotations

from dataclasses import dataclass

from apt.hub.info import SampleInfo, SamplingInfo


@dataclass(frozen=True, kw_only=True)
class PretrainedEntry:
    """Published weights of one registered model.

    Attributes:
        repo: Hub id of a diffusers folder.
        revision: commit, tag or branch; None is the newest.
        subfolder: of the transformer in it.
        license: SPDX identifier, or the Hub's name of another licence.
        source: who published it, and the paper or page.
        gated: whether the licence must be accepted on the Hub first.
        codec, text_encoder: registered names of the parts that go with it.
        compression: pixels per latent of that codec along time (after the first frame), height and
            width.
        text_tokens: the length of the sequence that the model reads for any prompt.
        sample: the size of what it makes best.
        sampling: how its authors sample it; a shift that the folder's scheduler gives is taken
            instead of this one.
        lowest_t: the least t in [0, 1] that it was trained at; above 0 for an expert of several.
        note: what a user has to know before they choose it.
    """

    repo: str
    license: str
    source: str
    codec: str
    text_encoder: str
    compression: tuple[int, int, int]
    text_tokens: int
    sample: SampleInfo
    sampling: SamplingInfo
    revision: str | None = None
    subfolder: str = "transformer"
    gated: bool = False
    lowest_t: float = 0.0
    note: str = ""
