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
    "frozen": Figure("frozen videos", "lower", "share"),
}
_ABOUT = """\
- **sharpness**: variance of the Laplacian of each frame, in squared grey levels; **flicker**: jumps
  of brightness, and **change from frame to frame**, in grey levels; **motion**: of the fastest
  parts, as a share of the shorter side per frame; **frozen videos**: the share without any. None of
  these is better high or low: near to real videos is."""
_DISTANCE = """
- **Fréchet distance** to {number} real videos in the features *{features}*: as FVD, and FVD itself
  where these are its I3D. Figures of other features or numbers of videos cannot be compared."""
_PATCHES = """
- **patch distance** to {number} real videos: a Fréchet distance between patches of 8×8
  pixels, which sees blur, ghosting and grain at full resolution and asks no network."""
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
    size: tuple[int, int] | None = None,
    options: GenerateOptions,
    references: Mapping[str, Path] | None = None,
    settings: Mapping[str, object],
) -> Protocol:
    """Build a protocol with the measures of videos.

    Args:
        name, about, prompts, options, references, settings: of the protocol.
        reference: returns the real videos; called once.
        config: what else is measured, and with what.
        number: of real videos; 0 measures no distance.
        size: (H, W) of all videos before files enlarge them; None if they do not.
    """
    figures, text = dict(_MOVEMENT), _ABOUT
    measures: list[Measure] = [lambda samples: _movement(_files(samples))]
    real_files = cache(reference)
    makers: list[Callable[[], object]] = [real_files]
    if number:
        patches = cache(lambda: PatchFrechetVideo(real_files(), size=size))
        makers.append(patches)
        figures = {"patch": Figure("patch distance", "lower", "log")} | figures
        measures.append(lambda samples: {"patch": patches()(_files(samples))})
        text += _PATCHES.format(number=number)
    if config.features != NO_FEATURES:
        features = cache(lambda: _features(config))
        makers.append(features)
        if number:
            distance = cache(lambda: FrechetVideo(real_files(), features()))
            makers.append(distance)
            figures = {"frechet": Figure("Fréchet distance", "lower", "log")} | figures
            measures.append(lambda samples: {"frechet": distance()(_files(samples))})
            text += _DISTANCE.format(number=number, features=config.features)
        if config.samples_per_prompt > 1 and len(set(prompts)) > 1:
            figures |= {
                "within": Figure("diversity within a prompt"),
                "across": Figure("diversity across prompts"),
            }
            measures.append(lambda samples: _diversity(samples, features()))
            text += _DIVERSITY
    return Protocol(
        name=name,
        about=f"{about}\n\n{text}",
        prompts=prompts,
        samples_per_prompt=config.samples_per_prompt,
        seeds=config.seeds,
        options=options,
        figures=figures,
        measures=tuple(measures),
        prepare=lambda: [make() for make in makers],
        real=(lambda: _movement(real_files())) if number else None,
        references=references or {},
        settings={"features": config.features, **settings},
    )


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
        raise DataError(f"{str(folder)!r} is no folder; give one of real videos")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if len(found) < 2:
        raise DataError(
            f"{str(folder)!r} has {len(found)} videos ({' '.join(sorted(VIDEO_SUFFIXES))}); a "
            "distance needs at least 2"
        )
    return found
