"""Videos, read with FFmpeg: their properties, and their frames from a given time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any, cast

import av
from av.codec.codec import UnknownCodecError
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError, InvalidDataError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from apt.data.picture import Picture, picture_of
from apt.data.reading import REMUX, MediaInfo, Source, name_of
from apt.data.timeline import irregular_span, usual_rate, without_second_fields
from apt.errors import DataError
from apt.media.containers import PLAIN_FILE, READING

_STREAMS = ("mpegts", "mpeg")
"""Formats of recordings, which start and end anywhere and have no index of frames."""

_WHOLE = ("gif", "apng")
"""Formats whose frames are drawn over the previous ones, so that all are needed."""

_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that keep the transparency of WebM; FFmpeg's own drop it."""

_EARLIER = (0, 1, 4, 16)
"""Seconds before a clip at which to look for a key frame."""

_ENOUGH = 1000
"""Frames of a Matroska file from which its rate is measured."""

_LONGEST_GAP = 10
"""Longest gap between two frames of a recording, in seconds. A longer gap means that the clock was
reset. So does a step back of more than a second; guessed timestamps cause smaller ones."""


class Video:
    """An open video file with one stream to read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._open()

    def _open(self) -> None:
        file: Any = self.source
        if isinstance(self.source, str | Path):
            file = f"{PLAIN_FILE}{self.source}"
        else:
            self.source.seek(0)
        try:
            # A title that is not UTF-8 is no reason to reject a video.
            self.container: InputContainer = av.open(
                file, "r", metadata_errors="replace", options=READING
            )
        except ArgumentError:
            raise DataError(
                f"{name_of(self.source)}: is not in a supported video format; {REMUX}"
            ) from None
        stream = self.container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            self.close()
            raise DataError(
                f"{name_of(self.source)}: holds no video stream; remove it, or use a video"
            )
        self.stream = cast(VideoStream, stream)
        # Attribute access fails on a missing decoder, which the type stubs do not know.
        if cast(object, self.stream.codec_context) is None:
            self.close()
            raise DataError(
                f"{name_of(self.source)}: its codec is unknown: either the file is cut off, so "
                f"copy it again, or this FFmpeg has no decoder for it; {REMUX}"
            )
        # One thread, as in `picture`. An exception can keep a decoder alive across a fork. The new
        # process then has a copy of its thread pool without the threads, and closing it hangs.
        self.stream.codec_context.thread_count = 1
        self.alpha = self._alpha_decoder()
        self.format = self.container.format.name

    def _alpha_decoder(self) -> VideoCodecContext | None:
        """Return a decoder that keeps transparency, if the stream has some; otherwise None."""
        name = _WITH_ALPHA.get(self.stream.codec_context.name)
        if name is None or self.stream.metadata.get("alpha_mode") != "1":
            return None
        try:
            decoder = av.CodecContext.create(name, "r")
        except UnknownCodecError:
            self.close()
            raise DataError(
                f"{name_of(self.source)}: is transparent, which this FFmpeg cannot decode without "
                f"{name}; {REMUX}"
            ) from None
        assert isinstance(decoder, VideoCodecContext)
        decoder.thread_count = 1
        return decoder

    def close(self) -> None:
        self.container.close()

    def restart(self) -> None:
        """Restart at the first byte, which seeking cannot reach in a stream without an index."""
        self.close()
        self._open()

    def seek(self, seconds: Fraction) -> None:
        """Seek to a key frame at or before a timestamp, as far as the file's index allows."""
        self.container.seek(_ticks(self.stream, seconds), stream=self.stream)
        if self.alpha is not None:
            self.alpha.flush_buffers()

    def packets(self) -> Iterator[Packet]:
        """Yield the stream's packets, and at the end an empty one that flushes the decoder."""
        before: Fraction | None = None
        for packet in self.container.demux(self.stream):
            if self.format in _STREAMS and packet.dts is not None:
                time = packet.dts * self.tick
                if before is not None and not -1 < time - before < _LONGEST_GAP:
                    raise DataError(
                        f"{name_of(self.source)}: its timestamps jump from {float(before):.2f} to "
                        f"{float(time):.2f} s; {REMUX}"
                    )
                before = time
            yield packet

    def frames(self) -> Iterator[tuple[VideoFrame, Fraction]]:
        """Yield decoded frames with their timestamps, from the current position.

        A frame that the file repeats without storing it again is yielded again.
        """
        last: VideoFrame | None = None
        for packet in self.packets():
            if repeats(packet):
                if last is not None and packet.pts is not None:
                    yield last, packet.pts * self.tick
                continue
            for frame in self.decode(packet, begun=last is not None):
                last = frame
                yield frame, self.time(frame)

    def decode(self, packet: Packet, *, begun: bool) -> list[VideoFrame]:
        """Return the frames that a packet completes."""
        try:
            return packet.decode() if self.alpha is None else self.alpha.decode(packet)
        except InvalidDataError:
            # A recording may begin inside a group of pictures, which then cannot be decoded.
            if begun or self.format not in _STREAMS:
                raise
            return []

    @property
    def tick(self) -> Fraction:
        """Length of a tick in seconds."""
        if self.stream.time_base is None:
            raise DataError(f"{name_of(self.source)}: its frames have no timestamps; {REMUX}")
        return self.stream.time_base

    def time(self, frame: VideoFrame) -> Fraction:
        """Return the timestamp of a frame in seconds."""
        if frame.pts is None or frame.time_base is None:
            raise DataError(f"{name_of(self.source)}: its frames carry no times; {REMUX}")
        return frame.pts * frame.time_base


