"""The errors of this package, which a user can cause, and mend.

`AptError` is the root. Each kind is also the built-in error that Python code expects of its cause:
ValueError for what was passed in, ImportError for a package that is missing, OSError for a Hub that
cannot be reached, RuntimeError for training that diverges (`apt.train.monitor.TrainingStopped`).

The command line turns these into one line and exit code 2. Every message says what was wrong,
what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

LISTED = 5
"""Names in a message before the rest is only counted."""


class AptError(Exception):
    """The root of all errors of this package."""


class InputError(AptError, ValueError):
    """An argument, a prompt, a size or a name that does not fit."""


class PeerError(InputError):
    """An error of another rank, which tells the user of it; this one has nothing to say."""


class HardwareError(AptError, RuntimeError):
    """A machine that computes wrongly."""


class LostRankError(AptError, RuntimeError):
    """A rank that the others have waited for in vain."""


class PromptLengthError(InputError):
    """A prompt of more tokens than a text encoder takes."""


class ConfigError(InputError):
    """A configuration that is wrong by itself, or does not fit the run it is used with."""


class DataError(InputError):
    """Files of a data set that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, foreign, or that cannot be written."""


class HubUnreachableError(CheckpointError, OSError):
    """The Hub cannot be reached, or does not work, and what is needed is not on this disk."""


class MissingPackageError(InputError, ImportError):
    """An optional package that is not installed, or does not import here."""


class MissingDecoderError(DataError, MissingPackageError):
    """A file of a data set that needs an optional package."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, shortly."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def listed(items: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 image", "2,000 images"; `plural` where it takes more than an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
