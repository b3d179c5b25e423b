"""Videos through FFmpeg: what they hold, and their frames from any moment on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any, cast

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError, InvalidDataError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from apt.data.picture import Picture, picture_of
from apt.data.reading import REMUX, MediaInfo, Source, name_of
from apt.data.timeline import irregular_span, usual_rate, without_second_fields
from apt.errors import DataError

# A playlist can name any file and address, whatever its own name; media files cannot.
_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": (
        "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,dv,rm,"
        "gif,apng,h264,hevc,m4v,ivf"
    ),
}

_STREAMS = ("mpegts", "mpeg")
"""Formats of recorders: they begin and end anywhere, and their frames are in no index."""

_WHOLE = ("gif", "apng")
"""Formats whose frames are painted over the ones before, so that all are needed."""

_EARLIER = (0, 1, 4, 16)
"""Seconds before a clip at which a key frame is looked for."""

_ENOUGH = 1000
"""Frames of a Matroska file that are looked at for the rate of all."""

_LONGEST_GAP = 10
"""Seconds between two frames of a recorder, or one back, where times are guessed; beyond them its
clock was set anew."""


class Video:
    """An open video file, of which one stream is read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._open()

    def _open(self) -> None:
        # The prefix keeps FFmpeg from reading a protocol into a file's name, and foreign bytes in
        # a title are no reason to refuse a video.
        file: Any = self.source
        if isinstance(self.source, str | Path):
            file = f"file:{self.source}"
        else:
            self.source.seek(0)
        try:
            self.container: InputContainer = av.open(
                file, "r", metadata_errors="replace", options=_OPTIONS
            )
        except ArgumentError:
            raise DataError(
                f"{name_of(self.source)}: is of no format that videos are read from; {REMUX}"
            ) from None
        stream = self.container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            self.close()
            raise DataError(f"{name_of(self.source)}: holds no video stream")
        self.stream = cast(VideoStream, stream)
        # Attribute access fails on a missing decoder, which the type stubs do not know.
        if cast(object, self.stream.codec_context) is None:
            self.close()
            raise DataError(
                f"{name_of(self.source)}: of an unknown codec: the file is cut off, so copy it "
                f"again, or this FFmpeg has no decoder for it; {REMUX}"
            )
        # One thread, as in `picture`: errors can keep a decoder alive until after a fork, and a
        # pool whose threads are in the other process can never be closed.
        self.stream.codec_context.thread_count = 1
        self.format = self.container.format.name

    def close(self) -> None:
        self.container.close()

    def restart(self) -> None:
        """Begin anew at the first byte, which in a stream without an index no seek finds."""
        self.close()
        self._open()

    def seek(self, seconds: Fraction) -> None:
        """To a key frame at or before a reading of the file's clock, as far as its index knows."""
        self.container.seek(_ticks(self.stream, seconds), stream=self.stream)

    def packets(self) -> Iterator[Packet]:
        """Packets of the stream with a time, and at last an empty one that flushes the decoder."""
        before: Fraction | None = None
        for packet in self.container.demux(self.stream):
            if self.format in _STREAMS and packet.dts is not None:
                time = packet.dts * self.tick
                if before is not None and not -1 < time - before < _LONGEST_GAP:
                    raise DataError(
                        f"{name_of(self.source)}: its clock jumps from {float(before):.2f} to "
                        f"{float(time):.2f} s; {REMUX}"
                    )
                before = time
            yield packet

    def frames(self) -> Iterator[tuple[VideoFrame, Fraction]]:
        """Decoded frames with what the file's clock says, from where the file was opened or left.

        A frame that the file repeats without storing it again is given again.
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
        """The frames that a packet completes."""
        try:
            return packet.decode()
        except InvalidDataError:
            # A recording may begin in the middle of a group, of which nothing can be decoded.
            if begun or self.format not in _STREAMS:
                raise
            return []

    @property
    def tick(self) -> Fraction:
        """Seconds."""
        if self.stream.time_base is None:
            raise DataError(f"{name_of(self.source)}: its frames carry no times; {REMUX}")
        return self.stream.time_base

    def time(self, frame: VideoFrame) -> Fraction:
        """What the file's clock says at a frame."""
        if frame.pts is None or frame.time_base is None:
            raise DataError(f"{name_of(self.source)}: its frames carry no times; {REMUX}")
        return frame.pts * frame.time_base


def repeats(packet: Packet) -> bool:
    """Whether a packet stands for the frame before it: it has a time and no content."""
    return packet.size == 0 and packet.pts is not None


@contextmanager
def open_video(source: Source) -> Iterator[Video]:
    """An open video. Raises DataError if it holds none that can be decoded."""
    video = Video(source)
    try:
        yield video
    finally:
        video.close()


def look(video: Video) -> MediaInfo:
    """What a video that was just opened holds, by its packets and its first frame.

    Of MP4, MOV and AVI only the header and the ends are read; of long Matroska files the
    beginning and the end; of others all, but decoded is one frame.

    Raises:
        DataError: if it holds no frame, its rate is unknown, its clock jumps, or its colours are
            of a kind that is not read.
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
        raise DataError(f"{name_of(video.source)}: holds no frames")
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
    """Frames of a video that was just opened, and their times in seconds after its first.

    They begin at a key frame at or before `start`; where the file's index leads elsewhere, at the
    first frame.
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
            decoded = _from_key_frame(video.frames())
            found = next(decoded, None)
        except FFmpegError:
            # Some formats cannot seek at all; damage is met again on the way from the beginning.
            break
        if found is not None and found[1] - first <= start:
            return chain([found], decoded)
    video.restart()
    return video.frames()


def _from_key_frame(
    frames: Iterator[tuple[VideoFrame, Fraction]],
) -> Iterator[tuple[VideoFrame, Fraction]]:
    """Without what decoders make of the end of a group whose beginning they have not seen."""
    begun = False
    for frame, time in frames:
        begun = begun or frame.key_frame
        if begun:
            yield frame, time


def _enough(shown: list[VideoFrame]) -> bool:
    """One frame tells size and beginning; three tell if interlaced ones come in two packets."""
    return bool(shown) and (len(shown) >= 3 or not shown[0].interlaced_frame)


def _indexed_times(stream: VideoStream) -> list[int] | None:
    """Decoding times of all frames from the first key frame on, if the file's header has them."""
    if not stream.frames or len(stream.index_entries) != stream.frames:
        return None
    from_key = dropwhile(lambda entry: not entry.is_keyframe, stream.index_entries)
    return [entry.timestamp for entry in from_key if not entry.is_discard] or None


def _length(
    video: Video, indexed: list[int] | None, times: list[int], first: Fraction, rate: Fraction
) -> tuple[int, Fraction]:
    """(frames, seconds from the first to the last) of a video whose packets were not all read."""
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
    # What a truncated file has lost, its index still promises.
    if indexed and sum(time >= (tail[0].dts or 0) for time in indexed if tail) != len(tail):
        return len(indexed), span
    last = max((cast(int, packet.pts) * tick for packet in tail), default=times[-1] * tick)
    span = last - first
    return len(indexed) if indexed else round(span * rate) + 1, span


def _ticks(stream: VideoStream, seconds: Fraction) -> int:
    return math.floor(seconds / stream.time_base) if stream.time_base else 0
