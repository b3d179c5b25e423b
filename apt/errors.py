"""The errors that a user can cause, and mend.

The command line turns these into one line and exit code 2. Every message says what was wrong,
what was expected, and what to do.
"""

from __future__ import annotations


class InputError(ValueError):
    """An argument, a prompt, a size or a name that does not fit."""


class PeerError(InputError):
    """An error of another rank, which tells the user of it; this one has nothing to say."""


class PromptLengthError(InputError):
    """A prompt of more tokens than a text encoder takes."""


class ConfigError(InputError):
    """A configuration that is wrong by itself, or does not fit the run it is used with."""


class DataError(InputError):
    """Files of a data set that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, foreign, or that cannot be written."""
