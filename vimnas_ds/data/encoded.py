"""Clips for the GPU's decoder: the file's bytes and the numbers of the wanted frames.

NVDEC counts frames, so the wanted times are turned into numbers with the timestamps of all packets
(the index has them; without it one pass over the file and one decoded frame). What
the GPU cannot be trusted with (rotated, 10-bit, AVI without timestamps, frames hidden by an edit
list, codecs it lacks) is left to PyAV: the answer is None.
"""

from __future__ import annotations

from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from vimnas_ds.data.bad import BadVideo
from vimnas_ds.data.blob import Media
from vimnas_ds.data.convert import orientation
from vimnas_ds.data.decode import TOLERANCE, decoded_frames, open_video
from vimnas_ds.data.listing import VideoFacts
from vimnas_ds.data.packets import PacketTimes, packet_times
from vimnas_ds.data.sampling import frame_times

GPU_CODECS = frozenset("h264 hevc vp8 vp9 av1".split())
#: Bytes of a file that is loaded whole, at most; a larger one is left to PyAV.
LARGEST = 64 * 2**20
GPU_PIXELS = frozenset("yuv420p yuvj420p".split())


class EncodedClip(NamedTuple):
    """A video file, uint8 (n,), the wanted frames' numbers, int32 (T,), and the frame size."""

    data: NDArray[np.uint8]
    numbers: NDArray[np.int32]
    width: int
    height: int


def read_indexed(
    path: Media, facts: VideoFacts, frames: int, fps: float, start: float
) -> EncodedClip | None:
    """As `read_encoded`, with what the index knows: the file is read once and not parsed.

    None if the file is no longer the one that was probed: `read_encoded` can tell what it is.
    """
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise BadVideo(str(path), error.strerror or str(error)) from error
    if len(data) != facts.size:
        return None
    line = facts.timeline
    chosen = _numbers(line.seconds(), line.duration, frames, fps, start)
    return EncodedClip(data, chosen, facts.width, facts.height)


def read_encoded(path: Media, frames: int, fps: float, start: float) -> EncodedClip | None:
    """A clip's bytes and frame numbers; None if PyAV should decode this file.

    Args and errors as `decode.read_clip`.
    """
    with open_video(path) as container:
        found = countable(container, path)
        if found is None:
            return None
        times, frame = found
        chosen = _numbers(np.array(times.begins), times.duration, frames, fps, start)
        data = np.frombuffer(path.read_bytes(), np.uint8)
    return EncodedClip(data, chosen, frame.width, frame.height)


def countable(
    container: av.container.InputContainer, path: Media
) -> tuple[PacketTimes, av.VideoFrame] | None:
    """The times of all frames and the first one; None if the GPU's decoder cannot be trusted to
    decode and count them."""
    stream = container.streams.video[0]
    context = stream.codec_context
    known = context.codec.canonical_name in GPU_CODECS and context.pix_fmt in GPU_PIXELS
    if not known or container.format.name == "avi":
        return None
    times = packet_times(container, path)
    if times.hidden:  # it would count what the edit list hides
        return None
    container.seek(0, backward=True)
    first = next(decoded_frames(container, stream, path), None)
    if first is None:
        raise BadVideo(str(path), "no frame can be decoded")
    return None if any(orientation(first[0])) else (times, first[0])


def _numbers(
    begins: NDArray[np.float64], duration: float, frames: int, fps: float, start: float
) -> NDArray[np.int32]:
    """The number of the frame shown at each of the clip's times."""
    times = begins[0] + frame_times(duration, frames, fps, start) + TOLERANCE
    numbers = np.searchsorted(begins, times, side="right") - 1
    return np.maximum(numbers, 0).astype(np.int32)
