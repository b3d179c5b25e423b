"""Draw samples of several models as one picture, for pages that do not play videos."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apt.data.decode import probe, read_clip, read_image
from apt.media import write_contact_sheet
from apt.pixels import to_frames

_HEIGHT = 96
_FRAMES = 3


def write_sample_sheet(
    path: Path, files: Sequence[Sequence[Path]], *, rows: Sequence[str], columns: Sequence[str]
) -> Path:
    """Draw a row for each prompt and a column for each model.

    Videos show their first, middle and last frame. All samples are scaled and cropped to the aspect
    ratio of the first.

    Args:
        path: of the PNG.
        files: `files[row][column]`.
        rows, columns: captions.

    Raises DataError for a file that cannot be decoded, InputError for a picture that cannot be
    written.
    """
    first = probe(files[0][0])
    size = (_HEIGHT, max(1, round(_HEIGHT * first.width / first.height)))
    moving = any(not probe(file).is_image for file in files[0])
    cells = [[_frames(file, size, _FRAMES if moving else 1) for file in row] for row in files]
    return write_contact_sheet(path, cells, rows=rows, columns=columns, scale=1)


def _frames(file: Path, size: tuple[int, int], number: int) -> NDArray[np.uint8]:
    """Return `number` frames from first to last, uint8 (number, H, W, 3); a still is repeated."""
    info = probe(file)
    if info.is_image:
        clip = read_image(file, size=size).repeat(1, number, 1, 1)
    else:
        # Frames from one shown frame to the next; 1 if only the first is shown.
        step = max(Fraction(1), Fraction(int(info.length) - 1, max(1, number - 1)))
        start, rate = Fraction(0), info.fps / step
        if number > 1 and info.length < number:
            clip = read_clip(file, start=start, num_frames=1, fps=rate, size=size, info=info)
            clip = clip.repeat(1, number, 1, 1)
        else:
            clip = read_clip(file, start=start, num_frames=number, fps=rate, size=size, info=info)
    return to_frames(clip[None])[0].numpy()
