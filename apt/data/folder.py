"""A folder of captioned videos and images as a data set."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from apt.data.buckets import MAX_UPSCALE, Bucket, best_bucket, check_buckets
from apt.data.captions import CaptionRule, Refused
from apt.data.dataset import BucketOrder, Sample, Shuffled
from apt.data.decode import probe, read_clip, read_image
from apt.data.reading import Entry, MediaInfo, Source, reason
from apt.data.report import DataReport, Problem, problem_lines
from apt.data.scan import Scan, scan_folder
from apt.errors import ConfigError, DataError
from apt.rng import generator_for

_LOG = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 16
"""More broken files than this in a row mean that a disk is gone or the folder was moved."""

_LOOKED_AT: dict[tuple[Hashable, int, int], MediaInfo] = {}
"""Properties of files by place, modification time and size. A run reads them twice: to choose the
clip size, and to list the clips."""


@dataclass(frozen=True)
class Item:
    """A usable file with its caption and its training bucket."""

    entry: Entry
    info: MediaInfo
    bucket: Bucket


class VideoFolder(Shuffled):
    """Captioned videos and images (one-frame videos), as clips in aspect-ratio buckets.

    `apt.data.scan` describes where captions are found. Index `epoch * len(folder) + item` is a clip
    of that item. The clip's first frame is drawn from (seed, epoch, item), so a sample is a pure
    function of its index and the files, in any process and any order.

    A file that cannot be used is skipped and named in `report`. A file that fails only when its
    clip is decoded is also named, and replaced by another file of its bucket, which depends only on
    the index. In a `part`, the replacement is from that part. All parts share one report.

    Args:
        directory: the folder. Sub-folders are included, hidden files are not.
        buckets: (frames, height, width) of the clips; frames must be 4k + 1. Images use the
            buckets of one frame; videos use the longer ones, or single frames if there are none.
        fps: frame rate of the clips; each frame is the nearest one of the source. None keeps each
            video's own rate.
        seed: of the clips' starts.
        max_upscale: sources that would have to be enlarged by more than this are skipped.
        strict: raise at the first file that cannot be used.
        captions: how to treat captions that the text encoder rejects; None checks no captions.
        captioned: whether files need a caption. If False, files without one get the empty caption.

    Attributes:
        items: usable files, sorted by name.
        report: counts, and every file that is not used, with the reason.

    Raises:
        DataError: if nothing is usable, or at the first problem if `strict`.
        ConfigError: if a bucket or the frame rate is out of range.
    """

    eight_bits = True

    def __init__(
        self,
        directory: str | Path,
        *,
        buckets: Iterable[Sequence[int]],
        fps: float | Fraction | None = None,
        seed: int = 0,
        max_upscale: float = MAX_UPSCALE,
        strict: bool = False,
        captions: CaptionRule | None = None,
        captioned: bool = True,
    ) -> None:
        if fps is not None and not fps > 0:
            raise ConfigError(f"fps must be positive, or None for each video's own, got {fps}")
        self.directory = Path(directory)
        self.buckets = check_buckets(buckets)
        self.fps = None if fps is None else exact_rate(fps)
        self.seed = seed
        self.strict = strict
        self.report = DataReport()
        scan = self._scan(self.directory, captioned)
        for problem in scan.problems:
            self._skip(problem)
        entries = self._with_captions(scan.entries, captions) if captions else scan.entries
        self.items = self._usable(entries, max_upscale)
        if not self.items:
            found = problem_lines(self.report.problems) or ["  no such files"]
            raise DataError(
                "\n".join(
                    [f"{directory}: nothing usable; looked for {scan.looked_for}. Found:", *found]
                )
            )
        self.report.num_images = sum(item.info.is_image for item in self.items)
        self.report.num_videos = len(self.items) - self.report.num_images
        members: dict[Bucket, list[int]] = {}
        for index, item in enumerate(self.items):
            members.setdefault(item.bucket, []).append(index)
        ordered = {bucket: members[bucket] for bucket in sorted(members)}
        self._order = BucketOrder(ordered, len(self.items))

    def __len__(self) -> int:
        """Return the number of items: one per file and caption."""
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """A hash of names, captions, sizes and buckets, which changes if a resume would differ."""
        digest = hashlib.sha256(repr((self.seed, self.fps)).encode())
        for item in self.items:
            digest.update(
                repr((item.entry.name, item.entry.caption, item.info, item.bucket)).encode()
            )
        return digest.hexdigest()

    def bucket_sizes(self) -> dict[Bucket, int]:
        """Return the number of items in each non-empty bucket."""
        return {bucket: len(items) for bucket, items in self.members.items()}

    def caption(self, index: int) -> str:
        """Return the caption of sample `index`, without decoding it."""
        return self.items[self._split(index)[1]].entry.caption

    def file_name(self, index: int) -> str:
        """Return the name of the file of sample `index`, relative to the folder."""
        return self.items[self._split(index)[1]].entry.name

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`: a clip of item `index % len(self)` in pass `index // len(self)`.

        Raises:
            IndexError: if `index` is negative.
            DataError: if the file cannot be decoded and `strict`, or no other file can replace it.
        """
        epoch, first = self._split(index)
        problems: list[Problem] = []
        for number in self._candidates(index, first):
            item = self.items[number]
            try:
                with item.entry.at_hand() as file, _without_name(file):
                    pixels = self._decode(item, file, epoch, number)
            except DataError as error:
                problem = Problem("unreadable", item.entry.name, str(error))
                problems.append(problem)
                self._skip(problem)
                continue
            return Sample(pixels, item.entry.caption, tuple(problems))
        raise DataError(
            f"{self.directory}: {len(problems)} files of bucket {self.items[first].bucket} in a "
            f"row cannot be decoded, the last: {problems[-1]}; is the folder still there? "
            f"`diffusion-apt data check` tests every file"
        )

    def _split(self, index: int) -> tuple[int, int]:
        if index < 0:
            raise IndexError(f"sample index must not be negative, got {index}")
        return divmod(index, len(self.items))

    def _candidates(self, index: int, first: int) -> Iterator[int]:
        """Yield the item itself, then its replacements, in an order drawn from the index."""
        yield first
        others = [item for item in self.members[self.items[first].bucket] if item != first]
        generator = generator_for("replacement", self.seed, index)
        order = torch.randperm(len(others), generator=generator).tolist()
        yield from (others[place] for place in order[:_MAX_REPLACEMENTS])

    def _scan(self, directory: Path, captioned: bool) -> Scan:
        return scan_folder(directory, captioned=captioned)

    def _decode(self, item: Item, file: Source, epoch: int, number: int) -> Tensor:
        bucket, info = item.bucket, item.info
        if info.is_image:
            return read_image(file, size=(bucket.height, bucket.width))
        fps = self.fps or info.fps
        generator = generator_for("clip start", self.seed, epoch, number)
        starts = info.clip_starts(bucket.frames, fps)
        start = int(torch.randint(starts, (), generator=generator))
        return read_clip(
            file,
            start=start / info.fps,
            num_frames=bucket.frames,
            fps=fps,
            size=(bucket.height, bucket.width),
            info=info,
        )

    def _skip(self, problem: Problem) -> None:
        if self.strict:
            raise DataError(f"{self.directory}: {problem}")
        self.report.add(problem)

    def _with_captions(self, entries: list[Entry], rule: CaptionRule) -> list[Entry]:
        """Return the entries with usable captions, some of them cut."""
        found = rule.apply([entry.caption for entry in entries], [entry.name for entry in entries])
        kept = []
        for entry, caption in zip(entries, found, strict=True):
            if isinstance(caption, Refused):
                self._skip(Problem(caption.kind, entry.name, caption.reason))
                continue
            if caption != entry.caption:
                self.report.add_cut(entry.name)
            kept.append(replace(entry, caption=caption))
        return kept

    def _usable(self, entries: list[Entry], max_upscale: float) -> list[Item]:
        """Probe the files in parallel and assign buckets."""
        items = []
        files = {entry.place: entry for entry in entries}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            infos = dict(zip(files, pool.map(_look_or_error, files.values()), strict=True))
        for entry in entries:
            info = infos[entry.place]
            if isinstance(info, DataError):
                self._skip(Problem("unreadable", entry.name, str(info)))
                continue
            place = self._place(entry.name, info, max_upscale)
            if isinstance(place, Problem):
                self._skip(place)
            else:
                items.append(Item(entry, info, place))
        return items

    def _place(self, name: str, info: MediaInfo, max_upscale: float) -> Bucket | Problem:
        stills = [bucket for bucket in self.buckets if bucket.frames == 1]
        moving = [bucket for bucket in self.buckets if bucket.frames > 1]
        buckets = stills if info.is_image else moving or stills
        if not buckets:
            return Problem("no bucket", name, "an image, but no bucket has one frame")
        fps = self.fps or info.fps
        frames = 1 if info.is_image else info.clip_frames(fps)
        fit = partial(best_bucket, buckets, height=info.height, width=info.width)
        bucket = fit(frames=frames, max_upscale=max_upscale)
        if bucket:
            return bucket
        shortest = min(bucket.frames for bucket in buckets)
        if frames < shortest:
            have = f"{frames} frames at {float(fps):g} fps"
            return Problem("too short", name, f"{have}, but the shortest bucket has {shortest}")
        size = f"{info.width}x{info.height} pixels"
        return Problem(
            "too small",
            name,
            f"{size} would have to be enlarged by a factor above {max_upscale:g} for every bucket",
        )


