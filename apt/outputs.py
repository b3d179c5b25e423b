"""Many outputs on disk: checks before the work starts, and a record of finished files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt.errors import InputError

RECORD_SUFFIX = ".jsonl"
RECORD_BEGINNING = '{"settings": '


@dataclass(frozen=True, kw_only=True)
class Output:
    """A file to generate.

    Attributes:
        path: of the file.
        prompt, seed: to generate it from.
    """

    path: Path
    prompt: str
    seed: int


def check_place(path: Path) -> None:
    """Raise InputError unless a file can be written at `path`. Creates no folders."""
    if path.is_dir():
        raise InputError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
    try:
        # The name of the temporary file is longer, and may be too long.
        path.with_name(f".{path.name}.partial").exists()
        check_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; choose another place"
        ) from error


def check_folder(folder: Path) -> None:
    """Raise InputError unless files can be written in a folder, which need not exist yet."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise InputError(
                f"cannot write to {str(folder)!r}: {str(there)!r} is a file; name a folder"
            )
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}; choose another place"
        ) from error


class OutputRecord:
    """A record of the finished files among a list of outputs, one line per file.

    A line is valid only for the same prompt, seed and settings, and while the size and content of
    its file are unchanged.

    Args:
        path: of the record, JSON lines.
        settings: everything else that determines the content of the files, as JSON.
        resume: continue an existing record; otherwise the first finished file starts a new one.
        again: advice after a failed write, for messages.
        anew: advice if the settings differ, for messages.

    Raises:
        InputError: if the record cannot be read or has other settings, or the file is no record.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        again: str = "continue with --resume",
        anew: str = "leave out --resume to start over",
    ) -> None:
        self._path = path
        self._again = again
        self._anew = anew
        self._settings = json.loads(json.dumps(settings))
        self._lines: list[dict[str, Any]] = []
        self._done: dict[tuple[str, str, int], tuple[int, str]] = {}
        content = self._content()
        if content and not content.startswith(RECORD_BEGINNING.encode()):
            raise InputError(
                f"{str(path)!r} is not a record of outputs; move it away, or write elsewhere"
            )
        if resume:
            self._read(content)

    def has(self, output: Output) -> bool:
        """Return whether the file was made and is unchanged."""
        made = self._done.get((output.path.name, output.prompt, output.seed))
        try:
            return made is not None and made == file_content(output.path)
        except OSError:
            return False

    def check(self, outputs: Sequence[Output]) -> None:
        """Raise InputError if a file holds another sample, or a sample is in another file."""
        made = {name: (prompt, seed) for name, prompt, seed in self._done}
        places = {key: name for name, key in made.items()}
        for output in outputs:
            name, key = output.path.name, (output.prompt, output.seed)
            prompt, seed = made.get(name, key)
            if (prompt, seed) != key:
                raise InputError(
                    f"{str(output.path)!r} was made from {prompt!r} with seed {seed}, and would be "
                    f"overwritten with {output.prompt!r} and seed {output.seed}; {self._anew}"
                )
            if (other := places.get(key, name)) != name:
                raise InputError(
                    f"{str(output.path.with_name(other))!r} was made from {output.prompt!r} with "
                    f"seed {output.seed}, which would now be {name!r}; {self._anew}"
                )

    def add(self, output: Output) -> None:
        """Record that the file is finished. Raises InputError if the record cannot be written."""
        try:
            size, digest = file_content(output.path)
            line = {
                "file": output.path.name,
                "prompt": output.prompt,
                "seed": output.seed,
                "bytes": size,
                "sha256": digest,
            }
            self._note([line])
        except OSError as error:
            raise self._refused(error) from error

    def take(self, other: OutputRecord) -> None:
        """Add the lines of another record with the same settings. Raises InputError as `add`."""
        try:
            if other._lines:
                self._note(other._lines)
        except OSError as error:
            raise self._refused(error) from error

    def _note(self, lines: list[dict[str, Any]]) -> None:
        if not self._lines:
            self._path.unlink(missing_ok=True)
            self._append([{"settings": self._settings}, *lines])
        else:
            self._append(lines)
        self._lines += lines

    def _refused(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write {str(self._path)!r}: {error.strerror or error}; free some space, and "
            f"{self._again}"
        )

    def _append(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def _content(self) -> bytes:
        """Return the bytes of the record; empty if there is none."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._unreadable(error) from error

    def _read(self, content: bytes) -> None:
        try:
            lines = [parse_line(self._path, line) for line in whole_lines(content)]
        except UnicodeDecodeError as error:
            raise self._unreadable(error) from error
        if not lines:
            return
        self._check_settings(lines[0])
        self._lines = lines[1:]
        for line in self._lines:
            made = (int(line["bytes"]), str(line["sha256"]))
            self._done[str(line["file"]), str(line["prompt"]), int(line["seed"])] = made
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            try:
                os.truncate(self._path, whole)
            except OSError as error:
                raise self._refused(error) from error

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(
            f"cannot read {str(self._path)!r} ({error}); move it away, or write elsewhere"
        )

    def _check_settings(self, first: Mapping[str, Any]) -> None:
        before = first.get("settings")
        if not isinstance(before, dict):
            raise InputError(
                f"{str(self._path)!r} is not a record of outputs; move it away, or write elsewhere"
            )
        names = sorted(
            name
            for name in before.keys() | self._settings.keys()
            if before.get(name) != self._settings.get(name)
        )
        if names:
            changes = ", ".join(
                f"{name} was {before.get(name)!r} and is now {self._settings.get(name)!r}"
                for name in names
            )
            raise InputError(
                f"the files of {str(self._path)!r} were made with other settings: {changes}; use "
                f"the same settings, or {self._anew}"
            )


def whole_lines(content: bytes) -> list[str]:
    """Return the complete lines of a record.

    A last line without a line ending was cut off, perhaps inside a character, and is ignored.
    Raises UnicodeDecodeError if the rest is not UTF-8.
    """
    return content[: content.rfind(b"\n") + 1].decode().split("\n")[:-1]


def parse_line(path: Path, line: str) -> dict[str, Any]:
    """Parse a line of the record at `path`: settings, or a file. Raises InputError for others."""
    try:
        document = json.loads(line)
        if isinstance(document, dict) and (
            "settings" in document
            or document.keys() >= {"file", "prompt", "seed", "bytes", "sha256"}
        ):
            return document
    except (ValueError, RecursionError):
        pass
    raise InputError(
        f"{str(path)!r} is damaged at {line[:60]!r} and cannot be resumed; leave out --resume to "
        "start over"
    )


def file_content(path: Path) -> tuple[int, str]:
    """Return the size and SHA-256 of a file. Raises OSError."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
