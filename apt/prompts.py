"""Prompts in a text file, one per line."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from apt.errors import InputError

_LINE_ENDS = re.compile(r"[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""Line separators of Unicode that do not end a prompt: copied web text has them in sentences."""


def read_prompts(path: Path) -> list[str]:
    """Read the non-empty lines of a prompt file. Raises InputError if it cannot be read.

    The text is UTF-8, or UTF-16 with a byte order mark as Windows writes it, with the line endings
    of any system.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read prompts from {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 ({error}); save it as UTF-8 text") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    # Concatenated files have byte order marks at the start of later lines.
    prompts = [_LINE_ENDS.sub(" ", line.removeprefix("\ufeff")).strip() for line in lines]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise InputError(f"{str(path)!r} contains no prompt; write one per line")
    return prompts
