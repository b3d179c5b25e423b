"""Compare videos with real ones, by measures that a frozen video cannot all win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from apt.data.suffixes import VIDEO_SUFFIXES
from apt.errors import DataError
from apt.evaluate.features import FEATURES
from apt.evaluate.protocol import PROTOCOLS, Figure, Figures, Measure, Protocol, Request
from apt.evaluate.video_measures import (
    FrechetVideo,
    PatchFrechetVideo,
    VideoFeatures,
    measure_movement,
    of_frames,
    video_diversity,
)
from apt.generate_options import GenerateOptions
from apt.prompts import read_prompts
from apt.registry import Registry
from apt.samples import Sample

VIDEO_FEATURES: Registry[VideoFeatures] = Registry("video features")
"""Your own networks for whole videos, such as FVD's I3D, by name; none is built in."""

NO_FEATURES = "none"

_MOVEMENT = {
    "sharpness": Figure("sharpness"),
    "flicker": Figure("flicker"),
    "frame_change": Figure("change from frame to frame"),
    "motion": Figure("motion"),
    "frozen": Figure("frozen videos", "", "share"),
}
_ABOUT = """\
- **sharpness**: variance of the Laplacian of each frame, in squared grey levels; **flicker**:
  amplitude of jumps in brightness, and **change from frame to frame**, both in grey levels;
  **motion**: speed of the moving parts, as a share of the shorter side per frame; **frozen
  videos**: the share of videos without motion. The closer these are to real videos, the better."""
_DISTANCE = """
- **Fréchet distance** to {number} real videos in the features *{features}*. With FVD's I3D as
  features, this is FVD. Figures with other features or numbers of videos cannot be compared."""
_PATCHES = """
- **patch distance** to {number} real videos: a Fréchet distance between patches of 8×8
  pixels, which detects blur, ghosting and grain at full resolution and needs no network. Samples
  are stored without loss for it."""
_CODEC = """
- **through the codec**: the real videos, encoded and decoded by the first model's codec. No model
  in its latents can do better."""
_DIVERSITY = """
- **diversity**: mean distance in these features between samples of one prompt (within), and of
  different ones (across)."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Options that all protocols for videos share."""

    samples_per_prompt: int = 2
    """Samples of each prompt and seed; with 2 or more, diversity is measured."""
    seeds: tuple[int, ...] = (0,)
    """Evaluation seeds; each has its own noise."""
    features: str = "inception"
    """Features for distance and diversity: a network in `apt.evaluate.features`, applied to frames
    and their changes, or your own from --import; "none" leaves both out."""
    measure_device: str = "cpu"
    """Where features are computed: cpu or cuda."""


