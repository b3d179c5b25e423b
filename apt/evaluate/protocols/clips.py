"""A folder of own videos as prompts and as what is real, for a model that was trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from apt.checkpoints.info import INFO_FILE, SampleInfo, read_info
from apt.checkpoints.source import locate
from apt.data.folder import VideoFolder
from apt.errors import InputError
from apt.evaluate.choice import PIPELINE_PREFIX
from apt.evaluate.peers import PEERS
from apt.evaluate.protocol import PROTOCOLS, Protocol, Request
from apt.evaluate.protocols.video import VideoOptions, video_protocol
from apt.evaluate.reconstructions import write_reconstructions
from apt.generate_options import GenerateOptions
from apt.media import write_mkv
from apt.pixels import to_frames


@PROTOCOLS.register("clips")
@dataclass(frozen=True, kw_only=True)
class Clips(VideoOptions):
    """Your own captioned videos: samples of their captions against clips that are cut from them."""

    videos: Path
    """Folder of videos with captions, as for `train own`: metadata.csv, or a .txt beside each."""
    most: int | None = None
    """So many videos at most, the first by name; None takes all."""
    frames: int | None = None
    """Frames of each clip and sample; None, also below, is what the first model was trained on."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    fps: float | None = None
    """Frames per second."""

    def build(self, request: Request) -> Protocol:
        """The protocol. Raises InputError without a size, DataError for an unusable folder."""
        frames, height, width, fps = self._size(request)
        if frames < 3:
            raise InputError(f"motion needs clips of at least 3 frames, got {frames}")
        folder = VideoFolder(self.videos, buckets=[(frames, height, width)], fps=fps)
        number = len(folder) if self.most is None else min(self.most, len(folder))
        if number < 2:
            raise InputError(f"{str(self.videos)!r} gives {number} clips; expected at least 2")
        digest = hashlib.sha256(f"{folder.fingerprint} {number}".encode()).hexdigest()[:12]
        place = request.out / "real" / digest
        files = [place / f"{index}.mkv" for index in range(number)]
        prompts = tuple(folder.caption(index) for index in range(number))

        def cut() -> Sequence[Path]:
            """Write the clips that are not there; each appears whole or not at all."""
            for index, file in enumerate(files):
                if not file.is_file():
                    write_mkv(file, to_frames(folder[index].pixels[None])[0], fps=fps, scale=1)
            return files

        first = request.models[0].place
        through = partial(
            write_reconstructions,
            request.out / "through_the_codec" / digest,
            cut,
            first,
            self.measure_device,
        )
        return video_protocol(
            "clips",
            f"Samples of the captions of {number} videos, and clips of {frames} frames of "
            f"{height}×{width} (height × width) at {fps:g} a second that were cut from these. A "
            "model that was trained on them may know them by heart: this tells how well it "
            "learned, not how well it makes new ones.",
            prompts,
            cut,
            self,
            number=number,
            reconstruct=None if _is_foreign(first) else through,
            options=GenerateOptions(frames=frames, height=height, width=width),
            references=dict(zip(prompts, files, strict=True)),
            settings={"videos": str(self.videos), "clips": digest},
        )

    def _size(self, request: Request) -> tuple[int, int, int, float]:
        """Frames, height, width and rate, as asked for or those of the first model."""
        own = _trained(request.models[0].place)
        frames = self.frames or (own and own.frames)
        height = self.height or (own and own.height)
        width = self.width or (own and own.width)
        fps = self.fps or (own and own.fps)
        if not (frames and height and width and fps):
            raise InputError(
                f"{request.models[0].place} does not say how long and large its clips are; give "
                "--frames, --height, --width and --fps"
            )
        return frames, height, width, fps


def _trained(place: str) -> SampleInfo | None:
    """What a model of ours was trained on; None of others."""
    if _is_foreign(place):
        return None
    folder = locate(place).folder
    return read_info(folder).sample if (folder / INFO_FILE).is_file() else None


def _is_foreign(place: str) -> bool:
    return place in PEERS or place.startswith(PIPELINE_PREFIX)
