"""VBench's prompts and, once it has run in its own environment, its figures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from apt.evaluate.protocol import PROTOCOLS, Figure, Figures, Protocol, Request
from apt.evaluate.vbench import (
    RESULTS,
    VIDEOS_PER_PROMPT,
    arrange_videos,
    read_vbench_prompts,
    read_vbench_results,
)
from apt.evaluate.vbench_run import DIMENSIONS
from apt.generate_options import GenerateOptions
from apt.samples import Sample

_ABOUT = """\
VBench (Huang et al., 2024): the raw figures of its 16 dimensions on {prompts} prompts with {each}
videos each, and its three scores in percent. It pins old packages and downloads a dozen models, so
it runs in its own environment. For a model without figures, run `apt/evaluate/vbench_run.py` there:

    python vbench_run.py {place}/MODEL/*/videos {place}/MODEL/*/results

Then repeat this command."""


@PROTOCOLS.register("vbench")
@dataclass(frozen=True, kw_only=True)
class VBench:
    """VBench's prompts, five videos each; reads its figures once it has run separately."""

    source: Path
    """Source of its prompts: vbench-*.whl (`pip download --no-deps vbench`), the folder of an
    installed vbench, or VBench_full_info.json."""
    frames: int | None = None
    """Frames of each sample; None, here and below, uses each model's own."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""

    def build(self, request: Request) -> Protocol:
        """Build the protocol. Raises DataError for a source without VBench's prompts."""
        prompts = tuple(read_vbench_prompts(self.source))
        place = request.out / "vbench"
        scores = {
            "total": Figure("total, %", "higher"),
            "quality": Figure("quality, %", "higher"),
            "semantic": Figure("semantic, %", "higher"),
        }
        names = {name: Figure(name.replace("_", " "), "higher", "share") for name in DIMENSIONS}
        return Protocol(
            name="vbench",
            about=_ABOUT.format(prompts=len(prompts), each=VIDEOS_PER_PROMPT, place=place),
            prompts=prompts,
            samples_per_prompt=VIDEOS_PER_PROMPT,
            options=GenerateOptions(frames=self.frames, height=self.height, width=self.width),
            figures=scores | names,
            measures=(partial(_measure, place, prompts),),
            settings={"source": self.source.name, "prompts": len(prompts)},
        )


def _measure(place: Path, prompts: Sequence[str], samples: Sequence[Sample]) -> Figures:
    """Arrange the files of these samples for VBench, and return its figures if it has run."""
    digest = hashlib.sha256("".join(sample.sha256 for sample in samples).encode()).hexdigest()[:12]
    folder = place / samples[0].path.parent.name / digest
    arrange_videos(
        {(sample.prompt, sample.seed): sample for sample in samples}, prompts, folder / "videos"
    )
    results = folder / "results"
    if not any(results.glob(f"*{RESULTS}")):
        return {}
    values, scores = read_vbench_results(results)
    found = {name.replace(" ", "_"): value for name, value in values.items()}
    return {
        "total": scores.total,
        "quality": scores.quality,
        "semantic": scores.semantic,
        **found,
    }
