"""Real videos as a codec reconstructs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from einops import rearrange

from apt.checkpoints.load import load_codec
from apt.data.decode import probe
from apt.evaluate.video_measures import read_video
from apt.media import write_mkv
from apt.pixels import to_frames


@torch.no_grad()
def write_reconstructions(
    folder: Path, videos: Callable[[], Sequence[Path]], model: str, device: str
) -> list[Path]:
    """Encode and decode videos with a model's codec, and write the results without loss.

    They are always written anew, because the model may have been trained further.

    Args:
        folder: for the files, which get the names of the videos.
        videos: returns files whose frames and size fit the codec.
        model: folder, name or Hub id of one of our models.
        device: to compute on.

    Raises:
        CheckpointError: if the codec cannot be loaded.
        DataError: for a damaged video.
    """
    codec = load_codec(model).to(device)
    written = []
    for path in videos():
        pixels = rearrange(read_video(path).to(device), "t h w c -> 1 c t h w") / 127.5 - 1
        frames = to_frames(codec.decode(codec.encode(pixels)))[0]
        written.append(write_mkv(folder / path.name, frames, fps=float(probe(path).fps), scale=1))
    return written
