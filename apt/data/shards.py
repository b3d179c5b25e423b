"""WebDataset shards: `.tar` files of clips and captions, with random access to the clips."""

from __future__ import annotations

import tarfile
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apt.data.folder import VideoFolder
from apt.data.metadata import is_text
from apt.data.reading import Entry, Source, reason
from apt.data.report import Problem
from apt.data.scan import Scan, walk
from apt.data.suffixes import is_media
from apt.data.tar import Member, open_member, read_index, read_members
from apt.errors import DataError
from apt.files import decode_text
from apt.untrusted import parse_json

__all__ = ["VideoShards", "scan_shards"]


@dataclass(frozen=True)
class _Inside(Entry):
    """A clip in the shard `path`; `name` is the shard's name followed by the member's."""

    at: Member

    @property
    def place(self) -> Hashable:
        return self.path, self.at.offset

    @contextmanager
    def at_hand(self) -> Iterator[Source]:
        with open_member(self.path, self.at, self.name) as file:
            yield file


class VideoShards(VideoFolder):
    """The clips of a folder of WebDataset shards; otherwise the same as `VideoFolder`.

    Members whose names agree up to the first dot are one sample: a video or an image, and its
    caption in `.txt`, or in `.json` as "caption" or "text". The index of each shard is read at the
    start, and clips are read at their offsets. So the order is shuffled over all shards, and a
    resume continues at the exact sample.

    Arguments, attributes and errors are those of `VideoFolder`. Shards must be uncompressed.
    """

    def _scan(self, directory: Path, captioned: bool) -> Scan:
        return scan_shards(directory, captioned=captioned)


def scan_shards(directory: str | Path, *, captioned: bool = True) -> Scan:
    """List the media members of a folder's shards and their captions, without decoding the media.

    Args:
        directory: the folder.
        captioned: whether a member without a caption is a problem. If False, it gets the empty
            caption.

    Raises:
        DataError: if it is not a folder.
    """
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; pass a folder of .tar shards")
    problems: list[Problem] = []
    entries: list[Entry] = []
    files: dict[str, Entry] = {}
    for path in sorted(path for path in walk(root, problems) if path.suffix.lower() == ".tar"):
        name = path.relative_to(root).as_posix()
        try:
            samples = read_index(path)
            captions = _captions(path, samples)
        except DataError as error:
            problems.append(Problem("unreadable", name, reason(error, path)))
            continue
        except (tarfile.TarError, OSError) as error:
            problems.append(Problem("unreadable", name, f"not an uncompressed tar file ({error})"))
            continue
        for key, parts in samples.items():
            caption = captions.get(key, "")
            for kind in parts:
                member = f"{name}/{key}.{kind}"
                if not is_media(Path(f"x.{kind}")):
                    continue
                files[member] = _Inside(path, member, caption, parts[kind])
                if caption or not captioned:
                    entries.append(files[member])
                else:
                    detail = "no .txt, or .json with a caption, of the same name"
                    problems.append(Problem("missing caption", member, detail))
    return Scan(root, None, files, entries, problems, looked_for=_LOOKED_FOR, captions_in=_CAPTIONS)


_CAPTIONS = ".txt and .json members"
_LOOKED_FOR = (
    "uncompressed .tar files with videos and images, each with a .txt of the same name, or a .json "
    "with a caption"
)


def _captions(path: Path, samples: Mapping[str, Mapping[str, Member]]) -> dict[str, str]:
    """Return the caption of each sample with a caption member; empty if it cannot be read."""
    kinds = {
        key: next((kind for kind in ("txt", "json") if kind in parts), "")
        for key, parts in samples.items()
    }
    kinds = {key: kind for key, kind in kinds.items() if kind}
    contents = read_members(path, [samples[key][kind] for key, kind in kinds.items()])
    return {
        key: _caption(kind, content)
        for (key, kind), content in zip(kinds.items(), contents, strict=True)
    }


def _caption(kind: str, content: bytes) -> str:
    try:
        text = decode_text(content)
        if kind == "txt":
            return text.strip() if is_text(text) else ""
        document = parse_json(text)
        found = document.get("caption") or document.get("text")
        return found.strip() if isinstance(found, str) and is_text(found) else ""
    except (ValueError, AttributeError):
        return ""
