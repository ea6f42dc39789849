"""Clips from video files with PyAV: the frame a player shows at each wanted time.

    frame at time t = the last one whose timestamp is <= t          (first frame = time 0)

so a 12 fps video sampled at 24 fps shows each frame twice and a variable frame rate is followed
by its real timestamps. What a header says is believed first and checked while decoding: a clip that
ends before its header promised, or starts after the wanted time because an index is wrong, is read
once more from timestamps that were really found. A file without any usable frame is a `BadVideo`.

Only wanted frames are converted to RGB, cropped and scaled on the way, into one preallocated array;
frames that nobody sees and no other needs are not decoded (`skip`). Everything is single-threaded
here (`thread_type` NONE, one scaling thread: automatic threads cost ten times the conversion of a
small frame); loaders decode many files at once instead, and PyAV releases the GIL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.error import EOFError as StreamEnd
from av.error import FFmpegError
from numpy.typing import NDArray

from vimnas_ds.data.bad import BadVideo
from vimnas_ds.data.blob import Blob, Media
from vimnas_ds.data.convert import Converter
from vimnas_ds.data.packets import packet_times, until_error
from vimnas_ds.data.sampling import Cut, frame_times
from vimnas_ds.data.skip import Inexact, Skipper

#: Matroska rounds timestamps to milliseconds: a frame may be this late and still be shown.
TOLERANCE = 6e-4
#: Damaged packets one file may have before it counts as undecodable.
MAX_ERRORS = 32
#: A header whose duration means fewer bits per second than this is not believed.
MIN_BIT_RATE = 500

Pixels = NDArray[np.uint8]


def read_clip(
    path: Media,
    frames: int,
    fps: float,
    start: float,
    cut: Callable[[int, int], Cut] | None = None,
) -> Pixels:
    """Decodes one clip: uint8 (T, 3, h, w), RGB, upright, (h, w) being the cut's size.

    Args:
        frames, fps: the clip's length and sampling rate.
        start: place of the clip in the video's slack, 0 to 1 (see `frame_times`).
        cut: maps the upright picture's (width, height) to the part to keep and the size to give it;
            None keeps everything as it is.

    Raises:
        BadVideo: not a video, encrypted, corrupt or without frames.
    """
    try:
        clip = _read_promised(path, frames, fps, start, cut, skip=True)
    except Inexact:
        clip = _read_promised(path, frames, fps, start, cut, skip=False)
    if clip is not None:
        return clip
    with open_video(path) as container:  # the header or the index was wrong
        stream = container.streams.video[0]
        first, duration = scan(container, path)
        times = first + frame_times(duration, frames, fps, start)
        clip = _read(container, stream, path, times, None, cut, seek=False, skip=False)
    if clip is None:
        raise BadVideo(str(path), "no frame can be decoded")
    return clip


def _read_promised(
    path: Media,
    frames: int,
    fps: float,
    start: float,
    cut: Callable[[int, int], Cut] | None,
    skip: bool,
) -> Pixels | None:
    """The clip if the video is as its header says, else None."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        first, duration = _header(container, stream)
        if duration is None:
            first, duration = scan(container, path)
        times = frame_times(duration, frames, fps, start)
        skip = skip and Skipper.suits(container, stream)
        end, seek = first + duration, bool(times[0] > 0)
        return _read(container, stream, path, first + times, end, cut, seek, skip)