def repeats(packet: Packet) -> bool:
    """Return whether a packet repeats the previous frame: it has a time and no content."""
    return packet.size == 0 and packet.pts is not None


@contextmanager
def open_video(source: Source) -> Iterator[Video]:
    """Open a video. Raises DataError if the file has no video that can be decoded."""
    video = Video(source)
    try:
        yield video
    finally:
        video.close()


def look(video: Video) -> MediaInfo:
    """Read the properties of a newly opened video from its packets and its first frame.

    For MP4, MOV and AVI, only the header and both ends are read; for long Matroska files, the
    beginning and the end; for others, all packets. At most the first few frames are decoded.

    Raises:
        DataError: if it has no frames, its rate is unknown, its timestamps jump, or its colours are
            unsupported.
    """
    indexed = _indexed_times(video.stream)
    limit = 0 if indexed else _ENOUGH if video.format.startswith("matroska") else math.inf
    whole = False
    times: list[int] = []
    shown: list[VideoFrame] = []
    for packet in video.packets():
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None and not packet.is_discard:
            times.append(time)
        if not repeats(packet) and not _enough(shown):
            shown += video.decode(packet, begun=bool(shown))
        if _enough(shown) and len(times) > limit:
            break
    else:
        whole = True
    if not shown:
        raise DataError(
            f"{name_of(video.source)}: holds no frames; copy or download the file again, or remove "
            "it"
        )
    first = video.time(shown[0])
    begins = [cast(int, frame.pts) for frame in shown]
    times = sorted({begins[0], *(time for time in times if time > begins[0])})
    times = list(without_second_fields(times, begins))
    stream = video.stream
    declared = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    rate = usual_rate(indexed or times, video.tick, declared)
    if not rate:
        raise DataError(f"{name_of(video.source)}: its frame rate is unknown; {REMUX}")
    if whole and not indexed:
        frames, span = len(times), times[-1] * video.tick - first
    else:
        frames, span = _length(video, indexed, times, first, rate)
    height, width = picture_of(video.source, stream, shown[0]).size
    return MediaInfo(
        is_image=False,
        width=width,
        height=height,
        frames=frames,
        fps=rate,
        codec=stream.codec_context.name,
        span=irregular_span(frames, span, rate),
        first=first,
    )


def frames_from(
    video: Video, info: MediaInfo, start: Fraction
) -> Iterator[tuple[Picture, Fraction]]:
    """Yield frames of a newly opened video, and their times in seconds after its first frame.

    They start at a key frame at or before `start`, or at the first frame if the file's index is
    wrong.
    """
    for frame, time in _raw_frames_from(video, info.first, start):
        yield picture_of(video.source, video.stream, frame), time - info.first


def _raw_frames_from(
    video: Video, first: Fraction, start: Fraction
) -> Iterator[tuple[VideoFrame, Fraction]]:
    if start <= 0 or video.format in _WHOLE:
        return video.frames()
    for earlier in _EARLIER:
        if earlier and earlier >= start:
            break
        try:
            video.seek(first + start - earlier)
            # libvpx does not mark key frames, and returns nothing before the first.
            frames = video.frames()
            decoded = _from_key_frame(frames) if video.alpha is None else frames
            found = next(decoded, None)
        except FFmpegError:
            # Some formats cannot seek at all. Damage will be found again when reading from the
            # beginning.
            break
        if found is not None and found[1] - first <= start:
            return chain([found], decoded)
    video.restart()
    return video.frames()


def _from_key_frame(
    frames: Iterator[tuple[VideoFrame, Fraction]],
) -> Iterator[tuple[VideoFrame, Fraction]]:
    """Skip frames before the first key frame, which decoders cannot decode correctly."""
    begun = False
    for frame, time in frames:
        begun = begun or frame.key_frame
        if begun:
            yield frame, time


def _enough(shown: list[VideoFrame]) -> bool:
    """Return whether these frames are enough to know the video's properties.

    One frame gives the size and the start. Interlaced video needs three, to see whether each frame
    is stored in two packets.
    """
    return bool(shown) and (len(shown) >= 3 or not shown[0].interlaced_frame)


def _indexed_times(stream: VideoStream) -> list[int] | None:
    """Return the decoding times of frames from the first key frame on, if the header has them."""
    if not stream.frames or len(stream.index_entries) != stream.frames:
        return None
    from_key = dropwhile(lambda entry: not entry.is_keyframe, stream.index_entries)
    return [entry.timestamp for entry in from_key if not entry.is_discard] or None


def _length(
    video: Video, indexed: list[int] | None, times: list[int], first: Fraction, rate: Fraction
) -> tuple[int, Fraction]:
    """Return (frames, seconds from first to last) of a video whose packets were not all read."""
    tick = video.tick
    if indexed:
        span = (indexed[-1] - indexed[0]) * tick
        if irregular_span(len(indexed), span, rate) is None:
            return len(indexed), span
        end = indexed[-1] * tick
    else:
        duration = Fraction(video.container.duration or 0, av.time_base)
        end = max(duration, times[-1] * tick)
    video.seek(end)
    tail = [
        packet for packet in video.packets() if packet.pts is not None and not packet.is_discard
    ]
    # The index of a truncated file still lists the frames that are lost.
    if indexed and sum(time >= (tail[0].dts or 0) for time in indexed if tail) != len(tail):
        return len(indexed), span
    last = max((cast(int, packet.pts) * tick for packet in tail), default=times[-1] * tick)
    span = last - first
    return len(indexed) if indexed else round(span * rate) + 1, span


def _ticks(stream: VideoStream, seconds: Fraction) -> int:
    return math.floor(seconds / stream.time_base) if stream.time_base else 0
