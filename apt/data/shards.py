"""WebDataset shards: `.tar` files of clips and captions, read at any place and in any order."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from apt.data.folder import VideoFolder
from apt.data.report import Problem
from apt.data.scan import Entry, Scan
from apt.data.suffixes import is_media
from apt.errors import DataError
from apt.untrusted import parse_json

__all__ = ["VideoShards"]


class _Place(NamedTuple):
    """Where the bytes of a member are in its shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class _Member(Entry):
    """A clip in a shard, `path`; `name` is that of the shard and its own."""

    at: _Place

    @property
    def place(self) -> Hashable:
        return self.path, self.at.offset

    @contextmanager
    def at_hand(self) -> Iterator[Path]:
        """A copy under a suffix of its own, which decoders go by."""
        with tempfile.NamedTemporaryFile(suffix=PurePosixPath(self.name).suffix) as file:
            file.write(_read(self.path, self.at))
            file.flush()
            try:
                yield Path(file.name)
            except DataError as error:  # whoever reads it knows this file by another name
                raise DataError(str(error).replace(file.name, self.name)) from error


class VideoShards(VideoFolder):
    """The clips of a folder of WebDataset shards, in all else as `VideoFolder`.

    Members of one name but for what follows its first dot are a sample: a video or an image, and
    its caption in `.txt`, or in `.json` as "caption" or "text". The index of each shard is read at
    the start, and a clip is read from its place in the file, so the order is shuffled over all
    shards, and a resume continues at the exact sample.

    Arguments, attributes and errors are those of `VideoFolder`; shards are not compressed.
    """

    looked_for = (
        "uncompressed .tar files with videos and images, each with a .txt, or a .json that has a "
        "caption, of the same name"
    )

    def _scan(self, directory: Path, captioned: bool) -> Scan:
        if not directory.is_dir():
            raise DataError(f"{directory}: no such folder; give a folder of .tar shards")
        shards = {
            path.relative_to(directory).as_posix(): path
            for path in sorted(directory.rglob("*.tar"))
        }
        problems: list[Problem] = []
        entries: list[Entry] = []
        for name, path in shards.items():
            try:
                samples = _samples(path)
            except (tarfile.TarError, OSError) as error:
                problems.append(Problem("unreadable", name, f"no uncompressed tar file ({error})"))
                continue
            for key, parts in samples.items():
                media = [kind for kind in parts if is_media(Path(f"x.{kind}"))]
                caption = _caption(path, parts)
                for kind in media:
                    member = f"{name}/{key}.{kind}"
                    if caption or not captioned:
                        entries.append(_Member(path, member, caption, parts[kind]))
                    else:
                        detail = "no .txt, and no .json with a caption, of the same name"
                        problems.append(Problem("missing caption", member, detail))
        return Scan(directory, None, shards, entries, problems)


def _samples(path: Path) -> dict[str, dict[str, _Place]]:
    """The members of each sample by what follows the first dot of their names, in their order."""
    samples: dict[str, dict[str, _Place]] = {}
    with tarfile.open(path, "r:") as shard:
        for member in shard:
            folder, _, file = member.name.rpartition("/")
            stem, _, kind = file.partition(".")
            if member.isreg() and stem:
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {})[kind] = _Place(member.offset_data, member.size)
    return samples


def _caption(path: Path, parts: dict[str, _Place]) -> str:
    """Empty if there is none that can be read."""
    try:
        if "txt" in parts:
            return _read(path, parts["txt"]).decode().strip()
        if "json" in parts:
            document = parse_json(_read(path, parts["json"]).decode())
            found = document.get("caption") or document.get("text")
            return found.strip() if isinstance(found, str) else ""
    except (ValueError, AttributeError):
        return ""
    return ""


def _read(path: Path, at: _Place) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(at.offset)
            found = file.read(at.size)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if len(found) < at.size:
        raise DataError(f"{path}: ends before its member does; fetch the shard again")
    return found
