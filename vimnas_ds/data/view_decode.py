"""All clips of a test video from one open file, every frame decoded and converted once.

Clips of a test overlap (4 x 64 frames at 15 fps are 17 s of a 10 s video), so their times are
merged, the file is decoded forward once, and what comes out is

    the distinct frames (F, 3, h, w)    and    order (clips, T): which of them each clip shows

The packets' timestamps are read first (no decoding, 1 % of the cost): they give the true duration,
whatever the header says, and the key frames, so that a long gap between clips, or before the first
one, is skipped exactly where a seek saves work. If a seek does not land where the timestamps said,
the file is read once more without seeking.

Frames are taken by time, as in `decode`: the last one whose timestamp is <= the wanted time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from vimnas_ds.data.bad import BadVideo
from vimnas_ds.data.blob import Media
from vimnas_ds.data.convert import Converter
from vimnas_ds.data.decode import TOLERANCE, Pixels, decoded_frames, open_video
from vimnas_ds.data.encoded import countable
from vimnas_ds.data.packets import PacketTimes, packet_times
from vimnas_ds.data.sampling import Cut

#: A seek costs a flush of the decoder: frames over fewer seconds are cheaper to decode.
WORTH_A_SEEK = 0.5

#: duration in seconds -> wanted times from the first frame on, (clips, T)
Times = Callable[[float], NDArray[np.float64]]


class Views(NamedTuple):
    """The distinct frames, uint8 (F, 3, h, w), and what each clip shows, int32 (clips, T)."""

    frames: Pixels
    order: NDArray[np.int32]


class EncodedViews(NamedTuple):
    """A file's bytes, uint8 (n,), for the GPU's decoder: the distinct frames' numbers, int32 (F,),
    what each clip shows of them, int32 (clips, T), and the frame size in pixels."""

    data: NDArray[np.uint8]
    numbers: NDArray[np.int32]
    order: NDArray[np.int32]
    width: int
    height: int


def read_views(path: Media, times: Times, cut: Callable[[int, int], Cut] | None = None) -> Views:
    """Decodes the frames at `times`, each cropped and scaled as `cut` says (see `read_clip`).

    Raises:
        BadVideo: not a video, encrypted, corrupt or without frames.
    """
    with open_video(path) as container:
        packets = packet_times(container, path)
        wanted, inverse = _merged(times, packets)
        frames = _decode(container, path, wanted, _runs(wanted, packets), cut)
        if frames is not None:
            return Views(frames.pictures, frames.shown[inverse])
    with open_video(path) as container:  # a seek went astray
        frames = _decode(container, path, wanted, [_Run(0, len(wanted), None)], cut)
    if frames is None:
        raise BadVideo(str(path), "no frame can be decoded")
    return Views(frames.pictures, frames.shown[inverse])


def read_encoded_views(path: Media, times: Times) -> EncodedViews | None:
    """The same for the GPU's decoder, which counts frames; None if PyAV should decode this file.

    Raises:
        BadVideo: as for `read_views`.
    """
    with open_video(path) as container:
        known = countable(container, path)
        if known is None:
            return None
        packets, first = known
        wanted, inverse = _merged(times, packets)
        found = np.maximum(np.searchsorted(packets.begins, wanted, side="right") - 1, 0)
        numbers, shown = np.unique(found, return_inverse=True)
        data = np.frombuffer(path.read_bytes(), np.uint8)
    order = shown.astype(np.int32)[inverse]
    return EncodedViews(data, numbers.astype(np.int32), order, first.width, first.height)


def _merged(times: Times, packets: PacketTimes) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(all wanted stream times, sorted and distinct; where each clip finds its own: (clips, T))."""
    first = packets.begins[0]
    clips = times(packets.duration)
    wanted, inverse = np.unique(first + clips + TOLERANCE, return_inverse=True)
    return wanted, inverse.reshape(clips.shape)


class _Run(NamedTuple):
    """wanted[begin:end] are decoded in one go, from the key frame at `seek` seconds if not None."""

    begin: int
    end: int
    seek: float | None


def _runs(wanted: NDArray[np.float64], packets: PacketTimes) -> list[_Run]:
    """A new run wherever a key frame lets the decoder skip `WORTH_A_SEEK` seconds and more."""
    keys = [tick * float(packets.base) for tick in packets.keys]
    starts: list[tuple[int, float | None]] = []
    reached = keys[0] if keys else math.inf  # decoded up to here before wanted[i]
    for i, time in enumerate(wanted.tolist()):
        key = keys[k - 1] if (k := bisect_right(keys, time)) else -math.inf
        if key >= reached + WORTH_A_SEEK:
            starts.append((i, key))
        elif i == 0:
            starts.append((0, None))
        reached = time
    ends = [i for i, _ in starts[1:]] + [len(wanted)]
    return [_Run(begin, end, key) for (begin, key), end in zip(starts, ends, strict=True)]


def _decode(
    container: av.container.InputContainer,
    path: Media,
    wanted: NDArray[np.float64],
    runs: list[_Run],
    cut: Callable[[int, int], Cut] | None = None,
) -> _Frames | None:
    """The frames at the `wanted` times; None if a seek landed too late or nowhere."""
    stream, frames = container.streams.video[0], _Frames(wanted, cut)
    for run in runs:
        if run.seek is None:
            container.seek(0, backward=True)
        else:
            ticks = round(run.seek / float(stream.time_base or 1))
            try:
                container.seek(ticks, stream=stream, backward=True)
            except FFmpegError:
                return None
        frames.begin(run)
        previous: av.VideoFrame | None = None
        for frame, time in decoded_frames(container, stream, path):
            if previous is not None:
                frames.show(previous, until=time)
            elif run.seek is not None and time > wanted[run.begin]:
                return None
            previous = frame
            if frames.done:
                break
        else:
            if previous is None:
                return None
            frames.show(previous, until=math.inf)
    return frames


class _Frames:
    """The distinct frames in the making, and which of them is shown at each wanted time."""

    def __init__(self, wanted: NDArray[np.float64], cut: Callable[[int, int], Cut] | None) -> None:
        self._cut = cut
        self._wanted: list[float] = wanted.tolist()
        self._next = self._end = self._count = 0
        self._convert: Converter | None = None
        self._store: Pixels = np.empty((0, 3, 0, 0), np.uint8)
        self.shown = np.zeros(len(wanted), np.int32)

    @property
    def pictures(self) -> Pixels:
        return self._store[: self._count]

    @property
    def done(self) -> bool:
        """Whether the run has all its frames."""
        return self._next == self._end

    def begin(self, run: _Run) -> None:
        self._next, self._end = run.begin, run.end

    def show(self, frame: av.VideoFrame, until: float) -> None:
        """Takes `frame` for the wanted times before `until`, the next frame's time."""
        begin = end = self._next
        while end < self._end and self._wanted[end] < until:
            end += 1
        if end == begin:
            return
        if self._convert is None:
            self._convert = Converter(frame, self._cut)
            # room for the most there can be; what is never written costs no memory
            self._store = np.empty((len(self._wanted), 3, *self._convert.size), np.uint8)
        self._convert(frame, self._store[self._count])
        self.shown[begin:end] = self._count
        self._next, self._count = end, self._count + 1
