"""Where the weights of a registered model come from."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        sample: the size of what it makes best.
        sampling: how its authors sample it; a shift that the folder's scheduler gives is taken
            instead of this one.
        note: what a user has to know before they choose it.
    """

    repo: str
    license: str
    source: str
    codec: str
    text_encoder: str
    revision: str | None = None
    subfolder: str = "transformer"
    gated: bool = False
    sample: SampleInfo = field(
        default_factory=lambda: SampleInfo(frames=1, height=1024, width=1024, fps=1)
    )
    sampling: SamplingInfo = field(
        default_factory=lambda: SamplingInfo(num_steps=50, cfg_scale=5.0, timestep_shift=3.0)
    )
    note: str = ""
