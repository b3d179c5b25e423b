"""Errors that a user can cause and fix.

`AptError` is the base class. Each error is also the built-in error that Python code expects:
ValueError for bad input, ImportError for a missing package, OSError for an unreachable Hub,
RuntimeError for training that diverges (`apt.train.monitor.TrainingStopped`).

The command line prints these as one line and exits with code 2. Every message says what was wrong,
what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

LISTED = 5
"""How many names a message lists before it only counts the rest."""


class AptError(Exception):
    """The base class of all errors of this package."""


class InputError(AptError, ValueError):
    """An invalid argument, prompt, size or name."""


class PeerError(InputError):
    """An error that happened on another rank, which reports it; this rank stays silent."""


class HardwareError(AptError, RuntimeError):
    """A machine that computes wrong results."""


class LostRankError(AptError, RuntimeError):
    """A rank that no longer responds to the others."""


class PromptLengthError(InputError):
    """A prompt with more tokens than the text encoder accepts."""


class ConfigError(InputError):
    """A configuration that is invalid, or does not fit the run it is used with."""


class DataError(InputError):
    """Data that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, unsupported, or cannot be written."""


class HubUnreachableError(CheckpointError, OSError):
    """The Hub is unreachable or does not work, and the file is not on this disk."""


class MissingPackageError(InputError, ImportError):
    """An optional package that is not installed or cannot be imported."""


class MissingDecoderError(DataError, MissingPackageError):
    """A data file that needs an optional package to decode."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def listed(items: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
