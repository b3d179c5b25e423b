"""How a file was made, inside it: prompt, seed, model and settings.

    .mp4     title and comment of the container, as of .mkv
    .png     text chunks: Title and Comment
    .gif     the comment
    .webp    EXIF: ImageDescription and UserComment

The title is the prompt, for people and other programs. The comment is all of it, as JSON in ASCII,
so that every prompt comes back as it was whatever a format or a program takes comments for.
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
"""What JSON holds, by name; `OneStepPipeline.tags` makes them."""

_OURS = "diffusion-apt"
_VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
_PICTURES = ("PNG", "GIF", "WEBP")
_DESCRIPTION, _EXIF_PART, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_IN_ASCII = b"ASCII\x00\x00\x00"


def read_tags(path: str | Path) -> dict[str, Any]:
    """What a file says of how it was made, as it was given to the writer.

    Raises:
        InputError: for a file that cannot be read, or that says nothing, as most files of other
            programs and those that were written anew by an editor or a messenger.
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
        f"{str(path)!r} does not say how it was made: it is not of this package, or another "
        "program has written it anew"
    )


def container_metadata(tags: Tags | None) -> dict[str, str]:
    """As a video's container holds them."""
    if tags is None:
        return {}
    title = _title(tags)
    return {**({"title": title} if title else {}), "comment": _comment(tags)}


def png_text(tags: Tags | None) -> PngImagePlugin.PngInfo | None:
    """As a PNG's text chunks; those that are not Latin-1 become international ones."""
    if tags is None:
        return None
    text = PngImagePlugin.PngInfo()
    if title := _title(tags):
        text.add_text("Title", title)
    text.add_text("Comment", _comment(tags))
    return text


def gif_options(tags: Tags | None) -> dict[str, Any]:
    """As an option of Pillow's for GIF."""
    return {} if tags is None else {"comment": _comment(tags).encode()}


def webp_options(tags: Tags | None) -> dict[str, Any]:
    """As an option of Pillow's for WebP."""
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
        raise InputError(f"tags must be what JSON holds, by name: {error}") from error


def _title(tags: Tags) -> str:
    """A prompt on one line; nothing for several."""
    prompt = tags.get("prompt")
    if not isinstance(prompt, str):
        return ""
    printable = prompt.encode(errors="replace").decode()
    return re.sub(r"[\x00-\x1f\x7f]+", " ", printable).strip()


def _comment_of_video(file: Path) -> str:
    import av

    try:
        with av.open(str(file)) as container:
            # Matroska's names of tags are in capitals.
            found = {name.lower(): text for name, text in container.metadata.items()}
            return found.get("comment", "")
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
        f"cannot read {str(file)!r} ({reason}); expected a video, or a .png, .gif or .webp"
    )
