"""A check of a folder before training on it: what is in it, and what is broken."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from apt.data.captions import CaptionRule, Refused
from apt.data.decode import probe, verify
from apt.data.reading import Entry, MediaInfo, reason
from apt.data.report import Problem, problem_lines
from apt.data.scan import Scan, scan_folder
from apt.errors import DataError, counted

if TYPE_CHECKING:
    from rich.console import RenderableType

_ROWS = 12


@dataclass(frozen=True)
class FolderCheck:
    """The findings of `check_folder`. The statistics are of the usable files.

    Attributes:
        directory: the folder.
        captions_in: name of the metadata file, or the other place of the captions.
        num_files: media files found, usable or not.
        num_videos, num_images: usable files, which have a caption and can be read.
        resolutions: number of files per (width, height), upright.
        durations: seconds of each video.
        frame_rates: number of videos per frame rate.
        codecs: number of files per codec or image format.
        captions: one per file and caption.
        problems: broken files, missing captions and missing files.
        left_aside: number of other files by suffix.
        looked_for: description of the files that were searched for.
        decoded: whether every frame was decoded, or only the headers were read.
    """

    directory: Path
    captions_in: str
    num_files: int
    num_videos: int
    num_images: int
    resolutions: Counter[tuple[int, int]] = field(default_factory=Counter)
    durations: list[float] = field(default_factory=list)
    frame_rates: Counter[Fraction] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    captions: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    left_aside: Counter[str] = field(default_factory=Counter)
    looked_for: str = ""
    decoded: bool = True

    @property
    def ok(self) -> bool:
        """Whether there is something to train on and no problem."""
        return not self.problems and self.num_videos + self.num_images > 0

    def render(self) -> RenderableType:
        """Return the findings as tables for a rich console."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts = Table(show_header=False, box=None, pad_edge=False)
        facts.add_column(style="bold")
        facts.add_column()
        for name, value in self._facts():
            facts.add_row(name, Text(value))
        if not self.problems:
            depth = "every frame decoded" if self.decoded else "headers only"
            return Group(facts, Text(f"no problems ({depth})", style="green"))
        lines = [counted(len(self.problems), "problem"), *problem_lines(self.problems)]
        return Group(facts, Text("\n".join(lines), style="red"))

    def _facts(self) -> list[tuple[str, str]]:
        words = [len(caption.split()) for caption in self.captions]
        facts = [
            ("folder", str(self.directory)),
            ("captions from", self.captions_in),
            ("files", f"{self.num_files} found"),
            ("usable", f"{counted(self.num_videos, 'video')}, {counted(self.num_images, 'image')}"),
        ]
        if self.left_aside:
            facts.append(("other files", _most_common(self.left_aside)))
        if self.num_videos + self.num_images == 0:
            return [*facts, ("looked for", self.looked_for)]
        sizes = {f"{width}x{height}": n for (width, height), n in self.resolutions.items()}
        facts += [
            ("resolutions", _most_common(Counter(sizes))),
            ("codecs", _most_common(self.codecs)),
            (
                "captions",
                f"{len(self.captions)}, {len(set(self.captions))} distinct, "
                f"{min(words)} to {max(words)} words (median {median(words):g})",
            ),
            ("for example", self.captions[0]),
        ]
        if self.durations:
            rates = {f"{float(rate):.5g} fps": n for rate, n in self.frame_rates.items()}
            facts += [
                (
                    "durations",
                    f"{min(self.durations):.2f} to {max(self.durations):.2f} s (median "
                    f"{median(self.durations):.2f} s), {sum(self.durations) / 3600:.2f} h in total",
                ),
                ("frame rates", _most_common(Counter(rates))),
            ]
        return facts


def check_folder(
    path: str | Path,
    *,
    decode: bool = True,
    captions: CaptionRule | None = None,
    progress: Callable[[int, int], None] | None = None,
    scan: Callable[[str | Path], Scan] = scan_folder,
) -> FolderCheck:
    """Read a folder as `VideoFolder` would, and test every file.

    Args:
        path: the folder.
        decode: decode every frame of every file. False only reads headers, which is fast but does
            not find damaged frames.
        captions: rule of the text encoder that will read the captions; None skips this check.
        progress: called with (files done, files to do) after each file.
        scan: finds the files; `apt.data.shards.scan_shards` for a folder of `.tar` shards.

    Returns:
        The findings. Broken files are reported as problems in it, and raise no error.

    Raises:
        DataError: if there is no such folder, or its metadata cannot be read at all.
    """
    there = scan(path)
    problems = list(there.problems)
    if captions:
        names = [entry.name for entry in there.entries]
        found = captions.apply([entry.caption for entry in there.entries], names)
        problems += (
            Problem(caption.kind, name, caption.reason)
            for name, caption in zip(names, found, strict=True)
            if isinstance(caption, Refused)
        )
    captioned = {entry.place: entry for entry in there.entries}
    files = {entry.place: entry for entry in there.files.values()} | captioned
    infos: dict[Hashable, MediaInfo] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda entry: _test(entry, decode), files.values())
        for done, (place, result) in enumerate(zip(files, results, strict=True), 1):
            if isinstance(result, str):
                problems.append(Problem("unreadable", files[place].name, result))
            elif place in captioned:
                infos[place] = result
            if progress:
                progress(done, len(files))
    videos = [info for info in infos.values() if not info.is_image]
    return FolderCheck(
        directory=there.directory,
        captions_in=there.metadata or there.captions_in,
        num_files=len(there.files),
        num_videos=len(videos),
        num_images=len(infos) - len(videos),
        resolutions=Counter((info.width, info.height) for info in infos.values()),
        durations=[info.duration for info in videos],
        frame_rates=Counter(info.fps for info in videos),
        codecs=Counter(info.codec for info in infos.values()),
        captions=[entry.caption for entry in there.entries if entry.place in infos],
        problems=problems,
        left_aside=there.left_aside,
        looked_for=there.looked_for,
        decoded=decode,
    )


def _test(entry: Entry, decode: bool) -> MediaInfo | str:
    """Return a file's contents, or what is wrong with it."""
    with entry.at_hand() as file:
        try:
            return verify(file) if decode else probe(file)
        except DataError as error:
            return reason(error, file)


def _most_common(counter: Counter[str]) -> str:
    shown = [f"{name} ({number})" for name, number in counter.most_common(_ROWS)]
    if len(counter) > _ROWS:
        shown.append(f"and {len(counter) - _ROWS} more")
    return ", ".join(shown)
