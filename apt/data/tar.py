"""Uncompressed `.tar` files: random access to their members, and writing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from apt.errors import DataError
from apt.files import replacing

__all__ = ["Member", "open_member", "read_index", "read_member", "read_members", "write_tar"]


class Member(NamedTuple):
    """The place of a member's bytes in its file."""

    offset: int
    size: int


def read_index(path: Path) -> dict[str, dict[str, Member]]:
    """Read the samples of a WebDataset shard, in their order.

    Members whose names agree up to the first dot are one sample; the rest of the name is their
    kind.

    Raises:
        OSError, tarfile.TarError: if it cannot be read, or is not an uncompressed tar file.
    """
    samples: dict[str, dict[str, Member]] = {}
    places: dict[str, Member] = {}
    with tarfile.open(path, "r:") as shard:
        for member in shard:
            if member.isreg():
                places[member.name] = Member(member.offset_data, member.size)
            elif member.islnk() and member.linkname in places:
                # Of a file with two names in one folder, tar stores the content once.
                places[member.name] = places[member.linkname]
            else:
                continue
            folder, _, file = member.name.rpartition("/")
            stem, _, kind = file.partition(".")
            if stem:
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {})[kind] = places[member.name]
    return samples


def read_member(path: Path, at: Member) -> bytes:
    """Read the bytes of a member. Raises DataError if the file is missing or ends too early."""
    return read_members(path, [at])[0]


def read_members(path: Path, places: Sequence[Member]) -> list[bytes]:
    """Read the bytes of several members in one pass. Raises DataError as `read_member` does."""
    found = []
    try:
        with path.open("rb") as file:
            for at in places:
                file.seek(at.offset)
                found.append(file.read(at.size))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if any(len(content) < at.size for content, at in zip(found, places, strict=True)):
        raise DataError(_ends_early(path))
    return found


def open_member(path: Path, at: Member, name: str) -> IO[bytes]:
    """Open a member as a file of that name, which is read on demand.

    Raises DataError, also on later reads, if the shard is missing or ends before the member does.
    """
    return io.BufferedReader(_Window(path, at, name))


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a tar file atomically and deterministically.

    Raises OSError if it cannot be written.
    """
    with replacing(path) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class _Window(io.RawIOBase):
    """A part of a file, as a file object of its own."""

    def __init__(self, path: Path, at: Member, name: str) -> None:
        self.name = name
        self._path = path
        self._begin, self._size = at
        self._at = 0
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._at))
        try:
            self._file.seek(self._begin + self._at)
            found = self._file.read(wanted)
        except OSError as error:
            raise DataError(f"{self._path}: {error.strerror or error}") from error
        if wanted and not found:
            raise DataError(_ends_early(self._path))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _ends_early(path: Path) -> str:
    return f"{path}: ends in the middle of a member; copy or download the shard again"
