"""Tags that record in a file how it was made: prompt, seed, model and settings.

    .mp4     title and comment of the container
    .png     text chunks: Title and Comment
    .gif     the comment
    .webp    EXIF: ImageDescription and UserComment

The title is the prompt, for people and other programs. The comment holds all tags as ASCII JSON,
so every prompt survives, whatever encoding a format or a program assumes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from apt.errors import InputError
from apt.untrusted import parse_json

Tags = Mapping[str, Any]
"""JSON values by name; `OneStepPipeline.tags` makes them."""

_OURS = "diffusion-apt"
_VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
_PICTURES = ("PNG", "GIF", "WEBP")
_DESCRIPTION, _EXIF_PART, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_IN_ASCII = b"ASCII\x00\x00\x00"


def read_tags(path: str | Path) -> dict[str, Any]:
    """Read the tags of a file, as they were given to the writer.

    Raises:
        InputError: for a file that cannot be read or has no such tags. Files of other programs have
            none, and editors and messengers remove them when they write a file again.
    """
    file = Path(path)
    comment = _comment_of_video(file) if file.suffix.lower() in _VIDEOS else _comment_of_image(file)
    try:
        found = parse_json(comment)[_OURS]
        if isinstance(found, dict):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{str(path)!r} does not say how it was made: this package did not write it, or another "
        "program has rewritten it"
    )


def container_metadata(tags: Tags | None) -> dict[str, str]:
    """Return tags as the metadata of a video container."""
    if tags is None:
        return {}
    title = _title(tags)
    return {**({"title": title} if title else {}), "comment": _comment(tags)}


def png_text(tags: Tags | None) -> PngImagePlugin.PngInfo | None:
    """Return tags as text chunks of a PNG; text outside Latin-1 becomes iTXt chunks."""
    if tags is None:
        return None
    text = PngImagePlugin.PngInfo()
    if title := _title(tags):
        text.add_text("Title", title)
    text.add_text("Comment", _comment(tags))
    return text


def gif_options(tags: Tags | None) -> dict[str, Any]:
    """Return tags as Pillow's options for GIF."""
    return {} if tags is None else {"comment": _comment(tags).encode()}


def webp_options(tags: Tags | None) -> dict[str, Any]:
    """Return tags as Pillow's options for WebP."""
    if tags is None:
        return {}
    exif = Image.Exif()
    if title := _title(tags):
        exif[_DESCRIPTION] = title.encode()
    exif.get_ifd(_EXIF_PART)[_USER_COMMENT] = _IN_ASCII + _comment(tags).encode()
    return {"exif": exif.tobytes()}


def _comment(tags: Tags) -> str:
    try:
        return json.dumps({_OURS: dict(tags)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"tags must be JSON values by name: {error}") from error


def _title(tags: Tags) -> str:
    """Return the prompt on one line; empty if the tags hold a list of prompts or none."""
    prompt = tags.get("prompt")
    if not isinstance(prompt, str):
        return ""
    printable = prompt.encode(errors="replace").decode()
    return re.sub(r"[\x00-\x1f\x7f]+", " ", printable).strip()


def _comment_of_video(file: Path) -> str:
    import av

    try:
        with av.open(str(file)) as container:
            return container.metadata.get("comment", "")
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _comment_of_image(file: Path) -> str:
    try:
        with Image.open(file, formats=_PICTURES) as image:
            if image.format == "WEBP":
                comment = image.getexif().get_ifd(_EXIF_PART).get(_USER_COMMENT, b"")
                comment = bytes(comment).removeprefix(_IN_ASCII)
            else:
                comment = image.info.get("Comment" if image.format == "PNG" else "comment", "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error
    return comment.decode(errors="replace") if isinstance(comment, bytes) else str(comment)


def _unreadable(file: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(
        f"cannot read {str(file)!r} ({reason}); expected a video, .png, .gif or .webp"
    )
