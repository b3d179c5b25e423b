"""Tokens for raters' links, which cannot be guessed and never change.

Tokens are derived from a key file next to the study. The answers, which may be passed on for a
report, therefore contain no tokens.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from pathlib import Path

from apt.errors import DataError

KEY_FILE = "links.key"
_KEY_BYTES = 32


def read_key(folder: Path) -> bytes:
    """Return the key of a study's links; create it if needed, readable by its owner only.

    Raises DataError if it cannot be written or read, or is damaged.
    """
    path = folder / KEY_FILE
    try:
        if not path.exists():
            _make(path)
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
        if len(key) != _KEY_BYTES:
            raise ValueError(f"it has {len(key)} bytes")
    except OSError as error:
        raise DataError(
            f"the key of the links, {str(path)!r}, cannot be read or written: "
            f"{error.strerror or error}; check its permissions and the disk's space"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{str(path)!r} is damaged; remove it, and send new links to all raters"
        ) from error
    return key


def token(key: bytes, rater: int) -> str:
    """Return the token of a rater: 128 bits, safe in a URL."""
    digest = hmac.digest(key, f"rater {rater}".encode(), "sha256")[:16]
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _make(path: Path) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(_KEY_BYTES) + "\n")
        # If two servers start at once, the first one's key is used.
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink(missing_ok=True)
