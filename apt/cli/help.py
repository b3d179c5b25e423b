"""What `--help` prints, fit to be read: tyro keeps some line breaks of docstrings, and wraps no
text outside its boxes."""

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


@contextlib.contextmanager
def readable_help() -> Iterator[None]:
    """Inside, what tyro prints as help has paragraphs of the terminal's width.

    An option is explained by the text below its field, or by its line in the docstring's
    "Attributes:". Where such a line is for several fields, the first has it and the others lead
    there.
    """
    # Only help needs tyro before a command's own module loads it.
    from tyro.constructors import ConstructorRegistry, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def explain(info: StructTypeInfo) -> None:
        """No rule of its own: it leaves explanations where tyro looks first."""
        if isinstance(info.type, type) and dataclasses.is_dataclass(info.type):
            texts = explanations(info.type)
            for field in dataclasses.fields(info.type):
                # Options that are a dataclass of their own have its docstring as their title.
                if field.name in texts and not dataclasses.is_dataclass(field.default_factory):
                    field.metadata = MappingProxyType({**field.metadata, "help": texts[field.name]})

    printed = _Kept(sys.stdout)
    try:
        with registry, contextlib.redirect_stdout(printed):
            yield
    finally:
        width = shutil.get_terminal_size().columns
        sys.stdout.write(wrapped(printed.getvalue(), width))


class _Kept(io.TextIOWrapper):
    """Keeps what is printed, in the colours and lines that its place can show."""

    def __init__(self, place: TextIO) -> None:
        super().__init__(io.BytesIO(), encoding=place.encoding or "utf-8", write_through=True)
        self._isatty = place.isatty()

    def isatty(self) -> bool:
        return self._isatty

    def getvalue(self) -> str:
        """All of it."""
        self.seek(0)
        return self.read()


def explanations(kind: type) -> dict[str, str]:
    """A paragraph for each field of a dataclass that has one in its docstrings."""
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
    """The text with its paragraphs filled, boxes as they are, and one empty line where there were
    more. A line that is indented begins a paragraph of its own.
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
