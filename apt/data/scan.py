"""Finding media files and their captions in a folder.

Three layouts, also in sub-folders: `metadata.csv` or `metadata.jsonl` in the folder itself, with
the columns `file_name` (relative to the folder) and `caption` (or `text`, as in Hugging Face's
folders); or a `.txt` beside each file. Metadata wins over a `.txt`. A file that is named twice is
two samples, one per caption.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from apt.data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from apt.data.report import Problem
from apt.errors import DataError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
_CAPTION_COLUMNS = ("caption", "text")


@dataclass(frozen=True)
class Entry:
    """A file with its caption; `name` is its path relative to the folder, with slashes."""

    path: Path
    name: str
    caption: str


@dataclass(frozen=True)
class Scan:
    """What a folder holds, sorted by name.

    Attributes:
        directory: the folder.
        metadata: name of the metadata file, or None.
        files: media files by name, captioned or not.
        entries: files with a caption.
        problems: files without, and metadata that leads nowhere.
    """

    directory: Path
    metadata: str | None
    files: dict[str, Path]
    entries: list[Entry]
    problems: list[Problem]


def scan_folder(directory: str | Path) -> Scan:
    """List a folder's media files and captions, without opening any media file.

    Raises:
        DataError: if it is no folder, or its metadata cannot be read at all.
    """
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder of videos and images")
    files = _media_files(root)
    metadata = _metadata_file(root)
    problems: list[Problem] = []
    entries: list[Entry] = []
    named: set[str] = set()
    if metadata:
        for where, row in _rows(metadata):
            if isinstance(row, str):
                problems.append(Problem("bad metadata", where, row))
                continue
            name = _same_form(row["file_name"])
            path = files.get(name) or root / row["file_name"]
            named.add(name)
            if not path.is_file():
                detail = f"named in {where}, but not there"
                problems.append(Problem("missing file", row["file_name"], detail))
            elif row["caption"]:
                entries.append(Entry(path, name, row["caption"]))
            else:
                problems.append(Problem("missing caption", name, f"empty in {where}"))
    for name, path in files.items():
        if name in named:
            continue
        caption = _sidecar_caption(path)
        if caption:
            entries.append(Entry(path, name, caption))
        else:
            beside = path.with_suffix(".txt").name
            where = f"no row in {metadata.name}, and " if metadata else ""
            state = "empty or not UTF-8" if path.with_suffix(".txt").is_file() else "not there"
            problems.append(Problem("missing caption", name, f"{where}{beside} is {state}"))
    # A stable sort: a file's several captions keep the order of the metadata.
    entries.sort(key=lambda entry: entry.name)
    return Scan(root, metadata.name if metadata else None, files, entries, problems)


def looked_for() -> str:
    """What a folder may hold, for messages about folders that hold none of it."""
    return (
        f"videos ({' '.join(sorted(VIDEO_SUFFIXES))}) and images "
        f"({' '.join(sorted(IMAGE_SUFFIXES))}), each with a caption: a row (file_name, caption) in "
        f"{' or '.join(METADATA_NAMES)}, or a .txt of the same name beside it"
    )


def _media_files(root: Path) -> dict[str, Path]:
    """Media files by relative name in one Unicode form, sorted; hidden ones are left out."""
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
                found[_same_form(path.relative_to(root).as_posix())] = path
    return dict(sorted(found.items()))


def _same_form(name: str) -> str:
    # macOS stores accents decomposed, most editors write them composed.
    return unicodedata.normalize("NFC", PurePath(name).as_posix())


def _metadata_file(root: Path) -> Path | None:
    present = [root / name for name in METADATA_NAMES if (root / name).is_file()]
    if len(present) > 1:
        raise DataError(f"{root}: has both {' and '.join(METADATA_NAMES)}; keep one of them")
    return present[0] if present else None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str] | str]]:
    """(where, row with `file_name` and `caption`, or what is wrong with the row)."""
    reader = _csv_rows if path.suffix == ".csv" else _jsonl_rows
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str] | str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        columns = reader.fieldnames
        if "file_name" not in columns or not set(_CAPTION_COLUMNS) & set(columns):
            raise DataError(
                f"{path}: the first line must name the columns file_name and caption, separated "
                f"by commas; it has {', '.join(map(repr, columns)) or 'none'}"
            )
        for row in reader:
            yield f"{path.name}:{reader.line_num}", _checked_row(row)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, str] | str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield f"{path.name}:{number}", f"is not JSON: {error}"
                continue
            yield f"{path.name}:{number}", _checked_row(row)


def _checked_row(row: object) -> dict[str, str] | str:
    if not isinstance(row, dict):
        return f"expected an object with file_name and caption, got {type(row).__name__}"
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        return "file_name is missing"
    captions = [row[column] for column in _CAPTION_COLUMNS if row.get(column)]
    if captions and not isinstance(captions[0], str):
        return f"caption must be text, got {type(captions[0]).__name__}"
    return {"file_name": name.strip(), "caption": captions[0].strip() if captions else ""}


def _sidecar_caption(path: Path) -> str | None:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip() or None
    except (FileNotFoundError, UnicodeDecodeError):
        return None
