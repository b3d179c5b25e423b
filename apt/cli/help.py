"""Readable output of `--help`. tyro keeps some line breaks of docstrings, and does not wrap text
outside its boxes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby
from types import MappingProxyType
from typing import TextIO

_BOX = "╭│╰"
_EMPTY_DEFAULT = "(default: )"


@contextlib.contextmanager
def readable_help() -> Iterator[None]:
    """Within the block, wrap the help that tyro prints to the width of the terminal.

    The help of an option is the text below its field, or its entry in the docstring's
    "Attributes:". If an entry is for several fields, the first one shows it, and the others refer
    to the first.
    """
    # Imported here, because only help needs tyro before a command's module loads it.
    from tyro.constructors import ConstructorRegistry, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def explain(info: StructTypeInfo) -> None:
        """Build nothing; only store the help where tyro looks first."""
        if isinstance(info.type, type) and dataclasses.is_dataclass(info.type):
            texts = explanations(info.type)
            for field in dataclasses.fields(info.type):
                # For options that are a dataclass, tyro shows its docstring as a title.
                if field.name in texts and not dataclasses.is_dataclass(field.default_factory):
                    field.metadata = MappingProxyType({**field.metadata, "help": texts[field.name]})

    printed = _Kept(sys.stdout)
    try:
        with registry, contextlib.redirect_stdout(printed):
            yield
    finally:
        width = shutil.get_terminal_size().columns
        # Blanks of the same width keep the sides of the boxes in line.
        shown = printed.getvalue().replace(_EMPTY_DEFAULT, " " * len(_EMPTY_DEFAULT))
        sys.stdout.write(wrapped(shown, width))


class _Kept(io.TextIOWrapper):
    """Captures output, with the encoding and colours that its destination can show."""

    def __init__(self, place: TextIO) -> None:
        super().__init__(io.BytesIO(), encoding=place.encoding or "utf-8", write_through=True)
        self._isatty = place.isatty()

    def isatty(self) -> bool:
        return self._isatty

    def getvalue(self) -> str:
        """Return everything that was written."""
        self.seek(0)
        return self.read()


def explanations(kind: type) -> dict[str, str]:
    """Return the help of each field of a dataclass that its docstrings explain."""
    import docstring_parser

    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        for entry in docstring_parser.parse_from_object(base).params:
            first, *others = (name.strip() for name in entry.arg_name.split(","))
            texts[first] = " ".join((entry.description or "").split())
            texts.update(dict.fromkeys(others, f"see {first.replace('_', '-')}."))
    return texts


def wrapped(text: str, width: int) -> str:
    """Wrap paragraphs to `width`, keep boxes unchanged, and merge adjacent empty lines.

    An indented line starts a new paragraph.
    """
    blocks = groupby(text.splitlines(), key=lambda line: (not line.strip(), line[:1] in _BOX))
    out: list[str] = []
    for (is_empty, is_box), block in blocks:
        if is_empty or is_box:
            out += [""] if is_empty else block
            continue
        paragraphs: list[str] = []
        for line in block:
            if paragraphs and not line.startswith(" "):
                paragraphs[-1] += f" {line}"
            else:
                paragraphs.append(line)
        for paragraph in paragraphs:
            indent = paragraph[: len(paragraph) - len(paragraph.lstrip())]
            hanging = indent + "    " if indent else ""
            out += textwrap.wrap(
                paragraph,
                width,
                subsequent_indent=hanging,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join([*out, ""]) if out else ""
