"""Write generated samples: video and image files, contact sheets, and a page that plays videos."""

from __future__ import annotations

from apt.media.files import (
    SUFFIXES,
    Tags,
    auto_scale,
    check_settings,
    enlarge,
    read_tags,
    write_gif,
    write_media,
    write_mkv,
    write_mp4,
    write_png,
    write_webp,
)
from apt.media.page import SamplerColumn, write_html
from apt.media.sheet import contact_sheet, moving_sheet, write_contact_sheet

__all__ = [
    "SUFFIXES",
    "SamplerColumn",
    "Tags",
    "auto_scale",
    "check_settings",
    "contact_sheet",
    "enlarge",
    "moving_sheet",
    "read_tags",
    "write_contact_sheet",
    "write_gif",
    "write_html",
    "write_media",
    "write_mkv",
    "write_mp4",
    "write_png",
    "write_webp",
]
