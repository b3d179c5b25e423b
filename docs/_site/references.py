"""Names of the package in backticks are cross-references; one that leads nowhere is an error."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A file's name looks like one: `apt.json`. In double backticks stands what only shows how.
_NAME = re.compile(r"(?<![\[`])(?<!`` )`(apt(?:\.\w+)+)`(?!\]| ``)")
_FILES = (".json",)


def link(text: str) -> str:
    """Markdown in which every `` `apt.some.name` `` is a cross-reference."""

    def linked(match: re.Match[str]) -> str:
        name = match.group(1)
        return match.group() if name.endswith(_FILES) else f"[`{name}`][{name}]"

    return _NAME.sub(linked, text)


# Entries of Args and Attributes that describe several names at once: "height, width: of a clip."
_SHARED = re.compile(r"^( {4})(\w+(?:, \w+)+)(:.*(?:\n {5,}.*)*)", re.MULTILINE)


def split_shared(text: str) -> str:
    """A docstring in which each parameter has an entry of its own, as the parser knows them."""

    def split(match: re.Match[str]) -> str:
        indent, names, rest = match.groups()
        return "\n".join(f"{indent}{name}{rest}" for name in names.split(", "))

    return _SHARED.sub(split, text)


class References(griffe.Extension):
    """Prepares docstrings: names are links, parameters that share an entry get one each."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = link(split_shared(obj.docstring.value))
