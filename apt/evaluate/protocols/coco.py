"""The paper's image metrics (APT, Appendix A) on captions of COCO 2014."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from apt.errors import ConfigError
from apt.evaluate.clip_score import PAPER_MODEL, clip_similarity
from apt.evaluate.coco import read_coco_captions
from apt.evaluate.features import FEATURES
from apt.evaluate.image_measures import Fid, FrechetRatio, PatchFid, clip_score
from apt.evaluate.protocol import PROTOCOLS, Figure, Figures, Measure, Protocol, Request
from apt.generate_options import GenerateOptions
from apt.samples import Sample

_NONE = "none"
_ABOUT = """\
Images generated for the first {number} captions of COCO 2014 validation are compared with the
{real} images that the captions were written for, as in APT's Appendix A:

- **FID**: Fréchet distance in the features *{features}*; images are cropped to a square and resized
  as clean-fid does.
- **PFID**: the same for 299-pixel patches from the middle, not resized; generated images of up to
  512 pixels are first enlarged to 1024.
{more}
The paper found that these figures contradict what people see (one-step FLUX beats its 25-step
base). Read several of them, look at the samples, and better still, run a study
(`diffusion-apt study make`)."""
_CLIP = "- **CLIP score**: 100 times the cosine of image and caption in *{name}*.\n"
_FDR = (
    "- **FDr**: mean over {names} of the Fréchet distance, divided by that of held-out real "
    "images; 1 is what real images reach.\n"
)


@PROTOCOLS.register("coco")
@dataclass(frozen=True, kw_only=True)
class Coco:
    """FID, PFID, FDr and CLIP score on COCO 2014, as in the paper's Tables 5 and 6."""

    folder: Path
    """COCO 2014 validation: annotations/captions_val2014.json, and the images in val2014/."""
    captions: int = 5000
    """Number of captions, from the first; the paper uses 5,000 and 10,000."""
    seeds: tuple[int, ...] = (0,)
    """Evaluation seeds; each has its own noise."""
    height: int | None = None
    """Height in pixels; None, here and below, uses each model's own."""
    width: int | None = None
    """Width in pixels."""
    features: str = "inception"
    """Features of FID and PFID: a name in `apt.evaluate.features`, or your own from --import."""
    fdr: tuple[str, ...] = ()
    """Features of FDr, by name; its authors use inception convnextv2 dinov2 mae siglip2 clip. If
    there are none, FDr is left out."""
    clip: str = PAPER_MODEL
    """Model of the CLIP score: a folder or a Hub id; "none" leaves it out."""
    batch_size: int = 32
    """Pictures per network call."""
    measure_device: str = "cpu"
    """Where features are computed: cpu or cuda."""

    def build(self, request: Request) -> Protocol:
        """Build the protocol. Raises DataError for an unusable folder, InputError for names."""
        for name in (self.features, *self.fdr):
            FEATURES.get(name)
        if self.captions < 2:
            raise ConfigError(f"captions must be at least 2, got {self.captions}")
        coco = read_coco_captions(self.folder, self.captions)
        network = cache(lambda name: FEATURES.create(name, device=self.measure_device))
        fid = cache(lambda: Fid(coco.reference, network(self.features), batch_size=self.batch_size))
        pfid = cache(
            lambda: PatchFid(coco.reference, network(self.features), batch_size=self.batch_size)
        )
        ratio = cache(
            lambda: FrechetRatio(
                coco.reference, [network(name) for name in self.fdr], batch_size=self.batch_size
            )
        )
        similarity = cache(lambda: clip_similarity(self.clip, device=self.measure_device))

        figures = {"fid": Figure("FID", "lower", "log"), "pfid": Figure("PFID", "lower", "log")}
        makers: list[Callable[[], object]] = [fid, pfid]

        def distances(samples: Sequence[Sample]) -> Figures:
            statistics = fid().statistics(_files(samples))
            found = {"fid": fid().distance(statistics)}
            if self.fdr:
                # FDr may use the features of FID too, which are computed only once.
                same = self.features in self.fdr
                known = {network(self.features).name: statistics} if same else {}
                ratios = ratio()(_files(samples), known)
                found |= {"fdr": ratios.mean}
                found |= {f"fdr_{name}": value for name, value in ratios.ratios.items()}
            return found

        measures: list[Measure] = [
            distances,
            lambda samples: {"pfid": pfid()(_files(samples))},
        ]
        more = ""
        if self.fdr:
            figures["fdr"] = Figure("FDr", "lower", "log")
            figures |= {f"fdr_{name}": Figure(f"FDr, {name}", "lower") for name in self.fdr}
            makers.append(ratio)
            more += _FDR.format(names=", ".join(self.fdr))
        if self.clip != _NONE:
            figures["clip"] = Figure("CLIP score", "higher")
            makers.append(similarity)
            measures.append(
                lambda samples: {
                    "clip": clip_score(
                        _files(samples),
                        [sample.prompt for sample in samples],
                        similarity(),
                        batch_size=self.batch_size,
                    )
                }
            )
            more += _CLIP.format(name=self.clip)
        return Protocol(
            name="coco",
            about=_ABOUT.format(
                number=self.captions,
                real=len(coco.reference),
                features=self.features,
                more=more,
            ),
            prompts=coco.prompts,
            seeds=self.seeds,
            options=GenerateOptions(frames=1, height=self.height, width=self.width),
            figures=figures,
            measures=tuple(measures),
            prepare=lambda: [make() for make in makers],
            references=dict(zip(coco.prompts, coco.images, strict=True)),
            settings={
                "folder": str(self.folder),
                "captions": self.captions,
                "features": self.features,
                "fdr": list(self.fdr),
                "clip": self.clip,
            },
        )


def _files(samples: Sequence[Sample]) -> list[Path]:
    return [sample.path for sample in samples]