@PROTOCOLS.register("video")
@dataclass(frozen=True, kw_only=True)
class Video(VideoOptions):
    """Videos for your prompts: distance to real ones, sharpness, flicker, motion, diversity."""

    prompts: Path
    """Text with one prompt per line."""
    reference: Path | None = None
    """Folder of real videos; without one, no distance is measured. They should have the length,
    size and rate of the samples; the protocol `clips` cuts them accordingly."""
    frames: int | None = None
    """Frames of each sample; None, here and below, uses each model's own."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""

    def build(self, request: Request) -> Protocol:
        """Build the protocol. Raises InputError for prompts, DataError for a bad folder."""
        files = () if self.reference is None else tuple(_videos(self.reference))
        return video_protocol(
            "video",
            "Videos of the same prompts and noise seeds for every model.",
            tuple(dict.fromkeys(read_prompts(self.prompts))),
            lambda: files,
            self,
            number=len(files),
            options=GenerateOptions(frames=self.frames, height=self.height, width=self.width),
            settings={"reference": None if self.reference is None else str(self.reference)},
        )


def video_protocol(
    name: str,
    about: str,
    prompts: tuple[str, ...],
    reference: Callable[[], Sequence[Path]],
    config: VideoOptions,
    *,
    number: int,
    reconstruct: Callable[[], Sequence[Path]] | None = None,
    options: GenerateOptions,
    references: Mapping[str, Path] | None = None,
    settings: Mapping[str, object],
) -> Protocol:
    """Return a protocol that measures videos.

    Args:
        name, about, prompts, options, references, settings: of the protocol.
        reference: returns the files of the real videos; called once.
        config: what else is measured, and with what.
        number: of real videos; 0 measures no distance.
        reconstruct: writes the real videos as a codec reconstructs them, for a row of their own.
    """
    figures, text = dict(_MOVEMENT), _ABOUT
    of_files: list[Callable[[Sequence[Path]], Figures]] = [_movement]
    real_files = cache(reference)
    makers: list[Callable[[], object]] = [real_files]
    if number:
        patches = cache(lambda: PatchFrechetVideo(real_files()))
        makers.append(patches)
        figures = {"patch": Figure("patch distance", "lower", "log")} | figures
        of_files.append(lambda files: {"patch": patches()(files)})
        text += _PATCHES.format(number=number)
    measures: list[Measure] = []
    if config.features != NO_FEATURES:
        features = cache(lambda: _features(config))
        makers.append(features)
        if number:
            distance = cache(lambda: FrechetVideo(real_files(), features()))
            makers.append(distance)
            figures = {"frechet": Figure("Fréchet distance", "lower", "log")} | figures
            of_files.append(lambda files: {"frechet": distance()(files)})
            text += _DISTANCE.format(number=number, features=config.features)
        if config.samples_per_prompt > 1 and len(set(prompts)) > 1:
            figures |= {
                "within": Figure("diversity within a prompt"),
                "across": Figure("diversity across prompts"),
            }
            measures.append(lambda samples: _diversity(samples, features()))
            text += _DIVERSITY
    baselines: dict[str, Callable[[], Figures]] = {}
    if number:
        baselines["real"] = lambda: _movement(real_files())
    if reconstruct is not None:
        written = reconstruct
        baselines["through the codec"] = lambda: _merged(of_files, written())
        text += _CODEC
    return Protocol(
        name=name,
        about=f"{about}\n\n{text}",
        prompts=prompts,
        samples_per_prompt=config.samples_per_prompt,
        seeds=config.seeds,
        lossless=bool(number),
        options=options,
        figures=figures,
        measures=(*(_of_samples(one) for one in of_files), *measures),
        prepare=lambda: [make() for make in makers],
        baselines=baselines,
        references=references or {},
        settings={"features": config.features, **settings},
    )


def _of_samples(measure: Callable[[Sequence[Path]], Figures]) -> Measure:
    return lambda samples: measure(_files(samples))


def _merged(
    measures: Sequence[Callable[[Sequence[Path]], Figures]], files: Sequence[Path]
) -> Figures:
    return {name: value for one in measures for name, value in one(files).items()}


def _features(config: VideoOptions) -> VideoFeatures:
    if config.features in VIDEO_FEATURES.names():
        return VIDEO_FEATURES.create(config.features)
    return of_frames(FEATURES.create(config.features, device=config.measure_device))


def _files(samples: Sequence[Sample]) -> list[Path]:
    return [sample.path for sample in samples]


def _movement(files: Sequence[Path]) -> Figures:
    found = measure_movement(files)
    return {name: getattr(found, name) for name in _MOVEMENT}


def _diversity(samples: Sequence[Sample], features: VideoFeatures) -> Figures:
    prompts = [sample.prompt for sample in samples]
    found = video_diversity(_files(samples), prompts, features)
    return {"within": found.within, "across": found.across}


def _videos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is not a folder; give a folder of real videos")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if len(found) < 2:
        raise DataError(
            f"{str(folder)!r} has {len(found)} videos ({' '.join(sorted(VIDEO_SUFFIXES))}); a "
            "distance needs at least 2"
        )
    return found
