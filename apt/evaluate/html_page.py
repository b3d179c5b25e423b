"""Write a Markdown page as one HTML file that contains its pictures and videos."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from apt.errors import InputError
from apt.files import write_text
from apt.media.parts import CONTROL, VIDEO_TYPES, data_uri, embed, html_page


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Files side by side, which replace a picture of the Markdown.

    Attributes:
        rows: a caption for each row.
        columns: a heading for each column.
        files: `files[row][column]`; None for an empty cell.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    files: Sequence[Sequence[Path | None]]

    def html(self) -> str:
        """Return an HTML element. Raises InputError for a file that a page cannot show."""
        names = [html.escape(column) for column in self.columns]
        parts = ["<div class=grid>"]
        for row, files in zip(self.rows, self.files, strict=True):
            caption = html.escape(row)
            cells = "".join(
                f"<figure>{embed(file, f'{caption}, {name}')}"
                f"<figcaption>{name}</figcaption></figure>"
                for name, file in zip(names, files, strict=True)
                if file is not None
            )
            parts.append(f"<section><h3>{caption}</h3><div>{cells}</div></section>")
        return "\n".join([*parts, "</div>"])

    def has_videos(self) -> bool:
        """Return whether any of the files is a video."""
        return any(f and f.suffix.lower() in VIDEO_TYPES for row in self.files for f in row)


def write_html_page(
    path: Path, text: str, *, title: str, grids: Mapping[str, Grid] | None = None
) -> Path:
    """Write Markdown (CommonMark with tables) as a self-contained HTML file.

    Args:
        path: of the page; its folder has the pictures that the text names.
        text: Markdown. HTML in it is escaped.
        title: of the window.
        grids: grids that replace pictures, by the picture's name.

    Raises InputError for a picture that cannot be read, or a page that cannot be written.
    """
    grids = grids or {}
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for number, token in enumerate(tokens):
        for child in token.children or ():
            if child.type == "image":
                _put_inside(child, path.parent, grids)
                if child.type == "html_inline":
                    # A grid cannot be inside a paragraph.
                    tokens[number - 1].hidden = tokens[number + 1].hidden = True
    videos = any(grid.has_videos() for grid in grids.values())
    body = parser.renderer.render(tokens, parser.options, {}) + (CONTROL if videos else "")
    page = html_page(body, title=title, style=_STYLE, videos=videos)
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; free some space"
        ) from error
    return path


def _put_inside(image: Token, folder: Path, grids: Mapping[str, Grid]) -> None:
    """Embed a picture's data, or replace the picture by its grid."""
    name = str(image.attrs["src"])
    if name in grids:
        image.type, image.tag, image.content = "html_inline", "", grids[name].html()
    else:
        image.attrs["src"] = data_uri(folder / name)


_STYLE = """h2 { font-size: 1.25rem; margin: 2.25rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
a { color: inherit }
code { font-size: .875em; background: color-mix(in srgb, var(--faint) 15%, transparent);
  border-radius: 4px; padding: .1em .3em }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0;
  font-size: .9375rem }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top }
thead th { color: var(--faint); font-weight: 500 }
tbody tr { border-top: 1px solid var(--line) }
p > img { background: #fff }
.grid div { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)) }
.grid figure { margin: 0; max-width: 24rem }
.grid video, .grid img { width: 100%; image-rendering: pixelated }
figcaption { color: var(--faint); font-size: .875rem }
button { position: fixed; right: 1rem; bottom: 1rem }"""