def exact_rate(fps: float | Fraction) -> Fraction:
    """Return a frame rate as a fraction; NTSC rates such as 29.97 become multiples of 1/1001."""
    if isinstance(fps, Fraction):
        return fps
    ntsc = Fraction(round(fps * 1001 / 1000) * 1000, 1001)
    if ntsc and abs(ntsc - Fraction(fps)) < Fraction(1, 200) and Fraction(fps).denominator != 1:
        return ntsc
    return Fraction(fps).limit_denominator(1001)


def look_at(entry: Entry) -> MediaInfo:
    """Read a file's properties; an unchanged file is not opened again.

    Raises DataError, without the file's name, if it cannot be read.
    """
    try:
        state = entry.path.stat()
        key = (entry.place, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise DataError(str(error.strerror or error)) from error
    if key not in _LOOKED_AT:
        with entry.at_hand() as file, _without_name(file):
            _LOOKED_AT[key] = probe(file)
    return _LOOKED_AT[key]


def _look_or_error(entry: Entry) -> MediaInfo | DataError:
    try:
        return look_at(entry)
    except DataError as error:
        return error


@contextmanager
def _without_name(source: Source) -> Iterator[None]:
    """Strip the file name from readers' errors, because the entry names the file."""
    try:
        yield
    except DataError as error:
        raise DataError(reason(error, source)) from error
