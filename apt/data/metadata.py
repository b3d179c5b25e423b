"""Captions in `metadata.csv` and `metadata.jsonl`, row by row, with the problem of each bad row."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from apt.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from apt.errors import DataError
from apt.files import read_lines
from apt.untrusted import parse_json

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
_CAPTION_COLUMNS = ("caption", "text")

_QUOTES = 'enclose captions that contain commas or line breaks in ", and double every " inside them'

_BEGINS_A_ROW = re.compile(
    rf'\s*"?[^,"]*({"|".join(map(re.escape, sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES)))})"?\s*,',
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """One row: a file and its caption, or a problem.

    Attributes:
        where: name of the metadata file, and line number.
        file_name: as written; None if it is unknown.
        caption: empty if there is none.
        problem: what was found and what was expected, or None.
    """

    where: str
    file_name: str | None = None
    caption: str = ""
    problem: str | None = None


def read_metadata(path: Path) -> list[Row]:
    """Read the rows of a metadata file.

    Raises:
        DataError: if the file cannot be read, or its first line does not name the columns.
    """
    if not path.is_file():
        raise DataError(f"{path}: cannot be read: it is not a regular file")
    try:
        lines = read_lines(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return list(_csv_rows(path, lines) if path.suffix == ".csv" else _jsonl_rows(path, lines))


def _csv_rows(path: Path, lines: list[str]) -> Iterator[Row]:
    records = _csv_records(lines)
    _, columns, problem = next(records, (1, [], None))
    columns = [name.strip() for name in columns]
    if problem or "file_name" not in columns or not set(_CAPTION_COLUMNS) & set(columns):
        raise DataError(
            f"{path}: the first line must name the columns file_name and caption, separated "
            f"by commas; it has {', '.join(map(repr, columns)) or 'none'}"
        )
    for number, fields, problem in records:
        where = f"{path.name}:{number}"
        named = dict(zip(columns, fields, strict=False))
        extra = len(fields) - len(columns)
        if not problem and extra > 0 and any(field.strip() for field in fields[-extra:]):
            problem = f"has {len(fields)} fields, but the first line has {len(columns)}; {_QUOTES}"
        if problem:
            # In a badly quoted row, only the fields before the caption are reliable.
            first = columns[0] == "file_name" and fields
            yield Row(where, fields[0].strip() if first else None, problem=problem)
        else:
            yield _checked_row(where, named)


def _csv_records(lines: list[str]) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield (line, fields, problem or None) of each record that is not empty.

    An unclosed quote swallows the following lines. Such a record is yielded with its first line
    only, and the lines after it are read as if it were complete.
    """
    at = 0
    while at < len(lines):
        rest = (lines[number] + "\n" for number in range(at, len(lines)))
        reader = csv.reader(rest, skipinitialspace=True, strict=True)
        problem = None
        try:
            fields, num = next(reader), reader.line_num
            swallowed = next(filter(_BEGINS_A_ROW.match, lines[at + 1 : at + num]), None)
            if swallowed is not None:
                problem = f"the quote includes {swallowed!r}"
        except csv.Error as error:
            problem = str(error)
        if problem:
            fields, num = [field.strip(' "') for field in lines[at].split(",")], 1
            problem = f"a quote is not closed or not doubled ({problem}); {_QUOTES}"
        if fields:
            yield at + 1, fields, problem
        at += num


def _jsonl_rows(path: Path, lines: list[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            yield Row(where, problem=f"is not JSON: {error}")
            continue
        if isinstance(row, dict):
            yield _checked_row(where, row)
        else:
            found = type(row).__name__
            yield Row(where, problem=f"expected an object with file_name and caption, got {found}")


def _checked_row(where: str, row: Mapping[str, object]) -> Row:
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        return Row(where, problem="file_name is missing")
    caption = next((row[column] for column in _CAPTION_COLUMNS if row.get(column)), "")
    if not isinstance(caption, str):
        return Row(
            where, name.strip(), problem=f"caption must be text, got {type(caption).__name__}"
        )
    if not all(map(is_text, (name, caption))):
        return Row(where, problem="contains a NUL or half of a character (a lone surrogate)")
    return Row(where, name.strip(), caption.strip())


def is_text(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8, and is not UTF-16 read as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
