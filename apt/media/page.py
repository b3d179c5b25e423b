"""A self-contained HTML page that plays the videos of several samplers side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apt.errors import InputError
from apt.files import write_text
from apt.media.parts import CONTROL, VIDEO_TYPES, embed, html_page


@dataclass(frozen=True, kw_only=True)
class SamplerColumn:
    """The videos that one sampler made, one per prompt.

    Args:
        name: heading, such as "1 step".
        detail: a few words below it, such as "adversarial post-training".
        seconds: the sampler's median time per video.
        files: one .mp4, .webm, .gif, .webp or .png per prompt.
    """

    name: str
    detail: str
    seconds: float
    files: Sequence[Path]


def write_html(
    path: str | Path,
    *,
    title: str,
    prompts: Sequence[str],
    columns: Sequence[SamplerColumn],
    note: str = "",
) -> Path:
    """Write a page with one row per prompt and one column per sampler.

    The videos are embedded, so the page is a single file. They start together without a click and
    restart together when all have ended; a button and the space bar pause them. They start paused
    if the browser asks for reduced motion. Animated images always play. Each heading gives the
    sampler's median time and how many times faster than the slowest sampler it is. `note` is a
    line below the title.

    Raises:
        InputError: if a column does not have one file per prompt, a file is of another type or
            cannot be read, or the page cannot be written.
    """
    for column in columns:
        if len(column.files) != len(prompts):
            raise InputError(
                f"the column {column.name!r} needs one file for each of {len(prompts)} prompts, "
                f"got {len(column.files)}"
            )
        if not column.seconds > 0:
            raise InputError(f"the column {column.name!r} needs a time above 0 seconds")
    if not prompts or not columns:
        raise InputError("the page needs at least one prompt and one sampler")
    slowest = max(column.seconds for column in columns)
    videos = _has_videos(columns)
    rows = "\n".join(
        f"<tr><th scope=row>{html.escape(prompt)}</th>"
        + "".join(
            f"<td><small>{_short(column)}</small>"
            f"{embed(column.files[row], f'{html.escape(prompt)}, {_short(column)}')}</td>"
            for column in columns
        )
        + "</tr>"
        for row, prompt in enumerate(prompts)
    )
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            f"<p>{html.escape(note)}</p>" if note else "",
            CONTROL if videos else "",
            "<table>",
            f"<thead><tr><td></td>{''.join(_heading(x, slowest) for x in columns)}</tr></thead>",
            f"<tbody>\n{rows}\n</tbody>",
            "</table>",
        ]
    )
    page = html_page(body, title=title, style=_STYLE, videos=videos)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, page)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error
    return target


def format_seconds(seconds: float) -> str:
    """Format a time in milliseconds or seconds: 12.3 ms, 1.24 s."""
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def format_ratio(ratio: float) -> str:
    """Format a speed-up: 23×, 1.8×."""
    return f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def _heading(column: SamplerColumn, slowest: float) -> str:
    ratio = slowest / column.seconds
    faster = f"<b>{format_ratio(ratio)} faster</b>" if ratio >= 1.05 else "reference"
    return (
        f"<th scope=col><h2>{html.escape(column.name)}</h2>"
        f"<span>{html.escape(column.detail)}</span>"
        f"<span class=time>{format_seconds(column.seconds)} per video · {faster}</span></th>"
    )


def _short(column: SamplerColumn) -> str:
    return html.escape(f"{column.name}, {column.detail}" if column.detail else column.name)


def _has_videos(columns: Sequence[SamplerColumn]) -> bool:
    return any(file.suffix.lower() in VIDEO_TYPES for column in columns for file in column.files)


_STYLE = """h1 + p { color: var(--faint); margin: .4rem 0 0 }
table { border-collapse: collapse; margin-top: 1.5rem; width: 100% }
th, td { padding: .6rem 1rem .6rem 0; text-align: left; vertical-align: middle }
thead th { vertical-align: top; font-weight: normal; padding-bottom: 1rem }
tbody tr { border-top: 1px solid var(--line) }
th[scope=row] { font-weight: 500; min-width: 7rem }
h2 { font-size: 1.05rem; margin: 0 }
span, small { color: var(--faint); display: block; font-size: .875rem }
td small { display: none }
.time b { color: var(--good); font-weight: 600 }
video, img { width: 100%; image-rendering: pixelated }
button { margin-top: 1.25rem }
@media (max-width: 44rem) {
  table, tbody { display: block }
  thead tr { display: grid; gap: .75rem; grid-template-columns: 1fr 1fr }
  thead td { display: none }
  thead th { padding: 0 }
  tbody tr { display: grid; gap: .75rem; grid-template-columns: 1fr 1fr; margin-top: 1rem;
    padding-top: .75rem }
  th[scope=row] { grid-column: 1 / -1; padding: 0 }
  td { padding: 0 }
  td small { display: block; margin-bottom: .2rem }
}"""
