"""One-line errors for invalid options, from the boxes that tyro prints."""

from __future__ import annotations

import re
from itertools import groupby

from apt.errors import InputError

_PYTHON = (
    (r"invalid literal for int\(\) with base 10: (.*)", r"expected a whole number, got \1"),
    (r"could not convert string to float: (.*)", r"expected a number, got \1"),
    (r"no type matching \{?(.*?)\}? could be instantiated from \[(.*)\]\.", r"expected \1, got \2"),
    (r"expected INT,", "expected a whole number,"),
    (r"expected FLOAT,", "expected a number,"),
    (r"Missing value for argument '(.*)'\. Expected (.*?)\.?$", r"\1: expected \2, got fewer"),
    (r"Failed to parse key-value pairs!", "expected pairs of a name and a value"),
    (r"^config\.", ""),
    (r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)\.",
     r"\2: expected one of \3, got \1"),
)  # fmt: skip


class UnknownOption(InputError):
    """An option that the command does not have."""


def usage_error(said: str, prog: str) -> InputError:
    """Return the error that a box of tyro reports.

    Args:
        said: the box, from a terminal so wide that no line in it is wrapped.
        prog: the command whose help the message refers to.
    """
    title, *rest = re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() or [""]
    # Without UTF-8, there is a rule below the title and nothing at the sides.
    drawn = title.startswith("╭")
    body = [line[2:-2] if drawn else line[2:] for line in (rest if drawn else rest[1:])]
    title = title.strip("╭─╮ ")
    sections = [
        [line.rstrip() for line in section]
        for is_rule, section in groupby(body, key=lambda line: set(line) in ({"─"}, {"-"}))
        if not is_rule
    ]
    first = sections[0] if sections else [title]
    if title == "Required options":
        missing = ", ".join(_options(first))
        return InputError(f"{missing} is missing; `{prog} --help` explains the options")
    # After an empty line, tyro repeats the message in Python's words.
    text = " ".join(" ".join(first).partition("  ")[0].split()).removeprefix("Error parsing ")
    for pattern, words in _PYTHON:
        text = re.sub(pattern, words, text)
    if title != "Unrecognized options":
        return InputError(f"{text.rstrip('.')}; `{prog} --help` explains the options")
    unknown = text.partition(": ")[2].replace(", ", " ")
    close = [option for section in sections[1:] for option in _options(section)]
    meant = f"did you mean {close[0]}? " if close else ""
    what = "option" if unknown.startswith("-") else "argument"
    return UnknownOption(f"no such {what}: {unknown}; {meant}`{prog} --help` shows all")


def _options(section: list[str]) -> list[str]:
    """Return the names of the listed options; each stands above its explanation."""
    return [line.split()[0].rstrip(",") for line in section if re.match(r" {4}\S", line)]
