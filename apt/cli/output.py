"""What a command prints on standard output, which may be a file on a full disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apt.errors import InputError


@contextmanager
def printing() -> Iterator[None]:
    """Raises InputError if what the block prints cannot be written; a reader that left passes."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python flushes standard output once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(f"standard output cannot be written: {error.strerror}") from error


def print_page(page: Path | None) -> None:
    """Say where a page is, as Markdown and as HTML; None, of a rank that wrote none, is silent."""
    if page is not None:
        with printing():
            print(page)
            print(page.with_suffix(".html"))
