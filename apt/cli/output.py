"""Printing to standard output, which may be a file on a full disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apt.errors import InputError


@contextmanager
def printing() -> Iterator[None]:
    """Raise InputError if the block's output cannot be written. BrokenPipeError passes through."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python flushes standard output once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(
            f"cannot write to standard output: {error.strerror}; redirect it elsewhere"
        ) from error


def print_page(page: Path | None) -> None:
    """Print the paths of a page, in Markdown and in HTML. None, on other ranks, prints nothing."""
    if page is not None:
        with printing():
            print(page)
            print(page.with_suffix(".html"))