@contextmanager
def open_video(path: Media) -> Iterator[av.container.InputContainer]:
    """Opens a file that has a video stream; FFmpeg's errors inside become `BadVideo`.

    Whatever the file is called: FFmpeg alone would take a:b.mp4 for an address of the protocol a.
    """
    try:
        opened = path.stream() if isinstance(path, Blob) else f"file:{Path(path).absolute()}"
        with av.open(opened, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise BadVideo(str(path), "no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadVideo(str(path), "no decoder for the video stream")
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container
    except BadVideo:
        raise
    except (FFmpegError, OSError, ValueError, MemoryError) as error:
        raise BadVideo(str(path), _reason(error)) from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _header(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[float, float | None]:
    """(time of the first frame, duration) in seconds as promised; None if not credible."""
    base = float(stream.time_base or 0)
    first = (stream.start_time or 0) * base
    if stream.duration and base:
        duration = stream.duration * base
    elif container.duration:
        duration = container.duration / av.time_base
    else:
        return first, None
    credible = duration > 0 and container.size * 8 >= MIN_BIT_RATE * duration
    return first, duration if credible else None


def scan(container: av.container.InputContainer, path: Media) -> tuple[float, float]:
    """(time of the first frame, duration) in seconds from every packet's timestamp; rewinds."""
    found = packet_times(container, path)
    container.seek(0, backward=True)
    return found.begins[0], found.duration


def _read(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    path: Media,
    times: NDArray[np.float64],
    end: float | None,
    cut: Callable[[int, int], Cut] | None,
    seek: bool,
    skip: bool,
) -> Pixels | None:
    """The frames at `times` (stream time, seconds).

    None if the video is not as its header says: it ends well before min(end, last time), or the
    frame after the seek comes too late. With `end` None whatever is there is taken. Raises Inexact
    only with `skip`.
    """
    if seek:
        container.seek(int(times[0] / float(stream.time_base or 1)), stream=stream, backward=True)
    fill = _Fill(times, cut)
    skipper = Skipper(stream, fill.times) if skip else None
    begins = float(times[0]) + TOLERANCE
    stamp, gap = -math.inf, 0.04
    previous: av.VideoFrame | None = None
    for frame, time in decoded_frames(container, stream, path, skipper):
        if previous is None and seek and time > begins:
            return None
        if previous is not None:
            fill.show(previous, stamp, until=time)
            gap = max(gap, time - stamp) if skipper is None else gap
        else:
            earliest = time
        previous, stamp = frame, time
        if fill.done:
            return _confirmed(fill, skipper)
    if previous is None:
        if end is None:
            raise BadVideo(str(path), "no frame can be decoded")
        return None
    if skipper is not None:
        gap = skipper.gap(earliest, stamp, gap)
    if end is not None and stamp + 2 * gap < min(end, times[-1]):
        return None
    fill.show(previous, stamp, until=math.inf)
    return _confirmed(fill, skipper)


def _confirmed(fill: _Fill, skipper: Skipper | None) -> Pixels:
    if skipper is not None:
        skipper.confirm(fill.shown)
        if fill.damaged and skipper.skipped:
            raise Inexact  # what a decoder conceals with depends on what it decoded before
    return fill.clip


def decoded_frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    path: Media,
    skipper: Skipper | None = None,
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames in display order with their times in seconds; damaged packets are passed over, and
    what `skipper` may leave out. Raises Inexact where both happen.

    AVI stores no presentation times, and FFmpeg's guesses for B-frames run backwards: there the
    decoding time of a frame leaving the decoder is taken, which is late by one or two frames.
    """
    base, by_dts = float(stream.time_base or 0), container.format.name == "avi"
    time, errors = -math.inf, 0
    packets = until_error(container.demux(stream))
    for packet in packets if skipper is None else skipper.watch(packets):
        try:
            decoded = packet.decode()
        except StreamEnd:
            continue
        except FFmpegError as error:
            errors += 1
            if skipper is not None and skipper.skipped:
                raise Inexact from error
            if errors > MAX_ERRORS:
                raise BadVideo(str(path), f"corrupt: {_reason(error)}") from error
            continue
        for frame in decoded:
            stamp = frame.dts if by_dts or frame.pts is None else frame.pts
            if stamp is not None:
                time = max(time, stamp * base)
            else:
                time = time + 0.04 if time > -math.inf else 0.0
            yield frame, time


class _Fill:
    """The clip being built: frames are shown in turn and land wherever a time asks for them."""

    def __init__(self, times: NDArray[np.float64], cut: Callable[[int, int], Cut] | None) -> None:
        self.times: list[float] = (times + TOLERANCE).tolist()
        self.shown: list[float] = []  #: the time of the frame shown at each of them
        self.damaged = False
        self.cut = cut
        self.clip: Pixels = np.empty((0, 3, 0, 0), np.uint8)
        self.convert: Converter | None = None

    @property
    def done(self) -> bool:
        return len(self.shown) == len(self.times)

    def show(self, frame: av.VideoFrame, stamp: float, until: float) -> None:
        """Puts `frame`, of time `stamp`, wherever the wanted time is before `until`, the next
        frame's time."""
        begin = end = len(self.shown)
        while end < len(self.times) and self.times[end] < until:
            end += 1
        if end == begin:
            return
        if self.convert is None:
            self.convert = Converter(frame, self.cut)
            self.clip = np.empty((len(self.times), 3, *self.convert.size), np.uint8)
        self.convert(frame, self.clip[begin])
        self.clip[begin + 1 : end] = self.clip[begin]
        self.shown += [stamp] * (end - begin)
        self.damaged |= frame.is_corrupt
