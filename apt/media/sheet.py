"""Contact sheets: many generated videos in one image, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from apt.errors import InputError, MissingPackageError
from apt.media.files import Frames, Tags, as_frames, enlarge, write_png

PAPER = (255, 255, 255)
INK = (31, 35, 40)
FAINT = (101, 109, 118)

MARGIN = 20
CAPTION_WIDTH = 140
CAPTION_GAP = 16
FRAME_GAP = 2
CELL_GAP = 18
ROW_GAP = 10
FRAME_HEIGHT = 96
"""Small frames are enlarged by the largest whole factor that keeps them within this height."""


def contact_sheet(
    cells: Sequence[Sequence[Frames]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    scale: int | None = None,
) -> Image.Image:
    """Draw a table of videos, for instance one row per prompt and one column per sampler.

    Args:
        cells: `cells[row][column]`, each uint8 (T, H, W, 3), all of one shape. The T frames of a
            cell are drawn side by side, so a single column shows one video per row.
        rows: captions on the left, wrapped to fit.
        columns: captions above; text after a newline is drawn fainter, below the rest.
        title: heading of the sheet; none if empty.
        scale: whole enlargement factor of the frames; None makes them about 96 pixels high.

    Raises:
        InputError: if the table is empty or ragged, or captions and cells do not match.
        MissingPackageError: if Pillow has no FreeType.
    """
    table = _check_table(cells, rows, columns)
    num_frames, height, width, _ = table[0][0].shape
    factor = max(1, FRAME_HEIGHT // height) if scale is None else scale
    frame_height, frame_width = height * factor, width * factor
    cell_width = num_frames * (frame_width + FRAME_GAP) - FRAME_GAP
    left = MARGIN + CAPTION_WIDTH + CAPTION_GAP
    sheet_width = left + len(columns) * (cell_width + CELL_GAP) - CELL_GAP + MARGIN

    heading = _Block([(title, 22, INK)] if title else [], sheet_width - 2 * MARGIN)
    heads = [_Block(_head(column), cell_width) for column in columns]
    captions = [_Block([(row, 15, INK)], CAPTION_WIDTH) for row in rows]
    head_top = MARGIN + heading.height + (14 if title else 0)
    body_top = head_top + max(head.height for head in heads) + 8
    row_height = max(frame_height, *(caption.height for caption in captions))
    sheet_height = body_top + len(rows) * (row_height + ROW_GAP) - ROW_GAP + MARGIN

    image = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(image)
    heading.draw(draw, MARGIN, MARGIN)
    for column, head in enumerate(heads):
        head.draw(draw, left + column * (cell_width + CELL_GAP), head_top)
    for row, caption in enumerate(captions):
        y = body_top + row * (row_height + ROW_GAP)
        caption.draw(draw, MARGIN, y + (row_height - caption.height) // 2)
        for column, cell in enumerate(table[row]):
            x = left + column * (cell_width + CELL_GAP)
            for index, frame in enumerate(enlarge(cell, factor)):
                image.paste(Image.fromarray(frame), (x + index * (frame_width + FRAME_GAP), y))
    return image


def write_contact_sheet(
    path: str | Path,
    cells: Sequence[Sequence[Frames]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    scale: int | None = None,
    tags: Tags | None = None,
) -> Path:
    """Draw a `contact_sheet` and write it as a PNG with `tags` (see `write_png`)."""
    sheet = contact_sheet(cells, rows=rows, columns=columns, title=title, scale=scale)
    return write_png(path, np.asarray(sheet)[None], scale=1, tags=tags)


def moving_sheet(
    cells: Sequence[Sequence[Frames]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    scale: int | None = None,
) -> NDArray[np.uint8]:
    """Draw a `contact_sheet` whose cells play: T frames of the whole sheet, uint8 (T, H, W, 3).

    Arguments and errors are those of `contact_sheet`.
    """
    table = _check_table(cells, rows, columns)
    stills = [
        contact_sheet(
            [[cell[t : t + 1] for cell in row] for row in table],
            rows=rows,
            columns=columns,
            title=title,
            scale=scale,
        )
        for t in range(len(table[0][0]))
    ]
    return np.stack([np.asarray(still) for still in stills])


def _check_table(
    cells: Sequence[Sequence[Frames]], rows: Sequence[str], columns: Sequence[str]
) -> list[list[NDArray[np.uint8]]]:
    if not rows or not columns or len(cells) != len(rows):
        raise InputError(
            "a contact sheet needs a caption for every row and column of cells; got "
            f"{len(cells)} rows of cells, {len(rows)} row captions and {len(columns)} column "
            "captions"
        )
    if any(len(row) != len(columns) for row in cells):
        raise InputError(
            f"each row of a contact sheet needs {len(columns)} cells, one per column caption; got "
            f"rows of {[len(row) for row in cells]}"
        )
    table = [[as_frames(cell) for cell in row] for row in cells]
    shapes = {cell.shape for row in table for cell in row}
    if len(shapes) > 1:
        raise InputError(f"the cells of a contact sheet must have one shape, got {sorted(shapes)}")
    return table


_Span = tuple[str, int, tuple[int, int, int]]
"""Text, font size, colour."""


def _head(caption: str) -> list[_Span]:
    main, _, detail = caption.partition("\n")
    return [(main, 17, INK), (detail, 14, FAINT)] if detail else [(main, 17, INK)]


class _Line(NamedTuple):
    y: int
    text: str
    font: ImageFont.FreeTypeFont
    colour: tuple[int, int, int]


class _Block:
    """Text wrapped to a width, in Pillow's own font, so sheets look the same everywhere."""

    def __init__(self, spans: Sequence[_Span], width: int) -> None:
        self.height = 0
        self.lines: list[_Line] = []
        for text, size, colour in spans:
            font = ImageFont.load_default(size)
            if not isinstance(font, ImageFont.FreeTypeFont):
                raise MissingPackageError(
                    "contact sheets need Pillow with FreeType; install Pillow's wheel from PyPI"
                )
            for line in _wrap(text, font, width):
                self.lines.append(_Line(self.height, line, font, colour))
                self.height += sum(font.getmetrics()) + 1

    def draw(self, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        for line in self.lines:
            draw.text((x, y + line.y), line.text, font=line.font, fill=line.colour)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break text into lines, at spaces and inside words that are wider than a line."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
