"""Finding media files and their captions in a folder.

There are three layouts, also with sub-folders: `metadata.csv` or `metadata.jsonl` in the folder
itself, with the columns `file_name` (relative to the folder) and `caption` (or `text`, as in
Hugging Face's folders); or a `.txt` beside each file. Metadata takes precedence over a `.txt`. A
file that is named twice is two samples, one per caption. Links are followed. Nothing is ignored
silently: files that are neither media nor captions are counted, and files that look like media but
have an unknown suffix are problems.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from apt.data.metadata import METADATA_NAMES, is_text, read_metadata
from apt.data.reading import Entry
from apt.data.report import Problem, ProblemKind
from apt.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_media, may_be_media
from apt.errors import DataError
from apt.files import read_text
from apt.untrusted import is_inside


def looked_for() -> str:
    """Return a description of usable files, for messages about folders without any."""
    return (
        f"videos ({' '.join(sorted(VIDEO_SUFFIXES))}) and images "
        f"({' '.join(sorted(IMAGE_SUFFIXES))}), each with a caption: a row (file_name, caption) in "
        f"{' or '.join(METADATA_NAMES)}, or a .txt of the same name beside it"
    )


@dataclass(frozen=True)
class Scan:
    """The contents of a folder, sorted by name.

    Attributes:
        directory: the folder.
        metadata: name of the metadata file, or None.
        files: media files by name, captioned or not.
        entries: files with a caption, or all.
        problems: files without a caption, metadata of missing files, and media with unknown
            suffixes.
        left_aside: number of other files by suffix.
        looked_for: description of usable files, for messages about a folder without any.
        captions_in: the place of the captions, if there is no metadata.
    """

    directory: Path
    metadata: str | None
    files: dict[str, Entry]
    entries: list[Entry]
    problems: list[Problem]
    left_aside: Counter[str] = field(default_factory=Counter)
    looked_for: str = field(default_factory=looked_for)
    captions_in: str = ".txt files"


def scan_folder(directory: str | Path, *, captioned: bool = True) -> Scan:
    """List a folder's media files and captions, without opening the media files.

    Args:
        directory: the folder.
        captioned: whether a file without a caption is a problem. If False, it gets the empty
            caption.

    Raises:
        DataError: if it is not a folder, or its metadata cannot be read at all.
    """
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; pass a folder of videos and images")
    problems: list[Problem] = []
    files, others = _files(root, problems)
    metadata = _metadata_file(root)
    entries: list[Entry] = []
    named: set[str] = set()
    for row in read_metadata(metadata) if metadata else ():
        name = _same_form(row.file_name or "")
        named.add(name)
        if row.problem:
            problems.append(Problem("bad metadata", row.where, row.problem))
            continue
        path = files.get(name) or root / (row.file_name or "")
        if name not in files and not is_inside(path, root):
            detail = (
                f"named in {row.where}, but outside the folder; move or link it into the folder"
            )
            problems.append(Problem("missing file", name, detail))
        elif not path.is_file():
            state = "a folder" if path.is_dir() else "missing"
            detail = f"named in {row.where}, but {state}"
            problems.append(Problem("missing file", name, detail))
        elif row.caption or not captioned:
            entries.append(Entry(path, name, row.caption or ""))
        else:
            problems.append(Problem("missing caption", name, f"empty in {row.where}"))
    for name, path in files.items():
        if name in named:
            continue
        caption = _sidecar_caption(path)
        if isinstance(caption, str) or not captioned:
            entries.append(Entry(path, name, caption if isinstance(caption, str) else ""))
        else:
            where = f"no row in {metadata.name}, and " if metadata else ""
            problems.append(Problem("missing caption", name, f"{where}{caption.state}"))
    # A stable sort: a file's several captions keep the order of the metadata.
    entries.sort(key=lambda entry: entry.name)
    captions = {path.with_suffix(".txt") for path in files.values()} | {metadata}
    left_aside = Counter(_suffix(path) for path in others if path not in captions)
    found = {name: Entry(path, name, "") for name, path in files.items()}
    return Scan(root, metadata.name if metadata else None, found, entries, problems, left_aside)


def _files(root: Path, problems: list[Problem]) -> tuple[dict[str, Path], list[Path]]:
    """Return media files by relative name (in Unicode NFC), sorted, and other files.

    Hidden files are left out.
    """
    media, others = {}, []
    for path in walk(root, problems):
        name = _same_form(path.relative_to(root).as_posix())
        try:
            if path.is_symlink() and not path.exists():
                target = os.readlink(path)
                problems.append(
                    Problem("missing file", name, f"a link to {target}, which is missing")
                )
            elif not path.is_file():
                problems.append(Problem("unreadable", name, "is not a regular file"))
            elif is_media(path):
                media[name] = path
            elif may_be_media(path):
                detail = f"{_suffix(path)} is not supported; convert or rename it, or move it away"
                problems.append(Problem("unknown suffix", name, detail))
            else:
                others.append(path)
        except OSError as error:
            problems.append(Problem("unreadable", name, str(error.strerror or error)))
    return dict(sorted(media.items())), others


def walk(root: Path, problems: list[Problem]) -> Iterator[Path]:
    """Yield every file that is not hidden, once each, following links to folders."""

    def add(kind: ProblemKind, folder: str | Path, detail: str) -> None:
        name = _same_form(Path(folder).relative_to(root).as_posix())
        problems.append(Problem(kind, name, detail))

    def unreadable(error: OSError) -> None:
        add("unreadable", error.filename, str(error.strerror or error))

    above = Path(os.path.realpath(root)).parents
    # Links are walked last, so that a folder's own path takes precedence over links to it.
    links: list[Path] = [root]
    seen: set[str] = set()
    while links:
        pending, links = links, []
        for start in pending:
            if start != root and Path(os.path.realpath(start)) in above:
                add("unreadable", start, "a link to a folder that contains this one: not followed")
                continue
            for folder, subfolders, names in os.walk(start, onerror=unreadable):
                real = os.path.realpath(folder)
                if real in seen:
                    subfolders.clear()
                    continue
                seen.add(real)
                shown = sorted(name for name in subfolders if not name.startswith("."))
                links += [Path(folder, name) for name in shown if Path(folder, name).is_symlink()]
                subfolders[:] = shown
                yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def _suffix(path: Path) -> str:
    return path.suffix.lower() or "without a suffix"


def _same_form(name: str) -> str:
    # macOS stores accents decomposed, but most editors write them composed. Bytes that are not
    # UTF-8 are escaped, so that the name can be printed.
    printable = name.encode("utf-8", "backslashreplace").decode()
    return unicodedata.normalize("NFC", PurePath(printable).as_posix())


def _metadata_file(root: Path) -> Path | None:
    present = [root / name for name in METADATA_NAMES if (root / name).exists()]
    if len(present) > 1:
        raise DataError(f"{root}: has both {' and '.join(METADATA_NAMES)}; keep one of them")
    return present[0] if present else None


@dataclass(frozen=True)
class _NoCaption:
    state: str


def _sidecar_caption(path: Path) -> str | _NoCaption:
    beside = path.with_suffix(".txt")
    name = _same_form(beside.name)
    if not beside.exists():
        return _NoCaption(f"{name} is missing")
    if not beside.is_file():
        return _NoCaption(f"{name} is {'a folder' if beside.is_dir() else 'not a regular file'}")
    try:
        caption = read_text(beside).strip()
    except UnicodeDecodeError:
        return _NoCaption(f"{name} is not UTF-8")
    except OSError as error:
        return _NoCaption(f"{name} cannot be read: {error.strerror or error}")
    if not is_text(caption):
        return _NoCaption(f"{name} is UTF-16 without a byte order mark; save it as UTF-8")
    return caption or _NoCaption(f"{name} is empty")
