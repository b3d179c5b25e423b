"""Parts shared by self-contained HTML pages: embedded media, colours and playback."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from apt.errors import InputError

VIDEO_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}
_IMAGE_TYPES = {
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}


def data_uri(file: Path) -> str:
    """Return a video or image file as a data URI.

    Raises InputError for a file of another type, or one that cannot be read.
    """
    suffix = file.suffix.lower()
    kind = VIDEO_TYPES.get(suffix) or _IMAGE_TYPES.get(suffix)
    if kind is None:
        raise InputError(f"{str(file)!r} is not a video or image that a page can show")
    try:
        data = base64.b64encode(file.read_bytes()).decode("ascii")
    except OSError as error:
        raise InputError(f"cannot read {str(file)!r}: {error.strerror}") from error
    return f"data:{kind};base64,{data}"


def is_shown(file: Path) -> bool:
    """Return whether `embed` accepts a file with this suffix."""
    return file.suffix.lower() in {**VIDEO_TYPES, **_IMAGE_TYPES}


def embed(file: Path, label: str) -> str:
    """Return a video or image as an HTML element. Raises what `data_uri` raises.

    Args:
        file: the video or image.
        label: alternative text, already escaped for HTML.
    """
    source = data_uri(file)
    if file.suffix.lower() in VIDEO_TYPES:
        return f'<video muted playsinline controls aria-label="{label}" src="{source}"></video>'
    return f'<img alt="{label}" src="{source}">'


def html_page(body: str, *, title: str, style: str, videos: bool) -> str:
    """A whole document.

    Args:
        body: HTML; `CONTROL` somewhere in it holds the videos.
        title: of the window.
        style: rules beside those that all pages share.
        videos: whether there are any, which then play together.
    """
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{_STYLE}
{style}
</style>
{body}
{_SCRIPT if videos else ""}
</html>
"""


# Light, and dark for who prefers that.
_STYLE = """:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --faint: #59636e;
  --line: #d8dee4; --good: #1a7f37 }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #30363d; --good: #3fb950 }
}
body { margin: 2.5rem auto; max-width: 62rem; padding: 0 1.25rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 }
video, img { border-radius: 6px; display: block; max-width: 100% }
button { background: var(--page); border: 1px solid var(--faint); border-radius: 6px;
  color: inherit; cursor: pointer; font: inherit; min-width: 7rem; padding: .4rem .9rem }
@media (max-width: 44rem) { body { margin: 1.25rem auto; padding: 0 .9rem } }"""

CONTROL = '<button type="button" aria-keyshortcuts="Space" hidden>Pause</button>'
"""The button that pauses and resumes all videos."""

# All videos are equally long, but browsers let them drift apart. So they restart together.
_SCRIPT = """<script>
"use strict";
const videos = [...document.querySelectorAll("video")];
const button = document.querySelector("button");
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let ended = new Set();
let timer = 0;

function begin() {
  ended = new Set();
  for (const video of videos) { video.currentTime = 0; video.play().catch(() => {}); }
}

function show() {
  button.textContent = playing ? "Pause" : "Play";
  clearTimeout(timer);
  if (!playing) { for (const video of videos) video.pause(); }
  else if (ended.size) begin();
  else {
    for (const video of videos) {
      video.currentTime = videos[0].currentTime;
      video.play().catch(() => {});
    }
  }
}

function toggle() { playing = !playing; show(); }

for (const video of videos) {
  video.controls = false;
  video.addEventListener("ended", () => {
    ended.add(video);
    if (playing && ended.size === videos.length) timer = setTimeout(begin, 500);
  });
}
button.hidden = false;
button.addEventListener("click", toggle);
document.addEventListener("keydown", (event) => {
  if (event.key !== " " || event.target === button) return;
  event.preventDefault();
  toggle();
});
show();
</script>"""
